"""What a conversion did, as it is shown and recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxedge.ops import Quality
    from mlxedge.plan import Kept, OutputPlan, Plan, PlannedTensor


@dataclass
class TensorResult:
    """Squared error and squared weights of a tensor, summed; ``error`` is their ratio's root."""

    name: str
    encoding: str
    squared_error: float = 0.0
    squared_weights: float = 0.0
    #: The same, each column's squares multiplied by its importance; 0 where that is not known.
    weighted_error: float = 0.0
    weighted_weights: float = 0.0
    #: "encode" if a part of the tensor could not keep its codes after all.
    how: str = ""
    quality: Quality = "reference"
    nonfinite: bool = False

    def kept(self, planned: PlannedTensor) -> Kept | None:
        """What became of weights that were quantized already."""
        again = self.how == "encode" != planned.how
        return "requantized" if again else planned.kept

    @property
    def error(self) -> float:
        """Relative root-mean-square error, 0 for a tensor of zeros."""
        return _ratio([(self.squared_error, self.squared_weights)])

    @property
    def output_error(self) -> float | None:
        """That of columns weighed by their importance, which estimates the relative error of what
        the layer computes; ``None`` without a calibration."""
        if not self.weighted_weights:
            return None
        return _ratio([(self.weighted_error, self.weighted_weights)])


@dataclass
class OutputResult:
    """One finished output; ``seconds`` is the time its encoding took, shared among threads."""

    plan: OutputPlan
    tensors: list[TensorResult]
    seconds: float
    resumed: int = 0
    record: Path | None = None

    @property
    def error(self) -> float:
        """Relative root-mean-square error over all weights."""
        return _ratio([(t.squared_error, t.squared_weights) for t in self.tensors])

    @property
    def output_error(self) -> float | None:
        """That of what the calibrated layers compute, estimated; ``None`` without a calibration."""
        sums = [(t.weighted_error, t.weighted_weights) for t in self.tensors if t.weighted_weights]
        return _ratio(sums) if sums else None


@dataclass
class Report:
    """What a conversion did. ``nonfinite`` names tensors with NaN or infinity that were allowed,
    ``kept`` the outputs that an interrupted run had finished; ``calibration_seconds`` of
    ``seconds`` went by while the model ran and what it showed was made ready for encoders."""

    plan: Plan
    backend: str
    threads: int
    outputs: list[OutputResult]
    seconds: float
    nonfinite: list[str] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    calibration_seconds: float = 0.0


def _ratio(sums: Iterable[tuple[float, float]]) -> float:
    """The root of summed errors over summed weights."""
    errors, weights = (math.fsum(column) for column in zip(*sums, strict=True))
    return math.sqrt(errors / weights) if weights else 0.0
