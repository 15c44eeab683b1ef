"""MLX's small floats with a shared scale: mxfp4, mxfp8, nvfp4.

The encoders give the bytes of ``mx.quantize(mode=…)`` of mlx 0.32.4 on the CPU. With ``amax`` the
largest magnitude of a group and ``t`` = amax / 6 (E2M1 codes) or amax / 448 (E4M3 codes), rounded
first to float32 and then to the dtype of the weights:

==========  =====  ===========================  ================================================
mode        group  scale byte                   codes
==========  =====  ===========================  ================================================
``mxfp4``   32     E8M0: ceil(log2 t) + 127     E2M1 of w / 2^(byte - 127)
``mxfp8``   32     E8M0: ceil(log2 t) + 127     E4M3 of w / 2^(byte - 127), saturating at ±448
``nvfp4``   16     E4M3 of t, saturating        E2M1 of w / scale
==========  =====  ===========================  ================================================

* t = 0 gives the E8M0 byte 127 (scale 1). An nvfp4 group whose scale rounds to 0 gets codes 0.
* E2M1 is the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6. A tie goes to the smaller magnitude (0.75 →
  0.5, 2.5 → 2), and what rounds to zero becomes +0: code 8 is never written. MLX's Metal kernels
  and ``quantize_dequantize`` send ties to even codes instead.
* E4M3 rounds to nearest, ties to even, and keeps the sign of zero.

Where MLX's result would be useless, this module departs from it: log2 t < -127 (groups below
about 10^-36) gives the byte 0, where MLX wraps around to a scale of about 2^120; nvfp4 weights far
above 6 · 448 saturate, where MLX finds all codes equally near and writes 0. A group with a
non-finite weight has no meaning; in the mx modes its scale byte is 255, which is NaN.

The decoders multiply code and scale in float32, which is exact. ``mx.dequantize`` gives the same
values, rounded to the dtype it is asked for.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from mlxedge.encodings import MlxFloat
from mlxedge.fallback.bits import (
    BF16,
    F16,
    as_input,
    brain,
    flat_bits,
    half,
    load,
    pack,
    to_brain,
    to_half,
    unpack,
)
from mlxedge.fallback.jit import kernel
from mlxedge.ops import Parts

_FLOAT, _INT, _U32 = np.float32, np.int32, np.uint32

#: E2M1 (the sign in bit 3) and E4M3 by code, and E8M0 by byte, as float32.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E8M0 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)

#: What codes and scales stand for, by mode.
_TABLES = {"mxfp4": (_E2M1, _E8M0), "mxfp8": (_E4M3, _E8M0), "nvfp4": (_E2M1, _E4M3)}
_LARGEST = {"mxfp4": np.float32(6.0), "mxfp8": np.float32(448.0), "nvfp4": np.float32(6.0)}


def encode(weights: np.ndarray, encoding: MlxFloat) -> Parts:
    """Encode ``weights`` ``[rows, cols]`` (f32, f16 or bf16, C order)."""
    parts = encoding.parts(weights.shape)
    weight = np.empty(parts["weight"].shape, np.uint32)
    scales = np.empty(parts["scales"].shape, np.uint8)
    source, kind = flat_bits(weights)
    _encode(
        source,
        kind,
        encoding.group,
        encoding.bits,
        encoding.mode == "nvfp4",
        _LARGEST[encoding.mode],
        weight.reshape(-1).view(np.uint8),
        scales.reshape(-1),
    )
    return {"weight": weight, "scales": scales}


def decode(parts: Parts, encoding: MlxFloat) -> np.ndarray:
    """Decode to f32 ``[rows, cols]``."""
    scales, weight = parts["scales"], as_input(parts["weight"])
    *lead, groups = scales.shape
    out = np.empty((*lead, groups * encoding.group), np.float32)
    codes_table, scales_table = _TABLES[encoding.mode]
    _decode(
        weight.reshape(-1).view(np.uint8),
        scales_table[scales.reshape(-1)],
        encoding.bits,
        codes_table,
        out.reshape(-1),
    )
    return out


@kernel
def _to_e4m3(value: Any) -> Any:
    """The E4M3 code nearest to a float32, ties to even, saturating at ±448."""
    pattern = _U32(_FLOAT(value).view(_U32))
    sign = _U32((pattern >> _U32(24)) & _U32(0x80))
    a = _U32(pattern & _U32(0x7FFFFFFF))
    odd = _U32((a >> _U32(20)) & _U32(1))
    normal = _U32(_U32(a + _U32(0x7FFFF) + odd) >> _U32(20)) - _U32(120 << 3)
    # Below 2^-6 the unit is 2^-9, which is the last place of 2^14 in float32.
    tiny = _U32(_FLOAT(a.view(_FLOAT) + _FLOAT(16384.0)).view(_U32)) - _U32(0x46800000)
    code = tiny if a < _U32(0x3C800000) else normal
    code = _U32(0x7E) if a >= _U32(0x43E00000) else code
    return np.uint8(code | sign)


@kernel
def _to_e8m0(value: Any) -> Any:
    """The byte of the least power of two that is not below a float32 ≥ 0; 127 for zero."""
    pattern: Any = _U32(_FLOAT(value).view(_U32))
    exponent, mantissa = pattern >> _U32(23), pattern & _U32(0x7FFFFF)
    above = mantissa > _U32(0x400000) if exponent == 0 else mantissa != _U32(0)
    return np.uint8(min(exponent + above, 255) if pattern != 0 else 127)


@kernel
def _as_kind(value: Any, kind: int) -> Any:
    """A float32 rounded to f16 or bf16."""
    if kind == F16:
        return half(to_half(value))
    if kind == BF16:
        return brain(to_brain(value))
    return value


@kernel
def _encode(
    source: np.ndarray,
    kind: int,
    group: int,
    bits: int,
    nvidia: bool,
    largest: float,
    packed: np.ndarray,
    scales: np.ndarray,
) -> None:
    size = group * bits // 8
    values = np.empty(group, _FLOAT)
    patterns = values.view(_INT)
    codes = np.empty(group, np.uint8)
    for g in range(scales.size):
        load(source[g * group : (g + 1) * group], kind, values)
        most = _INT(0)
        for j in range(group):
            most = max(most, _INT(patterns[j] & _INT(0x7FFFFFFF)))
        t = _as_kind(_FLOAT(_INT(most).view(_FLOAT) / largest), kind)
        if nvidia:
            byte = _to_e4m3(t)
            divisor = _E4M3[byte]
            # w / 0 is infinite: an infinite divisor gives the codes 0 that MLX writes.
            divisor = divisor if divisor > _FLOAT(0.0) else _FLOAT(np.inf)
        else:
            byte = _to_e8m0(t)
            divisor = _E8M0[byte]
        scales[g] = byte
        if bits == 8:
            for j in range(group):
                codes[j] = _to_e4m3(_FLOAT(values[j] / divisor))
        else:
            for j in range(group):
                q = _FLOAT(values[j] / divisor)
                a = abs(q)
                code = (
                    _INT(a > _FLOAT(0.25))
                    + _INT(a > _FLOAT(0.75))
                    + _INT(a > _FLOAT(1.25))
                    + _INT(a > _FLOAT(1.75))
                    + _INT(a > _FLOAT(2.5))
                    + _INT(a > _FLOAT(3.5))
                    + _INT(a > _FLOAT(5.0))
                )
                codes[j] = np.uint8(code + (_INT(8) if q < _FLOAT(-0.25) else _INT(0)))
        pack(codes, bits, packed[g * size : (g + 1) * size])


@kernel
def _decode(
    packed: np.ndarray, scales: np.ndarray, bits: int, table: np.ndarray, out: np.ndarray
) -> None:
    if scales.size == 0:
        return
    group = out.size // scales.size
    size = group * bits // 8
    codes = np.empty(group, np.uint8)
    for g in range(scales.size):
        unpack(packed[g * size : (g + 1) * size], bits, codes)
        values = out[g * group : (g + 1) * group]
        for j in range(group):
            values[j] = table[codes[j]] * scales[g]
