"""The search that ggml's IQ2 and IQ3 encoders share, sixteen sub-blocks at a time.

``quantize_row_iq2_*_impl`` and ``quantize_row_iq3_*_impl`` of ggml-quants.c (llama.cpp as vendored
by llama-cpp-python 0.3.36) try some inverse scales. Each rounds a sub-block to the nearest words of
the lattice (``ggml_iq_maps``), replaces words that the format lacks by the best point of their
list, and fits the scale anew.

A tile is float32 ``[n, 16]``, flat: weight i of sub-block k is ``tile[16·i + k]``. Words are int32
``[n / dims, 16]``, flat, in an array of float32 that kernels also view as int32.

Where no point is at a finite distance (a weight or its importance is beyond about 1e19), ggml
aborts; here the first point of the list is taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mlxedge.fallback.ggml_importance import read_weights, weigh
from mlxedge.fallback.ggml_iq_maps import RUN_BITS
from mlxedge.fallback.lanes import (
    F32,
    LANES,
    MASK,
    as_bits,
    as_float,
    bits_float,
    inline,
    inner,
    lane_min,
    lanes_set,
    load,
    lowest_bit,
    nearest_code,
    spread,
    spread_int,
    square_root,
    store,
    where,
)

SUPER_BLOCK = 256
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_HALF = np.float32(0.5)
_QUARTER = np.float32(0.25)
_GREATEST = np.float32(np.finfo(np.float32).max)
_GREATEST_BITS = 0x7F7FFFFF
# A small integer added to these bits gives the float 12582912 + integer.
_MAGIC, _MAGIC_BITS = np.float32(12582912.0), 0x4B400000

#: Set in a word that the format lacks, beside the point that replaced it.
LACKED = 1 << 20
_WORD = LACKED - 1

#: Which sub-blocks are rounded again by the scale found: those with a word that the format lacks,
#: there alone or everywhere; or all.
AGAIN_THERE, AGAIN_THROUGHOUT, AGAIN_ALWAYS = 0, 1, 2

#: Levels: 2·code + 1 as ggml's encoders have it; as decoders read them, of IQ3_S the same, of
#: IQ3_XXS with 15 1/2 for 15.
ODD, TRUE_ODD, WIDE = 0, 1, 2

#: How much errors count without importance: x², or x² + σ²/4.
SQUARE, SQUARE_AND_VARIANCE = 0, 1


def _address(
    context: Any, builder: ir.IRBuilder, kind: Any, array: ir.Value, index: ir.Value
) -> ir.Value:
    return builder.gep(context.make_array(kind)(context, builder, value=array).data, [index])


@intrinsic
def load_mask(typingctx: Any, array: types.Type, offset: types.Type) -> Any:
    """The uint16 ``array[offset]`` as a mask: bit k is lane k."""
    if not (isinstance(array, types.Array) and array.dtype == types.uint16):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.load(_address(context, builder, array, *args)), MASK.vector)

    return MASK(array, types.intp), codegen


@intrinsic
def load_small(typingctx: Any, array: types.Type, offset: types.Type) -> Any:
    """``array[offset : offset + 16]`` of int8 as float lanes."""
    if not (isinstance(array, types.Array) and array.dtype == types.int8):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        small = ir.VectorType(ir.IntType(8), LANES)
        pointer = builder.bitcast(_address(context, builder, array, *args), small.as_pointer())
        return builder.sitofp(builder.load(pointer, align=1), F32.vector)

    return F32(array, types.intp), codegen


@inline
def magnitudes(tile: Any, n: Any, signs: Any) -> Any:
    """Make the weights of ``tile`` positive; the largest. ``signs`` gets a word for every eight:
    bit i is set if weight i was negative."""
    largest = spread(_ZERO)
    for k in range(n // 8):
        word = spread_int(0)
        for i in range(8):
            x = load(tile, LANES * (8 * k + i))
            negative = x < _ZERO
            x = where(negative, _ZERO - x, x)
            store(tile, LANES * (8 * k + i), x)
            word = word | where(negative, spread_int(1 << i), spread_int(0))
            largest = where(largest > x, largest, x)
        store(signs, LANES * k, as_float(word))
    return largest


@inline
def even_signs(tile: Any, weights: Any, n: Any, signs: Any) -> Any:
    """After :func:`magnitudes`: where an odd number of eight weights were negative, turn the sign
    of the one whose square counts least. The largest of what is then in ``tile``."""
    for k in range(n // 8):
        word = as_bits(load(signs, LANES * k))
        odd = word ^ (word >> 4)
        odd = odd ^ (odd >> 2)
        odd = (odd ^ (odd >> 1)) & 1
        x = load(tile, LANES * 8 * k)
        least = load(weights, LANES * 8 * k) * x * x
        turned = spread_int(1)
        for i in range(1, 8):
            x = load(tile, LANES * (8 * k + i))
            counts = load(weights, LANES * (8 * k + i)) * x * x
            less = counts < least
            least = where(less, counts, least)
            turned = where(less, spread_int(1 << i), turned)
        turned = turned * odd
        store(signs, LANES * k, as_float((word ^ turned) & 127))
        for i in range(8):
            x = load(tile, LANES * (8 * k + i))
            x = where((turned & (1 << i)) > 0, _ZERO - x, x)
            store(tile, LANES * (8 * k + i), x)
    largest = load(tile, 0)
    for i in range(1, n):
        x = load(tile, LANES * i)
        largest = where(largest > x, largest, x)
    return largest


@inline
def read_sub_blocks(
    x: Any,
    importance: Any,
    start: Any,
    column: Any,
    n: Any,
    count: Any,
    variance: Any,
    unweighted: Any,
    tile: Any,
    weights: Any,
) -> None:
    """``count`` sub-blocks of ``n`` weights and how much their errors count."""
    read_weights(x, start, n, count, tile)
    if importance.size:
        read_weights(importance, column, n, count, weights)
        weigh(tile, weights, n, variance)
        return
    base = _QUARTER * variance if unweighted == SQUARE_AND_VARIANCE else spread(_ZERO)
    for i in range(n):
        v = load(tile, LANES * i)
        store(weights, LANES * i, base + v * v)


@inline
def _level(word: Any, shift: Any, bits: Any, levels: Any) -> Any:
    """The level of the code at ``shift``."""
    code = (word >> shift) & ((1 << bits) - 1)
    level = as_float((code << 1) + (_MAGIC_BITS + 1)) - _MAGIC
    if levels == WIDE:
        level = where(code > 6, level + _HALF, level)
    return level


@inline
def _best_point(distance: Any, run: Any, best: Any, point: Any, words: Any) -> Any:
    """The least of ``distance`` and its point, if it is less than ``best``, else those given."""
    least = np.int32(lane_min(as_bits(where(distance < _GREATEST, distance, spread(_GREATEST)))))
    if least < best:
        at = lowest_bit(lanes_set(distance == spread(bits_float(least))))
        return least, np.int32(words[LANES * run + at])
    return best, point


@inner
def nearest_of_8(
    tile: Any,
    roots: Any,
    costs: Any,
    scales: Any,
    at: Any,
    lane: Any,
    n: Any,
    entry: Any,
    lists: Any,
) -> Any:
    """The best point of a list for the eight weights from ``at`` on; ``costs`` of their levels."""
    _, words, _, masks = lists
    first, end = entry >> RUN_BITS, (entry >> RUN_BITS) + (entry & ((1 << RUN_BITS) - 1))
    best, point = np.int32(_GREATEST_BITS), np.int32(words[LANES * first])
    here = LANES * at + lane
    for run in range(first, end):
        distance = spread(_ZERO)
        for i in range(8):
            place = here + LANES * i
            cost = where(
                load_mask(masks, 16 * run + i),
                spread(costs[place + LANES * n]),
                spread(costs[place]),
            )
            cost = where(
                load_mask(masks, 16 * run + 8 + i), spread(costs[place + 2 * LANES * n]), cost
            )
            distance = distance + cost
        best, point = _best_point(distance, run, best, point, words)
    return point


@inner
def nearest_of_4(
    tile: Any,
    roots: Any,
    costs: Any,
    scales: Any,
    at: Any,
    lane: Any,
    n: Any,
    entry: Any,
    lists: Any,
) -> Any:
    """The best point of a list for the four weights from ``at`` on."""
    _, words, levels, _ = lists
    first, end = entry >> RUN_BITS, (entry >> RUN_BITS) + (entry & ((1 << RUN_BITS) - 1))
    best, point = np.int32(_GREATEST_BITS), np.int32(words[LANES * first])
    here = LANES * at + lane
    scale = scales[lane]
    for run in range(first, end):
        distance = spread(_ZERO)
        for i in range(4):
            level = load_small(levels, LANES * (4 * run + i))
            difference = scale * level - tile[here + LANES * i]
            distance = distance + roots[here + LANES * i] * difference * difference
        best, point = _best_point(distance, run, best, point, words)
    return point


@inner
def put_costs(tile: Any, roots: Any, n: Any, scale: Any, costs: Any) -> None:
    """Of levels 1, 3 and 5 of every weight, what :func:`nearest_of_8` adds up."""
    for level in range(3):
        value = scale * np.float32(2 * level + 1)
        for i in range(n):
            difference = value - load(tile, LANES * i)
            cost = load(roots, LANES * i) * difference * difference
            store(costs, LANES * (n * level + i), cost)


class Search(NamedTuple):
    """Compiled functions, see :func:`make_search`."""

    choose: Any
    fit: Any
    search: Any


def make_search(
    n: int, bits: int, first: int, last: int, step: float, again: int, levels: int = ODD
) -> Search:
    """A search of sub-blocks of ``n`` weights with codes of ``bits`` bits.

    Trials use the inverse scales (top + step · t) / denominator, t = first…last, where top is the
    greatest level. The function made takes the magnitudes, the weights of errors, their roots,
    scratch for costs ``[3 · n]``, words and the same as int32, words that the search keeps,
    scratch for scales ``[16]``, the denominators and first guesses of the scales, the number of
    sub-blocks and the tables (lists, words, levels, masks). It returns the scales.

    ``levels``: ODD as in ggml's encoders, which also weigh distances by the roots. Else those that
    decoders read, distances weighed as errors are; levels in the tables are then doubled.
    """
    half = _ONE if levels == ODD else _HALF
    dims, top = (8, 2) if bits == 2 else (4, 7)
    of_lattice = nearest_of_8 if bits == 2 else nearest_of_4
    groups = n // dims
    greatest, increment = np.float32(2 * top + 1), np.float32(step)

    @inner
    def choose(
        tile: Any,
        roots: Any,
        costs: Any,
        words: Any,
        numbers: Any,
        scales: Any,
        inverse: Any,
        scale: Any,
        count: Any,
        lists: Any,
    ) -> None:
        """Round to words, and those that the format lacks to the best of their lists."""
        for k in range(groups):
            word = spread_int(0)
            for i in range(dims):
                x = load(tile, LANES * (dims * k + i))
                word = word | (nearest_code(_HALF * (inverse * x - _ONE), 0, top) << (bits * i))
            store(words, LANES * k, as_float(word))
        if bits == 2:
            put_costs(tile, roots, n, scale, costs)
        else:
            store(scales, 0, scale * half)
        entries = lists[0]
        for k in range(groups):
            for lane in range(count):
                entry = entries[numbers[LANES * k + lane]]
                if entry >= 0:
                    point = of_lattice(tile, roots, costs, scales, dims * k, lane, n, entry, lists)
                    numbers[LANES * k + lane] = point | LACKED

    @inner
    def fit(tile: Any, weights: Any, words: Any) -> Any:
        sum_xq = spread(_ZERO)
        sum_qq = spread(_ZERO)
        for k in range(groups):
            word = as_bits(load(words, LANES * k))
            for i in range(dims):
                at = LANES * (dims * k + i)
                w = load(weights, at)
                level = _level(word, bits * i, bits, levels)
                sum_xq = sum_xq + w * load(tile, at) * level
                sum_qq = sum_qq + w * level * level
        return sum_xq, sum_qq

    @inner
    def search(
        tile: Any,
        weights: Any,
        roots: Any,
        costs: Any,
        words: Any,
        numbers: Any,
        kept: Any,
        scales: Any,
        denominator: Any,
        scale: Any,
        count: Any,
        lists: Any,
    ) -> Any:
        for i in range(n):
            w = load(weights, LANES * i)
            store(roots, LANES * i, square_root(w) if levels == ODD else w)
        for k in range(groups):
            store(kept, LANES * k, as_float(spread_int(0 if again == AGAIN_THERE else LACKED)))
        best = spread(_ZERO)
        for trial in range(first, last + 1):
            inverse = (greatest + np.float32(trial) * increment) / denominator
            choose(
                tile, roots, costs, words, numbers, scales, inverse, _ONE / inverse, count, lists
            )
            sum_xq, sum_qq = fit(tile, weights, words)
            better = (sum_qq > _ZERO) & (sum_xq * sum_xq > best * sum_qq)
            scale = where(better, sum_xq / sum_qq, scale)
            best = where(better, scale * sum_xq, best)
            for k in range(groups):
                word = where(
                    better, as_bits(load(words, LANES * k)), as_bits(load(kept, LANES * k))
                )
                store(kept, LANES * k, as_float(word))

        lacked = spread_int(LACKED if again == AGAIN_ALWAYS else 0)
        for k in range(groups):
            lacked = lacked | as_bits(load(kept, LANES * k))
        once_more = (scale > _ZERO) & (lacked > _WORD)
        if lanes_set(once_more) == 0:
            return scale
        choose(tile, roots, costs, words, numbers, scales, _ONE / scale, scale, count, lists)
        for k in range(groups):
            word = as_bits(load(kept, LANES * k))
            change = once_more
            if again == AGAIN_THERE:
                change = once_more & (word > _WORD)
            word = where(change, as_bits(load(words, LANES * k)), word)
            store(kept, LANES * k, as_float(word))
        sum_xq, sum_qq = fit(tile, weights, kept)
        return where(once_more & (sum_qq > _ZERO), sum_xq / sum_qq, scale)

    return Search(choose, fit, search)


@inner
def finish(
    groups: Any, octets: Any, scale: Any, zero: Any, mask: Any, kept: Any, signs: Any
) -> Any:
    """Clear the words and signs of zero sub-blocks, turn those of negative scales; the scales."""
    negative = scale < _ZERO
    for k in range(groups):
        word = where(zero, spread_int(0), as_bits(load(kept, LANES * k)) & _WORD)
        store(kept, LANES * k, as_float(word))
    for k in range(octets):
        word = as_bits(load(signs, LANES * k))
        word = where(negative, word ^ mask, word)
        store(signs, LANES * k, as_float(where(zero, spread_int(0), word)))
    scale = where(negative, _ZERO - scale, scale)
    return where(zero, spread(_ZERO), scale)
