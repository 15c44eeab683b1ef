"""Encoders of ggml's plain block formats: 32 weights, a float16 scale, for _1 types a minimum.

Byte for byte ``quantize_row_q*_ref`` of ggml-quants.c (llama.cpp as vendored by llama-cpp-python
0.3.36). No sums are involved, so a block lies along two vectors of 16 lanes as it does in memory.

Each kernel takes the weights, float32 ``[32 · n]``, and fills ``out``, uint8 ``[block bytes · n]``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.fallback.jit import kernel
from mlxedge.fallback.lanes import (
    absolute,
    as_bits,
    as_float,
    bits_float,
    inline,
    lane_max,
    lane_min,
    lanes_set,
    larger,
    load,
    lowest_bit,
    put_half,
    smaller,
    spread,
    store_bytes,
    truncate,
    where,
)

BLOCK = 32
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_BYTE = np.float32(256.0)
_MAGNITUDE = 0x7FFFFFFF
_SIGN = -0x80000000
#: The bits of the greatest float32 below 0.5: added before truncation, it rounds half away.
_ALMOST_HALF = 0x3EFFFFFF


@inline
def _first(x: Any, start: Any, low: Any, high: Any) -> Any:
    """The first weight of a block where a mask (of its two vectors) holds."""
    return x[start + (lowest_bit(np.uint32(lanes_set(low) | lanes_set(high) << 16)) & 31)]


@inline
def _signed_largest(x: Any, start: Any, low: Any, high: Any) -> Any:
    """The first weight of greatest magnitude; of a block of zeros, whatever their sign, 0."""
    a, b = absolute(low), absolute(high)
    largest = bits_float(lane_max(larger(as_bits(a), as_bits(b))))
    if largest == _ZERO:
        return _ZERO
    return _first(x, start, a == largest, b == largest)


@inline
def _ordered(bits: Any) -> Any:
    """Float bits as integers that compare as the floats do; its own inverse."""
    return bits ^ ((bits >> 31) & _MAGNITUDE)


@inline
def _range(x: Any, start: Any, low: Any, high: Any) -> Any:
    """The first least and the first greatest weight: which zero comes first decides a sign."""
    a, b = _ordered(as_bits(low)), _ordered(as_bits(high))
    least = bits_float(np.int32(_ordered(lane_min(smaller(a, b)))))
    most = bits_float(np.int32(_ordered(lane_max(larger(a, b)))))
    return (
        _first(x, start, low == least, high == least),
        _first(x, start, low == most, high == most),
    )


@inline
def _inverse(d: Any) -> Any:
    return _ONE / d if d != _ZERO else _ZERO


@inline
def _code(value: Any) -> Any:
    """``value`` towards zero. Infinities and NaN, of subnormal scales, give 0 as x86's C does."""
    return truncate(where(absolute(value) < _BYTE, value, spread(_ZERO)))


@inline
def put_fifth_bits(out: Any, at: Any, low: Any, high: Any) -> None:
    bits = lanes_set(low > 15) | lanes_set(high > 15) << 16
    for i in range(4):
        out[at + i] = (bits >> (8 * i)) & 0xFF


@kernel
def encode_q4_0(x: Any, out: Any) -> None:
    for block in range(x.size // BLOCK):
        start = BLOCK * block
        at = 18 * block
        a, b = load(x, start), load(x, start + 16)
        d = _signed_largest(x, start, a, b) / np.float32(-8.0)
        inverse = _inverse(d)
        middle = np.float32(8.5)
        put_half(out, at, d)
        low = smaller(_code(a * inverse + middle), 15)
        high = smaller(_code(b * inverse + middle), 15)
        store_bytes(out, at + 2, low | high << 4)


@kernel
def encode_q4_1(x: Any, out: Any) -> None:
    for block in range(x.size // BLOCK):
        start = BLOCK * block
        at = 20 * block
        a, b = load(x, start), load(x, start + 16)
        least, most = _range(x, start, a, b)
        d = (most - least) / np.float32(15.0)
        inverse = _inverse(d)
        put_half(out, at, d)
        put_half(out, at + 2, least)
        low = smaller(_code((a - least) * inverse + _HALF), 15)
        high = smaller(_code((b - least) * inverse + _HALF), 15)
        store_bytes(out, at + 4, low | high << 4)


@kernel
def encode_q5_0(x: Any, out: Any) -> None:
    for block in range(x.size // BLOCK):
        start = BLOCK * block
        at = 22 * block
        a, b = load(x, start), load(x, start + 16)
        d = _signed_largest(x, start, a, b) / np.float32(-16.0)
        inverse = _inverse(d)
        middle = np.float32(16.5)
        put_half(out, at, d)
        low = smaller(_code(a * inverse + middle), 31)
        high = smaller(_code(b * inverse + middle), 31)
        put_fifth_bits(out, at + 2, low, high)
        store_bytes(out, at + 6, low & 15 | (high & 15) << 4)


@kernel
def encode_q5_1(x: Any, out: Any) -> None:
    for block in range(x.size // BLOCK):
        start = BLOCK * block
        at = 24 * block
        a, b = load(x, start), load(x, start + 16)
        least, most = _range(x, start, a, b)
        d = (most - least) / np.float32(31.0)
        inverse = _inverse(d)
        put_half(out, at, d)
        put_half(out, at + 2, least)
        low = _code((a - least) * inverse + _HALF)
        high = _code((b - least) * inverse + _HALF)
        put_fifth_bits(out, at + 4, low, high)
        store_bytes(out, at + 8, low & 15 | (high & 15) << 4)


@inline
def _round_away(value: Any) -> Any:
    """C's ``roundf``: to nearest, halves away from zero."""
    return _code(value + as_float((as_bits(value) & _SIGN) | _ALMOST_HALF))


@kernel
def encode_q8_0(x: Any, out: Any) -> None:
    for block in range(x.size // BLOCK):
        start = BLOCK * block
        at = 34 * block
        a, b = load(x, start), load(x, start + 16)
        largest = bits_float(lane_max(larger(as_bits(absolute(a)), as_bits(absolute(b)))))
        d = largest / np.float32(127.0)
        inverse = _inverse(d)
        put_half(out, at, d)
        store_bytes(out, at + 2, _round_away(a * inverse))
        store_bytes(out, at + 18, _round_away(b * inverse))
