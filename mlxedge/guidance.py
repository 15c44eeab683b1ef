"""What is known of the input of each matrix when it is encoded, and the quality this allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlxedge.encodings import Encoding
from mlxedge.ops import Feedback, Quality, load_reference

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.calibration.statistics import Calibration
    from mlxedge.models.spec import ModelSpec
    from mlxedge.sources.checkpoint import Checkpoint

Collected = CalibrationRun = Any
ProgressHook = Callable[[int, int, str], None]

#: With fewer bits a search that knows nothing of the inputs may do harm: the least squares of
#: weights are not those of what a layer computes, and outliers get clipped that matter most.
LEAST_BITS_UNCALIBRATED = 4.0
#: From here on, inputs make no difference that a model could show.
MOST_BITS_CALIBRATED = 8.0


@dataclass(frozen=True)
class Hint:
    """For one matrix: ``importance`` f32 ``[cols]``, the mean square of each input, and what error
    feedback needs."""

    importance: np.ndarray | None = None
    feedback: Feedback | None = None


class Guide:
    """Nothing is known. Other guides know more.

    ``searches`` tells whether encodings may be searched at all; without, every matrix gets the rule
    of its runtime.
    """

    def __init__(self, asked: Quality = "reference") -> None:
        self.asked = asked

    def order(self, names: Iterable[str]) -> list[str]:
        """In which order tensors are to be encoded."""
        return list(names)

    def hint(self, name: str) -> Hint:
        """What is known of the tensor ``name``; asked in ``order``, from one thread."""
        return Hint()

    def quality(self, encoding: Encoding, hint: Hint) -> Quality:
        """The quality that a tensor gets."""
        if self.asked == "reference" or encoding.family == "plain":
            return "reference"
        if hint.importance is None and encoding.bits_per_weight < LEAST_BITS_UNCALIBRATED:
            return "reference"
        return "fast" if hint.feedback is None else "best"


class CalibratedGuide(Guide):
    """The importance of columns, as an imatrix file or a calibration tells it."""

    def __init__(self, asked: Quality, calibration: Calibration) -> None:
        super().__init__(asked)
        self._calibration = calibration

    def hint(self, name: str) -> Hint:
        return Hint(self._calibration.importance(name))


class FeedbackGuide(Guide):
    """Importance and Hessians, layer by layer as ``collected`` yields them.

    ``groups`` names the tensors that share an input, in the order in which they come. What was made
    of a group is dropped when the next is asked for, so that memory holds two or three of them.
    """

    def __init__(self, groups: Iterable[tuple[str, ...]], collected: Iterator[Collected]) -> None:
        super().__init__("best")
        self._rank = {name: i for i, names in enumerate(groups) for name in names}
        self._collected = collected
        self._current: Mapping[str, Hint] = {}

    def order(self, names: Iterable[str]) -> list[str]:
        """Tensors without an input first, then group by group."""
        return sorted(names, key=lambda name: self._rank.get(name, -1))

    def hint(self, name: str) -> Hint:
        if name not in self._rank:
            return Hint()
        while name not in self._current:
            found = next(self._collected)
            if name not in found.names:
                continue
            importance = (found.sums.reshape(-1) / max(found.count, 1)).astype("float32")
            feedback = None
            if found.hessian is not None:
                feedback = load_reference().feedback(found.hessian)
            self._current = dict.fromkeys(found.names, Hint(importance, feedback))
        return self._current[name]


@dataclass(frozen=True)
class Guidance:
    """How a plan's tensors are to be encoded: settled when planning, carried out when running.

    ``quality`` is the one asked for, or what it comes to. ``described`` is what the record says of
    the calibration, ``None`` without one; ``note`` says why there is none.
    """

    quality: Quality = "reference"
    described: Mapping[str, object] | None = None
    note: str | None = None
    #: The tensors whose inputs will be known.
    known: frozenset[str] = frozenset()
    memory_bytes: int = 0
    calibration: Calibration | None = None
    run: CalibrationRun | None = None

    @property
    def calibrates(self) -> bool:
        return self.described is not None

    def needed_for(self, encodings: Iterable[Encoding]) -> Guidance:
        """This, or one without a calibration if none of ``encodings`` gains by it."""
        if any(e.bits_per_weight < MOST_BITS_CALIBRATED for e in encodings):
            return self
        return replace(self, described=None, note=None, memory_bytes=0, calibration=None, run=None)

    def sentence(self) -> str:
        """For the reader of a plan."""
        if self.described is None:
            return f"quality {self.quality}" + (f": {self.note}" if self.note else "")
        return f"quality {self.quality}, calibrated on {self.described['what']}"

    @contextmanager
    def guide(
        self, checkpoint: Checkpoint, threads: int, progress: ProgressHook | None
    ) -> Iterator[Guide]:
        """Run the model if that is planned, and say what is known of each tensor."""
        if self.run is not None:
            with self.run.guide(self.quality, checkpoint, threads, progress) as guide:
                yield guide
        elif self.calibration is not None:
            yield CalibratedGuide(self.quality, self.calibration)
        else:
            yield Guide(self.quality)


def plan_guidance(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    quality: Quality,
    calibrate: str | Path | Literal[False] | None,
) -> Guidance:
    """Settle how to calibrate ``checkpoint`` for ``quality``, as ``mlxedge.conversion.convert``
    says of ``calibrate``."""
    return Guidance(quality)
