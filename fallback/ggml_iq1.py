"""Encoders of ggml's lattice formats below two bits: IQ1_S and IQ1_M.

Byte for byte ``quantize_iq1_s`` and ``quantize_iq1_m`` of ggml-quants.c (llama.cpp as vendored by
llama-cpp-python 0.3.36) where the C compiler does not contract multiply and add, and its ``qsort``
keeps the order of equal weights, as that of glibc does.

Weights are -1, 0 or 1, all shifted by 1/8 up or down, times a scale. Sorted, they fall into three
runs; every pair of borders is tried, with either shift (IQ1_M: of either half). Then each eight
weights become a point of the lattice (``ggml_iq_maps``) that those formats have.

The importance of columns is as in ``ggml_importance``; σ² is twice the mean square of the
super-block. Only IQ1_M can do without: the error of x then counts x².
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.fallback.bits import to_half
from mlxedge.fallback.ggml_importance import sum_squares
from mlxedge.fallback.ggml_iq2 import clear, greatest_of, scale_code
from mlxedge.fallback.ggml_iq_maps import lattice
from mlxedge.fallback.ggml_iq_search import LACKED, SQUARE, nearest_of_8, read_sub_blocks
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.lanes import (
    LANES,
    absolute,
    any_lane,
    as_bits,
    as_float,
    inline,
    inner,
    lanes_set,
    load,
    put_half,
    spread,
    spread_int,
    store,
    where,
)

SUPER_BLOCK = 256
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_SIZE = np.float32(SUPER_BLOCK)
_SCALES = np.float32(15.0)
_LOWEST = np.float32(np.finfo(np.float32).min)
#: Sub-blocks with no weight above this are zero (GROUP_MAX_EPS_IQ1_S and _M).
_TINY_S, _TINY_M = np.float32(1e-12), np.float32(1e-7)
#: Of d.
_FACTOR_S, _FACTOR_M = np.float32(1.125), np.float32(1.1125)

_SHIFT = np.float32(0.125)
#: The levels, shifted up and down.
_UP = tuple(np.float32(level + 0.125) for level in (-1, 0, 1))
_DOWN = tuple(np.float32(level - 0.125) for level in (-1, 0, 1))
#: Differences of their squares: lowest less middle, middle less highest.
_UP_SQUARES = (np.float32(0.75), np.float32(-1.25))
_DOWN_SQUARES = (np.float32(1.25), np.float32(-0.75))

_MAGIC, _MAGIC_BITS = np.float32(12582912.0), 0x4B400000
#: A word whose eight codes are all 2.
_TOP_WORD = 0xAAAA
#: Borders and shift of a split as one number; none was found.
_BORDER_BITS, _NOTHING = 6, -1


@inner
def _sort(x: Any, start: Any, n: Any, count: Any, order: Any) -> None:
    """Where the weights of each sub-block are in ascending order: ``order`` int32 ``[16 · n]``."""
    for lane in range(count):
        base, here = n * lane, start + n * lane
        order[base] = 0
        for i in range(1, n):
            value = x[here + i]
            j = base + i
            while j > base and x[here + order[j - 1]] > value:
                order[j] = order[j - 1]
                j -= 1
            order[j] = i


@inner
def _gather(tile: Any, weights: Any, n: Any, count: Any, order: Any, sums: Any, w: Any) -> None:
    """Weights of errors, and those times the weights, in ascending order of the weights."""
    for lane in range(count):
        for j in range(n):
            at = LANES * order[n * lane + j] + lane
            w[LANES * j + lane] = weights[at]
            sums[LANES * j + lane] = weights[at] * tile[at]


@inner
def _split_s(sum_x: Any, sum_w: Any, products: Any, squares: Any, found: Any) -> Any:
    """The best split of 32 and its scale. ``sum_x``, ``sum_w`` ``[33]``: running sums.

    Splits are numbered first border, second border, shift.
    """
    n = 32
    total_x, total_w = load(sum_x, LANES * n), load(sum_w, LANES * n)
    for i in range(n + 1):
        # Of weights beyond the second border.
        x, w = total_x - load(sum_x, LANES * i), total_w - load(sum_w, LANES * i)
        store(products, LANES * i, x * _UP[2])
        store(products, LANES * (n + 1 + i), x * _DOWN[2])
        store(squares, LANES * i, w * _UP[2] * _UP[2])
        store(squares, LANES * (n + 1 + i), w * _DOWN[2] * _DOWN[2])
    scale = spread(_ZERO)
    best = spread(_LOWEST)
    split = spread_int(_NOTHING)
    for i in range(n + 1):
        x, w = load(sum_x, LANES * i), load(sum_w, LANES * i)
        up_x, down_x = x * _UP[0], x * _DOWN[0]
        up_w, down_w = w * _UP[0] * _UP[0], w * _DOWN[0] * _DOWN[0]
        for j in range(i, n + 1):
            middle_x, middle_w = load(sum_x, LANES * j) - x, load(sum_w, LANES * j) - w
            number = (i << _BORDER_BITS | j) << 1
            xq = up_x + middle_x * _UP[1] + load(products, LANES * j)
            qq = up_w + middle_w * _UP[1] * _UP[1] + load(squares, LANES * j)
            better = (qq > _ZERO) & (xq * xq > best * qq)
            if any_lane(better):
                scale = where(better, xq / qq, scale)
                best = where(better, scale * xq, best)
                split = where(better, spread_int(number), split)
            xq = down_x + middle_x * _DOWN[1] + load(products, LANES * (n + 1 + j))
            qq = down_w + middle_w * _DOWN[1] * _DOWN[1] + load(squares, LANES * (n + 1 + j))
            better = (qq > _ZERO) & (xq * xq > best * qq)
            if any_lane(better):
                scale = where(better, xq / qq, scale)
                best = where(better, scale * xq, best)
                split = where(better, spread_int(number | 1), split)
    store(found, 0, scale)
    return split


@inline
def _half_sums(x: Any, total_x: Any, w: Any, x_here: Any, w_up: Any, w_down: Any, at: Any) -> Any:
    """Of one half: Σ w·q·x shifted up and down, Σ w·q² shifted up and down."""
    there_x, there_w = load(x, at), load(w, at)
    below = x_here + there_x
    return (
        total_x * _UP[2] - below,
        total_x * _DOWN[2] - below,
        w_up + there_w * _UP_SQUARES[1],
        w_down + there_w * _DOWN_SQUARES[1],
    )


@inline
def _better_split(
    xq: Any, qq: Any, number: Any, scale: Any, best: Any, split: Any
) -> tuple[Any, Any, Any]:
    better = (qq > _ZERO) & (xq * xq > best * qq)
    if any_lane(better):
        scale = where(better, xq / qq, scale)
        best = where(better, scale * xq, best)
        split = where(better, spread_int(number), split)
    return scale, best, split


@inner
def _split_m(xs: Any, ws: Any, other_xs: Any, other_ws: Any, found: Any) -> Any:
    """The best split of 16 and its scale, from running sums ``[17]`` of the first half and of the
    other. Splits are numbered first border, second border, shifts."""
    n = 16
    x_total, w_total = load(xs, LANES * n), load(ws, LANES * n)
    other_x_total, other_w_total = load(other_xs, LANES * n), load(other_ws, LANES * n)
    scale = spread(_ZERO)
    best = spread(_LOWEST)
    split = spread_int(_NOTHING)
    for i in range(n + 1):
        x, w = load(xs, LANES * i), load(ws, LANES * i)
        other_x, other_w = load(other_xs, LANES * i), load(other_ws, LANES * i)
        up = w_total * _UP[2] * _UP[2] + w * _UP_SQUARES[0]
        down = w_total * _DOWN[2] * _DOWN[2] + w * _DOWN_SQUARES[0]
        other_up = other_w_total * _UP[2] * _UP[2] + other_w * _UP_SQUARES[0]
        other_down = other_w_total * _DOWN[2] * _DOWN[2] + other_w * _DOWN_SQUARES[0]
        for j in range(i, n + 1):
            xq_up, xq_down, qq_up, qq_down = _half_sums(xs, x_total, ws, x, up, down, LANES * j)
            a, b, c, d = _half_sums(
                other_xs, other_x_total, other_ws, other_x, other_up, other_down, LANES * j
            )
            number = (i << _BORDER_BITS | j) << 2
            scale, best, split = _better_split(xq_up + a, qq_up + c, number, scale, best, split)
            scale, best, split = _better_split(xq_up + b, qq_up + d, number + 1, scale, best, split)
            scale, best, split = _better_split(
                xq_down + a, qq_down + c, number + 2, scale, best, split
            )
            scale, best, split = _better_split(
                xq_down + b, qq_down + d, number + 3, scale, best, split
            )
    store(found, 0, scale)
    return split


@inner
def _put_words(
    order: Any,
    n: Any,
    count: Any,
    splits: Any,
    shift_bits: Any,
    found: Any,
    shifts: Any,
    words: Any,
) -> None:
    """The words and shifts of the splits; a negative scale turns all. None: zero."""
    for lane in range(count):
        for k in range(n // 8):
            words[LANES * k + lane] = 0
        split = splits[lane]
        shifts[lane] = 0
        if split < 0:
            found[lane] = _ZERO
            continue
        i, j = split >> (_BORDER_BITS + shift_bits), split >> shift_bits & ((1 << _BORDER_BITS) - 1)
        for at in range(i, n):
            where_ = order[n * lane + at]
            code = 1 if at < j else 2
            words[LANES * (where_ // 8) + lane] |= code << (2 * (where_ % 8))
        shift = split & ((1 << shift_bits) - 1)
        if found[lane] < _ZERO:
            found[lane] = -found[lane]
            shift ^= (1 << shift_bits) - 1
            for k in range(n // 8):
                words[LANES * k + lane] = _TOP_WORD - words[LANES * k + lane]
        shifts[lane] = shift


@inline
def _offset(shifts: Any, k: Any, n: Any) -> Any:
    """What the shifts add to the levels of the ``k``-th eight."""
    bit = 2 if n == 16 and k == 0 else 1
    return where((shifts & bit) > 0, spread(-_SHIFT), spread(_SHIFT))


@inline
def _level(word: Any, i: Any, offset: Any) -> Any:
    return as_float((word >> (2 * i) & 3) + _MAGIC_BITS) - _MAGIC - _ONE + offset


@inner
def _choose(
    tile: Any,
    weights: Any,
    costs: Any,
    n: Any,
    count: Any,
    lists: Any,
    words: Any,
    numbers: Any,
    shifts: Any,
    found: Any,
) -> None:
    """Replace the words that the format lacks; where there are any, fit the scale anew."""
    scale = load(found, 0)
    entries = lists[0]
    for k in range(n // 8):
        offset = _offset(as_bits(load(shifts, 0)), k, n)
        for level in range(3):
            value = scale * (offset + np.float32(level - 1))
            for i in range(8 * k, 8 * k + 8):
                difference = value - load(tile, LANES * i)
                cost = load(weights, LANES * i) * difference * difference
                store(costs, LANES * (n * level + i), cost)
        for lane in range(count):
            entry = entries[numbers[LANES * k + lane]]
            if entry >= 0:
                point = nearest_of_8(tile, tile, costs, costs, 8 * k, lane, n, entry, lists)
                numbers[LANES * k + lane] = point | LACKED
    lacked = spread_int(0)
    sum_xq = spread(_ZERO)
    sum_qq = spread(_ZERO)
    for k in range(n // 8):
        word = as_bits(load(words, LANES * k))
        lacked = lacked | word
        offset = _offset(as_bits(load(shifts, 0)), k, n)
        for i in range(8):
            level = _level(word, i, offset)
            wq = load(weights, LANES * (8 * k + i)) * level
            sum_xq = sum_xq + wq * load(tile, LANES * (8 * k + i))
            sum_qq = sum_qq + wq * level
        store(words, LANES * k, as_float(word & (LACKED - 1)))
    refit = (lacked > LACKED - 1) & (sum_xq > _ZERO) & (sum_qq > _ZERO)
    if lanes_set(refit) != 0:
        store(found, 0, where(refit, sum_xq / sum_qq, scale))


@inner
def _running(sums: Any, n: Any, source: Any) -> None:
    """Running sums of the rows of ``source``, from zero."""
    total = spread(_ZERO)
    store(sums, 0, total)
    for j in range(n):
        total = total + load(source, LANES * j)
        store(sums, LANES * (j + 1), total)


@inner
def _running_half(sums: Any, n: Any, source: Any, order: Any, count: Any, half: Any) -> None:
    """As :func:`_running`, of the first (0) or other (1) half of each sub-block alone."""
    for lane in range(LANES):
        total = _ZERO
        sums[lane] = total
        for j in range(n):
            if lane < count and order[n * lane + j] // 8 == half:
                total = total + source[LANES * j + lane]
            sums[LANES * (j + 1) + lane] = total


@inner
def _largest(tile: Any, n: Any) -> Any:
    largest = absolute(load(tile, 0))
    for i in range(1, n):
        x = absolute(load(tile, LANES * i))
        largest = where(largest > x, largest, x)
    return largest


@inner
def _put_s(numbers: Any, shifts: Any, ids: Any, found: Any, lane: Any, out: Any, at: Any) -> None:
    """Write an IQ1_S block: f16 d, 32 low bytes of points, 8 of 4 x 3 high bits, scale, shift."""
    clear(out, at, 2)
    greatest = greatest_of(found, lane, 8)
    inverse = _ZERO
    if greatest != _ZERO:
        d = greatest / _SCALES
        put_half(out, at, d * _FACTOR_S)
        inverse = _ONE / d
    for j in range(8):
        word = 0
        for k in range(4):
            point = ids[numbers[LANES * k + lane + j]]
            out[at + 2 + 4 * j + k] = point & 255
            word |= point >> 8 << 3 * k
        if greatest != _ZERO:
            word |= scale_code(inverse, found[lane + j], 7) << 12
            word |= (shifts[lane + j] & 1) << 15
        out[at + 34 + 2 * j] = word & 255
        out[at + 35 + 2 * j] = word >> 8


@kernel
def _encode_s(x: Any, importance: Any, cols: Any, ids: Any, lists: Any, out: Any) -> None:
    n = 32
    tile = np.empty(n * LANES, np.float32)
    weights = np.empty(n * LANES, np.float32)
    costs = np.empty(3 * n * LANES, np.float32)
    sum_x = np.empty((n + 1) * LANES, np.float32)
    sum_w = np.empty((n + 1) * LANES, np.float32)
    products = np.empty(2 * (n + 1) * LANES, np.float32)
    squares = np.empty(2 * (n + 1) * LANES, np.float32)
    words = np.empty(n // 8 * LANES, np.float32)
    shifts = np.zeros(LANES, np.float32)
    splits = np.empty(LANES, np.float32)
    found = np.empty(LANES, np.float32)
    variances = np.empty(LANES, np.float32)
    of_lane = np.empty(LANES, np.float32)
    order = np.zeros(n * LANES, np.int32)
    numbers, shift_codes = words.view(np.int32), shifts.view(np.int32)
    split_codes = splits.view(np.int32)
    blocks = x.size // SUPER_BLOCK
    for first in range(0, blocks, LANES):
        group = min(LANES, blocks - first)
        start = SUPER_BLOCK * first
        sums = sum_squares(x, start, SUPER_BLOCK, group, SUPER_BLOCK, tile)
        store(variances, 0, _TWO * sums / _SIZE)
        for pair in range(0, group, 2):
            count = min(2, group - pair)
            lanes = 8 * count
            here, column = start + SUPER_BLOCK * pair, start % cols + SUPER_BLOCK * pair
            for k in range(LANES):
                of_lane[k] = variances[pair + k // 8]
            variance = load(of_lane, 0)
            read_sub_blocks(x, importance, here, column, n, lanes, variance, SQUARE, tile, weights)
            _sort(x, here, n, lanes, order)
            _gather(tile, weights, n, lanes, order, products, squares)
            _running(sum_x, n, products)
            _running(sum_w, n, squares)
            split = _split_s(sum_x, sum_w, products, squares, found)
            zero = _largest(tile, n) < _TINY_S
            store(splits, 0, as_float(where(zero, spread_int(_NOTHING), split)))
            _put_words(order, n, lanes, split_codes, 1, found, shift_codes, numbers)
            _choose(tile, weights, costs, n, lanes, lists, words, numbers, shifts, found)
            for b in range(count):
                at = 50 * (first + pair + b)
                _put_s(numbers, shift_codes, ids, found, 8 * b, out, at)


@inner
def _step(
    tile: Any, weights: Any, words: Any, shifts: Any, codes: Any, products: Any, squares: Any
) -> Any:
    """Of a super-block of IQ1_M, in its codes times the scales': Σ w·q·x and Σ w·q²."""
    shift = as_bits(load(shifts, 0))
    scale = load(codes, 0) * _TWO + _ONE
    for k in range(2):
        word = as_bits(load(words, LANES * k))
        offset = _offset(shift, k, 16)
        for i in range(8):
            at = LANES * (8 * k + i)
            level = _level(word, i, offset) * scale
            wq = load(weights, at) * level
            store(products, at, wq * load(tile, at))
            store(squares, at, wq * level)
    sum_xq = _ZERO
    sum_qq = _ZERO
    for lane in range(LANES):
        for i in range(16):
            sum_xq = sum_xq + products[LANES * i + lane]
            sum_qq = sum_qq + squares[LANES * i + lane]
    return sum_xq, sum_qq


@inner
def _put_m(
    numbers: Any,
    shifts: Any,
    ids: Any,
    codes: Any,
    half_bits: Any,
    out: Any,
    at: Any,
) -> None:
    """Write an IQ1_M block: 32 low bytes of points, 16 of 2 x (3 high bits, shift), 4 of 4 x 3 bits
    of scales and 4 bits of an f16 d."""
    for j in range(16):
        low, high = ids[numbers[j]], ids[numbers[LANES + j]]
        out[at + 2 * j] = low & 255
        out[at + 2 * j + 1] = high & 255
        sign = (shifts[j] & 2) << 2 | (shifts[j] & 1) << 7
        out[at + 32 + j] = low >> 8 | high >> 8 << 4 | sign
    for j in range(4):
        word = (half_bits >> 4 * j & 15) << 12
        for k in range(4):
            word |= np.int32(codes[4 * j + k]) << 3 * k
        out[at + 48 + 2 * j] = word & 255
        out[at + 49 + 2 * j] = word >> 8


@kernel
def _encode_m(x: Any, importance: Any, cols: Any, ids: Any, lists: Any, out: Any) -> None:
    n = 16
    tile = np.empty(n * LANES, np.float32)
    weights = np.empty(n * LANES, np.float32)
    costs = np.empty(3 * n * LANES, np.float32)
    sum_x = np.empty((n + 1) * LANES, np.float32)
    sum_w = np.empty((n + 1) * LANES, np.float32)
    other_x = np.empty((n + 1) * LANES, np.float32)
    other_w = np.empty((n + 1) * LANES, np.float32)
    products = np.empty(n * LANES, np.float32)
    squares = np.empty(n * LANES, np.float32)
    words = np.empty(n // 8 * LANES, np.float32)
    shifts = np.zeros(LANES, np.float32)
    splits = np.empty(LANES, np.float32)
    found = np.empty(LANES, np.float32)
    codes = np.empty(LANES, np.float32)
    variances = np.empty(LANES, np.float32)
    order = np.zeros(n * LANES, np.int32)
    numbers, shift_codes = words.view(np.int32), shifts.view(np.int32)
    split_codes = splits.view(np.int32)
    blocks = x.size // SUPER_BLOCK
    for first in range(0, blocks, LANES):
        group = min(LANES, blocks - first)
        start = SUPER_BLOCK * first
        sums = sum_squares(x, start, SUPER_BLOCK, group, SUPER_BLOCK, tile)
        store(variances, 0, _TWO * sums / _SIZE)
        for b in range(group):
            here, column = start + SUPER_BLOCK * b, start % cols + SUPER_BLOCK * b
            read_sub_blocks(
                x, importance, here, column, n, 16, spread(variances[b]), SQUARE, tile, weights
            )
            _sort(x, here, n, 16, order)
            _gather(tile, weights, n, 16, order, products, squares)
            _running_half(sum_x, n, products, order, 16, 0)
            _running_half(sum_w, n, squares, order, 16, 0)
            _running_half(other_x, n, products, order, 16, 1)
            _running_half(other_w, n, squares, order, 16, 1)
            split = _split_m(sum_x, sum_w, other_x, other_w, found)
            zero = _largest(tile, n) < _TINY_M
            store(splits, 0, as_float(where(zero, spread_int(_NOTHING), split)))
            _put_words(order, n, 16, split_codes, 2, found, shift_codes, numbers)
            _choose(tile, weights, costs, n, 16, lists, words, numbers, shifts, found)
            greatest = greatest_of(found, 0, 16)
            bits = 0
            if greatest == _ZERO:
                for j in range(16):
                    codes[j] = _ZERO
                    shift_codes[j] = 0
            else:
                d = greatest / _SCALES
                inverse = _ONE / d
                for j in range(16):
                    codes[j] = np.float32(scale_code(inverse, found[j], 7))
                sum_xq, sum_qq = _step(tile, weights, words, shifts, codes, products, squares)
                if sum_qq > _ZERO:
                    d = sum_xq / sum_qq
                bits = int(to_half(d * _FACTOR_M))
            _put_m(numbers, shift_codes, ids, codes, bits, out, 56 * (first + b))


def encode_iq1_s(x: np.ndarray, importance: np.ndarray, cols: int, out: np.ndarray) -> None:
    t = lattice("iq1_s")
    _encode_s(x, importance, cols, t.ids, (t.lists, t.words, t.levels, t.masks), out)


def encode_iq1_m(x: np.ndarray, importance: np.ndarray, cols: int, out: np.ndarray) -> None:
    t = lattice("iq1_m")
    _encode_m(x, importance, cols, t.ids, (t.lists, t.words, t.levels, t.masks), out)
