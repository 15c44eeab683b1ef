"""Gates with limits, and values kept within them, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from mlxedge.encodings import F32
from mlxedge.fallback.forward import Runner
from mlxedge.fallback.linear import Matrix
from mlxedge.fallback.tape import Product, Tape
from mlxedge.fallback.team import Team


def matrix(weights: np.ndarray) -> Matrix:
    return Matrix({"weight": weights.astype(np.float32)}, F32, *weights.shape)


def values(rows: int, cols: int) -> np.ndarray:
    return (np.random.default_rng(rows + cols).normal(size=(rows, cols)) * 8).astype(np.float32)


@pytest.mark.parametrize("width", [1, 16, 23])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("alpha", "limit"), [(1.702, 7.0), (0.5, 1.25)])
def test_a_clamped_gate(width: int, threads: int, alpha: float, limit: float) -> None:
    gate, up = values(5, width), values(5, width)[::-1].copy()
    tape = Tape()
    x, result = tape.buffer(2 * width), tape.buffer(width)
    g, u = tape.buffer(width), tape.buffer(width)
    tape.head()
    halves = np.eye(2 * width)
    tape.linear(x, [Product(matrix(halves[:width]), g), Product(matrix(halves[width:]), u)])
    tape.clamped_gate(g, u, alpha, limit)
    tape.linear(g, [Product(matrix(np.eye(width)), result)])
    found = walk(tape, x, result, np.concatenate([gate, up], axis=1), threads)
    low = np.minimum(gate.astype(np.float64), limit)
    expected = low / (1 + np.exp(-alpha * low)) * (np.clip(up, -limit, limit) + 1)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("width", [1, 16, 23])
@pytest.mark.parametrize("threads", [1, 2])
def test_clipped_values(width: int, threads: int) -> None:
    given = values(7, width)
    tape = Tape()
    x, y, result = (tape.buffer(width) for _ in range(3))
    tape.head()
    tape.linear(x, [Product(matrix(np.eye(width)), y)])
    tape.clip(y, 2.5)
    tape.linear(y, [Product(matrix(np.eye(width)), result)])
    found = walk(tape, x, result, given, threads)
    np.testing.assert_array_equal(found, np.clip(given, -2.5, 2.5))


def walk(tape: Tape, x: object, result: object, given: np.ndarray, threads: int) -> np.ndarray:
    team = Team(threads)
    runner = Runner(tape, team, x, result, [(np.ones(1), 1.0)], rows=len(given))
    try:
        return runner.project(given, None)
    finally:
        team.close()
