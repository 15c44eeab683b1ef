"""The search "fast" for Q3_K, Q6_K and IQ4_XS: sub-blocks with signed integer scales, one f16 d.

x ≈ d · scale · level. The error of a weight counts the importance of its column, and errors that
are compared are those of the numbers as stored:

1. Of every sub-block a scale is sought on its own, for either sign: several inverse scales give
   levels, levels the scale of least squares (after ``make_qx_quants`` of ggml-quants.c, llama.cpp
   as vendored by llama-cpp-python 0.3.36).
2. Several d are tried, fractions of the greatest of these scales. Each is rounded to f16; then
   every sub-block takes, of the integers about its scale, the one of least error.
3. For the integers and levels found, d is refitted by least squares over the super-block and the
   integers are chosen again; this is kept where the error of the super-block falls.

Sixteen sub-blocks are searched at once, one a lane. Sums over a sub-block go in the order of its
weights; sums over a super-block add lanes 8, 4, 2 and 1 apart. The weights of a super-block are
brought to about 1 by a power of two before, and so is importance, so that nothing overflows.
Super-blocks without importance count all weights alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlxedge.encodings import Encoding
from mlxedge.fallback.bits import as_input
from mlxedge.fallback.ggml_importance import read_weights
from mlxedge.fallback.ggml_iq4 import _code, _level
from mlxedge.fallback.ggml_k import put_q3_k
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
    nearest_code,
    put_half,
    smaller,
    spread,
    spread_int,
    store,
    store_bytes,
    swap_1,
    swap_2,
    swap_4,
    swap_8,
    transpose,
    where,
)
from mlxedge.ops import Parts

SUPER_BLOCK = 256
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_HUGE = np.float32(3e38)
_MAGIC = np.float32(12582912.0)
_F16_MAX = np.float32(65504.0)
_F16_NORMAL = np.float32(2.0**-14)
_F16_LEAST = np.float32(2.0**-24)


class Form(NamedTuple):
    """What a kernel must know of a format.

    ``size`` weights a sub-block; ``least`` … ``most``: its scales; ``low`` … ``high``: its levels,
    which are all integers between unless ``table``.
    """

    block_bytes: int
    size: int
    least: Any
    most: Any
    low: Any
    high: Any
    table: bool


@dataclass(frozen=True)
class Plan:
    """How one format is searched.

    ``spans``: the levels that inverse scales tried would give to the weight of greatest magnitude;
    those of one sign first. ``divisors``: the integers tried for the greatest scale. ``scan``: that
    many integers of either sign are tried for every scale, from that which would give the weight of
    greatest magnitude the level ``reach`` on. ``rounds`` of refitting.

    How far clipping may go is bounded on purpose: where few columns hold most of the importance,
    the scale that suits them alone has the least error, yet the model is worse for it.
    """

    form: Form
    spans: tuple[float, ...]
    divisors: tuple[float, ...]
    scan: int
    reach: float
    rounds: int


def _form(block_bytes: int, size: int, scale: int, low: int, high: int, table: bool) -> Form:
    least, most = np.float32(-scale), np.float32(scale - 1)
    return Form(block_bytes, size, least, most, np.float32(low), np.float32(high), table)


def _range(first: float, last: float, count: int) -> tuple[float, ...]:
    step = (last - first) / (count - 1)
    return tuple(first + step * i for i in range(count))


PLANS = {
    "q3_k": Plan(
        _form(110, 16, 32, -4, 3, False),
        (*_range(-4.5, -2.0, 8), *_range(3.5, 1.5, 8)),
        (-32.0,),
        12,
        7.0,
        2,
    ),
    "q6_k": Plan(
        _form(210, 16, 128, -32, 31, False),
        _range(-56.0, -18.0, 72),
        (-128.0, -126.0, -124.0, -122.0),
        0,
        1.0,
        1,
    ),
    "iq4_xs": Plan(
        _form(136, 32, 32, -127, 113, True),
        (*_range(-200.0, -60.0, 18), *_range(190.0, 50.0, 18)),
        (-33.0, -32.0, -30.0),
        0,
        1.0,
        1,
    ),
}


@inline
def _clamp(v: Any, low: Any, high: Any) -> Any:
    v = where(v < low, spread(low), v)
    return where(v > high, spread(high), v)


@inline
def _round(v: Any, low: Any, high: Any) -> Any:
    """The nearest integer of low…high, ties to even."""
    return (_clamp(v, low, high) + _MAGIC) - _MAGIC


@inline
def _inverse(v: Any) -> Any:
    return where(v != _ZERO, _ONE / v, spread(_ZERO))


@inline
def _total(v: Any, size: Any) -> Any:
    """The sum over the super-block of each lane, in each lane."""
    if size == 16:
        v = v + swap_8(v)
    v = v + swap_4(v)
    v = v + swap_2(v)
    return v + swap_1(v)


@inline
def _greater(a: Any, b: Any) -> Any:
    return where(a > b, a, b)


@inline
def _greatest(v: Any, size: Any) -> Any:
    """As :func:`_total`, the greatest."""
    if size == 16:
        v = _greater(v, swap_8(v))
    v = _greater(v, swap_4(v))
    v = _greater(v, swap_2(v))
    return _greater(v, swap_1(v))


@inline
def _exponent(largest: Any) -> Any:
    """The biased exponent of magnitudes, kept where its power of two and the inverse are normal."""
    return larger(smaller(as_bits(largest) >> 23, 253), 1)


@inline
def _through_half(v: Any) -> Any:
    """Rounded to f16, beyond its range to the greatest or the least number; 0 stays."""
    size = _clamp(absolute(v), _F16_LEAST, _F16_MAX)
    bits = as_bits(size)
    normal = as_float((bits + ((bits >> 13) & 1) + 0xFFF) & ~0x1FFF)
    tiny = (size + _HALF) - _HALF
    size = where(size < _F16_NORMAL, tiny, normal)
    return where(v == _ZERO, spread(_ZERO), where(v < _ZERO, _ZERO - size, size))


@inner
def _fit(tile: Any, weights: Any, form: Any, inverse: Any) -> Any:
    """Σ w · x · level and Σ w · level² for the levels that ``inverse`` gives."""
    sum_xl = spread(_ZERO)
    sum_ll = spread(_ZERO)
    for i in range(form.size):
        x = load(tile, LANES * i)
        scaled = inverse * x
        level = _level(scaled) if form.table else _round(scaled, form.low, form.high)
        wl = load(weights, LANES * i) * level
        sum_xl = sum_xl + wl * x
        sum_ll = sum_ll + wl * level
    return sum_xl, sum_ll


@inner
def _error(tile: Any, weights: Any, form: Any, step: Any) -> Any:
    """Σ w · (x - step · level)² for the best levels."""
    inverse = _inverse(step)
    error = spread(_ZERO)
    for i in range(form.size):
        x = load(tile, LANES * i)
        scaled = inverse * x
        level = _level(scaled) if form.table else _round(scaled, form.low, form.high)
        difference = x - step * level
        error = error + load(weights, LANES * i) * (difference * difference)
    return error


@inline
def _try(
    tile: Any, weights: Any, form: Any, d: Any, candidate: Any, scales: Any, error: Any
) -> Any:
    """The scales, and their errors, where ``candidate`` has been taken if it is better."""
    candidate = _round(candidate, form.least, form.most)
    trial = _error(tile, weights, form, d * candidate)
    better = trial < error
    return where(better, candidate, scales), where(better, trial, error)


@inline
def _normalize(tile: Any, size: Any) -> Any:
    """Scale the super-blocks in ``tile`` to about 1.

    Returns the greatest magnitude of each sub-block after, and the power of two of each super-block
    with its inverse.
    """
    largest = spread(_ZERO)
    for i in range(size):
        v = absolute(load(tile, LANES * i))
        largest = where(v > largest, v, largest)
    exponent = _exponent(_greatest(largest, size))
    unit = as_float(exponent << 23)
    factor = as_float((254 - exponent) << 23)
    for i in range(size):
        store(tile, LANES * i, load(tile, LANES * i) * factor)
    return largest * factor, unit, factor


@inner
def _weigh(weights: Any, size: Any) -> Any:
    """Make importance the weights of errors; 1 or, if a sub-block has no importance, 0."""
    largest = _normalize(weights, size)[0]
    dead = largest == _ZERO
    for i in range(size):
        store(weights, LANES * i, where(dead, spread(_ONE), load(weights, LANES * i)))
    return where(dead & (_greatest(largest, size) > _ZERO), spread(_ZERO), spread(_ONE))


@inner
def _scales(tile: Any, weights: Any, form: Any, spans: Any, largest: Any) -> Any:
    """The best scale of every sub-block, and the best of the other sign."""
    extreme = spread(_ZERO)
    for i in range(form.size):
        x = load(tile, LANES * i)
        extreme = where(absolute(x) == largest, x, extreme)
    extreme = where(largest == _ZERO, spread(_ONE), extreme)
    scale = spread(_ZERO)
    best = spread(_ZERO)
    other = scale
    other_best = best
    for t in range(spans.size):
        if t > 0 and (spans[t] > _ZERO) != (spans[t - 1] > _ZERO):
            other, other_best = scale, best
            scale, best = spread(_ZERO), spread(_ZERO)
        sum_xl, sum_ll = _fit(tile, weights, form, spans[t] / extreme)
        fitted = sum_xl / sum_ll
        gain = sum_xl * fitted
        better = gain > best
        scale = where(better, fitted, scale)
        best = where(better, gain, best)
    first = best > other_best
    return where(first, scale, other), where(first, other, scale)


@inner
def _search_block(
    tile: Any, weights: Any, form: Any, plan: Any, alive: Any, largest: Any, unit: Any, factor: Any
) -> Any:
    """d (f16, of the weights as they were) and the integer scales, in every lane."""
    spans, divisors, scan, reach, rounds = plan
    scale, other = _scales(tile, weights, form, spans, largest)
    top = _greatest(scale * alive, form.size)
    bottom = _greatest(_ZERO - scale * alive, form.size)
    greatest = where(top > bottom, top, _ZERO - bottom)
    best_error = spread(_HUGE)
    best_d = spread(_ZERO)
    best_scales = spread(_ZERO)
    for t in range(divisors.size + rounds):
        if t < divisors.size:
            stored = _through_half(greatest / divisors[t] * unit)
            inverse = _inverse(stored * factor)
            middle = _round(scale * inverse, form.least, form.most)
        else:
            step = best_d * factor * best_scales
            sum_xl, sum_ll = _fit(tile, weights, form, _inverse(step))
            sum_xl = _total(best_scales * sum_xl * alive, form.size)
            sum_ll = _total(best_scales * best_scales * sum_ll * alive, form.size)
            fitted = where(sum_ll > _ZERO, sum_xl / sum_ll, spread(_ZERO))
            stored = _through_half(fitted * unit)
            inverse = _inverse(stored * factor)
            middle = best_scales
        d = stored * factor
        scales = middle
        error = _error(tile, weights, form, d * scales)
        for candidate in (middle - _ONE, middle + _ONE, other * inverse):
            scales, error = _try(tile, weights, form, d, candidate, scales, error)
        if t < divisors.size:
            least = _round(largest * absolute(inverse) / reach, _ZERO, form.most)
            for i in range(scan):
                size = least + np.float32(i)
                scales, error = _try(tile, weights, form, d, size, scales, error)
                scales, error = _try(tile, weights, form, d, _ZERO - size, scales, error)
        total = _total(error * alive, form.size)
        better = total < best_error
        best_error = where(better, total, best_error)
        best_d = where(better, stored, best_d)
        best_scales = where(better, scales, best_scales)
    return best_d, best_scales


@inner
def _levels(tile: Any, form: Any, step: Any, rows: Any) -> None:
    """What rounds to the best levels for the stored scales: 16 weights of a sub-block in turn."""
    divisor = where(step == _ZERO, spread(_ONE), step)
    for i in range(form.size):
        level = _clamp(load(tile, LANES * i) / divisor, form.low, form.high)
        store(tile, LANES * i, where(step == _ZERO, spread(_ZERO), level))
    for i in range(0, form.size, LANES):
        transpose(tile, LANES * i, LANES, LANES, rows, LANES * i)


@inner
def _put_q3(rows: Any, h: Any, scales: Any, out: Any, at: Any) -> None:
    for i in range(96, 110):
        out[at + i] = 0
    put_half(out, at + 108, h)
    steps = np.ones(LANES, np.float32)
    for j in range(16):
        s = int(scales[j]) + 32
        out[at + 96 + j % 8] |= (s & 15) << (4 * (j // 8))
        out[at + 104 + j % 4] |= (s >> 4) << (2 * (j // 4))
    put_q3_k(rows, 0, steps, rows, out, at)


@inner
def _put_q6(rows: Any, h: Any, scales: Any, out: Any, at: Any) -> None:
    put_half(out, at + 208, h)
    for j in range(16):
        out[at + 192 + j] = int(scales[j]) & 0xFF
    for part in range(2):
        for side in range(2):
            top = spread_int(0)
            for j in range(2):
                lane = 8 * part + 2 * j + side
                low = nearest_code(load(rows, LANES * lane), -32, 31) + 32
                high = nearest_code(load(rows, LANES * (lane + 4)), -32, 31) + 32
                store_bytes(out, at + 64 * part + 32 * j + 16 * side, low & 15 | high << 4)
                top = top | low >> 4 << (2 * j) | high >> 4 << (2 * j + 4)
            store_bytes(out, at + 128 + 32 * part + 16 * side, top)


@inner
def _put_iq4_xs(rows: Any, h: Any, scales: Any, lane: Any, out: Any, at: Any) -> None:
    put_half(out, at, h)
    for j in range(2, 8):
        out[at + j] = 0
    for j in range(8):
        s = int(scales[lane + j]) + 32
        out[at + 2 + j // 4] |= (s >> 4) << (2 * (j % 4))
        out[at + 4 + j // 2] |= (s & 15) << (4 * (j % 2))
        low = _code(load(rows, LANES * (lane + j)))
        high = _code(load(rows, LANES * (LANES + lane + j)))
        store_bytes(out, at + 8 + 16 * j, low | high << 4)


@kernel
def _encode(x: Any, importance: Any, cols: Any, form: Any, plan: Any, out: Any) -> None:
    tile = np.empty(2 * LANES * LANES, np.float32)
    weights = np.ones(2 * LANES * LANES, np.float32)
    rows = np.empty(2 * LANES * LANES, np.float32)
    halves = np.empty(LANES, np.float32)
    integers = np.empty(LANES, np.float32)
    alive = spread(_ONE)
    subs = SUPER_BLOCK // form.size
    at_once = LANES // subs
    blocks = x.size // SUPER_BLOCK
    for first in range(0, blocks, at_once):
        count = min(at_once, blocks - first)
        start = SUPER_BLOCK * first
        read_weights(x, start, form.size, subs * count, tile)
        largest, unit, factor = _normalize(tile, form.size)
        if importance.size:
            read_weights(importance, start % cols, form.size, subs * count, weights)
            alive = _weigh(weights, form.size)
        d, scales = _search_block(tile, weights, form, plan, alive, largest, unit, factor)
        _levels(tile, form, d * factor * scales, rows)
        store(halves, 0, d)
        store(integers, 0, scales)
        for b in range(count):
            at = form.block_bytes * (first + b)
            if form.block_bytes == 110:
                _put_q3(rows, halves[0], integers, out, at)
            elif form.block_bytes == 210:
                _put_q6(rows, halves[0], integers, out, at)
            else:
                _put_iq4_xs(rows, halves[subs * b], integers, subs * b, out, at)


def search(weights: np.ndarray, encoding: Encoding, importance: np.ndarray | None) -> Parts:
    """Encode ``weights``, f32 ``[rows, cols]`` in C order, with ``importance`` f32 ``[cols]``."""
    plan = PLANS[encoding.name]
    rows, cols = weights.shape
    out = np.empty((rows, encoding.nbytes((cols,))), np.uint8)
    columns = np.empty(0, np.float32)
    if importance is not None:
        # Pairs of super-blocks may pass the end of a row.
        columns = np.resize(importance, cols + SUPER_BLOCK)
    trials = (
        as_input(np.array(plan.spans, np.float32)),
        as_input(np.array(plan.divisors, np.float32)),
        plan.scan,
        np.float32(plan.reach),
        plan.rounds,
    )
    x = as_input(weights).reshape(-1)
    _encode(x, as_input(columns), cols, plan.form, trials, out.reshape(-1))
    return {"weight": out}
