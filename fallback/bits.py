"""16-bit floats as bit patterns, and codes packed into little-endian bit streams, for kernels.

Kernels take floats of 16 bits as uint16 (numba has neither float16 nor bfloat16 on a CPU);
:func:`flat_bits` makes that view and ``kind`` says what the bits are. numba computes integers in 64
bits, so every function here casts where the width matters; loops over slices vectorise, loops over
computed offsets do not (numba tests those for negative indices). Slice assignment is avoided: its
checks take seconds to compile.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from mlxedge.errors import UsageError
from mlxedge.fallback.jit import kernel

#: NumPy dtypes by the names that encodings use.
DTYPES: dict[str, np.dtype] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "u32": np.dtype(np.uint32),
    "u8": np.dtype(np.uint8),
}

#: What a kernel's float source holds.
F32, F16, BF16 = 0, 1, 2
_KINDS = {DTYPES["f32"]: F32, DTYPES["f16"]: F16, DTYPES["bf16"]: BF16}

_U32, _U64, _FLOAT = np.uint32, np.uint64, np.float32
_F16_SUBNORMAL = np.float32(2.0**-24)


def as_input(array: np.ndarray) -> np.ndarray:
    """``array`` in C order, aligned and read-only: a view, or a copy where it must be.

    numba compiles a kernel once for every combination of these; this makes it one.
    """
    view = np.require(array, requirements=("C", "A")).view()
    view.flags.writeable = False
    return view


def flat_bits(array: np.ndarray) -> tuple[np.ndarray, int]:
    """``array`` (f32, f16 or bf16) as 1-D f32 or uint16 for a kernel to read, and its kind."""
    kind = _KINDS.get(array.dtype)
    if kind is None:
        raise UsageError(f"weights are {array.dtype}: f32, f16 or bf16 is needed")
    flat = as_input(array).reshape(-1)
    return (flat if kind == F32 else flat.view(np.uint16)), kind


@kernel
def half(bits: Any) -> Any:
    """The float32 of IEEE binary16 ``bits``; NaN keeps sign and payload. Exact.

    No arithmetic on subnormals, so that it holds in a process that flushes them to zero.
    """
    low = _U32(bits)
    exponent = low & _U32(0x7C00)
    magnitude = _U32((low & _U32(0x7FFF)) << _U32(13))
    normal = _U32(magnitude + _U32(112 << 23))
    special = _U32(magnitude + _U32(224 << 23))
    tiny = _U32(_FLOAT(_FLOAT(np.int32(low & _U32(0x3FF))) * _F16_SUBNORMAL).view(_U32))
    magnitude = special if exponent == _U32(0x7C00) else normal
    magnitude = tiny if exponent == _U32(0) else magnitude
    return _U32(magnitude | _U32((low & _U32(0x8000)) << _U32(16))).view(_FLOAT)


@kernel
def to_half(value: Any) -> Any:
    """The binary16 bits nearest to a float32, ties to even; NaN becomes quiet, payload cut."""
    pattern = _U32(_FLOAT(value).view(_U32))
    sign = _U32((pattern >> _U32(16)) & _U32(0x8000))
    a = _U32(pattern & _U32(0x7FFFFFFF))
    odd = _U32((a >> _U32(13)) & _U32(1))
    normal = _U32(_U32(a + _U32(0xC8000FFF) + odd) >> _U32(13))
    # Below 2^-14 the unit is 2^-24, which is the last place of 0.5 in float32.
    tiny = _U32(_FLOAT(a.view(_FLOAT) + _FLOAT(0.5)).view(_U32) - _U32(0x3F000000))
    nan = _U32(_U32(0x7E00) | _U32((a >> _U32(13)) & _U32(0x1FF)))
    result = tiny if a < _U32(0x38800000) else normal
    result = _U32(0x7C00) if a >= _U32(0x47800000) else result
    result = nan if a > _U32(0x7F800000) else result
    return np.uint16(result | sign)


@kernel
def brain(bits: Any) -> Any:
    """The float32 of bfloat16 ``bits``. Exact."""
    return _U32(_U32(bits) << _U32(16)).view(_FLOAT)


@kernel
def to_brain(value: Any) -> Any:
    """The bfloat16 bits nearest to a float32, ties to even; NaN becomes quiet without payload."""
    pattern = _U32(_FLOAT(value).view(_U32))
    odd = _U32((pattern >> _U32(16)) & _U32(1))
    rounded = _U32(_U64(pattern + _U64(0x7FFF) + odd) >> _U64(16))
    nan = _U32(((pattern >> _U32(16)) & _U32(0x8000)) | _U32(0x7FC0))
    return np.uint16(nan if (pattern & _U32(0x7FFFFFFF)) > _U32(0x7F800000) else rounded)


@kernel
def load(source: np.ndarray, kind: int, out: np.ndarray) -> None:
    """``source`` (f32, or uint16 holding f16 or bf16) as f32 into ``out``, both 1-D."""
    if kind == F32:
        for j in range(out.size):
            out[j] = source[j]
    elif kind == BF16:
        for j in range(out.size):
            out[j] = brain(source[j])
    else:
        for j in range(out.size):
            out[j] = half(source[j])


@kernel
def pack(codes: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Pack u8 ``codes`` ``[n]`` below 2^bits (n a multiple of 8) into u8 ``out`` ``[n·bits/8]``."""
    if bits == 8:
        for i in range(codes.size):
            out[i] = codes[i]
        return
    words = codes.view(_U64)
    width = _U64(bits)
    pairs, quads = _U64(0x00FF00FF00FF00FF), _U64(0x0000FFFF0000FFFF)
    if bits == 4:
        halves = out.view(_U32)
        for i in range(words.size):
            x = words[i]
            x = (x & pairs) | (((x >> _U64(8)) & pairs) << width)
            x = (x & quads) | (((x >> _U64(16)) & quads) << _U64(8))
            halves[i] = _U32(x | (x >> _U64(16)))
        return
    for i in range(words.size):
        x = words[i]
        x = (x & pairs) | (((x >> _U64(8)) & pairs) << width)
        x = (x & quads) | (((x >> _U64(16)) & quads) << (width + width))
        x = (x & _U64(0xFFFFFFFF)) | ((x >> _U64(32)) << (width * _U64(4)))
        piece = out[i * bits : (i + 1) * bits]
        for k in range(piece.size):
            piece[k] = np.uint8(x >> _U64(8 * k))


@kernel
def unpack(packed: np.ndarray, bits: int, codes: np.ndarray) -> None:
    """The inverse of :func:`pack`."""
    if bits == 8:
        for i in range(codes.size):
            codes[i] = packed[i]
        return
    words = codes.view(_U64)
    width = _U64(bits)
    code = _U64((1 << bits) - 1) * _U64(0x0001000100010001)
    pair = _U64((1 << (2 * bits)) - 1) * _U64(0x0000000100000001)
    quad = _U64((1 << (4 * bits)) - 1)
    for i in range(words.size):
        piece = packed[i * bits : (i + 1) * bits]
        x = _U64(0)
        for k in range(piece.size):
            x |= _U64(piece[k]) << _U64(8 * k)
        x = (x & quad) | ((x >> (width * _U64(4))) << _U64(32))
        x = (x & pair) | (((x >> (width + width)) & pair) << _U64(16))
        x = (x & code) | (((x >> width) & code) << _U64(8))
        words[i] = x
