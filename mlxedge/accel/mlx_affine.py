"""MLX's affine groups: w ≈ scale · code + bias, by the CPU rule of ``mx.quantize``.

The rule stands in ``quantize`` of ``mlx/backend/cpu/quantized.cpp`` (mlx 0.32.4). MLX's Metal and
CUDA kernels follow another; this module computes the CPU rule on any device.
"""

from __future__ import annotations

import mlx.core as mx

from mlxedge.accel.arrays import pack_stream, unpack_stream
from mlxedge.accel.casts import store_as
from mlxedge.encodings import Affine

#: The smallest scale that MLX gives a group.
EPSILON = 1e-7


def encode(x: mx.array, encoding: Affine) -> dict[str, mx.array]:
    """Encode groups ``[N, group]`` of f32 weights: packed codes u32 ``[N · group · bits / 32]``,
    scales and biases ``[N]`` in ``encoding.scale_dtype``."""
    top = float((1 << encoding.bits) - 1)
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    negative = mx.abs(low) > mx.abs(high)
    scale = mx.maximum((high - low) / top, EPSILON)
    scale = mx.where(negative, scale, -scale)
    edge = mx.where(negative, low, high)
    steps = mx.round(edge / scale)
    scale = mx.where(steps != 0, edge / steps, scale)
    bias = mx.where(steps != 0, edge, 0.0)
    codes = (x - bias) / scale
    codes = mx.where(codes > 0, codes, 0.0)
    codes = mx.round(mx.where(codes < top, codes, top)).astype(mx.uint32)
    return {
        "weight": pack_stream(codes, encoding.bits),
        "scales": store_as(scale, encoding.scale_dtype),
        "biases": store_as(bias, encoding.scale_dtype),
    }


def decode(weight: mx.array, scales: mx.array, biases: mx.array, encoding: Affine) -> mx.array:
    """Decode packed codes u32, with f32 scales and biases ``[N]``, to f32 ``[N, group]``."""
    codes = unpack_stream(weight, encoding.bits).reshape(-1, encoding.group)
    return scales[:, None] * codes.astype(mx.float32) + biases[:, None]
