"""Encoders that search, on MLX: the bytes of ``fallback.search``, which is their definition.

Every search runs on blocks of a few million weights at a time, so that no evaluation takes long or
more than 1 GiB beside the tensor.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from mlxedge.accel.casts import load_f32
from mlxedge.encodings import Affine, Encoding, MlxFloat
from mlxedge.errors import UnsupportedEncodingError
from mlxedge.ops import Feedback, Parts

#: The modules with ``search(weights, encoding, importance)``, by family or by name: weights f32
#: ``[rows, cols]`` and importance f32 ``[cols]`` or None, both NumPy's; NumPy parts come back.
_FAMILIES: dict[type[Encoding], str] = {Affine: "fast_affine", MlxFloat: "fast_levels"}
_NAMES = {
    "q4_1": "fast_affine",
    "q5_1": "fast_affine",
    "q4_0": "fast_levels",
    "q5_0": "fast_levels",
    "q8_0": "fast_levels",
    "iq4_nl": "fast_levels",
    "mxfp4": "fast_levels",
    "q2_k": "fast_k_affine",
    "q4_k": "fast_k_affine",
    "q5_k": "fast_k_affine",
    "q3_k": "fast_k_signed",
    "q6_k": "fast_k_signed",
    "iq4_xs": "fast_k_signed",
}


def encode(
    weights: np.ndarray,
    encoding: Encoding,
    importance: np.ndarray | None,
    feedback: Feedback | None,
) -> Parts:
    """Encode ``weights`` ``[rows, cols]`` (f32, f16 or bf16, C order)."""
    name = _FAMILIES.get(type(encoding)) or _NAMES.get(encoding.name)
    if name is None:
        raise UnsupportedEncodingError(f"{encoding} is not searched by MLX: use --backend numpy")
    wide = np.array(load_f32(weights))
    found: Parts = _load(name).search(wide, encoding, importance)
    if feedback is None:
        return found
    improved: Parts = _load("feedback").encode(wide, found, encoding, feedback)
    return improved


def _load(name: str) -> Any:
    return importlib.import_module(f"mlxedge.accel.{name}")
