"""MLX's affine groups: w ≈ scale · code + bias.

The encoder is the CPU rule of ``mx.quantize`` (``quantize`` in ``mlx/backend/cpu/quantized.cpp``,
mlx 0.32.4), bit for bit; MLX's Metal and CUDA kernels round differently, so files that this module
writes do not depend on the machine. In float32, for every group with n = 2^bits - 1::

    s = max((max - min) / n, 1e-7), negated unless |min| > |max|
    edge = min if |min| > |max| else max
    q0 = rint(edge / s)
    s, b = (edge / q0, edge) if q0 != 0 else (s, 0)
    code = clip(rint((w - b) / s), 0, n)

Codes follow from the unrounded s and b, which are then rounded to ``encoding.scale_dtype``;
``mx.quantize`` stores them in the dtype of its input. Groups with NaN or infinite weights get codes
without meaning.

The decoder computes scale · code + bias in float32 with both roundings. ``mx.dequantize`` computes
the same expression in the dtype of the scales, so with f16 or bf16 scales its result is coarser.
"""

from __future__ import annotations

import numpy as np

from mlxedge.encodings import Affine
from mlxedge.fallback.bits import DTYPES, as_input, flat_bits, load, pack, unpack
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.plain import cast
from mlxedge.ops import Parts

_FLOAT, _INT, _U32 = np.float32, np.int32, np.uint32
#: The smallest scale that MLX gives a group.
_EPSILON = np.float32(1e-7)
#: 1.5 · 2^23: added to a float below 2^22, it leaves the nearest integer in the low mantissa bits.
_MAGIC = np.float32(12582912.0)


def encode(weights: np.ndarray, encoding: Affine) -> Parts:
    """Encode ``weights`` ``[rows, cols]`` (f32, f16 or bf16, C order)."""
    parts = encoding.parts(weights.shape)
    weight = np.empty(parts["weight"].shape, np.uint32)
    scales = np.empty(parts["scales"].shape, np.float32)
    biases = np.empty_like(scales)
    source, kind = flat_bits(weights)
    _encode(
        source,
        kind,
        encoding.group,
        encoding.bits,
        weight.reshape(-1).view(np.uint8),
        scales.reshape(-1),
        biases.reshape(-1),
    )
    return {
        "weight": weight,
        "scales": cast(scales, encoding.scale_dtype),
        "biases": cast(biases, encoding.scale_dtype),
    }


def decode(parts: Parts, encoding: Affine) -> np.ndarray:
    """Decode to f32 ``[rows, cols]``."""
    scales, biases = cast(parts["scales"], "f32"), cast(parts["biases"], "f32")
    weight = as_input(parts["weight"])
    *lead, groups = scales.shape
    out = np.empty((*lead, groups * encoding.group), DTYPES["f32"])
    _decode(
        weight.reshape(-1).view(np.uint8),
        encoding.bits,
        as_input(scales.reshape(-1)),
        as_input(biases.reshape(-1)),
        out.reshape(-1),
    )
    return out


@kernel
def _encode(
    source: np.ndarray,
    kind: int,
    group: int,
    bits: int,
    packed: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
) -> None:
    top = _FLOAT((1 << bits) - 1)
    size = group * bits // 8
    values = np.empty(group, _FLOAT)
    patterns = values.view(_INT)
    shifted = np.empty(group, _FLOAT)
    mantissas = shifted.view(_U32)
    codes = np.empty(group, np.uint8)
    edges = np.empty(2, _INT)
    extremes = edges.view(_FLOAT)
    for g in range(scales.size):
        load(source[g * group : (g + 1) * group], kind, values)
        # Minimum and maximum of the bit patterns, made to order as integers do: unlike float
        # comparisons, which must keep NaN and the sign of zero, these vectorise.
        low, high = _INT(0x7FFFFFFF), _INT(-0x80000000)
        for j in range(group):
            key = _INT(patterns[j] ^ ((patterns[j] >> _INT(31)) & _INT(0x7FFFFFFF)))
            low, high = min(low, key), max(high, key)
        edges[0] = low ^ ((low >> _INT(31)) & _INT(0x7FFFFFFF))
        edges[1] = high ^ ((high >> _INT(31)) & _INT(0x7FFFFFFF))
        smallest, largest = extremes[0], extremes[1]
        negative = abs(smallest) > abs(largest)
        scale = max(_FLOAT((largest - smallest) / top), _EPSILON)
        scale = scale if negative else -scale
        edge = smallest if negative else largest
        bias = _FLOAT(0.0)
        q0 = np.rint(_FLOAT(edge / scale))
        if q0 != _FLOAT(0.0):
            scale, bias = _FLOAT(edge / q0), edge
        scales[g], biases[g] = scale, bias
        # Clipping first is the same, since 0 and top are integers, and keeps MAGIC exact.
        for j in range(group):
            q = _FLOAT(_FLOAT(values[j] - bias) / scale)
            q = q if q > _FLOAT(0.0) else _FLOAT(0.0)
            q = q if q < top else top
            shifted[j] = _FLOAT(q + _MAGIC)
        for j in range(group):
            codes[j] = np.uint8(mantissas[j])
        pack(codes, bits, packed[g * size : (g + 1) * size])


@kernel
def _decode(
    packed: np.ndarray, bits: int, scales: np.ndarray, biases: np.ndarray, out: np.ndarray
) -> None:
    if scales.size == 0:
        return
    group = out.size // scales.size
    size = group * bits // 8
    codes = np.empty(group, np.uint8)
    for g in range(scales.size):
        unpack(packed[g * size : (g + 1) * size], bits, codes)
        scale, bias = scales[g], biases[g]
        values = out[g * group : (g + 1) * group]
        for j in range(group):
            values[j] = _FLOAT(scale * _FLOAT(np.int32(codes[j]))) + bias
