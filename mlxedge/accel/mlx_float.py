"""MLX's small floats with a shared scale: mxfp4, mxfp8, nvfp4.

The rules, and where they leave those of ``mx.quantize``, are told in the fallback's module of the
same name. Rounding to E4M3 and E8M0 is done on bit patterns, which no device changes.
"""

from __future__ import annotations

import ml_dtypes
import mlx.core as mx
import numpy as np

from mlxedge.accel.arrays import pack_stream, unpack_stream
from mlxedge.accel.casts import round_through
from mlxedge.encodings import MlxFloat

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E8M0 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)

#: What codes and scales stand for, and the largest code, by mode.
_CODES = {"mxfp4": _E2M1, "mxfp8": _E4M3, "nvfp4": _E2M1}
_SCALES = {"mxfp4": _E8M0, "mxfp8": _E8M0, "nvfp4": _E4M3}
_LARGEST = {"mxfp4": 6.0, "mxfp8": 448.0, "nvfp4": 6.0}

#: Magnitudes above which E2M1 takes the next code.
_E2M1_STEPS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def _to_e4m3(x: mx.array) -> mx.array:
    """The E4M3 codes (u32) nearest to f32, ties to even, saturating at ±448."""
    bits = x.view(mx.uint32)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the unit is 2^-9, that of f32 in [2^14, 2^15): let the addition round.
    tiny = (size.view(mx.float32) + 16384.0).view(mx.uint32) - 0x46800000
    code = mx.where(size < 0x3C800000, tiny, normal)
    code = mx.where(size >= 0x43E00000, 0x7E, code)
    return code | ((bits >> 24) & 0x80)


def _to_e8m0(x: mx.array) -> mx.array:
    """The bytes (u32) of the least powers of two not below f32 ≥ 0; 127 for zero."""
    bits = x.view(mx.uint32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    above = mx.where(exponent == 0, mantissa > 0x400000, mantissa != 0)
    return mx.where(bits == 0, 127, mx.minimum(exponent + above.astype(mx.uint32), 255))


def _to_e2m1(x: mx.array) -> mx.array:
    """The E2M1 codes (u32) nearest to f32, ties towards zero; never -0."""
    magnitude = mx.abs(x)
    code = mx.where(x < -0.25, mx.array(8, mx.uint32), mx.array(0, mx.uint32))
    for step in _E2M1_STEPS:
        code = code + (magnitude > step).astype(mx.uint32)
    return code


def encode(x: mx.array, encoding: MlxFloat, dtype: str) -> dict[str, mx.array]:
    """Encode groups ``[N, group]`` of f32 weights that came in ``dtype``: packed codes u32
    ``[N · group · bits / 32]``, scale bytes u8 ``[N]``."""
    largest = mx.abs(x).max(axis=1, keepdims=True)
    target = round_through(largest / _LARGEST[encoding.mode], dtype)
    byte = _to_e4m3(target) if encoding.mode == "nvfp4" else _to_e8m0(target)
    divisor = mx.take(mx.array(_SCALES[encoding.mode]), byte)
    # A group whose scale rounds to 0 gets codes 0.
    scaled = x / mx.where(divisor == 0, np.inf, divisor)
    codes = _to_e4m3(scaled) if encoding.bits == 8 else _to_e2m1(scaled)
    return {"weight": pack_stream(codes, encoding.bits), "scales": byte.astype(mx.uint8)}


def decode(weight: mx.array, scales: mx.array, encoding: MlxFloat) -> mx.array:
    """Decode packed codes u32 with scale bytes u8 ``[N]`` to f32 ``[N, group]``."""
    codes = unpack_stream(weight, encoding.bits).reshape(-1, encoding.group)
    values = mx.take(mx.array(_CODES[encoding.mode]), codes)
    return values * mx.take(mx.array(_SCALES[encoding.mode]), scales)[:, None]
