"""ggml's blocks of 32 with one scale: q4_0, q4_1, q5_0, q5_1, q8_0.

After ``quantize_row_*_ref`` in ``ggml/src/ggml-quants.c`` (llama.cpp as vendored by
llama-cpp-python 0.3.36). Each encoder takes f32 ``[N, 32]`` and returns u8 ``[N, block bytes]``.
"""

from __future__ import annotations

import mlx.core as mx

from mlxedge.accel.arrays import (
    combine_bits,
    first_absmax,
    first_range,
    join_fields,
    reciprocal_or_zero,
    round_half_away,
    truncate_u8,
)
from mlxedge.accel.casts import f16_bytes

HALF = 16


def _nibbles(codes: mx.array) -> mx.array:
    """Codes ``[N, 32]`` as 16 bytes: the low halves hold the first 16 weights."""
    return combine_bits([codes[:, :HALF] & 15, codes[:, HALF:] & 15], shift=4)


def _fifth_bits(codes: mx.array) -> mx.array:
    """Bit 4 of each of 32 codes as one u32 per block, seen as 4 bytes."""
    place = mx.left_shift(mx.array(1, mx.uint32), mx.arange(32, dtype=mx.uint32))
    bits = mx.where((codes & 16) != 0, place, mx.array(0, mx.uint32))
    return bits.sum(axis=1, keepdims=True).astype(mx.uint32).view(mx.uint8)


def _symmetric_codes(x: mx.array, levels: int) -> tuple[mx.array, mx.array]:
    """Scale and codes in 0 … levels - 1, where -levels/2 stands for the largest magnitude."""
    _, extreme = first_absmax(x, axis=1)
    d = extreme / float(-(levels // 2))
    scaled = x * reciprocal_or_zero(d)
    codes = truncate_u8(scaled + (levels / 2 + 0.5))
    return d, mx.minimum(codes, levels - 1)


def _offset_codes(x: mx.array, levels: int) -> tuple[mx.array, mx.array, mx.array]:
    """Scale, minimum, and codes that may pass levels - 1 by rounding."""
    low, high = first_range(x, axis=1)
    d = (high - low) / float(levels - 1)
    scaled = (x - low) * reciprocal_or_zero(d)
    return d, low, truncate_u8(scaled + 0.5)


def encode_q4_0(x: mx.array) -> mx.array:
    d, codes = _symmetric_codes(x, 16)
    return join_fields([f16_bytes(d), _nibbles(codes)])


def encode_q4_1(x: mx.array) -> mx.array:
    d, low, codes = _offset_codes(x, 16)
    return join_fields([f16_bytes(d), f16_bytes(low), _nibbles(mx.minimum(codes, 15))])


def encode_q5_0(x: mx.array) -> mx.array:
    d, codes = _symmetric_codes(x, 32)
    return join_fields([f16_bytes(d), _fifth_bits(codes), _nibbles(codes)])


def encode_q5_1(x: mx.array) -> mx.array:
    d, low, codes = _offset_codes(x, 32)
    return join_fields([f16_bytes(d), f16_bytes(low), _fifth_bits(codes), _nibbles(codes)])


def encode_q8_0(x: mx.array) -> mx.array:
    d = mx.abs(x).max(axis=1, keepdims=True) / 127.0
    scaled = x * reciprocal_or_zero(d)
    return join_fields([f16_bytes(d), truncate_u8(round_half_away(scaled))])


ENCODERS = {
    "q4_0": encode_q4_0,
    "q4_1": encode_q4_1,
    "q5_0": encode_q5_0,
    "q5_1": encode_q5_1,
    "q8_0": encode_q8_0,
}
