"""The steps of layers that keep a state, against plain NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from mlxedge.encodings import PLAIN
from mlxedge.errors import UsageError
from mlxedge.fallback.forward import Buffer, Cache, Matrix, Product, Runner, Tape, Team

F32 = PLAIN["f32"]
Record = Callable[[Tape, Buffer], None]
#: Ways to cut 40 positions into passes.
CUTS: dict[str, Sequence[int]] = {
    "one pass": [40],
    "one by one": [1] * 40,
    "mixed": [1, 2, 17, 1, 3, 16],
}


def walk(record: Record, x: np.ndarray, cut: Sequence[int], threads: int = 1) -> np.ndarray:
    """What ``record(tape, buffer)`` makes of the rows of ``x`` in that buffer. The cache has seen
    another sequence before."""
    tape = Tape()
    buffer = tape.buffer(x.shape[1])
    record(tape, buffer)
    team = Team(threads)
    runner = Runner(tape, team, buffer, None, [], rows=64)
    cache = Cache(tape, 64)
    try:
        runner.advance(np.full((7, x.shape[1]), 3.5, np.float32), 0, cache)
        found, start = x.copy(), 0
        for count in cut:
            runner.advance(found[start : start + count], start, cache)
            start += count
    finally:
        team.close()
    return found


def same_however_run(record: Record, x: np.ndarray) -> np.ndarray:
    """What one pass of one thread gives; asserts that every cut and three threads give its bits."""
    truth = walk(record, x, CUTS["one pass"])
    for cut in CUTS.values():
        for threads in (1, 3):
            found = walk(record, x, cut, threads)
            np.testing.assert_array_equal(found.view(np.uint32), truth.view(np.uint32))
    return truth


def silu(v: np.ndarray) -> np.ndarray:
    return v / (1 + np.exp(-v))


@pytest.mark.parametrize("apart", [False, True], ids=["in place", "elsewhere"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(("channels", "width"), [(16, 4), (37, 3), (80, 2), (5, 1), (48, 7)])
def test_convolution(channels: int, width: int, activation: Any, biased: bool, apart: bool) -> None:
    rng = np.random.default_rng(channels)
    x = rng.normal(size=(40, channels)).astype(np.float32)
    weight = rng.normal(size=(channels, width)).astype(np.float32)
    bias = rng.normal(size=channels).astype(np.float32) if biased else None

    def record(tape: Tape, buffer: Buffer) -> None:
        out = tape.buffer(channels) if apart else buffer
        tape.causal_conv(buffer, out, weight, bias=bias, activation=activation)
        if apart:
            tape.scale(buffer, 0.0)
            tape.add(out, buffer)

    padded = np.concatenate([np.zeros((width - 1, channels)), x])
    truth = sum(padded[k : k + len(x)] * weight[:, k] for k in range(width))
    truth = truth if bias is None else truth + bias
    truth = truth if activation == "none" else silu(truth)
    np.testing.assert_allclose(same_however_run(record, x), truth, rtol=1e-5, atol=1e-5)


def test_a_convolution_of_other_channels_is_refused() -> None:
    tape = Tape()
    with pytest.raises(UsageError, match="16 channels for 32 to 32"):
        tape.causal_conv(tape.buffer(32), tape.buffer(32), np.ones((16, 4), np.float32))


def softplus(v: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(v))


def split(tape: Tape, x: Buffer, widths: Sequence[int]) -> list[Buffer]:
    """Buffers with the columns of x."""
    eye = np.eye(x.width, dtype=np.float32)
    outs, start = [tape.buffer(width) for width in widths], 0
    products = []
    for out in outs:
        rows = Matrix({"weight": eye[start : start + out.width]}, F32, out.width, x.width)
        products.append(Product(rows, out))
        start += out.width
    tape.linear(x, products)
    return outs


def back(tape: Tape, y: Buffer, x: Buffer) -> None:
    """The columns of y in the first ones of x, zeros in the others."""
    eye = Matrix({"weight": np.eye(x.width, y.width, dtype=np.float32)}, F32, x.width, y.width)
    tape.linear(y, [Product(eye, x)])


@pytest.mark.parametrize("limits", [(0.0, np.inf), (0.3, 1.0)], ids=["free", "limited"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "groups", "size"),
    [(4, 32, 2, 16), (3, 20, 1, 8), (6, 16, 3, 5), (2, 4, 2, 128), (1, 64, 1, 1)],
)
def test_scan_of_heads(
    heads: int, head_dim: int, groups: int, size: int, limits: tuple[float, float]
) -> None:
    rng = np.random.default_rng(heads)
    inner, shared = heads * head_dim, groups * size
    x = rng.normal(size=(40, inner + 2 * shared + heads)).astype(np.float32)
    x[5, -heads:] = 30.0  # where softplus is the identity
    a, bias, d = (rng.normal(size=heads).astype(np.float32) for _ in range(3))
    a = -np.exp(a)

    def record(tape: Tape, buffer: Buffer) -> None:
        both, dt = split(tape, buffer, (inner + 2 * shared, heads))
        decay, out = tape.buffer(heads), tape.buffer(inner)
        tape.time_steps(dt, bias, a=a, decay=decay, limits=limits)
        tape.scan(both, dt, decay, out, head_dim=head_dim, groups=groups, size=size, d=d)
        back(tape, out, buffer)

    wide = x.astype(np.float64)
    channels = wide[:, :inner].reshape(-1, heads, head_dim)
    b, c = (
        np.repeat(part.reshape(-1, groups, size), heads // groups, axis=1)
        for part in np.split(wide[:, inner : inner + 2 * shared], 2, axis=1)
    )
    dt = np.clip(softplus(wide[:, -heads:] + bias), *limits)
    state, truth = np.zeros((heads, head_dim, size)), []
    for i in range(len(x)):
        moved = dt[i][:, None] * channels[i]
        state = np.exp(a * dt[i])[:, None, None] * state + moved[..., None] * b[i][:, None]
        truth.append((state * c[i][:, None]).sum(-1) + d[:, None] * channels[i])
    found = same_however_run(record, x)[:, :inner]
    truth = np.array(truth).reshape(len(x), inner)
    assert np.abs(found - truth).max() < 1e-5 * np.abs(truth).max()


@pytest.mark.parametrize(("channels", "size"), [(32, 16), (21, 4), (5, 1)])
def test_scan_of_channels(channels: int, size: int) -> None:
    rng = np.random.default_rng(channels)
    x = rng.normal(size=(40, 2 * channels + 2 * size)).astype(np.float32)
    a = -np.exp(rng.normal(size=(channels, size))).astype(np.float32)
    bias, d = (rng.normal(size=channels).astype(np.float32) for _ in range(2))

    def record(tape: Tape, buffer: Buffer) -> None:
        v, dt, b, c = split(tape, buffer, (channels, channels, size, size))
        tape.time_steps(dt, bias)
        tape.scan_channels(v, b, c, dt, v, a=a, d=d)
        back(tape, v, buffer)

    v, dt, b, c = np.split(x.astype(np.float64), np.cumsum([channels, channels, size]), axis=1)
    dt = softplus(dt + bias)
    state, truth = np.zeros((channels, size)), []
    for i in range(len(x)):
        state = np.exp(a * dt[i][:, None]) * state + (dt[i] * v[i])[:, None] * b[i]
        truth.append(state @ c[i] + d * v[i])
    found = same_however_run(record, x)[:, :channels]
    assert np.abs(found - truth).max() < 1e-5 * np.abs(truth).max()


@pytest.mark.parametrize(("width", "groups"), [(64, 4), (30, 5), (17, 1)])
def test_norm_of_groups(width: int, groups: int) -> None:
    rng = np.random.default_rng(width)
    x = rng.normal(size=(40, width)).astype(np.float32)
    weight = rng.normal(size=width).astype(np.float32)

    def record(tape: Tape, buffer: Buffer) -> None:
        tape.group_norm(buffer, weight, 1e-5, groups)

    parts = x.reshape(len(x), groups, -1).astype(np.float64)
    truth = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)
    found = same_however_run(record, x)
    np.testing.assert_allclose(found, truth.reshape(x.shape) * weight, rtol=1e-5, atol=1e-6)


def test_sizes_that_do_not_fit_are_refused() -> None:
    tape = Tape()
    four, wide = tape.buffer(4), tape.buffer(64 + 2 * 16)
    ones = np.ones(4, np.float32)
    with pytest.raises(UsageError, match="4 time steps with"):
        tape.time_steps(four, ones[:3])
    with pytest.raises(UsageError, match="4 time steps"):
        tape.time_steps(four, ones, a=ones)
    with pytest.raises(UsageError, match="4 heads of 16 for 96 columns"):
        tape.scan(wide, four, four, tape.buffer(64), head_dim=16, groups=2, size=16, d=ones)
    with pytest.raises(UsageError, match="4 channels"):
        tape.scan_channels(four, wide, four, four, four, a=np.ones((4, 3), np.float32), d=ones)
    with pytest.raises(UsageError, match="3 groups of 4 columns"):
        tape.group_norm(four, ones, 1e-5, 3)
