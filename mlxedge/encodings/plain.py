"""Unquantized floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlxedge.encodings.base import Encoding, Part


@dataclass(frozen=True)
class Plain(Encoding):
    """``dtype`` is "f32", "f16" or "bf16"; one part, "weight", of the tensor's own shape."""

    dtype: str
    family: ClassVar[str] = "plain"

    @property
    def name(self) -> str:
        return self.dtype

    @property
    def block(self) -> int:
        return 1

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"weight": Part(self.dtype, shape)}


F32 = Plain("f32")
F16 = Plain("f16")
BF16 = Plain("bf16")
PLAIN = {e.dtype: e for e in (F32, F16, BF16)}
