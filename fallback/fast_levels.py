"""Searches for formats whose blocks have one stored scale and a fixed table of levels.

The scale of a block is the one, as it is stored, with the least Σ w · (x - scale · level)², w being
the importance of a weight's column, where each weight has the level nearest to it.

* float16 scales (Q4_0, Q5_0, Q8_0, IQ4_NL, TQ1_0, TQ2_0). A trial makes the extreme weight so many
  levels large, on either side of zero where levels are not symmetric. Weighted least squares fit a
  scale to its levels: that removes (Σ w·x·level)² / Σ w·level² of the error. The best trial's scale
  is rounded, gets new levels, is fitted and rounded again; it and its neighbours in float16 are
  compared with the scale that the runtime's rule gives without importance.
* E8M0 scales (MXFP4, MXFP8): the least power of two that cuts no weight off, and the next below it.
  Greater ones have no better levels. Bytes that make the largest level infinite are not used.
* E4M3 scales (NVFP4): that of MLX's rule and those about it.

Little is cut off: trials end where the extreme weight would lose about a seventh, or with E8M0 a
quarter. Where importance is far from even, wider ranges lower the weighted error much more, yet a
model measured with them (SmolLM2-135M, Q4_0) came out no nearer to the original.

Columns without importance are left out, but where a block has no others: there all count alike.
Blocks are searched in units of a power of two that makes the extreme weight 2…4, so nothing
overflows; a scale beyond float16 becomes its largest number. Levels are those of ggml-common.h
(llama.cpp as vendored by llama-cpp-python 0.3.36) and mlx 0.32; Q8_0 uses -127…127. Infinities and
NaN give meaningless bytes.

Sums run over the weights of a block in order. Lanes are the same block of sixteen rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxedge.encodings import Encoding
from mlxedge.fallback.bits import DTYPES, as_input
from mlxedge.fallback.ggml_iq4 import _code as iq4_code
from mlxedge.fallback.ggml_iq4 import _level as iq4_level
from mlxedge.fallback.ggml_legacy import put_fifth_bits
from mlxedge.fallback.ggml_small import encode_tq1_0, encode_tq2_0
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.lanes import (
    LANES,
    absolute,
    as_bits,
    as_float,
    float_bits,
    inline,
    larger,
    load,
    smaller,
    spread,
    spread_int,
    store,
    store_bytes,
    store_nibbles,
    transpose,
    truncate,
    where,
)
from mlxedge.ops import Parts

_ZERO, _HALF, _ONE, _TWO = (np.float32(v) for v in (0.0, 0.5, 1.0, 2.0))
_FOUR, _SIX, _INFINITY = np.float32(4.0), np.float32(6.0), np.float32(np.inf)
#: 1.5 · 2^23: added and taken off again, it rounds to whole numbers, ties to even.
_MAGIC = np.float32(12582912.0)
_EXPONENT, _SIGN = 0x7F800000, -0x80000000
_LARGEST_HALF, _LARGEST_E4M3 = 0x7BFF, 126
#: With greater E8M0 bytes the largest levels of E2M1 and E4M3 would be infinite.
_LARGEST_BYTE_E2M1, _LARGEST_BYTE_E4M3 = 252, 246

#: Tables of levels: signed ones, then those that magnitudes have.
_INT4, _INT5, _IQ4, _INT8, _TRIT, _E2M1, _E4M3 = range(7)


@inline
def _clipped(v: Any, low: Any, high: Any) -> Any:
    v = where(v < high, v, spread(high))
    return where(v > low, v, spread(low))


@inline
def _nearest(v: Any, levels: Any) -> Any:
    """The level nearest to each ``v``; NaN gives any."""
    if levels == _INT4:
        return (_clipped(v, np.float32(-8.0), np.float32(7.0)) + _MAGIC) - _MAGIC
    if levels == _INT5:
        return (_clipped(v, np.float32(-16.0), np.float32(15.0)) + _MAGIC) - _MAGIC
    if levels == _IQ4:
        return iq4_level(v)
    if levels == _INT8:
        most = np.float32(127.0)
        return (where(v < most, v, spread(most)) + _MAGIC) - _MAGIC
    if levels == _TRIT:
        return where(v > _HALF, spread(_ONE), spread(_ZERO))
    if levels == _E2M1:
        v = where(v < _SIX, v, spread(_SIX))
        # Levels are 1/2 apart below 2, 1 below 4, then 2.
        magic = where(v < _FOUR, spread(_MAGIC), spread(_MAGIC * _TWO))
        magic = where(v < _TWO, spread(_MAGIC * _HALF), magic)
        return (v + magic) - magic
    most = np.float32(448.0)
    v = where(v < most, v, spread(most))
    # Three bits of mantissa; below 2^-6 levels stay 2^-9 apart.
    magic = as_float(larger(as_bits(v) & _EXPONENT, 121 << 23) + (20 << 23 | 0x400000))
    return (v + magic) - magic


@inline
def _code(x: Any, factor: Any, inverse: Any, levels: Any) -> Any:
    """The codes of weights; what is zero has the positive zero's."""
    v = (x * factor) * inverse
    if levels == _IQ4:
        return iq4_code(v)
    if levels == _INT4:
        return truncate(_nearest(v, levels)) + 8
    if levels == _INT5:
        return truncate(_nearest(v, levels)) + 16
    level = _nearest(absolute(v), levels)
    none = spread_int(0)
    if levels == _INT8:
        code = truncate(level)
        return where(v < _ZERO, 0 - code, code)
    if levels == _E2M1:
        # From 1 on, the exponent and one bit of mantissa count up.
        code = where(level < _ONE, spread_int(1), (as_bits(level) >> 22) - 252)
        code = where(level > _ZERO, code, none)
        return where((v < _ZERO) & (code > 0), code | 8, code)
    code = where(
        level < np.float32(2.0**-6),
        truncate(level * np.float32(512.0)),
        (as_bits(level) >> 20) - (120 << 3),
    )
    return where((v < _ZERO) & (code > 0), code | 128, code)


@inline
def _half_bits(v: Any) -> Any:
    """The binary16 bits of magnitudes, to nearest; at most those of the largest number."""
    bits = as_bits(v)
    normal = ((bits - 0x37FFF001) + ((bits >> 13) & 1)) >> 13
    tiny = as_bits(v + _HALF) - 0x3F000000
    return smaller(where(bits > 0x387FFFFF, normal, tiny), _LARGEST_HALF)


@inline
def _half_value(bits: Any, sign: Any, power: Any) -> Any:
    """Magnitudes of binary16 in units of a block, with their signs."""
    tiny = (as_float(bits | 0x4B000000) - np.float32(2.0**23)) * np.float32(2.0**-24)
    value = where(bits > 0x3FF, as_float((bits << 13) + (112 << 23)), tiny)
    return as_float(as_bits(value * power) | sign)


@inline
def _e4m3_code(v: Any) -> Any:
    """The E4M3 code of magnitudes, to nearest; at most that of the largest number."""
    bits = as_bits(v)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    tiny = as_bits(v + np.float32(2.0**14)) - 0x46800000
    return smaller(where(bits > 0x3C7FFFFF, normal, tiny), _LARGEST_E4M3)


@inline
def _e8m0_rule(largest: Any, levels: Any, zero: Any) -> Any:
    """The byte that runtimes give to a block with this largest magnitude, ``zero`` to zeros.

    ggml, with ``zero`` 0, divides the power of two of the magnitude by 4; MLX takes the least power
    that cuts nothing off.
    """
    if zero == 0:
        return larger((as_bits(largest) >> 23) - 2, 0)
    bits = as_bits(largest / (_SIX if levels == _E2M1 else np.float32(448.0)))
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    below = where(exponent > 0, spread_int(0), spread_int(0x400000))
    byte = where(mantissa > below, exponent + 1, exponent)
    return where(bits > 0, byte, spread_int(zero))


@inline
def _byte_value(code: Any, exponent: Any, power: Any, e4m3: Any) -> Any:
    """Scales of E4M3 codes or E8M0 bytes in units of a block."""
    if not e4m3:
        return as_float(smaller(larger(code - exponent + 128, 1), 254) << 23)
    tiny = (as_float(code | 0x4B000000) - np.float32(2.0**23)) * np.float32(2.0**-9)
    return where(code > 7, as_float((code << 20) + (120 << 23)), tiny) * power


@inline
def _inverse(scale: Any) -> Any:
    return where(scale != _ZERO, _ONE / scale, spread(_ZERO))


@inline
def _read(
    x: Any, start: Any, cols: Any, count: Any, weights: Any, n: Any, signed: Any, tile: Any
) -> Any:
    """The raw weights of a block, with their extremes in all columns and in those that count.

    Unless ``signed``, magnitudes. Where no column that counts has a weight, all do.
    """
    for i in range(0, n, LANES):
        transpose(x, start + i, cols, count, tile, LANES * i)
    largest, extreme = spread(_ZERO), spread(_ZERO)
    all_largest, all_extreme = spread(_ZERO), spread(_ZERO)
    for i in range(n):
        v = load(tile, LANES * i)
        size = absolute(v)
        if not signed:
            v = size
        more = size > all_largest
        all_largest = where(more, size, all_largest)
        all_extreme = where(more, v, all_extreme)
        if weights[i] > _ZERO:
            more = size > largest
            largest = where(more, size, largest)
            extreme = where(more, v, extreme)
    none = largest == _ZERO
    return all_extreme, where(none, all_extreme, extreme)


@inline
def _prepare(tile: Any, products: Any, weights: Any, n: Any, signed: Any, power: Any) -> None:
    """Bring the weights that count to the units of their block, and multiply by importance."""
    for i in range(n):
        v = load(tile, LANES * i) * power
        if not signed:
            v = absolute(v)
        if weights[i] == _ZERO:
            v = spread(_ZERO)
        store(tile, LANES * i, v)
        store(products, LANES * i, v * weights[i])


@inline
def _fit(tile: Any, products: Any, weights: Any, n: Any, inverse: Any, levels: Any) -> Any:
    """Σ w · x · level and Σ w · level² for the levels that ``inverse`` gives."""
    sum_xl, sum_ll = spread(_ZERO), spread(_ZERO)
    for i in range(n):
        level = _nearest(load(tile, LANES * i) * inverse, levels)
        sum_xl = sum_xl + load(products, LANES * i) * level
        sum_ll = sum_ll + (level * level) * weights[i]
    return sum_xl, sum_ll


@inline
def _error(tile: Any, weights: Any, n: Any, scale: Any, levels: Any) -> Any:
    """Σ w · (x - scale · level)²; infinite where it is no number."""
    inverse = _inverse(scale)
    total = spread(_ZERO)
    for i in range(n):
        x = load(tile, LANES * i)
        difference = x - _nearest(x * inverse, levels) * scale
        total = total + (difference * difference) * weights[i]
    return where(total < _INFINITY, total, spread(_INFINITY))


@inline
def _search_half(
    tile: Any,
    products: Any,
    weights: Any,
    n: Any,
    levels: Any,
    trials: Any,
    rule: Any,
    extreme: Any,
    power: Any,
    unit: Any,
) -> Any:
    """The binary16 bits of the best scale, and their sign as a float's. ``rule``: another."""
    whole = extreme * power
    whole = where(whole != _ZERO, whole, spread(_ONE))
    best_xl, best_ll = spread(_ZERO), spread(_ONE)
    for t in range(trials.size):
        xl, ll = _fit(tile, products, weights, n, trials[t] / whole, levels)
        better = (xl * xl) * best_ll > (best_xl * best_xl) * ll
        best_xl = where(better, xl, best_xl)
        best_ll = where(better, ll, best_ll)
    bits, sign = _half_bits(absolute(rule)), as_bits(rule) & _SIGN
    error = _error(tile, weights, n, _half_value(bits, sign, power), levels)
    for turn in range(2):
        if turn:
            inverse = _inverse(_half_value(bits, sign, power))
            best_xl, best_ll = _fit(tile, products, weights, n, inverse, levels)
        fitted = where(best_ll != _ZERO, best_xl / best_ll, spread(_ZERO))
        other, its_sign = _half_bits(absolute(fitted) * unit), as_bits(fitted) & _SIGN
        trial = _error(tile, weights, n, _half_value(other, its_sign, power), levels)
        better = trial < error
        error = where(better, trial, error)
        bits = where(better, other, bits)
        sign = where(better, its_sign, sign)
    middle = bits
    for step in range(-1, 2, 2):
        other = smaller(larger(middle + step, 0), _LARGEST_HALF)
        trial = _error(tile, weights, n, _half_value(other, sign, power), levels)
        better = trial < error
        error = where(better, trial, error)
        bits = where(better, other, bits)
    return bits, sign


@inline
def _put_block(
    x: Any,
    start: Any,
    factor: Any,
    inverse: Any,
    levels: Any,
    out: Any,
    at: Any,
) -> None:
    """Write the codes of a block of 32."""
    low = _code(load(x, start), factor, inverse, levels)
    high = _code(load(x, start + LANES), factor, inverse, levels)
    if levels == _INT8:
        store_bytes(out, at, low)
        store_bytes(out, at + LANES, high)
    elif levels == _INT5:
        put_fifth_bits(out, at, low, high)
        store_bytes(out, at + 4, low & 15 | (high & 15) << 4)
    else:
        store_bytes(out, at, low | high << 4)


@inline
def _encode_half(
    x: Any, weights: Any, cols: Any, trials: Any, rule: Any, n: Any, levels: Any, out: Any
) -> None:
    """Blocks of ``n`` with a binary16 scale. ``rule``: the level of the extreme weight."""
    tile = np.empty(n * LANES, np.float32)
    products = np.empty(n * LANES, np.float32)
    found = np.empty(3 * LANES, np.float32)
    signed = levels < _INT8
    size = n * out.size // x.size
    for first in range(0, x.size // cols, LANES):
        count = min(LANES, x.size // cols - first)
        for column in range(0, cols, n):
            start = first * cols + column
            of_block = weights[column : column + n]
            all_extreme, extreme = _read(x, start, cols, count, of_block, n, signed, tile)
            exponent = larger(as_bits(absolute(extreme)) >> 23, 1)
            power = as_float((255 - exponent) << 23)
            unit = as_float(larger(exponent - 1, 1) << 23)
            _prepare(tile, products, of_block, n, signed, power)
            bits, sign = _search_half(
                tile,
                products,
                of_block,
                n,
                levels,
                trials,
                all_extreme / rule,
                extreme,
                power,
                unit,
            )
            store(found, 0, as_float(bits | (sign >> 16 & 0x8000)))
            store(found, LANES, power)
            store(found, 2 * LANES, _inverse(_half_value(bits, sign, power)))
            for k in range(count):
                here = start + k * cols
                at = here // n * size
                half = float_bits(found[k])
                factor, inverse = found[LANES + k], found[2 * LANES + k]
                if levels == _TRIT:
                    # As ggml packs weights that are trits: then its scale, 1, becomes ours.
                    for i in range(0, n, LANES):
                        v = (load(x, here + i) * factor) * inverse
                        trit = _nearest(absolute(v), levels)
                        store(tile, i, where(v < _ZERO, -_ONE * trit, trit))
                    block = out[at : at + size]
                    if size == 54:
                        encode_tq1_0(tile[:256], block)
                    else:
                        encode_tq2_0(tile[:256], block)
                    at += size - 2
                else:
                    _put_block(x, here, factor, inverse, levels, out, at + 2)
                out[at] = half & 0xFF
                out[at + 1] = half >> 8 & 0xFF


@kernel
def _encode_q4_0(x: Any, weights: Any, cols: Any, trials: Any, out: Any) -> None:
    _encode_half(x, weights, cols, trials, np.float32(-8.0), 32, _INT4, out)


@kernel
def _encode_q5_0(x: Any, weights: Any, cols: Any, trials: Any, out: Any) -> None:
    _encode_half(x, weights, cols, trials, np.float32(-16.0), 32, _INT5, out)


@kernel
def _encode_q8_0(x: Any, weights: Any, cols: Any, trials: Any, out: Any) -> None:
    _encode_half(x, weights, cols, trials, np.float32(127.0), 32, _INT8, out)


@kernel
def _encode_iq4_nl(x: Any, weights: Any, cols: Any, trials: Any, out: Any) -> None:
    _encode_half(x, weights, cols, trials, np.float32(-127.0), 32, _IQ4, out)


@kernel
def _encode_ternary(x: Any, weights: Any, cols: Any, trials: Any, out: Any) -> None:
    _encode_half(x, weights, cols, trials, _ONE, 256, _TRIT, out)


@inline
def _encode_bytes(
    x: Any,
    weights: Any,
    cols: Any,
    steps: Any,
    zero: Any,
    n: Any,
    levels: Any,
    e4m3: Any,
    out: Any,
    scales: Any,
) -> None:
    """Blocks of ``n`` with a scale of one byte, E8M0 or E4M3: the codes to ``out``, the bytes to
    ``scales``. ``steps``: the bytes to try, from that of the rule; ``zero``: that of zeros.

    Without ``scales`` the byte precedes the codes, which are packed as ggml does.
    """
    tile = np.empty(n * LANES, np.float32)
    products = np.empty(n * LANES, np.float32)
    found = np.empty(3 * LANES, np.float32)
    size = n * out.size // x.size
    for first in range(0, x.size // cols, LANES):
        count = min(LANES, x.size // cols - first)
        for column in range(0, cols, n):
            start = first * cols + column
            of_block = weights[column : column + n]
            all_largest, largest = _read(x, start, cols, count, of_block, n, False, tile)
            exponent = larger(as_bits(largest) >> 23, 1)
            power = as_float((255 - exponent) << 23)
            _prepare(tile, products, of_block, n, False, power)
            if e4m3:
                most = _LARGEST_E4M3
                code, middle = _e4m3_code(all_largest / _SIX), _e4m3_code(largest / _SIX)
            else:
                most = _LARGEST_BYTE_E2M1 if levels == _E2M1 else _LARGEST_BYTE_E4M3
                # Half the power of two of the largest weight cuts none off, with E4M3 a 128th.
                middle = larger(exponent - (1 if levels == _E2M1 else 7), 0)
                code = smaller(_e8m0_rule(all_largest, levels, zero), most)
            scale = _byte_value(code, exponent, power, e4m3)
            error = _error(tile, of_block, n, scale, levels)
            for t in range(steps.size):
                other = smaller(larger(middle + steps[t], 0), most)
                scale = _byte_value(other, exponent, power, e4m3)
                trial = _error(tile, of_block, n, scale, levels)
                better = trial < error
                error = where(better, trial, error)
                code = where(better, other, code)
            store(found, 0, as_float(code))
            store(found, LANES, power)
            store(found, 2 * LANES, _inverse(_byte_value(code, exponent, power, e4m3)))
            for k in range(count):
                here = start + k * cols
                at = here // n * size
                factor, inverse = found[LANES + k], found[2 * LANES + k]
                if scales.size == 0:
                    out[at] = float_bits(found[k])
                    _put_block(x, here, factor, inverse, levels, out, at + 1)
                    continue
                scales[here // n] = float_bits(found[k])
                for i in range(0, n, LANES):
                    code_of = _code(load(x, here + i), factor, inverse, levels)
                    if levels == _E2M1:
                        store_nibbles(out, at + i // 2, code_of)
                    else:
                        store_bytes(out, at + i, code_of)


@kernel
def _encode_ggml_mxfp4(x: Any, weights: Any, cols: Any, steps: Any, out: Any, scales: Any) -> None:
    _encode_bytes(x, weights, cols, steps, 0, 32, _E2M1, False, out, scales)


@kernel
def _encode_mxfp4(x: Any, weights: Any, cols: Any, steps: Any, out: Any, scales: Any) -> None:
    _encode_bytes(x, weights, cols, steps, 127, 32, _E2M1, False, out, scales)


@kernel
def _encode_mxfp8(x: Any, weights: Any, cols: Any, steps: Any, out: Any, scales: Any) -> None:
    _encode_bytes(x, weights, cols, steps, 127, 32, _E4M3, False, out, scales)


@kernel
def _encode_nvfp4(x: Any, weights: Any, cols: Any, steps: Any, out: Any, scales: Any) -> None:
    _encode_bytes(x, weights, cols, steps, 0, 16, _E2M1, True, out, scales)


def _both(negative: tuple[float, ...], positive: tuple[float, ...]) -> np.ndarray:
    return np.array([-v for v in negative] + list(positive), np.float32)


@dataclass(frozen=True, eq=False)
class _Format:
    """A kernel and what it tries: levels that the extreme weight may have, or steps of the scale's
    byte."""

    kernel: Callable[..., None]
    tries: np.ndarray


_TERNARY = np.array(
    [1.0, 1.2, 1.4, 1.6, 1.9, 2.3, 2.7, 3.1, 3.7, 4.3, 5.1, 6.0, 8.0, 11.0], np.float32
)
_FORMATS = {
    "q4_0": _Format(
        _encode_q4_0,
        _both(
            (7.2, 7.5, 7.8, 8.0, 8.3, 8.6, 8.9, 9.2),
            (6.3, 6.6, 6.9, 7.2, 7.5, 7.8, 8.1, 8.4),
        ),
    ),
    "q5_0": _Format(
        _encode_q5_0,
        _both(
            (12.8, 13.4, 14.0, 14.6, 15.2, 15.8, 16.4, 17.0, 17.6, 18.3),
            (12.0, 12.6, 13.2, 13.8, 14.4, 15.0, 15.6, 16.2, 16.8, 17.4),
        ),
    ),
    "q8_0": _Format(_encode_q8_0, np.arange(105, 131).astype(np.float32)),
    "iq4_nl": _Format(
        _encode_iq4_nl,
        _both(
            (112.0, 117.0, 122.0, 127.0, 131.0, 135.0),
            (100.0, 105.0, 110.0, 113.0, 117.0, 121.0),
        ),
    ),
    "tq1_0": _Format(_encode_ternary, _TERNARY),
    "tq2_0": _Format(_encode_ternary, _TERNARY),
    "mxfp4": _Format(_encode_ggml_mxfp4, np.arange(0, -2, -1)),
    "mlx-mxfp4": _Format(_encode_mxfp4, np.arange(0, -2, -1)),
    "mlx-mxfp8": _Format(_encode_mxfp8, np.arange(0, -2, -1)),
    "mlx-nvfp4": _Format(_encode_nvfp4, np.arange(-2, 9)),
}


def search(weights: np.ndarray, encoding: Encoding, importance: np.ndarray | None) -> Parts:
    """Encode ``weights`` f32 ``[rows, cols]`` in C order; ``importance`` f32 ``[cols]``."""
    parts = {
        name: np.empty(part.shape, DTYPES[part.dtype])
        for name, part in encoding.parts(weights.shape).items()
    }
    if weights.size == 0:
        return parts
    cols = weights.shape[1]
    counts = _counts(importance, cols, encoding.block)
    form = _FORMATS[encoding.name]
    outs = [parts["weight"].reshape(-1).view(np.uint8)]
    if form.tries.dtype != np.float32:
        outs.append(parts["scales"].reshape(-1) if "scales" in parts else outs[0][:0])
    form.kernel(as_input(weights).reshape(-1), as_input(counts), cols, as_input(form.tries), *outs)
    return parts


def _counts(importance: np.ndarray | None, cols: int, block: int) -> np.ndarray:
    """``importance``, each block's times a power of two that makes its greatest 0.5…1; ones where
    all of a block, or none of it, is important."""
    if importance is None:
        return np.ones(cols, np.float32)
    blocks = importance.reshape(-1, block)
    greatest = blocks.max(axis=1, keepdims=True)
    counts = np.where(greatest > 0, np.ldexp(blocks, -np.frexp(greatest)[1]), np.float32(1.0))
    return counts.astype(np.float32).reshape(-1)
