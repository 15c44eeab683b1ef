"""Statistics of the inputs of a model's matrices, layer by layer from disk.

The sums are those of llama-imatrix (tools/imatrix/imatrix.cpp of llama.cpp as vendored by
llama-cpp-python 0.3.36): of every position, chunk after chunk. Hessians are those of GPTQ
(arXiv 2210.17323) without their factor of two: the mean of x·xᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlxedge.calibration.statistics import Calibration, Statistics
from mlxedge.calibration.texts import Sample
from mlxedge.errors import BadWeightsError
from mlxedge.layers import LayerRunner, ProgressHook
from mlxedge.models.graph import head_name, layer_groups, postlude_groups, prelude_groups
from mlxedge.models.shape import shape_of

if TYPE_CHECKING:
    from mlxedge.calibration.states import KeptStates
    from mlxedge.sources.checkpoint import Checkpoint

#: Whether a group of matrices that share an input is to have a Hessian.
Wanted = Callable[[tuple[str, ...]], bool]
#: Rows of a Hessian that are computed together.
_STRIPE = 2048


@dataclass(frozen=True, eq=False)
class Collected:
    """Of the input x of the matrices ``names``: ``statistics``, and ``hessians`` f32
    ``[experts, cols, cols]``, symmetric, the mean of x·xᵀ over the tokens that reached an expert
    (over all of them where fewer than ``FEWEST_TOKENS`` did), or ``None``."""

    names: tuple[str, ...]
    statistics: Statistics
    hessians: np.ndarray | None = None


def input_groups(checkpoint: Checkpoint) -> list[tuple[str, ...]]:
    """The matrices that share an input, in the order in which they are collected; the head, or the
    embedding that it is tied to, comes last. ``checkpoint`` is a prepared one."""
    shape = shape_of(checkpoint.config)
    groups = [group for layer in range(shape.layers) for group in layer_groups(shape, layer)]
    after = [*postlude_groups(shape), (head_name(checkpoint.tensors),)]
    return [*prelude_groups(shape), *groups, *after]


def collect(
    checkpoint: Checkpoint,
    sample: Sample,
    *,
    hessians: bool | Wanted = False,
    threads: int | None = None,
    folder: Path | None = None,
    progress: ProgressHook | None = None,
    kept: KeptStates | None = None,
) -> Generator[Collected]:
    """Run ``sample`` through a prepared ``checkpoint`` and yield what its matrices saw, in the
    order of ``input_groups``.

    The weights and the Hessians of one layer are in memory at a time, if the consumer keeps none.
    ``hessians`` may choose groups by their names. ``folder`` is where hidden states go that memory
    is too small for. With ``kept`` an earlier run is gone on with, which leaves out the layers that
    it had finished. Results do not depend on ``threads``; the last bits of Hessians may depend on
    NumPy's BLAS. Raises what ``LayerRunner`` does.
    """
    with LayerRunner(checkpoint, sample.ids, threads, folder=folder) as runner:
        if kept is not None:
            kept.restore(runner)
        while runner.done < runner.shape.layers:
            if kept is not None:
                kept.keep(runner)
            yield from _handed_over(collect_layer(runner, hessians, progress))
        if kept is not None:
            kept.keep(runner)
        yield from _handed_over(collect_head(runner, hessians))
        if progress:
            total = runner.shape.layers * runner.sequences
            progress(total, total, "")


def calibrate(
    checkpoint: Checkpoint,
    sample: Sample,
    *,
    threads: int | None = None,
    folder: Path | None = None,
    progress: ProgressHook | None = None,
) -> Calibration:
    """The sums alone, of the whole model; see :func:`collect`."""
    found = collect(checkpoint, sample, threads=threads, folder=folder, progress=progress)
    return as_calibration(found, sample)


def as_calibration(found: Iterable[Collected], sample: Sample) -> Calibration:
    """What was collected, without Hessians."""
    tensors: dict[str, Statistics] = {}
    for one in found:
        tensors |= dict.fromkeys(one.names, one.statistics)
    return Calibration(tensors, (sample.text,), sample.sha256, sample.tokens, sample.context)


def collect_layer(
    runner: LayerRunner, hessians: bool | Wanted = False, progress: ProgressHook | None = None
) -> list[Collected]:
    """Take a runner through its next layer."""
    seen = _Seen(hessians)
    layer = runner.done
    runner.step(seen, progress)
    return seen.finish(f"{runner.checkpoint.origin.path}: the activations of layer {layer}")


def collect_head(runner: LayerRunner, hessians: bool | Wanted = False) -> list[Collected]:
    """After the last layer: of the head's input last."""
    seen = _Seen(hessians)
    runner.watch_head(seen)
    return seen.finish(f"{runner.checkpoint.origin.path}: the activations before the head")


def _handed_over(found: list[Collected]) -> Iterator[Collected]:
    """Each in turn, kept here no longer than the consumer keeps it."""
    while found:
        yield found.pop(0)


class _Seen:
    """Sums over the inputs of one layer, by group."""

    def __init__(self, hessians: bool | Wanted) -> None:
        self._wanted = hessians if callable(hessians) else lambda names: bool(hessians)
        self._groups: dict[tuple[str, ...], _Sums] = {}

    def __call__(self, names: tuple[str, ...], x: np.ndarray, expert: int, experts: int) -> None:
        if names not in self._groups:
            self._groups[names] = _Sums(experts, x.shape[1], self._wanted(names))
        self._groups[names].add(x, expert)

    def finish(self, what: str) -> list[Collected]:
        """In the order in which they came. Raises BadWeightsError if ``what`` is not finite."""
        found = []
        for names, sums in self._groups.items():
            made = sums.finish(names)
            hessians = made.hessians
            if not np.isfinite(made.statistics.sums).all() or (
                hessians is not None and not all(np.isfinite(one).all() for one in hessians)
            ):
                raise BadWeightsError(
                    f"{what} are not finite at the input of {names[0]}, or their squares are not: "
                    "the weights are damaged or out of range"
                )
            found.append(made)
        self._groups.clear()
        return found


class _Sums:
    """Of the inputs of one group, by expert."""

    def __init__(self, experts: int, cols: int, hessians: bool) -> None:
        self._squares = np.zeros((experts, cols))
        self._counts = np.zeros(experts, np.int64)
        self._hessians = np.zeros((experts, cols, cols), np.float32) if hessians else None

    def add(self, x: np.ndarray, expert: int) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            wide = x.astype(np.float64)
            self._squares[expert] += np.einsum("nc,nc->c", wide, wide)
            self._counts[expert] += len(x)
            if self._hessians is not None:
                _add_upper(self._hessians[expert], x)

    def finish(self, names: tuple[str, ...]) -> Collected:
        hessians, self._hessians = self._hessians, None
        with np.errstate(over="ignore", invalid="ignore"):
            statistics = Statistics(self._squares.astype(np.float32), self._counts)
            if hessians is not None:
                _average(hessians, statistics)
        return Collected(names, statistics, hessians)


def _average(hessians: np.ndarray, statistics: Statistics) -> None:
    """Sums of x·xᵀ (their upper halves) to symmetric means, in place."""
    few = statistics.few
    everyone = hessians.sum(0, dtype=np.float32) if few.any() else None
    for one, count, alone in zip(hessians, statistics.counts, ~few, strict=True):
        if not alone:
            one[:] = everyone
        _complete(one, np.float32(1 / (count if alone else statistics.total)))


def _add_upper(hessian: np.ndarray, x: np.ndarray) -> None:
    """Add xᵀ·x on and above the diagonal, a stripe of rows at a time."""
    for first in range(0, len(hessian), _STRIPE):
        stripe = x[:, first : first + _STRIPE]
        hessian[first : first + _STRIPE, first:] += stripe.T @ x[:, first:]


def _complete(hessian: np.ndarray, scale: np.float32) -> None:
    """Scale, and mirror what is above the diagonal."""
    hessian *= scale
    for first in range(0, len(hessian), _STRIPE):
        stop = first + _STRIPE
        block = hessian[first:stop, first:stop]
        upper = np.triu(block)
        block[:] = upper + np.triu(block, 1).T
        hessian[stop:, first:stop] = hessian[first:stop, stop:].T
