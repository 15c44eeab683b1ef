"""Products with encoded matrices, and the steps of a forward pass, against plain NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from oracles.ggml_blocks import random_blocks

from mlxedge.encodings import GGML, MLX_FLOAT, PLAIN, Affine, Encoding
from mlxedge.encodings.mlx import AFFINE_BITS, AFFINE_GROUPS
from mlxedge.fallback import OPS
from mlxedge.fallback.forward import Cache, Matrix, Product, Runner, Tape, Team
from mlxedge.fallback.linear import rows_kernel
from mlxedge.ops import Parts

ROWS, COLS = 37, 512
AFFINE = [
    *(Affine(bits, 64, "f16") for bits in AFFINE_BITS),
    *(Affine(4, group, dtype) for group in AFFINE_GROUPS for dtype in ("f32", "bf16")),
]
ENCODINGS: list[Encoding] = [*PLAIN.values(), *GGML.values(), *AFFINE, *MLX_FLOAT.values()]


def make_parts(encoding: Encoding, rows: int = ROWS, cols: int = COLS, seed: int = 0) -> Parts:
    """Random blocks for ggml's types, so that every bit of them counts; encoded weights else."""
    if encoding.family == "ggml":
        blocks = random_blocks(encoding.name, rows, cols, seed=seed)
        if encoding.name == "mxfp4":  # powers of two from the whole range of float32
            blocks[:, ::17] = 120 + blocks[:, ::17] % 8
        return {"weight": blocks}
    weights = np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32)
    dtype = getattr(encoding, "scale_dtype", "f32")
    kind = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    return OPS.encode(weights.astype(kind), encoding)


def test_what_has_a_kernel() -> None:
    slow = {e.name for e in ENCODINGS if not Matrix(make_parts(e), e, ROWS, COLS).compiled}
    assert slow == {name for name in GGML if name.startswith(("iq", "tq"))} | {"mxfp4", "nvfp4"}


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_rows_decode_as_the_definition_says(encoding: Encoding) -> None:
    parts = make_parts(encoding)
    expected = OPS.decode(parts, encoding)
    matrix = Matrix(parts, encoding, ROWS, COLS)
    if getattr(encoding, "scale_dtype", None) == "f32":
        # The product does not fit a float32, so fusing it with the addition shows.
        np.testing.assert_allclose(matrix.decode(), expected, rtol=0, atol=1e-6)
    else:
        np.testing.assert_array_equal(matrix.decode(), expected)
    np.testing.assert_array_equal(matrix.decode(5, 9), matrix.decode()[5:9])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_products_are_those_of_the_decoded_matrix(encoding: Encoding, count: int) -> None:
    parts = make_parts(encoding, seed=1)
    x = np.random.default_rng(2).normal(size=(count, COLS)).astype(np.float32)
    weights = OPS.decode(parts, encoding).astype(np.float64)
    found = Matrix(parts, encoding, ROWS, COLS).product(x)
    bound = np.abs(x).astype(np.float64) @ np.abs(weights).T
    assert (np.abs(found - x @ weights.T) <= 1e-6 * bound).all()


@pytest.mark.parametrize("cols", [1, 15, 16, 40, 64, 200])
@pytest.mark.parametrize("dtype", PLAIN)
def test_plain_rows_of_any_length(dtype: str, cols: int) -> None:
    parts = make_parts(PLAIN[dtype], cols=cols)
    matrix = Matrix(parts, PLAIN[dtype], ROWS, cols)
    weights = OPS.decode(parts, PLAIN[dtype])
    x = np.random.default_rng(2).normal(size=(2, cols)).astype(np.float32)
    np.testing.assert_array_equal(matrix.decode(), weights)
    np.testing.assert_allclose(matrix.product(x), x @ weights.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(matrix.product(x[:1]), x[:1] @ weights.T, rtol=1e-5, atol=1e-5)


def test_the_size_in_memory_is_that_of_the_file() -> None:
    for encoding in ENCODINGS:
        matrix = Matrix(make_parts(encoding), encoding, ROWS, COLS)
        assert matrix.nbytes == encoding.nbytes((ROWS, COLS))


def test_a_kernel_is_compiled_once() -> None:
    kind = "ggml q8_0 32 34"
    assert rows_kernel(kind) is rows_kernel(kind)


def run(tape: Tape, start: Any, result: Any, tokens: list[int], threads: int) -> np.ndarray:
    team = Team(threads)
    cache = Cache(tape, 64)
    runner = Runner(tape, team, start, result, [(np.ones(1), 1.0)], rows=64)
    try:
        return runner.run(np.array(tokens, np.int64), 0, cache, len(tokens))
    finally:
        team.close()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("kind", ["q4_k", "iq4_xs"])
def test_linear_steps(kind: str, count: int, threads: int) -> None:
    """Several matrices on one input, with bias and residual, for any number of positions; rows
    that fill no tile; and a format without a kernel among them."""
    rng = np.random.default_rng(3)
    width, hidden, out = 512, 256, 75
    table = rng.normal(size=(30, width)).astype(np.float32)
    first = make_parts(GGML[kind], hidden, width, seed=4)
    second = rng.normal(size=(hidden, width)).astype(np.float32)
    third = make_parts(GGML["q8_0"], out, hidden, seed=5)
    bias = rng.normal(size=hidden).astype(np.float32)

    tape = Tape()
    x, a, b, y = (tape.buffer(n) for n in (width, hidden, hidden, out))
    tape.embed(Matrix({"weight": table}, PLAIN["f32"], 30, width), x)
    products = [
        Product(Matrix({"weight": second}, PLAIN["f32"], hidden, width), b, bias),
        Product(Matrix(first, GGML[kind], hidden, width), a, bias, add_to=b),
    ]
    tape.linear(x, products[:1])
    tape.linear(x, products[1:])
    tape.head()
    tape.linear(b, [Product(Matrix(third, GGML["q8_0"], out, hidden), y)])
    tokens = rng.integers(0, 30, count).tolist()

    middle = table[tokens] @ second.T + bias
    middle += table[tokens] @ OPS.decode(first, GGML[kind]).T + bias
    expected = middle @ OPS.decode(third, GGML["q8_0"]).T
    found = run(tape, b, y, tokens, threads)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("width", [8, 16, 40, 300])
def test_norm_and_gate_steps(width: int) -> None:
    rng = np.random.default_rng(6)
    table = rng.normal(size=(20, width)).astype(np.float32) * 30
    weight = rng.normal(size=width).astype(np.float32)
    tape = Tape()
    x, h, y = (tape.buffer(width) for _ in range(3))
    tape.embed(Matrix({"weight": table}, PLAIN["f32"], 20, width), x)
    tape.norm(x, weight, 1e-5, h)
    tape.gate(x, h)
    tape.head()
    identity = np.eye(width, dtype=np.float32)
    tape.linear(x, [Product(Matrix({"weight": identity}, PLAIN["f32"], width, width), y)])
    tokens = [3, 7, 0, 19, 3]
    values = table[tokens].astype(np.float64)
    normed = values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-5) * weight
    with np.errstate(over="ignore"):
        expected = values / (1 + np.exp(-values)) * normed
    found = run(tape, x, y, tokens, 2)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def naive_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int, sinks: np.ndarray, slopes: np.ndarray
) -> np.ndarray:
    """q ``[n, heads, d]``, k ``[n, kv_heads, d]`` and v ``[n, kv_heads, value_d]``; of ``sinks``
    ``[heads]`` minus infinity is none, ``slopes`` ``[heads]`` are ALiBi's."""
    out = np.zeros((*q.shape[:2], v.shape[2]))
    group = q.shape[1] // k.shape[1]
    for i in range(len(q)):
        first = max(0, i + 1 - window) if window else 0
        for h in range(q.shape[1]):
            keys, values = k[first : i + 1, h // group], v[first : i + 1, h // group]
            scores = keys @ q[i, h] / np.sqrt(q.shape[2])
            scores -= slopes[h] * np.arange(len(scores))[::-1]
            most = max(scores.max(), sinks[h])
            weights = np.exp(scores - most)
            out[i, h] = weights @ values / (weights.sum() + np.exp(sinks[h] - most))
    return out


@pytest.mark.parametrize("window", [0, 1, 70])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "value_size", "still", "sinks", "slopes"),
    [
        *((9, 3, 64, 64, 0, 0, 1), (4, 4, 16, 16, 0, 0, 0), (5, 1, 24, 24, 0, 1, 0)),
        *((8, 2, 80, 80, 0, 1, 0), (2, 1, 6, 6, 0, 0, 0), (6, 2, 48, 32, 16, 0, 0)),
        (3, 3, 24, 70, 20, 1, 1),
    ],
)
def test_attention_steps(
    heads: int, kv_heads: int, size: int, value_size: int, still: int, sinks: int, slopes: int,
    window: int,
) -> None:  # fmt: skip
    """Positions in pieces of many lengths, across the growth of the cache; the first ``still``
    dimensions of a head are not rotated. A second layer attends to what the first one kept, a third
    keeps that itself, as it was kept; the results are added up."""
    rng = np.random.default_rng(7)
    pieces = [5, 1, 2, 1, 100, 3, 1, 190, 1]
    count = sum(pieces)
    widths = [heads * size, kv_heads * size, kv_heads * value_size]
    cuts = np.cumsum(widths)[:-1]
    table = rng.normal(size=(count, sum(widths))).astype(np.float32)
    given = rng.normal(size=heads).astype(np.float32) if sinks else None
    steep = rng.uniform(0.01, 0.5, heads).astype(np.float32) if slopes else None
    tape = Tape()
    x, again, y = tape.buffer(sum(widths)), tape.buffer(widths[0]), tape.buffer(heads * value_size)
    mixed, q, k, v = (tape.buffer(n) for n in (heads * value_size, *widths))
    anew, third = tape.buffer(widths[0]), tape.buffer(heads * value_size)
    tape.embed(Matrix({"weight": table}, PLAIN["f32"], count, sum(widths)), x)
    identity = np.split(np.eye(sum(widths), dtype=np.float32), cuts)
    tape.linear(
        x,
        [
            Product(Matrix({"weight": cut}, PLAIN["f32"], len(cut), sum(widths)), out)
            for cut, out in zip([*identity, *identity[:1] * 2], (q, k, v, again, anew), strict=True)
        ],
    )
    shared: dict[str, Any] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": size,
        "value_dim": value_size,
        "rotated": size - still,
        "rotated_from": still,
        "scale": size**-0.5,
        "window": window,
        "sinks": given,
        "slopes": steep,
    }
    slot = tape.attention(q, k, v, y, **shared)
    tape.attention(again, k, v, mixed, slot=slot, **shared)
    tape.attention(anew, k, v, third, placed=True, **shared)
    tape.add(third, mixed)
    tape.head()
    copy = np.eye(heads * value_size, dtype=np.float32)
    tape.linear(mixed, [Product(Matrix({"weight": copy}, PLAIN["f32"], len(copy), len(copy)), y)])

    frequencies = 100.0 ** -(np.arange(0, size - still, 2) / size)
    team = Team(2)
    runner = Runner(tape, team, mixed, y, [(frequencies, 1.0)], rows=256)
    cache = Cache(tape, 2048)
    found = []
    for piece in pieces:
        start = sum(len(f) for f in found)
        tokens = np.arange(start, start + piece)
        found.append(runner.run(tokens, start, cache, piece))
    team.close()
    assert cache.capacity > 256

    angles = np.outer(np.arange(count), frequencies)[:, None]

    def rotate(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float64)
        low, high = np.split(values[..., still:], 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        turned = [low * cos - high * sin, high * cos + low * sin]
        return np.concatenate([values[..., :still], *turned], -1)

    qs, ks, vs = np.split(table, cuts, axis=1)
    expected = naive_attention(
        rotate(qs.reshape(count, heads, size)),
        rotate(ks.reshape(count, kv_heads, size)),
        vs.reshape(count, kv_heads, value_size).astype(np.float64),
        window,
        np.full(heads, -np.inf) if given is None else given.astype(np.float64),
        np.zeros(heads) if steep is None else steep.astype(np.float64),
    )
    np.testing.assert_allclose(
        np.concatenate(found), 2 * expected.reshape(count, -1), rtol=1e-4, atol=4e-5
    )


def test_a_pass_may_come_from_several_threads() -> None:
    """Passes take turns; each gets its own result."""
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(8)
    table = rng.normal(size=(50, 64)).astype(np.float32)
    weights = rng.normal(size=(100, 64)).astype(np.float32)
    tape = Tape()
    x, y = tape.buffer(64), tape.buffer(100)
    tape.embed(Matrix({"weight": table}, PLAIN["f32"], 50, 64), x)
    tape.head()
    tape.linear(x, [Product(Matrix({"weight": weights}, PLAIN["f32"], 100, 64), y)])
    team = Team(2)
    runner = Runner(tape, team, x, y, [(np.ones(1), 1.0)], rows=8)

    def one(token: int) -> np.ndarray:
        return runner.run(np.array([token]), 0, Cache(tape, 64), 1)[0]

    with ThreadPoolExecutor(4) as pool:
        found = np.array(list(pool.map(one, list(range(50)) * 4)))
    team.close()
    np.testing.assert_allclose(found, np.tile(table @ weights.T, (4, 1)), rtol=1e-4, atol=1e-4)
