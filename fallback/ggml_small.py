"""Encoders of ggml's formats that take the scale from the largest weight: MXFP4, TQ1_0 and TQ2_0.

Byte for byte ``quantize_row_mxfp4_ref`` and ``quantize_row_tq*_0_ref`` of ggml-quants.c (llama.cpp
as vendored by llama-cpp-python 0.3.36). They have no use for an importance matrix. Each kernel
takes the weights, float32 ``[block · n]``, and fills ``out``, uint8 ``[block bytes · n]``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.fallback.jit import kernel
from mlxedge.fallback.lanes import (
    LANES,
    absolute,
    as_bits,
    bits_float,
    float_bits,
    inline,
    lane_max,
    larger,
    load,
    put_half,
    spread_int,
    store_bytes,
    where,
)

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_TWO = np.float32(2.0)
_INFINITY = np.float32(np.inf)
_MANTISSA, _LEADING_BIT = 0x7FFFFF, 0x800000
#: ln 2 · 2^16
_LN2 = 45426


@inline
def _floor_log2(value: Any) -> Any:
    """``floorf(log2f(value))`` for a positive ``value`` and a log2f rounded to nearest.

    Numbers that are a little less than a power of two have a logarithm that rounds to a whole one.
    """
    bits = float_bits(value)
    exponent = bits >> 23
    significand = bits & _MANTISSA
    if exponent:
        significand |= _LEADING_BIT
    else:
        exponent = 1
        while significand < _LEADING_BIT:
            significand <<= 1
            exponent -= 1
    power = exponent - 127
    # d units of 2^-24 below 2^k, the logarithm is k - d / (ln 2 · 2^24). The next float from k in
    # that direction is 2^-23 · reach away; reach is the power of two that the size begins with.
    distance = 2 * _LEADING_BIT - significand
    size = power if power >= 0 else -power - 1
    if distance <= 64 and size:
        reach = 1
        while 2 * reach <= size:
            reach *= 2
        if distance <= reach * _LN2 >> 16:
            power += 1
    return power


@inline
def _mxfp4_codes(x: Any, d: Any, last: Any) -> Any:
    """Codes of the nearest of ±d · (0, 1, 2, 3, 4, 6, 8, 12), half-way to the smaller magnitude.

    ``last`` is the half-way point of 6 and 8.
    """
    size = absolute(x)
    one, none = spread_int(1), spread_int(0)
    code = where(size > _HALF * d, one, none)
    code = code + where(size > np.float32(1.5) * d, one, none)
    code = code + where(size > np.float32(2.5) * d, one, none)
    code = code + where(size > np.float32(3.5) * d, one, none)
    code = code + where(size > np.float32(5.0) * d, one, none)
    code = code + where(size > last, one, none)
    code = code + where(size > np.float32(10.0) * d, one, none)
    return where((x < _ZERO) & (code > 0), code | 8, code)


@kernel
def encode_mxfp4(x: Any, out: Any) -> None:
    for block in range(x.size // 32):
        start, at = 32 * block, 17 * block
        a, b = load(x, start), load(x, start + LANES)
        bits = lane_max(larger(as_bits(absolute(a)), as_bits(absolute(b))))
        largest = bits_float(bits)
        # Below 2^-125 the exponent wraps, as in ggml; the codes are then 0 all the same.
        e = (_floor_log2(largest) + 125) & 0xFF if largest > _ZERO else 0
        out[at] = e
        d = bits_float(np.int32((e - 1) << 23 if e > 1 else 0x200000 << e))
        # 8 · d may be beyond float32: it is never the nearest then.
        last = np.float32(7.0) * d if np.float32(8.0) * d < _INFINITY else _INFINITY
        store_bytes(out, at + 1, _mxfp4_codes(a, d, last) | _mxfp4_codes(b, d, last) << 4)


@inline
def _put_largest(x: Any, start: Any, out: Any, at: Any) -> Any:
    """Write the greatest magnitude of 256 weights as f16; its inverse, or 0."""
    bits = spread_int(0)
    for i in range(0, 256, LANES):
        bits = larger(bits, as_bits(absolute(load(x, start + i))))
    largest = bits_float(lane_max(bits))
    put_half(out, at, largest)
    return _ONE / largest if largest != _ZERO else _ZERO


@inline
def _trit(x: Any, inverse: Any) -> Any:
    """0, 1 or 2 for -1, 0 or 1. Halves are away from zero; infinities and NaN, of a subnormal
    scale, are 0 as in glibc's ``lroundf`` cut to an int."""
    v = x * inverse
    one, none = spread_int(1), spread_int(0)
    size = absolute(v)
    code = where((size < _HALF) | (size > _TWO) | (v != v), none, one)
    return where(v < _ZERO, one - code, one + code)


@inline
def _fifth_power(q: Any) -> Any:
    """Five trits as a byte that gives them back by multiplication: ceil(256 · q / 243)."""
    return q + (((q * 13 + 242) * 135) >> 15)


@inline
def _trits(x: Any, start: Any, step: Any, count: Any, inverse: Any) -> Any:
    """``count`` trits, the first the most significant, of weights ``step`` apart."""
    q = spread_int(0)
    for n in range(count):
        q = q * 3 + _trit(load(x, start + step * n), inverse)
    return q


@kernel
def encode_tq1_0(x: Any, out: Any) -> None:
    trits = np.empty(LANES, np.uint8)
    for block in range(x.size // 256):
        start, at = 256 * block, 54 * block
        inverse = _put_largest(x, start, out, at + 52)
        for i in range(0, 32, LANES):
            store_bytes(out, at + i, _fifth_power(_trits(x, start + i, 32, 5, inverse)))
        store_bytes(out, at + 32, _fifth_power(_trits(x, start + 160, 16, 5, inverse)))
        store_bytes(trits, 0, _trit(load(x, start + 240), inverse))
        for j in range(4):
            q = 0
            for n in range(4):
                q = q * 3 + trits[j + 4 * n]
            out[at + 48 + j] = (q * 3 * 256 + 242) // 243


@kernel
def encode_tq2_0(x: Any, out: Any) -> None:
    for block in range(x.size // 256):
        start, at = 256 * block, 66 * block
        inverse = _put_largest(x, start, out, at + 64)
        for half in range(2):
            for i in range(0, 32, LANES):
                packed = spread_int(0)
                for n in range(4):
                    there = start + 128 * half + 32 * n + i
                    packed = packed | _trit(load(x, there), inverse) << (2 * n)
                store_bytes(out, at + 32 * half + i, packed)
