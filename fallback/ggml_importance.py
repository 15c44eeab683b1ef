"""Encoders of ggml's block formats that weigh errors by an importance matrix.

Byte for byte what ``ggml_quantize_chunk`` writes with ``imatrix`` (``quantize_row_q*_impl`` of
ggml-quants.c, llama.cpp as vendored by llama-cpp-python 0.3.36) where the C compiler does not
contract multiply and add. Some builds differ in one respect: an outlier without importance can pass
the 4194303 that ggml's ``nearest_int`` asserts; its code is then what the C source says, as GCC
compiles it.

The error of weight x in a column of importance q counts q · √(σ² + x²), but in Q6_K, where it
counts q. σ² is the mean square of the row (Q4_0, Q4_1, Q5_0, Q5_1) or of the super-block (K-quants;
twice that but in Q2_K).

Each kernel takes the weights ``x``, float32 ``[rows · cols]``; the importance of columns, float32
``[cols + SPARE]``, which starts again beyond ``cols`` so that it can be read on across the end of a
row; ``cols``; and fills ``out``, uint8. Sixteen blocks are searched at once (``ggml_search``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.fallback.ggml_k import (
    put_q2_k,
    put_q3_k,
    put_q4_k,
    put_q5_k,
    put_q6_k,
    symmetric_codes,
)
from mlxedge.fallback.ggml_legacy import put_fifth_bits
from mlxedge.fallback.ggml_search import (
    INVERSE,
    LARGEST,
    MINIMUM,
    OFFSET,
    SCALE,
    TINY,
    search_affine,
    search_positive,
    search_symmetric,
)
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.lanes import (
    LANES,
    inline,
    inner,
    load,
    nearest,
    nearest_code,
    put_half,
    spread,
    square_root,
    store,
    store_bytes,
    transpose,
    where,
)

BLOCK, SUPER_BLOCK = 32, 256
#: Columns that the importance is repeated for: sixteen super-blocks.
SPARE = LANES * SUPER_BLOCK
_ZERO = np.float32(0.0)
_TWO = np.float32(2.0)
#: Of the affine searches: the first trial's distance from the largest level, the step, the steps.
_FIRST, _STEP, _STEPS = np.float32(-0.9), np.float32(0.05), 36


@inline
def sum_squares(x: Any, start: Any, stride: Any, count: Any, n: Any, tile: Any) -> Any:
    """Σ x² of ``count`` runs of ``n`` weights that begin ``stride`` apart, in order, per lane."""
    total = spread(_ZERO)
    for i in range(0, n, LANES):
        transpose(x, start + i, stride, count, tile, 0)
        for j in range(LANES):
            v = load(tile, LANES * j)
            total = total + v * v
    return total


@inline
def read_weights(x: Any, start: Any, n: Any, count: Any, tile: Any) -> None:
    """``count`` blocks of ``n`` weights, one a lane."""
    for i in range(0, n, LANES):
        transpose(x, start + i, n, count, tile, LANES * i)


@inline
def weigh(tile: Any, weights: Any, n: Any, variance: Any) -> Any:
    """Turn importance in ``weights`` into the weights of errors; their sums, per lane."""
    total = spread(_ZERO)
    for i in range(n):
        x = load(tile, LANES * i)
        w = load(weights, LANES * i) * square_root(variance + x * x)
        store(weights, LANES * i, w)
        total = total + w
    return total


@inline
def _multiply(tile: Any, weights: Any, products: Any, n: Any) -> None:
    for i in range(n):
        store(products, LANES * i, load(weights, LANES * i) * load(tile, LANES * i))


@inner
def _row_variances(x: Any, cols: Any, tile: Any) -> Any:
    """The mean square of each row."""
    rows = x.size // cols
    variances = np.empty(rows + LANES, np.float32)
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        squares = sum_squares(x, first * cols, cols, count, cols, tile)
        store(variances, first, squares / np.float32(cols))
    return variances


@inline
def _read_blocks(
    x: Any,
    importance: Any,
    cols: Any,
    variances: Any,
    first: Any,
    count: Any,
    tile: Any,
    weights: Any,
) -> None:
    """Blocks ``first``… of 32 weights, and the weights of their errors."""
    start = BLOCK * first
    read_weights(x, start, BLOCK, count, tile)
    read_weights(importance, start % cols, BLOCK, count, weights)
    of_lane = np.empty(LANES, np.float32)
    for k in range(LANES):
        of_lane[k] = variances[(start + BLOCK * min(k, count - 1)) // cols]
    weigh(tile, weights, BLOCK, load(of_lane, 0))


@inline
def _symmetric(x: Any, found: Any, lane: Any, top: Any) -> Any:
    return symmetric_codes(x, found[INVERSE + lane], found[LARGEST + lane], top)


@inline
def _affine(x: Any, found: Any, lane: Any, top: Any) -> Any:
    return nearest_code(found[INVERSE + lane] * (x - found[OFFSET + lane]), 0, top)


@kernel
def encode_q4_0(x: Any, importance: Any, cols: Any, out: Any) -> None:
    tile = np.empty(BLOCK * LANES, np.float32)
    weights = np.empty(BLOCK * LANES, np.float32)
    products = np.empty(BLOCK * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    variances = _row_variances(x, cols, tile)
    blocks = x.size // BLOCK
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        _read_blocks(x, importance, cols, variances, first, count, tile, weights)
        _multiply(tile, weights, products, BLOCK)
        search_symmetric(tile, weights, products, BLOCK, 8, found)
        for k in range(count):
            start, at = BLOCK * (first + k), 18 * (first + k)
            put_half(out, at, found[SCALE + k])
            low = _symmetric(load(x, start), found, k, 8)
            high = _symmetric(load(x, start + 16), found, k, 8)
            store_bytes(out, at + 2, low | high << 4)


@kernel
def encode_q5_0(x: Any, importance: Any, cols: Any, out: Any) -> None:
    tile = np.empty(BLOCK * LANES, np.float32)
    weights = np.empty(BLOCK * LANES, np.float32)
    products = np.empty(BLOCK * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    variances = _row_variances(x, cols, tile)
    blocks = x.size // BLOCK
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        _read_blocks(x, importance, cols, variances, first, count, tile, weights)
        _multiply(tile, weights, products, BLOCK)
        search_symmetric(tile, weights, products, BLOCK, 16, found)
        for k in range(count):
            start, at = BLOCK * (first + k), 22 * (first + k)
            put_half(out, at, found[SCALE + k])
            low = _symmetric(load(x, start), found, k, 16)
            high = _symmetric(load(x, start + 16), found, k, 16)
            put_fifth_bits(out, at + 2, low, high)
            store_bytes(out, at + 6, low & 15 | (high & 15) << 4)


@kernel
def encode_q4_1(x: Any, importance: Any, cols: Any, out: Any) -> None:
    tile = np.empty(BLOCK * LANES, np.float32)
    weights = np.empty(BLOCK * LANES, np.float32)
    levels = np.empty(BLOCK * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    variances = _row_variances(x, cols, tile)
    blocks = x.size // BLOCK
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        _read_blocks(x, importance, cols, variances, first, count, tile, weights)
        search_affine(tile, weights, levels, BLOCK, 15, _FIRST, _STEP, _STEPS, False, found)
        for k in range(count):
            start, at = BLOCK * (first + k), 20 * (first + k)
            put_half(out, at, found[SCALE + k])
            put_half(out, at + 2, -found[MINIMUM + k])
            low = _affine(load(x, start), found, k, 15)
            high = _affine(load(x, start + 16), found, k, 15)
            store_bytes(out, at + 4, low | high << 4)


@kernel
def encode_q5_1(x: Any, importance: Any, cols: Any, out: Any) -> None:
    tile = np.empty(BLOCK * LANES, np.float32)
    weights = np.empty(BLOCK * LANES, np.float32)
    levels = np.empty(BLOCK * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    variances = _row_variances(x, cols, tile)
    blocks = x.size // BLOCK
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        _read_blocks(x, importance, cols, variances, first, count, tile, weights)
        search_affine(tile, weights, levels, BLOCK, 31, _FIRST, _STEP, _STEPS, False, found)
        for k in range(count):
            start, at = BLOCK * (first + k), 24 * (first + k)
            put_half(out, at, found[SCALE + k])
            put_half(out, at + 2, -found[MINIMUM + k])
            low = _affine(load(x, start), found, k, 31)
            high = _affine(load(x, start + 16), found, k, 31)
            put_fifth_bits(out, at + 4, low, high)
            store_bytes(out, at + 8, low & 15 | (high & 15) << 4)


@inner
def _read_sub_blocks(
    x: Any,
    importance: Any,
    column: Any,
    start: Any,
    n: Any,
    count: Any,
    variances: Any,
    tile: Any,
    weights: Any,
) -> Any:
    """``count`` sub-blocks of ``n`` weights, and the weights of their errors, whose sums it gives.

    ``variances`` are those of the super-blocks from ``start`` on.
    """
    read_weights(x, start, n, count, tile)
    read_weights(importance, column, n, count, weights)
    of_lane = np.empty(LANES, np.float32)
    for k in range(LANES):
        of_lane[k] = variances[k * n // SUPER_BLOCK]
    return weigh(tile, weights, n, load(of_lane, 0))


#: Where a group of sixteen super-blocks keeps what the searches found: float32 ``[5, 256 + 16]``,
#: flat; sub-block j of super-block k is at ``subs · k + j``. A transposition may read 16 too many.
_ROW = 256 + LANES
_SCALES, _MINIMUMS, _INVERSES, _OFFSETS, _SUMS = (_ROW * i for i in range(5))


@inner
def _search_group(
    x: Any,
    importance: Any,
    cols: Any,
    first: Any,
    count: Any,
    n: Any,
    top: Any,
    tile: Any,
    weights: Any,
    levels: Any,
    found: Any,
    group: Any,
) -> None:
    """Search super-blocks ``first``… for scales and minimums of sub-blocks of ``n`` weights."""
    start = SUPER_BLOCK * first
    column = start % cols
    squares = sum_squares(x, start, SUPER_BLOCK, count, SUPER_BLOCK, tile)
    variances = np.empty(LANES, np.float32)
    # Q2_K, of sub-blocks of 16, takes the mean square, the others twice that.
    store(variances, 0, (squares if n == 16 else _TWO * squares) / np.float32(SUPER_BLOCK))
    subs = SUPER_BLOCK // n
    many = LANES // subs
    for b in range(0, count, many):
        lanes = subs * min(many, count - b)
        sums = _read_sub_blocks(
            x,
            importance,
            column + SUPER_BLOCK * b,
            start + SUPER_BLOCK * b,
            n,
            lanes,
            variances[b:],
            tile,
            weights,
        )
        search_affine(tile, weights, levels, n, top, _FIRST, _STEP, _STEPS, False, found)
        store(group, _SUMS + subs * b, sums)
        store(group, _SCALES + subs * b, load(found, SCALE))
        store(group, _MINIMUMS + subs * b, load(found, MINIMUM))
        store(group, _INVERSES + subs * b, load(found, INVERSE))
        store(group, _OFFSETS + subs * b, load(found, OFFSET))


@inner
def _search_scales(
    group: Any, row: Any, subs: Any, top: Any, count: Any, tile: Any, weights: Any, levels: Any
) -> Any:
    """Quantize the scales, or the minimums, of each super-block: the factors, per lane. ``levels``
    gets that of sub-block j of super-block k at ``16 · j + k``."""
    transpose(group, row, subs, count, tile, 0)
    transpose(group, _SUMS, subs, count, weights, 0)
    return search_positive(tile, weights, levels, subs, top)


@inner
def _put_scales_6bit(
    scales: Any,
    minimums: Any,
    factors: Any,
    k: Any,
    limit: Any,
    out: Any,
    at: Any,
    steps: Any,
) -> None:
    """Write f16 d, f16 dmin and the 6-bit scales of super-block ``k`` at ``out[at]``.

    Levels that wrapped spill into their neighbours, as they do in ggml, unless ``limit`` is 63;
    ``steps`` gets d · scale (8) and dmin · minimum (8) of what can be read back.
    """
    d = put_half(out, at, factors[k])
    dmin = put_half(out, at + 2, factors[LANES + k])
    base = at + 4
    for j in range(8):
        s = min(np.int32(scales[LANES * j + k]), limit)
        m = min(np.int32(minimums[LANES * j + k]), limit)
        if j < 4:
            out[base + j] = s
            out[base + 4 + j] = m
        else:
            out[base + 4 + j] = (s & 15) | (m & 15) << 4
            out[base + j - 4] |= (s >> 4 << 6) & 0xFF
            out[base + j] |= (m >> 4 << 6) & 0xFF
    for j in range(8):
        if j < 4:
            s = out[base + j] & 63
            m = out[base + 4 + j] & 63
        else:
            s = (out[base + 4 + j] & 15) | (out[base + j - 4] >> 6) << 4
            m = (out[base + 4 + j] >> 4) | (out[base + j] >> 6) << 4
        steps[j] = d * np.float32(s)
        steps[8 + j] = dmin * np.float32(m)


@kernel
def encode_q4_k(x: Any, importance: Any, cols: Any, out: Any) -> None:
    tile = np.empty(32 * LANES, np.float32)
    weights = np.empty(32 * LANES, np.float32)
    levels = np.empty(32 * LANES, np.float32)
    scales = np.empty(16 * LANES, np.float32)
    minimums = np.empty(16 * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    group = np.zeros(5 * _ROW, np.float32)
    factors = np.empty(2 * LANES, np.float32)
    steps = np.empty(16, np.float32)
    blocks = x.size // SUPER_BLOCK
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        _search_group(
            x, importance, cols, first, count, 32, 15, tile, weights, levels, found, group
        )
        store(factors, 0, _search_scales(group, _SCALES, 8, 63, count, tile, weights, scales))
        store(
            factors, LANES, _search_scales(group, _MINIMUMS, 8, 63, count, tile, weights, minimums)
        )
        for k in range(count):
            start, at = SUPER_BLOCK * (first + k), 144 * (first + k)
            _put_scales_6bit(scales, minimums, factors, k, 255, out, at, steps)
            put_q4_k(x, start, steps, group, _INVERSES + 8 * k, _OFFSETS + 8 * k, out, at)


@kernel
def encode_q5_k(x: Any, importance: Any, cols: Any, out: Any) -> None:
    tile = np.empty(32 * LANES, np.float32)
    weights = np.empty(32 * LANES, np.float32)
    levels = np.empty(32 * LANES, np.float32)
    scales = np.empty(16 * LANES, np.float32)
    minimums = np.empty(16 * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    group = np.zeros(5 * _ROW, np.float32)
    factors = np.empty(2 * LANES, np.float32)
    steps = np.empty(16, np.float32)
    blocks = x.size // SUPER_BLOCK
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        _search_group(
            x, importance, cols, first, count, 32, 31, tile, weights, levels, found, group
        )
        store(factors, 0, _search_scales(group, _SCALES, 8, 63, count, tile, weights, scales))
        store(
            factors, LANES, _search_scales(group, _MINIMUMS, 8, 63, count, tile, weights, minimums)
        )
        for k in range(count):
            start, at = SUPER_BLOCK * (first + k), 176 * (first + k)
            _put_scales_6bit(scales, minimums, factors, k, 63, out, at, steps)
            put_q5_k(x, start, steps, group, _INVERSES + 8 * k, _OFFSETS + 8 * k, out, at)


@kernel
def encode_q2_k(x: Any, importance: Any, cols: Any, out: Any) -> None:
    tile = np.empty(16 * LANES, np.float32)
    weights = np.empty(16 * LANES, np.float32)
    levels = np.empty(16 * LANES, np.float32)
    scales = np.empty(16 * LANES, np.float32)
    minimums = np.empty(16 * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    group = np.zeros(5 * _ROW, np.float32)
    factors = np.empty(2 * LANES, np.float32)
    blocks = x.size // SUPER_BLOCK
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        _search_group(x, importance, cols, first, count, 16, 3, tile, weights, levels, found, group)
        store(factors, 0, _search_scales(group, _SCALES, 16, 15, count, tile, weights, scales))
        store(
            factors, LANES, _search_scales(group, _MINIMUMS, 16, 15, count, tile, weights, minimums)
        )
        for k in range(count):
            start, at = SUPER_BLOCK * (first + k), 84 * (first + k)
            for j in range(16):
                s = np.int32(scales[LANES * j + k])
                out[at + j] = (s | np.int32(minimums[LANES * j + k]) << 4) & 0xFF
            d = put_half(out, at + 80, factors[k])
            dmin = put_half(out, at + 82, factors[LANES + k])
            put_q2_k(x, start, d, dmin, group, _INVERSES + 16 * k, _OFFSETS + 16 * k, out, at)


@kernel
def encode_q3_k(x: Any, importance: Any, cols: Any, out: Any) -> None:
    tile = np.empty(16 * LANES, np.float32)
    weights = np.empty(16 * LANES, np.float32)
    products = np.empty(16 * LANES, np.float32)
    spare = np.empty(16 * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    group = np.zeros(5 * _ROW, np.float32)
    variances = np.empty(LANES, np.float32)
    steps = np.empty(16, np.float32)
    blocks = x.size // SUPER_BLOCK
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        start = SUPER_BLOCK * first
        squares = sum_squares(x, start, SUPER_BLOCK, count, SUPER_BLOCK, tile)
        store(variances, 0, _TWO * squares / np.float32(SUPER_BLOCK))
        for k in range(count):
            there = SUPER_BLOCK * k
            column = start % cols + there
            sums = _read_sub_blocks(
                x, importance, column, start + there, 16, 16, variances[k:], tile, weights
            )
            _multiply(tile, weights, products, 16)
            search_symmetric(tile, weights, products, 16, 4, found)
            store(group, _SUMS + 16 * k, sums)
            store(group, _SCALES + 16 * k, load(found, SCALE))
            store(group, _MINIMUMS + 16 * k, load(found, LARGEST))
            store(group, _INVERSES + 16 * k, load(found, INVERSE))

        transpose(group, _SCALES, 16, count, tile, 0)
        transpose(group, _SUMS, 16, count, weights, 0)
        _multiply(tile, weights, products, 16)
        search_symmetric(tile, weights, products, 16, 32, found)
        zero = load(found, LARGEST) < TINY
        for j in range(16):
            level = nearest(load(found, INVERSE) * load(tile, LANES * j), -32, 31)
            store(tile, LANES * j, where(zero, spread(np.float32(-32.0)), level))

        for k in range(count):
            at = 110 * (first + k)
            scales = at + 96
            out[scales : scales + 12] = 0
            d = put_half(out, at + 108, found[SCALE + k])
            for j in range(16):
                s = np.int32(tile[LANES * j + k])
                out[scales + j % 8] |= (s + 32 & 15) << (4 * (j // 8))
                out[scales + 8 + j % 4] |= (s + 32 >> 4) << (2 * (j // 4))
                steps[j] = d * np.float32(s)
                if steps[j] == _ZERO:
                    here = start + SUPER_BLOCK * k + 16 * j
                    level = nearest(group[_INVERSES + 16 * k + j] * load(x, here), -4, 3)
                    tiny = group[_MINIMUMS + 16 * k + j] < TINY
                    store(spare, 16 * j, spread(_ZERO) if tiny else level + np.float32(4.0))
            put_q3_k(x, start + SUPER_BLOCK * k, steps, spare, out, at)


@kernel
def encode_q6_k(x: Any, importance: Any, cols: Any, out: Any) -> None:
    tile = np.empty(16 * LANES, np.float32)
    weights = np.empty(16 * LANES, np.float32)
    products = np.empty(16 * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    steps = np.empty(16, np.float32)
    for block in range(x.size // SUPER_BLOCK):
        start = SUPER_BLOCK * block
        transpose(x, start, 16, 16, tile, 0)
        transpose(importance, start % cols, 16, 16, weights, 0)
        _multiply(tile, weights, products, 16)
        search_symmetric(tile, weights, products, 16, 32, found)
        put_q6_k(x, start, steps, found, out, 210 * block)
