"""Steps on parts of rows: columns of a buffer, norms of pieces, streams that are mixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlxedge.encodings import GGML, PLAIN, Encoding
from mlxedge.errors import UsageError
from mlxedge.fallback.forward import Cache, Matrix, Product, Runner, Tape, Team
from mlxedge.ops import load_reference

OPS = load_reference()
TOKENS = [3, 7, 0, 11, 3]


def table(rows: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32) * 3


def matrix(values: np.ndarray, kind: Encoding = PLAIN["f32"]) -> Matrix:
    return Matrix(OPS.encode(values, kind), kind, *values.shape)


def walked(
    values: np.ndarray, steps: Callable[[Tape, Any], Any], threads: int = 2, results: int = 0
) -> np.ndarray:
    """What steps make of a buffer with the rows ``values[TOKENS]``: that buffer, or the one that
    they return."""
    tape = Tape()
    x = tape.buffer(values.shape[1])
    tape.embed(matrix(values), x)
    out = steps(tape, x) or x
    tape.head()
    y = tape.buffer(out.width)
    tape.linear(out, [Product(matrix(np.eye(out.width, dtype=np.float32)), y)])
    team = Team(threads)
    try:
        runner = Runner(tape, team, x, y, [(np.ones(1), 1.0)], rows=16)
        count = results or len(TOKENS)
        return runner.run(np.array(TOKENS), 0, Cache(tape, 64), count)
    finally:
        team.close()


def test_columns_are_written_where_they_stand() -> None:
    """Steps on columns leave the others as they are; padding between them stays zero."""
    values = table(12, 90)
    second = table(12, 20, 2)

    def steps(tape: Tape, x: Any) -> None:
        first, last = tape.columns(x, 0, 32), tape.columns(x, 64, 20)
        tape.embed(matrix(second), last)
        tape.scale(last, 2.0, 5.0)
        tape.add(first, tape.columns(x, 32, 32), -1.0)

    expected = values[TOKENS].astype(np.float64)
    expected[:, 64:84] = 5 * np.tanh(second[TOKENS] * 2 / 5)
    expected[:, 32:64] -= expected[:, :32]
    found = walked(values, steps)
    np.testing.assert_allclose(found[:, :84], expected[:, :84], rtol=1e-5, atol=1e-5)


def test_columns_follow_the_rows_of_results() -> None:
    """After the head a buffer is that of the last positions, and so are its columns."""
    values = table(12, 48)
    tape = Tape()
    x = tape.buffer(48)
    tape.embed(matrix(values), x)
    part = tape.columns(x, 16, 16)
    tape.scale(part, 2.0)
    tape.head()
    y = tape.buffer(16)
    tape.linear(part, [Product(matrix(np.eye(16, dtype=np.float32)), y)])
    team = Team(1)
    runner = Runner(tape, team, x, y, [], rows=16)
    found = runner.run(np.array(TOKENS), 0, Cache(tape, 64), 2)
    team.close()
    np.testing.assert_allclose(found, 2 * values[TOKENS[-2:], 16:32], rtol=1e-6)


@pytest.mark.parametrize(("start", "width"), [(8, 16), (48, 16), (-16, 16), (0, 49)])
def test_columns_that_are_none(start: int, width: int) -> None:
    tape = Tape()
    x = tape.buffer(48)
    with pytest.raises(UsageError, match="columns"):
        tape.columns(x, start, width)
    with pytest.raises(UsageError, match="columns"):
        tape.columns(tape.columns(x, 16, 16), 0, 16)


@pytest.mark.parametrize("kind", [PLAIN["f32"], GGML["q4_0"], GGML["iq4_xs"]], ids=str)
def test_tokens_beyond_a_table_have_its_first_row(kind: Encoding) -> None:
    small = table(5, 256)
    tape = Tape()
    x = tape.buffer(256)
    tape.embed(matrix(small, kind), x)
    tape.head()
    y = tape.buffer(256)
    tape.linear(x, [Product(matrix(np.eye(256, dtype=np.float32)), y)])
    team = Team(1)
    runner = Runner(tape, team, x, y, [], rows=16)
    found = runner.run(np.array(TOKENS), 0, Cache(tape, 64), len(TOKENS))
    team.close()
    known = OPS.decode(OPS.encode(small, kind), kind)
    np.testing.assert_allclose(found, known[[3, 0, 0, 0, 3]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_norms_of_pieces(threads: int) -> None:
    values = table(12, 96)
    weight = table(1, 32, 2)[0]
    found = walked(values, lambda tape, x: tape.norm(x, weight, 1e-5, x, pieces=3), threads=threads)
    pieces = values[TOKENS].reshape(5, 3, 32).astype(np.float64)
    expected = pieces / np.sqrt((pieces**2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(found, expected.reshape(5, 96), rtol=2e-6, atol=1e-6)
    with pytest.raises(UsageError, match="whole vectors"):
        walked(values, lambda tape, x: tape.norm(x, weight, 1e-5, x, pieces=4))


@pytest.mark.parametrize("width", [16, 40])
def test_streams_are_mixed(width: int) -> None:
    """Of three streams each takes its own part of all, and of one that comes beside them."""
    stride = -(-width // 16) * 16
    values = np.zeros((12, 4 * stride + 16), np.float32)
    for number in range(4):
        values[:, number * stride : number * stride + width] = table(12, width, number)
    values[:, 4 * stride : 4 * stride + 12] = table(12, 12, 9)

    def steps(tape: Tape, x: Any) -> Any:
        streams = tape.columns(x, 0, 2 * stride + width)
        other = tape.columns(x, 3 * stride, width)
        pairs, few = tape.columns(x, 4 * stride, 9), tape.buffer(3)
        tape.linear(other, [Product(matrix(np.eye(3, width, dtype=np.float32)), few)])
        mixed = tape.buffer(streams.width)
        tape.mix(streams, streams, pairs, mixed, 3)
        tape.mix(mixed, other, few, mixed, 3)
        return mixed

    rows = values[TOKENS].astype(np.float64)
    streams = rows[:, : 3 * stride].reshape(5, 3, stride)
    other, pairs = rows[:, 3 * stride : 4 * stride], rows[:, 4 * stride : 4 * stride + 9]
    expected = streams + np.einsum("nij,njd->nid", pairs.reshape(5, 3, 3), streams)
    expected += other[:, :3, None] * other[:, None]
    found = walked(values, steps)
    np.testing.assert_allclose(
        found, expected.reshape(5, -1)[:, : found.shape[1]], rtol=1e-4, atol=1e-4
    )
    tape = Tape()
    x, factors = tape.buffer(48), tape.buffer(9)
    with pytest.raises(UsageError, match="cannot be mixed"):
        tape.mix(x, tape.buffer(32), factors, x, 3)


@pytest.mark.parametrize("width", [16, 40, 300])
def test_magnitudes_cuts_and_weights(width: int) -> None:
    values, like = table(12, width), table(12, width, 2)
    weight = table(1, width, 3)[0]

    def matched(tape: Tape, x: Any) -> None:
        other = tape.buffer(width)
        tape.embed(matrix(like), other)
        tape.match(x, other)

    x = values[TOKENS].astype(np.float64)
    size = np.sqrt((like[TOKENS].astype(np.float64) ** 2).mean(-1, keepdims=True))
    expected = x * size / np.sqrt((x**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(walked(values, matched), expected, rtol=1e-5, atol=1e-5)

    cutoff = x.mean(-1, keepdims=True) + 0.7 * x.std(-1, keepdims=True)
    found = walked(values, lambda tape, x: tape.cut(x, 0.7))
    np.testing.assert_allclose(found, np.maximum(x - cutoff, 0), rtol=1e-5, atol=1e-5)

    found = walked(values, lambda tape, x: tape.multiply(x, weight, x))
    np.testing.assert_allclose(found, x * weight, rtol=1e-6)


def test_little_is_not_made_large() -> None:
    """As in transformers: a mean square counts at least 1e-5."""
    values = table(12, 32) * np.float32(1e-6)

    def matched(tape: Tape, x: Any) -> None:
        other = tape.buffer(32)
        tape.embed(matrix(table(12, 32, 2)), other)
        tape.match(x, other)

    size = np.sqrt((table(12, 32, 2)[TOKENS] ** 2).mean(-1, keepdims=True))
    expected = values[TOKENS] * size / np.sqrt(1e-5)
    np.testing.assert_allclose(walked(values, matched), expected, rtol=1e-5)
