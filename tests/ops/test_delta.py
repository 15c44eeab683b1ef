"""The gated delta rule against plain NumPy, position by position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ops.test_recurrent import same_however_run

from mlxedge.errors import UsageError
from mlxedge.fallback.forward import Buffer, Tape

#: Key heads, value heads, sizes of their heads, and whether each dimension of keys decays alone.
SHAPES = {
    "two to a key": (2, 4, 32, 48, False),
    "whole blocks": (1, 3, 64, 128, False),
    "odd sizes": (3, 3, 20, 21, False),
    "blocks and a rest": (2, 2, 8, 70, False),
    "each dimension": (2, 2, 24, 24, True),
}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def delta_rule(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, beta: np.ndarray
) -> np.ndarray:
    """q and k ``[n, heads, key_dim]``, v ``[n, heads, value_dim]``, decay ``[n, heads, 1 or
    key_dim]``, beta ``[n, heads]``: the definition, f64."""
    count, heads, size = k.shape
    state = np.zeros((heads, size, v.shape[-1]))
    out = np.zeros_like(v)
    for i in range(count):
        state *= decay[i][:, :, None]
        wrong = v[i] - np.einsum("hkv,hk->hv", state, k[i])
        state += np.einsum("hk,hv->hkv", k[i], beta[i][:, None] * wrong)
        out[i] = np.einsum("hkv,hk->hv", state, q[i])
    return out


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_delta_rule(shape: tuple[Any, ...], activation: Any) -> None:
    keys, values, size, width, each = shape
    rng = np.random.default_rng(values)
    rates = values * size if each else values
    parts = [keys * size, keys * size, values * width, rates, values, values * width]
    ends = np.cumsum(parts)
    x = rng.normal(size=(40, ends[-1])).astype(np.float32)
    rate = -np.exp(rng.normal(size=values)).astype(np.float32)
    bias = rng.normal(size=rates).astype(np.float32)
    norm = rng.normal(size=width).astype(np.float32)
    most = 2.0 if activation == "sigmoid" else 1.0

    def record(tape: Tape, buffer: Buffer) -> None:
        """The inputs come from one buffer, by matrices that pick their columns."""
        from mlxedge.encodings import PLAIN
        from mlxedge.fallback.forward import Matrix, Product

        def pick(first: int, last: int) -> Buffer:
            out = tape.buffer(last - first)
            rows = np.eye(x.shape[1], dtype=np.float32)[first:last]
            matrix = Matrix({"weight": rows}, PLAIN["f32"], *rows.shape)
            tape.linear(buffer, [Product(matrix, out)])
            return out

        qkv, a = pick(0, int(ends[2])), pick(int(ends[2]), int(ends[3]))
        b, gate = pick(int(ends[3]), int(ends[4])), pick(int(ends[4]), int(ends[5]))
        starts = [0, *ends[:2].tolist()]
        places = [(qkv, first, count) for first, count in zip(starts, parts, strict=False)]
        out = tape.buffer(values * width)
        tape.delta_rule(
            *places, a, b, gate, out, key_heads=keys, value_heads=values, rate=rate, bias=bias,
            norm=norm, epsilon=1e-5, activation=activation, beta=most,
        )  # fmt: skip
        tape.scale(buffer, 0.0)
        tape.add(out, buffer)

    found = same_however_run(record, x)
    q, k, v, a, b, gate = np.split(x.astype(np.float64), ends[:-1], axis=1)
    q, k = (np.repeat(unit(p.reshape(40, keys, size)), values // keys, axis=1) for p in (q, k))
    decay = np.repeat(rate, rates // values) * np.log1p(np.exp(a + bias))
    truth = delta_rule(
        q * size**-0.5,
        k,
        v.reshape(40, values, width),
        np.exp(decay).reshape(40, values, -1),
        most / (1 + np.exp(-b)),
    )
    truth *= norm / np.sqrt((truth**2).mean(-1, keepdims=True) + 1e-5)
    sigmoid = 1 / (1 + np.exp(-gate))
    truth = truth.reshape(40, -1) * (sigmoid if activation == "sigmoid" else gate * sigmoid)
    np.testing.assert_allclose(found[:, : values * width], truth, rtol=2e-4, atol=2e-5)


def test_sizes_that_do_not_fit_are_refused() -> None:
    tape = Tape()
    qkv, a, out = tape.buffer(48), tape.buffer(3), tape.buffer(24)
    three = np.ones(3, np.float32)
    parts = ((qkv, 0, 16), (qkv, 16, 16), (qkv, 32, 24))
    with pytest.raises(UsageError, match="a delta rule of 3 heads and 2 of keys"):
        tape.delta_rule(
            *parts, a, a, out, out, key_heads=2, value_heads=3, rate=three, bias=three,
            norm=np.ones(8, np.float32), epsilon=1e-6,
        )  # fmt: skip
