"""The search for ggml's affine super-blocks, Q2_K, Q4_K and Q5_K, by a weighted least error.

A super-block is 256 weights, x ≈ d · scale · code - dmin · minimum, with an integer scale and
minimum for each sub-block. The error that is made small is Σ importance · (x - stored x)².

1. Each sub-block alone: its range is cut or widened a little at either end, in steps; the codes of
   each such grid get the scale and the minimum that suit them best, by weighted least squares.
2. For those codes the error is a quadratic of the stored scale and minimum. Pairs (d, dmin) are
   tried on it, as f16 numbers, each with the nearest integers.
3. Integers next to those are tried with the codes chosen again, and (d, dmin) by least squares over
   the 256 weights; twice. The stored values with the least error are kept.

Sixteen super-blocks are searched at once, one a lane, so every sum runs in the order of the
weights: nothing depends on the width of registers. Super-blocks are scaled to numbers near 1 by a
power of two, so that no sum overflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxedge.encodings import Encoding
from mlxedge.fallback.bits import as_input
from mlxedge.fallback.fast_k_put import SUPER_BLOCK, nearest_in, put_q2_k, put_q4_k, put_q5_k
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.lanes import (
    LANES,
    absolute,
    as_bits,
    as_float,
    inline,
    inner,
    larger,
    load,
    smaller,
    spread,
    spread_int,
    store,
    transpose,
    where,
)
from mlxedge.ops import Parts

#: Columns that the importance is repeated for: sixteen super-blocks.
SPARE = LANES * SUPER_BLOCK

_ZERO, _ONE, _TWO, _HALF = (np.float32(v) for v in (0.0, 1.0, 2.0, 0.5))
_GREATEST = np.float32(3e38)
_GREATEST_HALF, _LEAST_NORMAL_HALF = np.float32(65504.0), np.float32(2.0**-14)
#: Twice what dead columns count.
_DEAD = np.float32(2.0**-23)
#: Determinants below this part of their first product are rounding errors.
_SINGULAR = np.float32(1e-5)


@dataclass(frozen=True)
class Layout:
    """``size`` weights a sub-block; the largest code, and the largest scale and minimum.

    ``ends``: the first and the last place, in steps, where either end of a sub-block's grid is
    tried, counted inwards from its least and greatest weight, and how many. ``levels``: what d (or
    dmin) has the greatest scale (minimum) in units of itself, likewise.
    """

    size: int
    top: int
    limit: int
    ends: tuple[float, float, int]
    levels: tuple[float, float, int]


LAYOUTS = {
    "q2_k": Layout(16, 3, 15, (-0.5, 1.3, 6), (11.75, 15.75, 17)),
    "q4_k": Layout(32, 15, 63, (-1.0, 2.0, 7), (50.0, 66.0, 17)),
    "q5_k": Layout(32, 31, 63, (-1.0, 2.0, 7), (50.0, 66.0, 17)),
}
#: How far the scale and the minimum of a sub-block are moved; ties stay where they are.
MOVES = ((0, 0), (-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
#: How often the integers and then (d, dmin) are chosen again.
ROUNDS = 2


def grids(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Of each trial, f32: codes a range, and the code of the range's low end before rounding,
    counted from the lowest (see ``_fit``)."""
    first, last, count = layout.ends
    ends = np.linspace(first, last, count) / layout.top
    low, high = (ends_of.ravel() for ends_of in np.meshgrid(ends, ends, indexing="ij"))
    widths = layout.top / (1.0 - low - high)
    return widths.astype(np.float32), (lowest(layout.top) - low * widths).astype(np.float32)


def factors(layout: Layout) -> np.ndarray:
    """d for a greatest scale of 1, f32, as they are tried."""
    return (1.0 / np.linspace(*layout.levels)).astype(np.float32)


def lowest(top: int) -> int:
    """Codes are counted from here while least squares are computed, so that they centre on 0."""
    return top // 2 - top


def column_weights(importance: np.ndarray | None, cols: int) -> np.ndarray:
    """What errors count, f32 ``[cols]``: ``importance`` times a power of two of each 256 columns.

    The greatest of 256 is in [0.5, 1) and none is below 2^-24 of that, so that every sub-block has
    a best fit and columns that were never active ("dead") are encoded sensibly. All are alike if
    none is above 0.
    """
    if importance is None:
        return np.ones(cols, np.float32)
    blocks = importance.reshape(-1, SUPER_BLOCK)
    blocks = np.where(blocks.max(axis=1, keepdims=True) > 0, blocks, np.float32(1.0))
    greatest = blocks.max(axis=1, keepdims=True)
    scaled = np.ldexp(blocks, -np.frexp(greatest)[1])
    floor = np.ldexp(np.frexp(greatest)[0], -24)
    weights: np.ndarray = np.maximum(scaled, floor).astype(np.float32).reshape(-1)
    return weights


def search(weights: np.ndarray, encoding: Encoding, importance: np.ndarray | None) -> Parts:
    """Encode ``weights`` f32 ``[rows, cols]``; errors in a column count ``importance`` f32
    ``[cols]``, alike if None."""
    layout = LAYOUTS[encoding.name]
    rows, cols = weights.shape
    out = np.empty((rows, encoding.nbytes((cols,))), np.uint8)
    if weights.size:
        repeated = np.resize(column_weights(importance, cols), cols + SPARE)
        _KERNELS[encoding.name](
            as_input(weights).reshape(-1),
            repeated,
            cols,
            (*grids(layout), factors(layout), np.array(MOVES, np.float32).ravel()),
            out.reshape(-1),
        )
    return {"weight": out}


@inline
def _least(a: Any, b: Any) -> Any:
    return where(a < b, a, b)


@inline
def _greatest(a: Any, b: Any) -> Any:
    return where(a > b, a, b)


@inline
def _inverse(v: Any) -> Any:
    return where(v > _ZERO, _ONE / v, spread(_ZERO))


@inline
def _through_half(value: Any, scale: Any, back: Any) -> Any:
    """``value`` (0 or more) as f16 can store it once multiplied by ``back``, times ``scale``."""
    value = _least(value * back, spread(_GREATEST_HALF))
    bits = as_bits(value)
    normal = as_float((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000)
    return where(value < _LEAST_NORMAL_HALF, (value + _HALF) - _HALF, normal) * scale


@inner
def _read(
    x: Any, importance: Any, start: Any, column: Any, count: Any, tile: Any, weights: Any
) -> Any:
    """``count`` super-blocks, one a lane, scaled to 4 at most; the scale, per lane, and back."""
    largest = spread(_ZERO)
    for i in range(0, SUPER_BLOCK, LANES):
        transpose(x, start + i, SUPER_BLOCK, count, tile, LANES * i)
        transpose(importance, column + i, SUPER_BLOCK, count, weights, LANES * i)
        for k in range(i, i + LANES):
            largest = _greatest(absolute(load(tile, LANES * k)), largest)
    exponent = larger(smaller(as_bits(largest) >> 23, 253), 1)
    scale = as_float((spread_int(254) - exponent) << 23)
    for i in range(SUPER_BLOCK):
        store(tile, LANES * i, load(tile, LANES * i) * scale)
    return scale, as_float(exponent << 23)


#: What is kept of each sub-block, float32 ``[8, sub-blocks, 16]``, flat: the sums of weights and of
#: weighted x; the best scale and minimum; by how much the minimum grows with the scale, for the
#: codes found, and how fast the error grows with the square of a change of scale; the integers.
_SUM_W, _SUM_X, _SCALE, _MINIMUM, _SLOPE, _CURVE, _LS, _LM = (256 * i for i in range(8))


@inline
def _sums(
    tile: Any, weights: Any, products: Any, n: Any, inverse: Any, shift: Any, top: Any
) -> Any:
    """Σ w·q, Σ w·q² and Σ w·q·x of the codes round(x · inverse + shift), from ``lowest(top)``."""
    low, high = spread(np.float32(top // 2 - top)), spread(np.float32(top // 2))
    sum_q = spread(_ZERO)
    sum_qq = spread(_ZERO)
    sum_qx = spread(_ZERO)
    for i in range(n):
        q = nearest_in(load(tile, LANES * i) * inverse + shift, low, high)
        wq = load(weights, LANES * i) * q
        sum_q = sum_q + wq
        sum_qq = sum_qq + wq * q
        sum_qx = sum_qx + load(products, LANES * i) * q
    return sum_q, sum_qq, sum_qx


@inline
def _fit(
    tile: Any,
    weights: Any,
    products: Any,
    n: Any,
    top: Any,
    widths: Any,
    shifts: Any,
    kept: Any,
    at: Any,
) -> None:
    """The best scale and minimum of sub-blocks of ``n`` weights; fills ``kept`` at ``at``.

    Trial t has the codes round((x - least) · widths[t] / range + shifts[t]); the last one those of
    the best scale and minimum so far.
    """
    far, near = spread(_GREATEST), spread(-_GREATEST)
    low, high, live_low, live_high = far, near, far, near
    sum_w = spread(_ZERO)
    sum_x = spread(_ZERO)
    for i in range(n):
        x = load(tile, LANES * i)
        w = load(weights, LANES * i)
        low = _least(x, low)
        high = _greatest(x, high)
        live_low = where(w > _DEAD, _least(x, live_low), live_low)
        live_high = where(w > _DEAD, _greatest(x, live_high), live_high)
        wx = w * x
        store(products, LANES * i, wx)
        sum_w = sum_w + w
        sum_x = sum_x + wx
    some_live = live_high > -_GREATEST
    low = _least(where(some_live, live_low, low), spread(_ZERO))
    high = _greatest(where(some_live, live_high, high), low)
    span = high - low
    over_span = _inverse(span)
    over_w = _ONE / sum_w
    mean = sum_x * over_w
    zero = np.float32(top - top // 2)  # code 0, from the lowest

    best = spread(-_GREATEST)
    scale = span / np.float32(top)
    minimum = spread(_ZERO) - low
    slope = spread(_ZERO)
    curve = sum_w
    trials = widths.size
    for t in range(trials + 1):
        if t < trials:
            inverse = over_span * widths[t]
            shift = spread(shifts[t]) - low * inverse
        else:
            inverse = _inverse(scale)
            shift = minimum * inverse - zero
        sum_q, sum_qq, sum_qx = _sums(tile, weights, products, n, inverse, shift, top)
        # Both unknown, unless the minimum would be negative: then it is 0 and the scale alone is.
        cross = sum_w * sum_qx - sum_x * sum_q
        det = sum_w * sum_qq - sum_q * sum_q
        from_zero = sum_q + zero * sum_w
        free = (det > _SINGULAR * (sum_w * sum_qq)) & (cross * from_zero > sum_x * det)
        alone_qx = sum_qx + zero * sum_x
        alone_qq = sum_qq + (_TWO * zero) * sum_q + (zero * zero) * sum_w
        divisor = where(free, det, alone_qq)
        trial = where(free, cross, alone_qx) / divisor
        trial_slope = from_zero * over_w
        gain = where(free, trial * cross * over_w, trial * alone_qx - sum_x * mean)
        better = (divisor > _ZERO) & (trial > _ZERO) & (gain > best)
        best = where(better, gain, best)
        scale = where(better, trial, scale)
        minimum = where(better, where(free, trial * trial_slope - mean, spread(_ZERO)), minimum)
        slope = where(better, where(free, trial_slope, spread(_ZERO)), slope)
        curve = where(better, where(free, det * over_w, alone_qq), curve)
    store(kept, at + _SUM_W, sum_w)
    store(kept, at + _SUM_X, sum_x)
    store(kept, at + _SCALE, scale)
    store(kept, at + _MINIMUM, minimum)
    store(kept, at + _SLOPE, slope)
    store(kept, at + _CURVE, curve)


@inline
def _largest(kept: Any, row: Any, subs: Any) -> Any:
    """The greatest of a row, without sub-blocks of dead columns."""
    dead = _DEAD * np.float32(SUPER_BLOCK // subs)
    largest = spread(_ZERO)
    for j in range(subs):
        more = _greatest(load(kept, row + LANES * j), largest)
        largest = where(load(kept, _SUM_W + LANES * j) > dead, more, largest)
    return largest


@inline
def _wanted_minimums(kept: Any, subs: Any, limit: Any, d: Any, wanted: Any) -> Any:
    """The nearest scales for ``d`` and the minimums that then suit the codes; the error so far."""
    top = spread(np.float32(limit))
    inverse = _inverse(d)
    error = spread(_ZERO)
    for j in range(subs):
        at = LANES * j
        scale = load(kept, at + _SCALE)
        ls = nearest_in(scale * inverse, spread(_ZERO), top)
        change = d * ls - scale
        store(kept, at + _LS, ls)
        store(wanted, at, load(kept, at + _MINIMUM) + load(kept, at + _SLOPE) * change)
        error = error + load(kept, at + _CURVE) * (change * change)
    return error


@inner
def _choose_steps(
    kept: Any,
    subs: Any,
    limit: Any,
    factors: Any,
    scale: Any,
    back: Any,
    wanted: Any,
    steps: Any,
) -> Any:
    """(d, dmin) of least error as far as the codes found tell, and the integers, into ``kept``."""
    top = spread(np.float32(limit))
    largest_scale = _largest(kept, _SCALE, subs)
    largest_minimum = _largest(kept, _MINIMUM, subs)
    count = factors.size
    for b in range(count):
        store(steps, LANES * b, _through_half(largest_minimum * factors[b], scale, back))
    best = spread(_GREATEST)
    best_d = spread(_ZERO)
    best_dmin = spread(_ZERO)
    for a in range(count):
        d = _through_half(largest_scale * factors[a], scale, back)
        of_scales = _wanted_minimums(kept, subs, limit, d, wanted)
        for b in range(count):
            dmin = load(steps, LANES * b)
            inverse = _inverse(dmin)
            error = of_scales
            for j in range(subs):
                minimum = load(wanted, LANES * j)
                lm = nearest_in(minimum * inverse, spread(_ZERO), top)
                rest = dmin * lm - minimum
                error = error + load(kept, LANES * j + _SUM_W) * (rest * rest)
            better = error < best
            best = where(better, error, best)
            best_d = where(better, d, best_d)
            best_dmin = where(better, dmin, best_dmin)
    _wanted_minimums(kept, subs, limit, best_d, wanted)
    inverse = _inverse(best_dmin)
    for j in range(subs):
        lm = nearest_in(load(wanted, LANES * j) * inverse, spread(_ZERO), top)
        store(kept, LANES * j + _LM, lm)
    return best_d, best_dmin


@inline
def _stored_error(tile: Any, weights: Any, n: Any, scale: Any, minimum: Any, top: Any) -> Any:
    zero = spread(_ZERO)
    highest = spread(np.float32(top))
    inverse = _inverse(scale)
    error = zero
    for i in range(n):
        above = load(tile, LANES * i) + minimum
        rest = scale * nearest_in(above * inverse, zero, highest) - above
        error = error + load(weights, LANES * i) * (rest * rest)
    return error


@inner
def _move(
    tile: Any,
    weights: Any,
    n: Any,
    top: Any,
    limit: Any,
    d: Any,
    dmin: Any,
    moves: Any,
    kept: Any,
    at: Any,
) -> Any:
    """Move the integers of one sub-block to those of least error, which is given back."""
    zero = spread(_ZERO)
    most = spread(np.float32(limit))
    ls = load(kept, at + _LS)
    lm = load(kept, at + _LM)
    best = spread(_GREATEST)
    best_ls = ls
    best_lm = lm
    for t in range(0, moves.size, 2):
        trial_ls = _greatest(_least(ls + moves[t], most), zero)
        trial_lm = _greatest(_least(lm + moves[t + 1], most), zero)
        error = _stored_error(tile, weights, n, d * trial_ls, dmin * trial_lm, top)
        better = error < best
        best = where(better, error, best)
        best_ls = where(better, trial_ls, best_ls)
        best_lm = where(better, trial_lm, best_lm)
    store(kept, at + _LS, best_ls)
    store(kept, at + _LM, best_lm)
    return best


@inner
def _refit(
    tile: Any, weights: Any, n: Any, subs: Any, top: Any, kept: Any, d: Any, dmin: Any
) -> Any:
    """(d, dmin) by least squares for the integers in ``kept`` and the codes that d, dmin give."""
    zero = spread(_ZERO)
    highest = spread(np.float32(top))
    qq, qm, mm, qx, mx = zero, zero, zero, zero, zero
    for j in range(subs):
        ls = load(kept, LANES * j + _LS)
        lm = load(kept, LANES * j + _LM)
        scale = d * ls
        minimum = dmin * lm
        inverse = _inverse(scale)
        sum_q, sum_qq, sum_qx = zero, zero, zero
        for i in range(n * j, n * j + n):
            x = load(tile, LANES * i)
            q = nearest_in((x + minimum) * inverse, zero, highest)
            wq = load(weights, LANES * i) * q
            sum_q = sum_q + wq
            sum_qq = sum_qq + wq * q
            sum_qx = sum_qx + wq * x
        qq = qq + ls * ls * sum_qq
        qm = qm + ls * lm * sum_q
        mm = mm + lm * lm * load(kept, LANES * j + _SUM_W)
        qx = qx + ls * sum_qx
        mx = mx + lm * load(kept, LANES * j + _SUM_X)
    det = qq * mm - qm * qm
    new_d = (qx * mm - mx * qm) / det
    new_dmin = (qx * qm - mx * qq) / det
    both = (det > _SINGULAR * (qq * mm)) & (new_d > _ZERO) & (new_dmin > _ZERO)
    alone = (qx + qm * dmin) / qq
    new_d = where(both, new_d, where(alone > _ZERO, alone, d))
    return new_d, where(both, new_dmin, dmin)


@inline
def _encode(
    x: Any,
    importance: Any,
    cols: Any,
    tables: Any,
    out: Any,
    n: Any,
    top: Any,
    limit: Any,
    put: Any,
) -> None:
    """Encode ``x``; ``n``, ``top`` and ``limit`` are those of the layout, ``put`` writes it."""
    widths, shifts, factors, moves = tables
    tile = np.empty(SUPER_BLOCK * LANES, np.float32)
    weights = np.empty(SUPER_BLOCK * LANES, np.float32)
    scratch = np.empty(32 * LANES, np.float32)
    steps = np.empty(factors.size * LANES, np.float32)
    kept = np.empty(8 * 256, np.float32)
    found = np.zeros(2 * 256 + 2 * LANES, np.float32)
    scales = np.empty(32, np.float32)
    subs = SUPER_BLOCK // n
    blocks = x.size // SUPER_BLOCK
    size = out.size // blocks
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        start = SUPER_BLOCK * first
        scale, back = _read(x, importance, start, start % cols, count, tile, weights)
        for j in range(subs):
            here = LANES * n * j
            _fit(tile[here:], weights[here:], scratch, n, top, widths, shifts, kept, LANES * j)
        d, dmin = _choose_steps(kept, subs, limit, factors, scale, back, scratch, steps)
        best = spread(_GREATEST)
        best_d = d
        best_dmin = dmin
        for turn in range(ROUNDS):
            if turn > 0:
                d, dmin = _refit(tile, weights, n, subs, top, kept, d, dmin)
                d = _through_half(d, scale, back)
                dmin = _through_half(dmin, scale, back)
            error = spread(_ZERO)
            for j in range(subs):
                here = LANES * n * j
                error = error + _move(
                    tile[here:], weights[here:], n, top, limit, d, dmin, moves, kept, LANES * j
                )
            better = error < best
            best = where(better, error, best)
            best_d = where(better, d, best_d)
            best_dmin = where(better, dmin, best_dmin)
            for at in range(0, LANES * subs, LANES):
                store(found, at, where(better, load(kept, at + _LS), load(found, at)))
                lm = where(better, load(kept, at + _LM), load(found, 256 + at))
                store(found, 256 + at, lm)
        store(found, 512, best_d * back)
        store(found, 512 + LANES, best_dmin * back)
        for k in range(count):
            put(x, start + SUPER_BLOCK * k, found, k, out, size * (first + k), scales)


@kernel
def _encode_q2_k(x: Any, importance: Any, cols: Any, tables: Any, out: Any) -> None:
    _encode(x, importance, cols, tables, out, 16, 3, 15, put_q2_k)


@kernel
def _encode_q4_k(x: Any, importance: Any, cols: Any, tables: Any, out: Any) -> None:
    _encode(x, importance, cols, tables, out, 32, 15, 63, put_q4_k)


@kernel
def _encode_q5_k(x: Any, importance: Any, cols: Any, tables: Any, out: Any) -> None:
    _encode(x, importance, cols, tables, out, 32, 31, 63, put_q5_k)


_KERNELS = {"q2_k": _encode_q2_k, "q4_k": _encode_q4_k, "q5_k": _encode_q5_k}
