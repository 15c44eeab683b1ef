"""MLX's quantized formats: u32-packed codes with scales (and biases) per group.

Layouts follow ``mx.quantize`` of mlx 0.32 (``mlx/ops.cpp``, ``mlx/backend/cpu/quantized.cpp``).
Codes are one little-endian bit stream per row, viewed as u32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlxedge.encodings.base import Encoding, Part

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Affine(Encoding):
    """w = scale · code + bias, with one scale and one bias per group of ``group`` weights.

    Parts for shape ``[..., K]``: "weight" u32 ``[..., K · bits / 32]``, "scales" and "biases"
    ``[..., K / group]`` in ``scale_dtype`` ("f32", "f16" or "bf16").
    """

    bits: int
    group: int = 64
    scale_dtype: str = "bf16"
    family: ClassVar[str] = "mlx"
    mode: ClassVar[str] = "affine"

    @property
    def name(self) -> str:
        return f"affine-{self.bits}bit-g{self.group}"

    @property
    def block(self) -> int:
        return self.group

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        *lead, k = shape
        groups = Part(self.scale_dtype, (*lead, k // self.group))
        return {
            "weight": Part("u32", (*lead, k * self.bits // 32)),
            "scales": groups,
            "biases": groups,
        }


@dataclass(frozen=True)
class MlxFloat(Encoding):
    """Small floats with a shared scale: mxfp4, mxfp8 (group 32, E8M0), nvfp4 (group 16, E4M3).

    Parts for shape ``[..., K]``: "weight" u32 ``[..., K · bits / 32]``, "scales" u8
    ``[..., K / group]``.
    """

    mode: str
    bits: int
    group: int
    family: ClassVar[str] = "mlx"

    @property
    def name(self) -> str:
        return f"mlx-{self.mode}"

    @property
    def block(self) -> int:
        return self.group

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        *lead, k = shape
        return {
            "weight": Part("u32", (*lead, k * self.bits // 32)),
            "scales": Part("u8", (*lead, k // self.group)),
        }


MLX_FLOAT = {
    e.mode: e
    for e in (MlxFloat("mxfp4", 4, 32), MlxFloat("mxfp8", 8, 32), MlxFloat("nvfp4", 4, 16))
}
