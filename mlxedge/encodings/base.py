"""The shape of an encoding: named parts, each an array of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

#: Bytes per element of the dtypes that parts are made of; the last rows are only ever listed.
ITEM_SIZE = {
    "f32": 4,
    "f16": 2,
    "bf16": 2,
    "u32": 4,
    "u8": 1,
    "i8": 1,
    "i16": 2,
    "i32": 4,
    "f64": 8,
    "bool": 1,
    "u16": 2,
    "i64": 8,
    "u64": 8,
    "c64": 8,
    "f8_e4m3": 1,
    "f8_e5m2": 1,
    "f8_e8m0": 1,
    "f8_e4m3fnuz": 1,
    "f8_e5m2fnuz": 1,
}


@dataclass(frozen=True)
class Part:
    """One stored array of an encoded matrix.

    ``dtype`` is one of ``ITEM_SIZE``; ``shape`` keeps every leading dimension of the tensor and
    replaces the last one.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_SIZE[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Encoding:
    """How the weights along the last axis of a tensor are stored.

    ``block`` weights are encoded together; the last axis must be a multiple of it.
    """

    family: ClassVar[str]

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def block(self) -> int:
        raise NotImplementedError

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """The stored arrays for a tensor of ``shape``, by part name; "weight" always exists."""
        raise NotImplementedError

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(part.nbytes for part in self.parts(shape).values())

    def fits(self, shape: tuple[int, ...]) -> bool:
        return bool(shape) and shape[-1] % self.block == 0

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales and biases included."""
        return 8 * self.nbytes((1, self.block)) / self.block

    def __str__(self) -> str:
        return self.name
