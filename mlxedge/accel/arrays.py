"""C's arithmetic where MLX has another or none, and bit packing.

What does not fit an integer is undefined when C converts a float; here it is what x86-64 computes.
"""

from __future__ import annotations

import mlx.core as mx

#: 1.5 · 2^23. Adding it leaves the nearest integer (ties to even) in a float's low mantissa bits.
MAGIC = 12582912.0
MANTISSA = 0x007FFFFF
MAGIC_MANTISSA = 0x00400000


def first_absmax(x: mx.array, axis: int) -> tuple[mx.array, mx.array]:
    """The largest magnitude along ``axis`` and the first value that has it (both keep the axis).

    NaN never wins and -0 counts as 0, as in C's ``if (amax < fabsf(v))`` from 0.
    """
    x = mx.where(mx.abs(x) > 0, x, 0.0)
    magnitude = mx.abs(x)
    at = mx.argmax(magnitude, axis=axis, keepdims=True)
    return mx.take_along_axis(magnitude, at, axis), mx.take_along_axis(x, at, axis)


def first_range(x: mx.array, axis: int) -> tuple[mx.array, mx.array]:
    """The first least and the first greatest value along ``axis`` (both keep the axis).

    Of 0 and -0 the first counts, which a plain minimum leaves open.
    """
    low, high = (pick(x, axis=axis, keepdims=True) for pick in (mx.argmin, mx.argmax))
    return mx.take_along_axis(x, low, axis), mx.take_along_axis(x, high, axis)


def nearest_int(x: mx.array) -> mx.array:
    """ggml's ``nearest_int``, i32: ties to even, and for NaN, infinity or abs(x) > 4194303 the
    same low mantissa bits that C leaves (llama.cpp ``ggml-quants.c``)."""
    return ((x + MAGIC).view(mx.int32) & MANTISSA) - MAGIC_MANTISSA


def truncate_u8(x: mx.array) -> mx.array:
    """``(uint8_t)(int32_t)x``; what does not fit an i32 becomes 0."""
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


def join_fields(fields: list[mx.array]) -> mx.array:
    """Concatenate integer ``[N, k]`` fields below 256 to u8 ``[N, bytes]``."""
    return mx.concatenate([f.astype(mx.uint8) for f in fields], axis=1)


def combine_bits(parts: list[mx.array], shift: int) -> mx.array:
    """``parts[0] | parts[1] << shift | parts[2] << 2 shift …``, u32."""
    total = parts[0].astype(mx.uint32)
    for i, part in enumerate(parts[1:], 1):
        total = total | (part.astype(mx.uint32) << (i * shift))
    return total


def pack_stream(codes: mx.array, bits: int) -> mx.array:
    """Codes u32 below 2^bits as one little-endian bit stream: u32 ``[codes · bits / 32]``.

    The number of codes is a multiple of 32, so the stream repeats itself every ``bits`` words.
    """
    columns = codes.reshape(-1, 32)
    words = [mx.zeros_like(columns[:, 0])] * bits
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        words[word] = words[word] | (columns[:, i] << offset)
        if offset + bits > 32:
            words[word + 1] = words[word + 1] | (columns[:, i] >> (32 - offset))
    return mx.stack(words, axis=1).reshape(-1)


def unpack_stream(words: mx.array, bits: int) -> mx.array:
    """The inverse of :func:`pack_stream`."""
    columns = words.reshape(-1, bits)
    codes = []
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        code = columns[:, word] >> offset
        if offset + bits > 32:
            code = code | (columns[:, word + 1] << (32 - offset))
        codes.append(code & ((1 << bits) - 1))
    return mx.stack(codes, axis=1).reshape(-1)
