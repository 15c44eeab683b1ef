"""What every MLX encoder needs: arrays in and out, C's order of sums, C's rounding of floats.

Why the encoders look as they do. ggml and MLX define their encoders as C loops, and a float sum
depends on its order, so a reduction such as ``mx.sum`` (order unspecified, different on each
device) would change bytes. Blocks are therefore laid out as ``[position, block]``: each operation
works on all blocks at once, and sums go through the positions one by one, as C does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import mlx.core as mx
import numpy as np

from mlxedge.encodings import Encoding
from mlxedge.errors import UsageError

#: NumPy dtypes by the short names that encodings use for their parts.
NUMPY_DTYPES: dict[str, np.dtype] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "u32": np.dtype(np.uint32),
    "u8": np.dtype(np.uint8),
}
MLX_FLOATS = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}

#: 1.5 · 2^23. Adding it leaves the nearest integer (ties to even) in a float's low mantissa bits.
MAGIC = 12582912.0
MANTISSA = 0x007FFFFF
MAGIC_MANTISSA = 0x00400000


def to_mlx(array: np.ndarray) -> mx.array:
    """Copy a NumPy array (bf16 too) to MLX."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def to_numpy(array: mx.array) -> np.ndarray:
    """Copy an MLX array (bf16 too) to NumPy."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def chunks(blocks: int, block_size: int, weights_at_once: int) -> Iterator[slice]:
    """Slices of ``blocks`` that hold at most ``weights_at_once`` weights each."""
    step = max(1, weights_at_once // block_size)
    for start in range(0, blocks, step):
        yield slice(start, min(blocks, start + step))


def as_blocks(weights: np.ndarray, encoding: Encoding) -> np.ndarray:
    """View weights ``[rows, cols]`` as ``[rows * cols / block, block]``; blocks never cross rows.

    Raises UsageError for another rank, a dtype other than f32, f16 and bf16, or a width that is
    no multiple of the block.
    """
    if weights.ndim != 2:
        raise UsageError(f"{encoding}: expected weights [rows, cols], got shape {weights.shape}")
    if weights.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
        raise UsageError(f"{encoding}: expected f32, f16 or bf16 weights, got {weights.dtype}")
    if weights.shape[1] % encoding.block:
        raise UsageError(
            f"{encoding}: width {weights.shape[1]} is no multiple of the block of {encoding.block}"
        )
    return weights.reshape(-1, encoding.block)


def first_absmax(x: mx.array, axis: int) -> tuple[mx.array, mx.array]:
    """The largest magnitude along ``axis`` and the first value that has it (both keep the axis).

    NaN never wins and -0 counts as 0, as in C's ``if (amax < fabsf(v))`` from 0.
    """
    x = mx.where(mx.abs(x) > 0, x, 0.0)
    magnitude = mx.abs(x)
    at = mx.argmax(magnitude, axis=axis, keepdims=True)
    return mx.take_along_axis(magnitude, at, axis), mx.take_along_axis(x, at, axis)


def nearest_int(x: mx.array) -> mx.array:
    """ggml's ``nearest_int``, i32: ties to even, and for NaN, infinity or abs(x) > 4194303 the
    same low mantissa bits that C leaves (llama.cpp ``ggml-quants.c``)."""
    return ((x + MAGIC).view(mx.int32) & MANTISSA) - MAGIC_MANTISSA


def truncate_u8(x: mx.array) -> mx.array:
    """``(uint8_t)(int32_t)x`` as x86-64 computes it: what does not fit an i32 becomes 0."""
    fits = mx.abs(x) < 2147483648.0
    return (mx.where(fits, x, 0.0).astype(mx.int32) & 0xFF).astype(mx.uint8)


def round_half_away(x: mx.array) -> mx.array:
    """C's ``roundf``."""
    magnitude = mx.abs(x)
    floor = mx.floor(magnitude)
    rounded = floor + (magnitude - floor >= 0.5).astype(mx.float32)
    return mx.where(x < 0, -rounded, rounded)


def reciprocal_or_zero(d: mx.array) -> mx.array:
    """``d ? 1/d : 0``."""
    return mx.where(d == 0, 0.0, 1.0 / d)


def f16_bytes(x: mx.array) -> mx.array:
    """f32 ``[N, k]`` rounded to f16 (nearest, ties to even), as u8 ``[N, 2k]`` little-endian."""
    return mx.contiguous(x.astype(mx.float16)).view(mx.uint8)


def f16_from_bytes(raw: mx.array) -> mx.array:
    """The f16 values stored in u8 ``[N, 2k]``, as f32 ``[N, k]``."""
    return mx.contiguous(raw).view(mx.float16).astype(mx.float32)


def join_fields(fields: list[mx.array]) -> mx.array:
    """Concatenate u8 ``[N, ...]`` fields to ``[N, bytes]``."""
    return mx.concatenate([f.astype(mx.uint8) for f in fields], axis=1)


def combine_bits(parts: list[mx.array], shift: int) -> mx.array:
    """``parts[0] | parts[1] << shift | parts[2] << 2 shift …`` of integers that do not overlap."""
    total = parts[0].astype(mx.uint32)
    for i, part in enumerate(parts[1:], 1):
        total = total | (part.astype(mx.uint32) << (i * shift))
    return total


Encoder = Callable[[mx.array], dict[str, mx.array]]
Decoder = Callable[[dict[str, mx.array]], mx.array]
