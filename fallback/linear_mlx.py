"""MLX's packed codes to vectors of weights.

Each function takes the addresses of a group's codes ``w``, scale ``s`` and bias ``b``, and the
number ``j`` of a unit within the group, and gives the unit's weights in order, sixteen to a vector.
Formats: :mod:`mlxedge.encodings.mlx`; values: :mod:`mlxedge.fallback.mlx_affine` and ``mlx_float``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.fallback.lanes import as_bits, as_float, bits_float, inline, spread, where
from mlxedge.fallback.memory import LOAD_CODES, get_bf16, get_f16, get_f32, get_u8, load_u8
from mlxedge.fallback.tiles import fma, to_float

_SCALES = {"f32": get_f32, "f16": get_f16, "bf16": get_bf16}
_f32, _i32 = np.float32, np.int32
_HALF, _TINIEST, _NAN = _f32(0.5), _f32(2.0**-9), _f32(np.nan)


def affine(bits: int, dtype: str, unit: int) -> Any:
    """The function for ``bits``-bit codes, scales in ``dtype`` and units of 32 or 64 weights."""
    codes, scale = LOAD_CODES[bits], _SCALES[dtype]
    step = 2 * bits

    @inline
    def pair(w: int, s: int, b: int, j: int) -> Any:
        d, m, p = spread(scale(s)), spread(scale(b)), w + 2 * step * j
        return fma(d, to_float(codes(p)), m), fma(d, to_float(codes(p + step)), m)

    @inline
    def four(w: int, s: int, b: int, j: int) -> Any:
        d, m, p = spread(scale(s)), spread(scale(b)), w + 4 * step * j
        return (
            fma(d, to_float(codes(p)), m),
            fma(d, to_float(codes(p + step)), m),
            fma(d, to_float(codes(p + 2 * step)), m),
            fma(d, to_float(codes(p + 3 * step)), m),
        )

    return pair if unit == 32 else four


@inline
def _power(byte: int) -> Any:
    """E8M0: 2^(byte - 127); 255 is NaN."""
    if byte == 255:
        return _NAN
    return bits_float(_i32(byte << 23 if byte else 1 << 22))


@inline
def _small(byte: int) -> Any:
    """E4M3 of one byte; ±127 is NaN."""
    size = byte & 127
    value = bits_float(_i32((size << 20) + (120 << 23))) if size > 7 else _f32(size) * _TINIEST
    if size == 127:
        return _NAN
    return -value if byte > 127 else value


@inline
def _smalls(q: Any) -> Any:
    """E4M3 of lanes of bytes."""
    size = q & 127
    value = where(size > 7, as_float((size << 20) + (120 << 23)), to_float(size) * _TINIEST)
    value = where(size > 126, spread(_NAN), value)
    return as_float(as_bits(value) | ((q & 128) << 24))


@inline
def _doubled(q: Any) -> Any:
    """Twice the E2M1 values of lanes of codes: 0 1 2 3 4 6 8 12 and their negatives."""
    size = q & 7
    value = where(size > 1, (((size & 1) | 2) << (size >> 1)) >> 1, size)
    return to_float(where(q > 7, 0 - value, value))


_nibbles = LOAD_CODES[4]


@inline
def mxfp4(w: int, s: int, b: int, j: int) -> Any:
    d = spread(_power(get_u8(s)) * _HALF)
    return d * _doubled(_nibbles(w)), d * _doubled(_nibbles(w + 8))


@inline
def mxfp8(w: int, s: int, b: int, j: int) -> Any:
    d = spread(_power(get_u8(s)))
    return d * _smalls(load_u8(w)), d * _smalls(load_u8(w + 16))


@inline
def nvfp4(w: int, s: int, b: int, j: int) -> Any:
    return (spread(_small(get_u8(s)) * _HALF) * _doubled(_nibbles(w)),)


#: By mode: the function, and how many weights a unit has.
UNITS = {"mxfp4": (mxfp4, 32), "mxfp8": (mxfp8, 32), "nvfp4": (nvfp4, 16)}
