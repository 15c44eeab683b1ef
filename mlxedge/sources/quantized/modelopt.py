"""What NVIDIA's ModelOpt exports: NVFP4 and FP8, mixed freely.

NVFP4: ``X.weight`` u8 ``[out, in / 2]``, ``X.weight_scale`` E4M3 ``[out, in / 16]`` and
``X.weight_scale_2`` f32, all factors. FP8: ``X.weight`` E4M3 and ``X.weight_scale``.
"""

from __future__ import annotations

from typing import Any

from mlxedge.errors import UnsupportedEncodingError
from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.files import shown
from mlxedge.sources.quantized import fp4, scaled
from mlxedge.sources.quantized.stored import FP8, Stored


def read(stored: Stored, rules: dict[str, Any]) -> dict[str, SourceTensor]:
    """Every matrix of bytes and of FP8."""
    made = {}
    for name in stored.names:
        dtype = stored.entry(name).dtype
        if dtype in FP8 and not name.endswith("_scale"):
            made[name] = scaled.scaled(stored, name, None)
        elif dtype == "u8" and f"{name}_scale_2" in stored:
            made[name] = fp4.nvfp4(
                stored, name, name, f"{name}_scale", f"{name}_scale_2", divides=False
            )
        elif dtype == "u8" and not name.endswith("_scale"):
            algorithm = shown(str(rules.get("quant_algo")))
            raise UnsupportedEncodingError(
                f"{stored.folder}: {shown(name)} is quantized with {algorithm}; of ModelOpt's "
                "algorithms mlxedge reads NVFP4 and FP8"
            )
    scaled.drop_unused(stored)
    return made
