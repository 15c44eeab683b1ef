"""Encoders of ggml's 4-bit formats whose sixteen levels are not evenly spaced: IQ4_NL and IQ4_XS.

Byte for byte ``quantize_iq4_nl`` and ``quantize_iq4_xs`` of ggml-quants.c (llama.cpp as vendored by
llama-cpp-python 0.3.36), which try 15 scales, where the C compiler does not contract multiply and
add. Without importance the error of weight x counts x²; with it, as in ``ggml_importance``.

Kernels take ``x``, float32 ``[rows · cols]``; the importance as there, or nothing; ``cols``; and
fill ``out``, uint8.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from mlxedge.fallback.ggml_importance import read_weights, sum_squares, weigh
from mlxedge.fallback.ggml_k import nearest_int
from mlxedge.fallback.ggml_search import LARGEST, SCALE, TINY, signed_largest
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.lanes import (
    LANES,
    inline,
    inner,
    load,
    put_half,
    spread,
    spread_int,
    store,
    store_bytes,
    where,
)

BLOCK, SUPER_BLOCK = 32, 256
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)

#: The levels (``kvalues_iq4nl``). A number belongs to the nearest, half-way to the upper one: in
#: float32 all differences near the half-way points are exact, so comparing with those is the same.
_LEVELS = tuple(
    np.float32(v)
    for v in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
)
_MIDDLES = tuple((a + b) * _HALF for a, b in pairwise(_LEVELS))
_LEAST = _LEVELS[0]


@inline
def _level(v: Any) -> Any:
    """The nearest level."""
    a = where(v < _MIDDLES[0], spread(_LEVELS[0]), spread(_LEVELS[1]))
    b = where(v < _MIDDLES[2], spread(_LEVELS[2]), spread(_LEVELS[3]))
    c = where(v < _MIDDLES[4], spread(_LEVELS[4]), spread(_LEVELS[5]))
    d = where(v < _MIDDLES[6], spread(_LEVELS[6]), spread(_LEVELS[7]))
    e = where(v < _MIDDLES[8], spread(_LEVELS[8]), spread(_LEVELS[9]))
    f = where(v < _MIDDLES[10], spread(_LEVELS[10]), spread(_LEVELS[11]))
    g = where(v < _MIDDLES[12], spread(_LEVELS[12]), spread(_LEVELS[13]))
    h = where(v < _MIDDLES[14], spread(_LEVELS[14]), spread(_LEVELS[15]))
    a = where(v < _MIDDLES[1], a, b)
    c = where(v < _MIDDLES[5], c, d)
    e = where(v < _MIDDLES[9], e, f)
    g = where(v < _MIDDLES[13], g, h)
    a = where(v < _MIDDLES[3], a, c)
    e = where(v < _MIDDLES[11], e, g)
    return where(v < _MIDDLES[7], a, e)


@inline
def _code(v: Any) -> Any:
    """The number of the nearest level; of a NaN 15."""
    code = spread_int(15)
    for i in range(len(_MIDDLES)):
        code = code - where(v < _MIDDLES[i], spread_int(1), spread_int(0))
    return code


@inline
def _fit(tile: Any, weights: Any, inverse: Any) -> Any:
    """Σ w · level · x and Σ w · level² for the levels that ``inverse`` gives."""
    sum_xl = spread(_ZERO)
    sum_ll = spread(_ZERO)
    for i in range(BLOCK):
        x = load(tile, LANES * i)
        level = _level(inverse * x)
        wl = load(weights, LANES * i) * level
        sum_xl = sum_xl + wl * x
        sum_ll = sum_ll + wl * level
    return sum_xl, sum_ll


@inner
def _search(tile: Any, weights: Any, found: Any) -> None:
    """x ≈ scale · level for sixteen blocks of 32. Fills SCALE; LARGEST too.

    Trials use the inverse scales -127 / extreme, then (t - 127) / extreme for t = -7…7.
    """
    extreme = signed_largest(tile, BLOCK, found)
    sum_xl, sum_ll = _fit(tile, weights, _ONE / (extreme / -_LEAST))
    scale = where(sum_ll > _ZERO, sum_xl / sum_ll, spread(_ZERO))
    best = scale * sum_xl
    for trial in range(-7, 8):
        sum_xl, sum_ll = _fit(tile, weights, (np.float32(trial) + _LEAST) / extreme)
        better = (sum_ll > _ZERO) & (sum_xl * sum_xl > best * sum_ll)
        scale = where(better, sum_xl / sum_ll, scale)
        best = where(better, scale * sum_xl, best)
    store(found, SCALE, where(load(found, LARGEST) < TINY, spread(_ZERO), scale))


@inline
def _read(
    x: Any, importance: Any, start: Any, column: Any, count: Any, tile: Any, weights: Any
) -> None:
    """``count`` blocks and, as yet without variance, the weights of their errors."""
    read_weights(x, start, BLOCK, count, tile)
    if importance.size:
        read_weights(importance, column, BLOCK, count, weights)
    else:
        for i in range(BLOCK):
            v = load(tile, LANES * i)
            store(weights, LANES * i, v * v)


@inline
def _put_codes(x: Any, start: Any, inverse: Any, out: Any, at: Any) -> None:
    """Write the codes of a block of 32."""
    low = _code(inverse * load(x, start))
    high = _code(inverse * load(x, start + LANES))
    store_bytes(out, at, low | high << 4)


@kernel
def encode_iq4_nl(x: Any, importance: Any, cols: Any, out: Any) -> None:
    tile = np.empty(BLOCK * LANES, np.float32)
    weights = np.empty(BLOCK * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    blocks = x.size // BLOCK
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        start = BLOCK * first
        _read(x, importance, start, start % cols, count, tile, weights)
        if importance.size:
            squares = spread(_ZERO)
            for i in range(BLOCK):
                v = load(tile, LANES * i)
                squares = squares + v * v
            weigh(tile, weights, BLOCK, squares * np.float32(2.0 / BLOCK))
        _search(tile, weights, found)
        for k in range(count):
            at = 18 * (first + k)
            scale = found[SCALE + k]
            put_half(out, at, scale)
            _put_codes(x, start + BLOCK * k, _ONE / scale if scale != _ZERO else _ZERO, out, at + 2)


@inline
def _put_block_xs(x: Any, start: Any, found: Any, lane: Any, out: Any, at: Any) -> None:
    """Write an IQ4_XS block: f16 d, 8 x 2 high and 8 x 4 low bits of scales, codes."""
    largest = _ZERO
    extreme = _ZERO
    for j in range(8):
        scale = found[SCALE + lane + j]
        if abs(scale) > largest:
            largest = abs(scale)
            extreme = scale
    d = -extreme / np.float32(32.0)
    put_half(out, at, d)
    inverse = _ONE / d if d != _ZERO else _ZERO
    for j in range(2, 8):
        out[at + j] = 0
    for j in range(8):
        s = max(-32, min(31, nearest_int(inverse * found[SCALE + lane + j])))
        step = d * np.float32(s)
        out[at + 2 + j // 4] |= (s + 32 >> 4) << (2 * (j % 4))
        out[at + 4 + j // 2] |= (s + 32 & 15) << (4 * (j % 2))
        finer = _ONE / step if step != _ZERO else _ZERO
        _put_codes(x, start + BLOCK * j, finer, out, at + 8 + 16 * j)


@kernel
def encode_iq4_xs(x: Any, importance: Any, cols: Any, out: Any) -> None:
    tile = np.empty(BLOCK * LANES, np.float32)
    weights = np.empty(BLOCK * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    variances = np.empty(LANES, np.float32)
    of_lane = np.empty(LANES, np.float32)
    blocks = x.size // SUPER_BLOCK
    for first in range(0, blocks, LANES):
        group = min(LANES, blocks - first)
        start = SUPER_BLOCK * first
        if importance.size:
            squares = sum_squares(x, start, SUPER_BLOCK, group, SUPER_BLOCK, tile)
            store(variances, 0, squares * np.float32(2.0 / SUPER_BLOCK))
        for pair in range(0, group, 2):
            count = min(2, group - pair)
            here = start + SUPER_BLOCK * pair
            column = start % cols + SUPER_BLOCK * pair
            _read(x, importance, here, column, 8 * count, tile, weights)
            if importance.size:
                for k in range(LANES):
                    of_lane[k] = variances[pair + k // 8]
                weigh(tile, weights, BLOCK, load(of_lane, 0))
            _search(tile, weights, found)
            for b in range(count):
                at = 136 * (first + pair + b)
                _put_block_xs(x, here + SUPER_BLOCK * b, found, 8 * b, out, at)
