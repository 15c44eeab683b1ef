"""``mx.quantize`` and ``mx.dequantize`` on the CPU device, with NumPy arrays in and out."""

from __future__ import annotations

import ml_dtypes
import mlx.core as mx
import numpy as np

from mlxedge.encodings import Affine, MlxFloat
from mlxedge.ops import Parts

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}


def to_mlx(array: np.ndarray) -> mx.array:
    if array.dtype == _BFLOAT16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def to_numpy(array: mx.array) -> np.ndarray:
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(_BFLOAT16)
    return np.array(array)


def quantize(weights: np.ndarray, encoding: Affine | MlxFloat) -> Parts:
    """The parts of ``weights`` ``[rows, cols]``; affine scales have the dtype of the weights."""
    made = mx.quantize(
        to_mlx(weights),
        group_size=encoding.group,
        bits=encoding.bits,
        mode=encoding.mode,
        stream=mx.cpu,
    )
    return dict(zip(("weight", "scales", "biases"), map(to_numpy, made)))


def dequantize(parts: Parts, encoding: Affine | MlxFloat, dtype: str | None = None) -> np.ndarray:
    """The weights, computed by MLX in the dtype of affine scales, else in ``dtype``."""
    arrays = {name: to_mlx(part) for name, part in parts.items()}
    return to_numpy(
        mx.dequantize(
            arrays["weight"],
            arrays["scales"],
            arrays.get("biases"),
            group_size=encoding.group,
            bits=encoding.bits,
            mode=encoding.mode,
            dtype=None if dtype is None else _DTYPES[dtype],
            stream=mx.cpu,
        )
    )
