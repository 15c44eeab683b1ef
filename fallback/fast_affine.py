"""The searching encoder of groups that store w ≈ scale · code + bias: MLX's affine, Q4_1, Q5_1.

For every group, in float32, with weights x, codes 0 … n = 2^bits - 1, and the importance of
columns divided by its largest in the group (where that is zero, all count alike):

1. A first pair (scale, bias) follows the rule of ``mx.quantize`` (``mlx_affine``) or of ggml's
   ``quantize_row_q4_1_ref``.
2. Trials: t = (x - middle) · n / (max - min) is x in steps from the middle of its range. A trial
   (k, c) rounds t · k + c to codes; the weighted least squares fit of t by them has an error in
   closed form. The fit with the least error makes the second pair.
3. The second pair is rounded as stored and codes are chosen for it as it is stored; the fit to
   those codes makes the next pair, and so on for ``ROUNDS`` pairs. Where bf16 is coarse beside the
   codes, the neighbours of the best pair follow (``NEIGHBOURS``).
4. All pairs are compared as they are stored, each with its best codes. The least weighted error
   wins, so none is above that of the first pair.

The trials were picked one after the other from a lattice, each for what it took off the weighted
error of a language model's groups of 32, 64 and 128 that those before it had left; more come at
widths where they pay. At three bits none cuts off much: what did lowered the error and harmed the
model. Groups without importance keep the first pair at three bits or fewer: pairs of less squared
error were found to make a model worse.

What a dtype would store as infinite is clipped to its largest number. NaN and infinite weights give
codes without meaning. Sixteen rows are searched side by side, as lanes: sums run over the positions
of a group in order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.encodings import Affine, Encoding
from mlxedge.fallback.bits import as_input, to_half
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
from mlxedge.fallback.plain import cast
from mlxedge.ops import Parts

#: Trials (k, c), by bits.
TRIALS = {
    2: (
        *((1.6, 0.0), (1.6, -0.4), (1.6, 0.4), (1.3, 0.0), (1.7, 0.2), (1.7, -0.2)),
        *((1.3, -0.2), (1.3, 0.2), (1.7, -0.6), (1.7, 0.6), (2.0, 0.0), (2.1, -0.4)),
    ),
    3: (
        *((1.15, 0.0), (1.15, 0.4), (1.15, -0.2), (1.15, 0.2), (1.15, -0.4), (1.05, 0.0)),
        *((1.05, -0.2), (1.05, 0.2), (1.15, -0.6), (1.15, 0.6), (1.05, 0.4), (1.05, -0.4)),
    ),
    4: (
        *((1.03, 0.0), (1.06, -0.4), (1.06, 0.2), (1.03, -0.2), (1.06, 0.4), (1.12, -0.2)),
        *((0.94, 0.4), (1.0, 0.2), (1.15, 0.2), (0.94, -0.4), (1.09, 0.0), (1.15, -0.4)),
    ),
    5: (
        *((1.0, 0.0), (1.0, 0.4), (1.0, -0.2), (1.03, 0.2), (0.97, -0.4), (1.03, -0.4)),
        *((0.94, 0.0), (1.03, 0.0), (0.97, -0.6), (1.0, 0.2)),
    ),
    6: (
        *((1.01, 0.0), (0.995, -0.4), (0.995, 0.2), (0.965, -1.0), (0.98, 0.4), (0.995, -0.2)),
        *((0.95, 0.6), (1.01, 0.4)),
    ),
    8: ((0.996, 0.6), (0.992, -1.0), (1.0, 0.0), (0.988, -0.6), (0.984, -1.0), (0.996, -0.6)),
}
#: How many stored pairs are tried after the first.
ROUNDS = 3
#: The fewest bits at which pairs are searched where all columns count alike.
ALIKE = 4
#: From this many bits on, bf16 is so coarse a store that neighbours of the best pair are tried:
#: the scale, then the bias, moved by this part of itself, which is the next bf16 either way.
NEIGHBOURS, NEARBY = 6, np.float32(0.7 * 2.0**-7)

#: Dtypes of the stored pairs, and the largest finite number of each.
F32, F16, BF16 = 0, 1, 2
_KINDS = {"f32": F32, "f16": F16, "bf16": BF16}
_MOST = np.array([3.4028235e38, 65504.0, 3.3895314e38], np.float32)
#: Where the words of a group go: codes as one stream of bits, or a block of ggml.
_STREAM, _Q4_1, _Q5_1 = 0, 1, 2
_GGML = {"q4_1": (4, _Q4_1), "q5_1": (5, _Q5_1)}

#: Least squares with a determinant this much smaller than its terms keep the scale.
SINGULAR = np.float32(2.0**-16)
#: Ranges in which nothing of the search overflows or vanishes; other groups keep the first pair.
LEAST_RANGE, MOST_RANGE = np.float32(2.0**-100), np.float32(2.0**126)
#: Smaller scales have no inverse: all codes are 0.
LEAST_SCALE = np.float32(2.0**-126)

_ZERO, _HALF = np.float32(0.0), np.float32(0.5)
_ONE, _TWO = np.float32(1.0), np.float32(2.0)
#: The smallest scale that MLX gives a group.
_EPSILON = np.float32(1e-7)
#: 1.5 · 2^23: added to a float, it leaves the nearest integer in the low bits.
_MAGIC, _MAGIC_BITS = np.float32(12582912.0), 0x4B400000
#: Floats below this are rounded by adding _MAGIC.
_WHOLE = np.float32(2.0**22)
_F16_NORMAL = np.float32(2.0**-14)
_SIGN = -0x80000000

#: Offsets in the scratch that inner functions leave results in.
_SCALE, _BIAS, _LOW, _HIGH = 0, LANES, 2 * LANES, 3 * LANES


def search(weights: np.ndarray, encoding: Encoding, importance: np.ndarray | None) -> Parts:
    """Encode f32 ``weights`` ``[rows, cols]`` (C order); ``importance`` f32 ``[cols]`` or None."""
    rows, cols = weights.shape
    if isinstance(encoding, Affine):
        bits, layout, kind = encoding.bits, _STREAM, _KINDS[encoding.scale_dtype]
    else:
        (bits, layout), kind = _GGML[encoding.name], F16
    group = encoding.block
    factors, totals, weighed = _column_weights(importance, cols, group)
    rounds = np.where(weighed | (bits >= ALIKE), ROUNDS, 0)
    words = np.empty((rows, encoding.nbytes((cols,)) // 4 if layout else cols * bits // 32), "u4")
    scales = np.empty((rows, cols // group) if layout == _STREAM else (0, 0), np.float32)
    biases = np.empty_like(scales)
    _search(
        as_input(weights.reshape(-1)),
        cols,
        group,
        bits,
        kind,
        layout,
        factors.reshape(-1),
        totals,
        np.array(TRIALS[bits], np.float32).reshape(-1),
        rounds,
        words.reshape(-1),
        scales.reshape(-1),
        biases.reshape(-1),
    )
    if not isinstance(encoding, Affine):
        return {"weight": words.view(np.uint8)}
    return {
        "weight": words,
        "scales": cast(scales, encoding.scale_dtype),
        "biases": cast(biases, encoding.scale_dtype),
    }


def _column_weights(
    importance: np.ndarray | None, cols: int, group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Importance by group, its largest 1: f32 ``[groups, group]``; the sums, added in order; and
    whether there was any."""
    given = np.zeros(cols, np.float32) if importance is None else importance
    given = given.reshape(-1, group)
    most = given.max(axis=1, keepdims=True, initial=0.0)
    one = np.float32(1.0)
    factors: np.ndarray = np.where(most > 0, given, one) / np.where(most > 0, most, one)
    return factors, np.cumsum(factors, axis=1, dtype=np.float32)[:, -1].copy(), most[:, 0] > 0


@inline
def _stored(v: Any, kind: Any) -> Any:
    """``v`` clipped to the finite numbers of its dtype and rounded to them."""
    most = _MOST[kind]
    v = where(v > most, spread(most), v)
    v = where(v < -most, spread(-most), v)
    bits = as_bits(v)
    if kind == BF16:
        return as_float((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000)
    if kind == F16:
        normal = as_float((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000)
        # Below 2^-14 the unit of f16 is that of f32 in [0.5, 1): let the addition round.
        tiny = as_float(as_bits((absolute(v) + _HALF) - _HALF) | (bits & _SIGN))
        return where(absolute(v) < _F16_NORMAL, tiny, normal)
    return v


@inline
def _inverse(scale: Any) -> Any:
    usable = absolute(scale) > LEAST_SCALE
    return where(usable, _ONE / where(usable, scale, spread(_ONE)), spread(_ZERO))


@inline
def _nearest(v: Any, low: Any, high: Any) -> Any:
    """The nearest of the integers low … high, as float lanes."""
    bits = as_bits(v + _MAGIC)
    return as_float(larger(smaller(bits, high + _MAGIC_BITS), low + _MAGIC_BITS)) - _MAGIC


@inline
def _fitted(
    total: Any, sum_x: Any, sum_l: Any, sum_ll: Any, sum_xl: Any, otherwise: Any
) -> tuple[Any, Any]:
    """Slope and offset of the least squares fit of x by levels, from weighted sums; of the offset
    alone, with the slope ``otherwise``, where that is singular."""
    determinant = total * sum_ll - sum_l * sum_l
    slope = (total * sum_xl - sum_x * sum_l) / determinant
    slope = where(determinant > sum_ll * (total * SINGULAR), slope, otherwise)
    return slope, (sum_x - slope * sum_l) / total


@inner
def _first_pair(tile: Any, n: Any, top: Any, layout: Any, found: Any) -> None:
    """The scale and bias of the reference encoder, unrounded; the range of the weights."""
    low = load(tile, 0)
    high = low
    for i in range(1, n):
        x = load(tile, LANES * i)
        low = where(x < low, x, low)
        high = where(x > high, x, high)
    # Which zero came first must not matter.
    low = where(low == _ZERO, spread(_ZERO), low)
    high = where(high == _ZERO, spread(_ZERO), high)
    scale = (high - low) / np.float32(top)
    bias = low
    if layout == _STREAM:
        negative = absolute(low) > absolute(high)
        scale = where(scale > _EPSILON, scale, spread(_EPSILON))
        scale = where(negative, scale, _ZERO - scale)
        edge = where(negative, low, high)
        steps = edge / scale
        steps = where(absolute(steps) < _WHOLE, (steps + _MAGIC) - _MAGIC, steps)
        some = steps != _ZERO
        scale = where(some, edge / steps, scale)
        bias = where(some, edge, spread(_ZERO))
    store(found, _SCALE, scale)
    store(found, _BIAS, bias)
    store(found, _LOW, low)
    store(found, _HIGH, high)


@inner
def _best_trial(
    tile: Any, w: Any, at: Any, n: Any, top: Any, total: Any, sum_t: Any, trials: Any, found: Any
) -> None:
    """The best fit t ≈ scale · (code - (n + 1) / 2) + bias; ``tile`` holds t."""
    best = spread(np.float32(np.inf))
    best_scale = spread(_ONE)
    best_bias = spread(_ZERO)
    low = -((top + 1) // 2)
    high = top + low
    for trial in range(trials.size // 2):
        k = trials[2 * trial]
        # Codes are whole, the middle of the range lies between two of them.
        c = trials[2 * trial + 1] - _HALF
        sum_l = spread(_ZERO)
        sum_ll = spread(_ZERO)
        sum_tl = spread(_ZERO)
        for i in range(n):
            t = load(tile, LANES * i)
            level = _nearest(t * k + c, low, high)
            wl = level * w[at + i]
            sum_l = sum_l + wl
            sum_ll = sum_ll + wl * level
            sum_tl = sum_tl + wl * t
        scale, bias = _fitted(total, sum_t, sum_l, sum_ll, sum_tl, spread(_ONE / k))
        # The error without the sum of w · t², which all trials share.
        error = scale * (scale * sum_ll - sum_tl * _TWO)
        error = error + bias * (bias * total + (scale * sum_l - sum_t) * _TWO)
        better = error < best
        best = where(better, error, best)
        best_scale = where(better, scale, best_scale)
        best_bias = where(better, bias, best_bias)
    store(found, _SCALE, best_scale)
    store(found, _BIAS, best_bias)


@inner
def _weigh(
    tile: Any,
    w: Any,
    at: Any,
    n: Any,
    top: Any,
    total: Any,
    scale: Any,
    bias: Any,
    step: Any,
    per_step: Any,
    found: Any,
) -> Any:
    """The weighted error, in squares of ``step``, of a stored pair; the pair fitted to its codes.

    A scale without an inverse leaves every weight at the bias.
    """
    usable = absolute(scale) > LEAST_SCALE
    unit = where(usable, scale, step)
    inverse = where(usable, _inverse(scale), per_step)
    relative = where(usable, scale * per_step, spread(_ONE))
    high = where(usable, spread_int(top), spread_int(0))
    error = spread(_ZERO)
    sum_r = spread(_ZERO)
    sum_l = spread(_ZERO)
    sum_ll = spread(_ZERO)
    sum_rl = spread(_ZERO)
    for i in range(n):
        y = (load(tile, LANES * i) - bias) * inverse
        level = _nearest(y, 0, high)
        rest = y - level
        factor = w[at + i]
        wr = rest * factor
        wl = level * factor
        error = error + wr * rest
        sum_r = sum_r + wr
        sum_l = sum_l + wl
        sum_ll = sum_ll + wl * level
        sum_rl = sum_rl + wr * level
    slope, offset = _fitted(total, sum_r, sum_l, sum_ll, sum_rl, spread(_ZERO))
    store(found, _SCALE, scale + scale * slope)
    store(found, _BIAS, bias + unit * offset)
    return error * (relative * relative)


@inner
def _to_steps(tile: Any, w: Any, at: Any, n: Any, middle: Any, per_step: Any, steps: Any) -> Any:
    """The weights in steps from the middle, and their weighted sum."""
    total = spread(_ZERO)
    for i in range(n):
        t = (load(tile, LANES * i) - middle) * per_step
        store(steps, LANES * i, t)
        total = total + t * w[at + i]
    return total


@inner
def _pack(tile: Any, n: Any, bits: Any, layout: Any, scale: Any, bias: Any, packed: Any) -> None:
    """The codes of a group as words ``[words, 16]``; a block of ggml leaves its first word."""
    inverse = _inverse(scale)
    top = (1 << bits) - 1
    word = spread_int(0)
    if layout == _STREAM:
        at = 0
        filled = 0
        for i in range(n):
            y = (load(tile, LANES * i) - bias) * inverse
            code = larger(smaller(as_bits(y + _MAGIC), top + _MAGIC_BITS), _MAGIC_BITS)
            code = code - _MAGIC_BITS
            word = word | (code << filled)
            filled += bits
            if filled >= 32:
                store(packed, at, as_float(word))
                at += LANES
                filled -= 32
                word = code >> (bits - filled)
        return
    fifth = spread_int(0)
    at = LANES * layout
    for i in range(n // 2):
        for half in range(2):
            y = (load(tile, LANES * (i + half * (n // 2))) - bias) * inverse
            code = larger(smaller(as_bits(y + _MAGIC), top + _MAGIC_BITS), _MAGIC_BITS)
            code = code - _MAGIC_BITS
            word = word | ((code & 15) << (8 * (i % 4) + 4 * half))
            fifth = fifth | ((code >> 4) << (i + half * (n // 2)))
        if i % 4 == 3:
            store(packed, at, as_float(word))
            at += LANES
            word = spread_int(0)
    if layout == _Q5_1:
        store(packed, LANES, as_float(fifth))


@kernel
def _search(
    x: Any,
    cols: Any,
    group: Any,
    bits: Any,
    kind: Any,
    layout: Any,
    w: Any,
    totals: Any,
    trials: Any,
    rounds: Any,
    words: Any,
    scales: Any,
    biases: Any,
) -> None:
    """Fill ``words`` uint32 ``[rows · groups · words per group]``, and for a stream f32 ``scales``
    and ``biases`` ``[rows · groups]``."""
    groups = cols // group
    top = (1 << bits) - 1
    width = np.float32(top)
    center = np.float32((top + 1) // 2)
    per_group = group * bits // 32 + (1 if layout != _STREAM else 0)
    tile = np.empty(LANES * group, np.float32)
    steps = np.empty(LANES * group, np.float32)
    found = np.empty(4 * LANES, np.float32)
    packed = np.empty(LANES * per_group, np.float32)
    packed_words = packed.view(np.uint32)
    rows = x.size // cols if cols else 0
    for row in range(0, rows, LANES):
        count = min(LANES, rows - row)
        for g in range(groups):
            at = g * group
            total = totals[g]
            for j in range(0, group, LANES):
                transpose(x, row * cols + at + j, cols, count, tile, LANES * j)
            _first_pair(tile, group, top, layout, found)
            scale = _stored(load(found, _SCALE), kind)
            bias = _stored(load(found, _BIAS), kind)
            low = load(found, _LOW)
            high = load(found, _HIGH)
            spanned = high - low
            usable = (spanned > LEAST_RANGE) & (spanned < MOST_RANGE)
            spanned = where(usable, spanned, spread(_ONE))
            step = spanned / width
            per_step = width / spanned
            middle = low * _HALF + high * _HALF
            best = _weigh(tile, w, at, group, top, total, scale, bias, step, per_step, found)
            new_scale = scale
            new_bias = bias
            if rounds[g] > 0:
                sum_t = _to_steps(tile, w, at, group, middle, per_step, steps)
                _best_trial(steps, w, at, group, top, total, sum_t, trials, found)
                new_scale = load(found, _SCALE)
                new_bias = middle + step * (load(found, _BIAS) - new_scale * center)
                new_scale = new_scale * step
            for _ in range(rounds[g]):
                new_scale = _stored(new_scale, kind)
                new_bias = _stored(new_bias, kind)
                error = _weigh(
                    tile, w, at, group, top, total, new_scale, new_bias, step, per_step, found
                )
                better = (error < best) & usable
                best = where(better, error, best)
                scale = where(better, new_scale, scale)
                bias = where(better, new_bias, bias)
                new_scale = load(found, _SCALE)
                new_bias = load(found, _BIAS)
            old_scale = scale
            old_bias = bias
            if kind == BF16 and bits >= NEIGHBOURS:
                for trial in range(4):
                    nearby = -NEARBY if trial % 2 else NEARBY
                    if trial % 2 == 0:
                        old_scale = scale
                        old_bias = bias
                    if trial < 2:
                        new_scale = _stored(old_scale + old_scale * nearby, kind)
                        new_bias = old_bias + (old_scale - new_scale) * (width * _HALF)
                    else:
                        new_scale = old_scale
                        new_bias = old_bias + old_bias * nearby
                    new_bias = _stored(new_bias, kind)
                    error = _weigh(
                        tile, w, at, group, top, total, new_scale, new_bias, step, per_step, found
                    )
                    better = (error < best) & usable
                    best = where(better, error, best)
                    scale = where(better, new_scale, scale)
                    bias = where(better, new_bias, bias)
            _pack(tile, group, bits, layout, scale, bias, packed)
            store(found, _SCALE, scale)
            store(found, _BIAS, bias)
            for k in range(count):
                block = (row + k) * groups + g
                if layout == _STREAM:
                    scales[block] = found[_SCALE + k]
                    biases[block] = found[_BIAS + k]
                else:
                    pair = np.uint32(to_half(found[_SCALE + k]))
                    pair |= np.uint32(to_half(found[_BIAS + k])) << np.uint32(16)
                    packed_words[k] = pair
                for i in range(per_group):
                    words[block * per_group + i] = packed_words[LANES * i + k]
