"""The steps of layers that keep a state, against plain NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from mlxedge.errors import UsageError
from mlxedge.fallback.forward import Buffer, Cache, Runner, Tape, Team

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
@pytest.mark.parametrize("activation", [None, "silu"])
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
    truth = truth if activation is None else silu(truth)
    np.testing.assert_allclose(same_however_run(record, x), truth, rtol=1e-5, atol=1e-5)


def test_a_convolution_of_other_channels_is_refused() -> None:
    tape = Tape()
    with pytest.raises(UsageError, match="16 channels for 32 to 32"):
        tape.causal_conv(tape.buffer(32), tape.buffer(32), np.ones((16, 4), np.float32))
