"""Floats as bit patterns: rounding between f32, f16 and bf16, the same bytes on every device.

``astype`` would do for most numbers, but devices differ in what they make of NaN, and a GPU may
flush f32 subnormals to zero in arithmetic; integers it leaves alone. Arrays of f16 and bf16 are
held as their bits, u16, as in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import mlx.core as mx
import numpy as np

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000

#: NumPy dtypes by the names that encodings use.
DTYPES: dict[str, np.dtype] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "u32": np.dtype(np.uint32),
    "u8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def f16_from_f32(x: mx.array) -> mx.array:
    """f32 to f16, to nearest, ties to even; NaN becomes quiet and keeps its high bits."""
    bits = x.view(mx.uint32)
    sign, size = (bits >> 16) & 0x8000, bits & _MAGNITUDE
    normal = (size - 0x37FFF001 + ((size >> 13) & 1)) >> 13
    # Below 2^-14 the unit of f16 is that of f32 in [0.5, 1): let the addition round.
    tiny = (size.view(mx.float32) + 0.5).view(mx.uint32) - 0x3F000000
    nan = ((size >> 13) & 0x1FF) | 0x7E00
    half = mx.where(size < 0x38800000, tiny, normal)
    half = mx.where(size >= 0x47800000, 0x7C00, half)
    half = mx.where(size > _INFINITY, nan, half)
    return (half | sign).astype(mx.uint16)


def bf16_from_f32(x: mx.array) -> mx.array:
    """f32 to bf16, to nearest, ties to even; NaN becomes quiet without payload."""
    bits = x.view(mx.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = ((bits >> 16) & 0x8000) | 0x7FC0
    return mx.where((bits & _MAGNITUDE) > _INFINITY, nan, rounded).astype(mx.uint16)


def f32_from_f16(half: mx.array) -> mx.array:
    """f16 to f32; NaN keeps sign and payload."""
    bits = half.astype(mx.uint32)
    size, exponent = (bits & 0x7FFF) << 13, bits & 0x7C00
    tiny = ((bits & 0x3FF).astype(mx.float32) * 2.0**-24).view(mx.uint32)
    result = mx.where(exponent == 0x7C00, size + (224 << 23), size + (112 << 23))
    result = mx.where(exponent == 0, tiny, result)
    return (result | ((bits & 0x8000) << 16)).view(mx.float32)


def f32_from_bf16(brain: mx.array) -> mx.array:
    """bf16 to f32."""
    return (brain.astype(mx.uint32) << 16).view(mx.float32)


_FROM_F32: dict[str, Callable[[mx.array], mx.array]] = {
    "f32": lambda x: x,
    "f16": f16_from_f32,
    "bf16": bf16_from_f32,
}
_TO_F32: dict[str, Callable[[mx.array], mx.array]] = {
    "f32": lambda x: x,
    "f16": f32_from_f16,
    "bf16": f32_from_bf16,
}


def dtype_name(array: np.ndarray) -> str:
    """The encodings' name of an array's dtype, or "" for a dtype they do not have."""
    return _NAMES.get(array.dtype, "")


def to_mlx(array: np.ndarray) -> mx.array:
    """Copy a NumPy array to MLX; f16 and bf16 become their bits."""
    halved = array.dtype.itemsize == 2
    return mx.array(array.view(np.uint16) if halved else array)


def load_f32(array: np.ndarray) -> mx.array:
    """Copy an f32, f16 or bf16 NumPy array to MLX as f32."""
    return _TO_F32[dtype_name(array)](to_mlx(array))


def store_as(x: mx.array, dtype: str) -> mx.array:
    """f32 rounded to "f32", "f16" or "bf16"; the last two as bits."""
    return _FROM_F32[dtype](x)


def round_through(x: mx.array, dtype: str) -> mx.array:
    """f32 rounded to the numbers of a dtype, as f32."""
    return _TO_F32[dtype](_FROM_F32[dtype](x))


def f16_bytes(x: mx.array) -> mx.array:
    """f32 ``[N, k]`` rounded to f16, as u8 ``[N, 2k]`` little-endian."""
    return f16_from_f32(x).view(mx.uint8)


def f16_from_bytes(raw: mx.array) -> mx.array:
    """The f16 values stored in u8 ``[N, 2k]``, as f32 ``[N, k]``."""
    return f32_from_f16(mx.contiguous(raw).view(mx.uint16))
