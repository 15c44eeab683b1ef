"""ggml blocks to vectors of weights.

Each function takes the address ``w`` of a block and the number ``j`` of a unit within it, and gives
the unit's weights in order, sixteen to a vector. ``s`` and ``b`` (scales and biases) serve MLX's
formats and are not used here. Layouts: ``ggml-common.h``; arithmetic: ``dequantize_row_*`` of
``ggml-quants.c`` (llama.cpp as vendored by llama-cpp-python 0.3.36).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.fallback.lanes import inline, spread
from mlxedge.fallback.memory import by_bit, get_f16, get_i8, get_u8, get_u32, load_i8, load_u8
from mlxedge.fallback.tiles import fma, to_float

_f32 = np.float32


@inline
def q4_0(w: int, s: int, b: int, j: int) -> Any:
    d, q = spread(get_f16(w)), load_u8(w + 2)
    return d * to_float((q & 15) - 8), d * to_float((q >> 4) - 8)


@inline
def q4_1(w: int, s: int, b: int, j: int) -> Any:
    d, m, q = spread(get_f16(w)), spread(get_f16(w + 2)), load_u8(w + 4)
    return fma(d, to_float(q & 15), m), fma(d, to_float(q >> 4), m)


@inline
def q5_0(w: int, s: int, b: int, j: int) -> Any:
    d, high, q = spread(get_f16(w)), get_u32(w + 2), load_u8(w + 6)
    # A set fifth bit cancels the offset of 16.
    low = (q & 15) | by_bit(high, 0, -16)
    return d * to_float(low), d * to_float((q >> 4) | by_bit(high >> 16, 0, -16))


@inline
def q5_1(w: int, s: int, b: int, j: int) -> Any:
    d, m, high, q = spread(get_f16(w)), spread(get_f16(w + 2)), get_u32(w + 4), load_u8(w + 8)
    low = (q & 15) | by_bit(high, 16, 0)
    return fma(d, to_float(low), m), fma(d, to_float((q >> 4) | by_bit(high >> 16, 16, 0)), m)


@inline
def q8_0(w: int, s: int, b: int, j: int) -> Any:
    d = spread(get_f16(w))
    return d * to_float(load_i8(w + 2)), d * to_float(load_i8(w + 18))


@inline
def q2_k(w: int, s: int, b: int, j: int) -> Any:
    d, m = get_f16(w + 80), -get_f16(w + 82)
    q0, q1, t = load_u8(w + 16 + 32 * j), load_u8(w + 32 + 32 * j), w + 8 * j
    return (
        _scaled(d, m, get_u8(t), q0 & 3),
        _scaled(d, m, get_u8(t + 1), q1 & 3),
        _scaled(d, m, get_u8(t + 2), (q0 >> 2) & 3),
        _scaled(d, m, get_u8(t + 3), (q1 >> 2) & 3),
        _scaled(d, m, get_u8(t + 4), (q0 >> 4) & 3),
        _scaled(d, m, get_u8(t + 5), (q1 >> 4) & 3),
        _scaled(d, m, get_u8(t + 6), q0 >> 6),
        _scaled(d, m, get_u8(t + 7), q1 >> 6),
    )


@inline
def _scaled(d: float, m: float, scale: int, q: Any) -> Any:
    return fma(spread(d * _f32(scale & 15)), to_float(q), spread(m * _f32(scale >> 4)))


@inline
def q3_k(w: int, s: int, b: int, j: int) -> Any:
    d = get_f16(w + 108)
    h0, h1 = load_u8(w) >> (4 * j), load_u8(w + 16) >> (4 * j)
    q0, q1, t, i = load_u8(w + 32 + 32 * j), load_u8(w + 48 + 32 * j), w + 96, 8 * j
    # A set high bit cancels the offset of 4.
    return (
        spread(d * _q3_scale(t, i)) * to_float((q0 & 3) + ((h0 & 1) << 2) - 4),
        spread(d * _q3_scale(t, i + 1)) * to_float((q1 & 3) + ((h1 & 1) << 2) - 4),
        spread(d * _q3_scale(t, i + 2)) * to_float(((q0 >> 2) & 3) + ((h0 & 2) << 1) - 4),
        spread(d * _q3_scale(t, i + 3)) * to_float(((q1 >> 2) & 3) + ((h1 & 2) << 1) - 4),
        spread(d * _q3_scale(t, i + 4)) * to_float(((q0 >> 4) & 3) + (h0 & 4) - 4),
        spread(d * _q3_scale(t, i + 5)) * to_float(((q1 >> 4) & 3) + (h1 & 4) - 4),
        spread(d * _q3_scale(t, i + 6)) * to_float((q0 >> 6) + ((h0 & 8) >> 1) - 4),
        spread(d * _q3_scale(t, i + 7)) * to_float((q1 >> 6) + ((h1 & 8) >> 1) - 4),
    )


@inline
def _q3_scale(t: int, i: int) -> Any:
    """Scale ``i`` of 16: four low bits in bytes 0 to 7, two high ones in bytes 8 to 11."""
    low = (get_u8(t + (i & 7)) >> (4 * (i >> 3))) & 15
    high = (get_u8(t + 8 + (i & 3)) >> (2 * (i >> 2))) & 3
    return _f32((low | high << 4) - 32)


@inline
def _scale_and_min(t: int, i: int) -> Any:
    """Six-bit scale and min ``i`` of 8, packed as in ``get_scale_min_k4``."""
    if i < 4:
        return get_u8(t + i) & 63, get_u8(t + i + 4) & 63
    low = get_u8(t + i + 4)
    return (low & 15) | (get_u8(t + i - 4) >> 6) << 4, (low >> 4) | (get_u8(t + i) >> 6) << 4


@inline
def q4_k(w: int, s: int, b: int, j: int) -> Any:
    d, m = get_f16(w), -get_f16(w + 2)
    s0, m0 = _scale_and_min(w + 4, 2 * j)
    s1, m1 = _scale_and_min(w + 4, 2 * j + 1)
    d0, d1 = spread(d * _f32(s0)), spread(d * _f32(s1))
    o0, o1 = spread(m * _f32(m0)), spread(m * _f32(m1))
    q0, q1 = load_u8(w + 16 + 32 * j), load_u8(w + 32 + 32 * j)
    return (
        fma(d0, to_float(q0 & 15), o0),
        fma(d0, to_float(q1 & 15), o0),
        fma(d1, to_float(q0 >> 4), o1),
        fma(d1, to_float(q1 >> 4), o1),
    )


@inline
def q5_k(w: int, s: int, b: int, j: int) -> Any:
    d, m = get_f16(w), -get_f16(w + 2)
    s0, m0 = _scale_and_min(w + 4, 2 * j)
    s1, m1 = _scale_and_min(w + 4, 2 * j + 1)
    d0, d1 = spread(d * _f32(s0)), spread(d * _f32(s1))
    o0, o1 = spread(m * _f32(m0)), spread(m * _f32(m1))
    q0, q1 = load_u8(w + 48 + 32 * j), load_u8(w + 64 + 32 * j)
    h0, h1 = load_u8(w + 16) >> (2 * j), load_u8(w + 32) >> (2 * j)
    return (
        fma(d0, to_float((q0 & 15) | ((h0 & 1) << 4)), o0),
        fma(d0, to_float((q1 & 15) | ((h1 & 1) << 4)), o0),
        fma(d1, to_float((q0 >> 4) | ((h0 & 2) << 3)), o1),
        fma(d1, to_float((q1 >> 4) | ((h1 & 2) << 3)), o1),
    )


@inline
def q6_k(w: int, s: int, b: int, j: int) -> Any:
    d, p, t = get_f16(w + 208), w + 64 * j, w + 192 + 8 * j
    q0, q1, q2, q3 = load_u8(p), load_u8(p + 16), load_u8(p + 32), load_u8(p + 48)
    h0, h1 = load_u8(w + 128 + 32 * j), load_u8(w + 144 + 32 * j)
    return (
        _signed(d, get_i8(t), (q0 & 15) | ((h0 & 3) << 4)),
        _signed(d, get_i8(t + 1), (q1 & 15) | ((h1 & 3) << 4)),
        _signed(d, get_i8(t + 2), (q2 & 15) | ((h0 & 12) << 2)),
        _signed(d, get_i8(t + 3), (q3 & 15) | ((h1 & 12) << 2)),
        _signed(d, get_i8(t + 4), (q0 >> 4) | (h0 & 48)),
        _signed(d, get_i8(t + 5), (q1 >> 4) | (h1 & 48)),
        _signed(d, get_i8(t + 6), (q2 >> 4) | ((h0 & 192) >> 2)),
        _signed(d, get_i8(t + 7), (q3 >> 4) | ((h1 & 192) >> 2)),
    )


@inline
def _signed(d: float, scale: int, q: Any) -> Any:
    return spread(d * _f32(scale)) * to_float(q - 32)


#: By encoding name: the function, and how many weights a unit has.
UNITS = {
    "q4_0": (q4_0, 32),
    "q4_1": (q4_1, 32),
    "q5_0": (q5_0, 32),
    "q5_1": (q5_1, 32),
    "q8_0": (q8_0, 32),
    "q2_k": (q2_k, 128),
    "q3_k": (q3_k, 128),
    "q4_k": (q4_k, 64),
    "q5_k": (q5_k, 64),
    "q6_k": (q6_k, 128),
}
