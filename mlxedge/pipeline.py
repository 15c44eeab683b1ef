"""Run a plan: read each source tensor once, in chunks of rows, for every output.

Chunks of several tensors are in flight at once, one per thread; the kernels release the GIL. A
tensor is noted in the journals when all its chunks are written.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxedge.encodings import Encoding
from mlxedge.errors import BadWeightsError, UnsupportedEncodingError, UsageError
from mlxedge.guidance import Guide, Hint, Known
from mlxedge.models.layout import heads_of, rope_row_order_to_gguf
from mlxedge.ops import Ops, Parts, Quality, load_ops, load_reference
from mlxedge.outputs.gguf import without_imatrix
from mlxedge.outputs.staging import Staging
from mlxedge.plan import Plan, PlannedTensor
from mlxedge.report import OutputResult, Report, TensorResult

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.calibration.states import KeptStates
    from mlxedge.sources.checkpoint import Checkpoint, SourceTensor

#: Called from one thread at a time with weights done, weights in all, and the tensor's name; for a
#: calibration with layers of sequences done, those in all, and the layer.
ProgressHook = Callable[[int, int, str], None]

_LARGEST_F16 = 65504.0
#: Below this a sum of squares in f32 may have lost what it is made of.
_TINY = 1e-25


@dataclass
class _Work:
    """A source tensor and where it goes; shared by the chunks of it."""

    source: SourceTensor
    goals: list[tuple[int, PlannedTensor]]
    chunks: int
    results: list[TensorResult]
    hint: Hint


def run_plan(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    backend: str | None = None,
    force: bool = False,
    allow_nan: bool = False,
    threads: int | None = None,
    progress: ProgressHook | None = None,
    calibrating: ProgressHook | None = None,
) -> Report:
    """Write every output of ``plan`` from ``checkpoint``; see ``mlxedge.conversion.convert``."""
    from mlxedge.record import SourceHashes, write_record

    ops = load_ops(backend)
    started = time.perf_counter()
    workers = worker_count(threads)
    with contextlib.ExitStack() as stack:
        stages = []
        for output in plan.outputs:
            if output.finished:
                continue
            stage = Staging(output, plan.fingerprint(output, ops.name, allow_nan))
            stack.callback(stage.keep)
            stages.append(stage)
        hashes = stack.enter_context(SourceHashes(checkpoint.origin))
        run = _Run(plan, checkpoint, ops, stages, allow_nan, workers, progress, calibrating)
        try:
            run.run()
        except (BadWeightsError, UnsupportedEncodingError, UsageError):
            for stage in stages:
                stage.discard()
            raise
        results = run.collect()
        report = Report(plan, ops.name, run.threads, results, 0.0, run.nonfinite())
        report.calibration_seconds = run.calibration_seconds
        report.kept = [output.path for output in plan.outputs if output.finished]
        for stage in stages:
            check_written(stage)
        for stage, result in zip(stages, results, strict=True):
            report.seconds = time.perf_counter() - started
            # The record goes first: an output that is there has one, which says whose it is.
            result.record = write_record(report, result, checkpoint, hashes, stage)
            stage.publish(force)
    report.seconds = time.perf_counter() - started
    return report


class _Run:
    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        ops: Ops,
        stages: list[Staging],
        allow_nan: bool,
        threads: int,
        progress: ProgressHook | None,
        calibrating: ProgressHook | None,
    ) -> None:
        self.plan = plan
        self.guide = Guide()
        self.checkpoint = checkpoint
        self.ops = ops
        self.reference = load_reference()
        self.stages = stages
        self.allow_nan = allow_nan
        self.threads = threads if ops.parallel else 1
        self._processors = threads
        self.progress, self.calibrating = progress, calibrating
        self.calibration_seconds = 0.0
        self._sources = plan.sources(checkpoint.tensors)
        self.total = sum(t.size for t in self._sources.values())
        self._done_weights = 0
        self._seconds = [0.0] * len(stages)
        self._guard = threading.Lock()

    def run(self) -> None:
        """Calibrate if that is planned, and encode everything."""
        try:
            with self._timed_calibration():
                self.guide = self.plan.guidance.guide(
                    self.checkpoint,
                    self._processors,  # of the model, which is the fallback's, whatever encodes
                    self._calibrating,
                    self._fed_back(),
                    self._kept_states(),
                )
        except BadWeightsError as error:
            self._explain(error)
        with contextlib.closing(self.guide):
            self._encode_all()

    def _fed_back(self) -> set[str]:
        """Source tensors for which error feedback has codes to choose: not those that an earlier
        run finished."""
        from mlxedge.grids import has_grid

        return {
            self._calibrated_as(planned.source)
            for stage in self.stages
            for planned in stage.plan.tensors
            if planned.name not in stage.done
            and planned.how == "encode"
            and has_grid(planned.encoding)
        }

    def _calibrated_as(self, name: str) -> str:
        """The canonical tensor whose input a source tensor has, else its own name."""
        return self._sources[name].like or name

    def _kept_states(self) -> KeptStates | None:
        """Where a run of the model leaves its states, or goes on from those of an earlier one."""
        from mlxedge.calibration.states import KeptStates

        if not self.stages:
            return None
        wanted = {
            self._calibrated_as(planned.source)
            for stage in self.stages
            for planned in stage.plan.tensors
            if planned.name not in stage.done and planned.how == "encode"
        }

        def sync() -> None:
            for stage in self.stages:
                stage.sync()

        return KeptStates(self.stages[0].dir / "states", wanted, sync)

    def _encode_all(self) -> None:
        running: set[Future[None]] = set()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="mlxedge") as pool:
            try:
                for work, start, stop in self._chunks():
                    if len(running) > self.threads:
                        done, running = wait(running, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()
                    running.add(pool.submit(self._chunk, work, start, stop))
                for future in running:
                    future.result()
            except BaseException:
                if self.checkpoint.cache is not None:
                    self.checkpoint.cache.cancel()
                pool.shutdown(cancel_futures=True)
                raise

    def collect(self) -> list[OutputResult]:
        """Results per output, those of an earlier run from its journal."""
        found = []
        for stage, seconds in zip(self.stages, self._seconds, strict=True):
            tensors = []
            for planned in stage.plan.tensors:
                line = stage.done[planned.name]
                tensors.append(
                    TensorResult(
                        planned.name,
                        planned.encoding.name,
                        line["squared_error"],
                        line["squared_weights"],
                        line["weighted_error"],
                        line["weighted_weights"],
                        line["how"],
                        line["quality"],
                        line["nonfinite"],
                    )
                )
            found.append(
                OutputResult(stage.plan, tensors, seconds / self.threads, stage.resumed_tensors)
            )
        return found

    def nonfinite(self) -> list[str]:
        """Source tensors with NaN or infinity, also those that an earlier run met."""
        found = {
            planned.source
            for stage in self.stages
            for planned in stage.plan.tensors
            if stage.done[planned.name]["nonfinite"]
        }
        return sorted(found)

    def _chunks(self) -> Iterator[tuple[_Work, int, int]]:
        goals: dict[str, list[tuple[int, PlannedTensor]]] = {}
        for index, stage in enumerate(self.stages):
            for planned in stage.plan.tensors:
                if planned.name not in stage.done:
                    goals.setdefault(planned.source, []).append((index, planned))
        for name in self._order():
            source = self._sources[name]
            if name not in goals:
                self._advance(source.size, name)
                continue
            encoded = [p for _, p in goals[name] if p.how == "encode"]
            hint = self._hint(name) if encoded else Hint()
            results = [TensorResult(p.name, p.encoding.name, how=p.how) for _, p in goals[name]]
            for (_, planned), result in zip(goals[name], results, strict=True):
                result.quality = self.guide.quality(planned.encoding, hint)
            # Where experts are told apart, no chunk is of two.
            whole = source.rows // hint.experts
            step = min(self._rows_per_chunk(source, [p for _, p in goals[name]]), whole)
            work = _Work(source, goals[name], hint.experts * -(-whole // step), results, hint)
            for first in range(0, source.rows, whole):
                for start in range(first, first + whole, step):
                    yield work, start, min(start + step, first + whole)

    def _order(self) -> list[str]:
        """The guide's, what is made of canonical tensors beside those that have the same input."""
        place = {name: i for i, name in enumerate(self.guide.order(self.checkpoint.tensors))}
        return sorted(self._sources, key=lambda name: place.get(self._calibrated_as(name), -1))

    def _hint(self, name: str) -> Hint:
        try:
            with self._timed_calibration():
                return self.guide.hint(self._calibrated_as(name), self._sources[name].columns)
        except BadWeightsError as error:
            self._explain(error)
            self.guide = Guide()
            return Hint()

    def _explain(self, error: BadWeightsError) -> None:
        """After a calibration that met what is not finite: raise BadWeightsError for the first
        weight that is not, or let the plain rules do for what is left where the user allowed that
        and no header tells of a calibration.
        """
        if self.allow_nan:
            for stage in self.stages:
                if advice := without_imatrix(stage.plan):
                    raise BadWeightsError(f"{error}; {advice}") from error
            return
        for source in self.checkpoint.tensors.values():
            step = self._rows_per_chunk(source, [])
            for start in range(0, source.rows, step):
                parts = source.read_rows(start, min(start + step, source.rows))
                self._is_finite(self._decode(parts, source.encoding), source, start)
        raise BadWeightsError(
            f"{error}; --no-calibrate with --quality reference encodes them without running it"
        ) from error

    def _calibrating(self, done: int, steps: int, what: str) -> None:
        if self.calibrating is not None:
            with self._guard:
                self.calibrating(done, steps, what)

    @contextlib.contextmanager
    def _timed_calibration(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.calibration_seconds += time.perf_counter() - began

    def _rows_per_chunk(self, source: SourceTensor, planned: list[PlannedTensor]) -> int:
        step = max(1, self.plan.chunk_weights // source.cols)
        for goal in planned:
            if goal.rows != "same" and len(source.shape) > 1:
                head = source.rows // heads_of(goal.rows, self.checkpoint.config, source.rows)
                step = -(-step // head) * head
        return step

    def _chunk(self, work: _Work, start: int, stop: int) -> None:
        import numpy as np

        source = work.source
        parts = source.read_rows(start, stop)
        quantized = source.encoding.family != "plain"
        weights = self._decode(parts, source.encoding) if quantized else parts["weight"]
        finite = self._is_finite(weights, source, start)
        plain = weights.astype(np.float32, copy=False)
        expert = start * work.hint.experts // source.rows
        importance = work.hint.of(expert, "fast").importance
        power, weighted_power = _power(plain), _weighted_power(plain, importance)
        for (index, goal), result in zip(work.goals, work.results, strict=True):
            began = time.perf_counter()
            order = self._row_order(goal, source, stop - start)
            error = 0.0
            kept = self._keep(parts, source, goal)
            known = work.hint.of(expert, result.quality)
            wanted = plain + np.float32(goal.offset) if goal.offset else plain
            values = wanted if goal.offset else weights
            made = kept or self._encode(values, goal, known, result.quality)
            weighted = 0.0
            if measured := kept is None or goal.kept == "rounded once":
                error, weighted = self._error(made, goal, wanted, importance)
            if kept is None:
                if finite and result.quality != "reference":
                    error = self._in_range(wanted, goal, error)
                if finite and not math.isfinite(error):
                    raise BadWeightsError(
                        f"{source.name} does not fit in {goal.encoding}: its largest weight is "
                        f"{np.abs(plain).max():g}; choose bf16 or f32, or --dtype bf16 for MLX"
                    )
            for part, place in goal.places.items():
                data = made[part] if order is None else _reorder(made[part], order)
                row = place.part.nbytes // source.rows
                flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
                self.stages[index].write(place.file, place.offset + start * row, flat.data)
            with self._guard:
                result.squared_error += error
                result.squared_weights += power
                result.weighted_error += weighted
                result.weighted_weights += weighted_power if measured else 0.0
                result.how = "encode" if kept is None else result.how
                result.nonfinite |= not finite
                self._seconds[index] += time.perf_counter() - began
        self._chunk_done(work, (stop - start) * source.cols)

    def _chunk_done(self, work: _Work, weights: int) -> None:
        with self._guard:
            work.chunks -= 1
            finished = work.chunks == 0
        if finished:
            for (index, goal), result in zip(work.goals, work.results, strict=True):
                line = {
                    "tensor": goal.name,
                    "squared_error": result.squared_error,
                    "squared_weights": result.squared_weights,
                    "weighted_error": result.weighted_error,
                    "weighted_weights": result.weighted_weights,
                    "quality": result.quality if result.how == "encode" else "reference",
                    "how": result.how,
                    "nonfinite": result.nonfinite,
                }
                self.stages[index].finish_tensor(line, goal.nbytes)
        self._advance(weights, work.source.name)

    def _advance(self, weights: int, name: str) -> None:
        with self._guard:
            self._done_weights += weights
            if self.progress is not None:
                self.progress(self._done_weights, self.total, name)

    def _keep(self, parts: Parts, source: SourceTensor, goal: PlannedTensor) -> Parts | None:
        """The stored bytes or codes where the plan keeps them, or ``None`` to encode anew (also
        for a block whose scale the target's type cannot hold)."""
        if goal.how == "copy":
            return parts
        if goal.how == "transcode":
            with contextlib.suppress(UnsupportedEncodingError):
                return self.reference.transcode(
                    parts, source.encoding, goal.encoding, rounded=goal.kept == "rounded once"
                )
        return None

    def _encode(
        self, weights: np.ndarray, goal: PlannedTensor, known: Known, quality: Quality
    ) -> Parts:
        """By the backend, or by the fallback where that has no encoder: the bytes are the same."""
        how: dict[str, Any] = {"quality": quality, "feedback": known.feedback}
        try:
            return self.ops.encode(weights, goal.encoding, known.importance, **how)
        except UnsupportedEncodingError:
            return self.reference.encode(weights, goal.encoding, known.importance, **how)

    def _decode(self, parts: Parts, encoding: Encoding) -> np.ndarray:
        try:
            return self.ops.decode(parts, encoding)
        except UnsupportedEncodingError:
            return self.reference.decode(parts, encoding)

    def _error(
        self,
        made: Parts,
        goal: PlannedTensor,
        weights: np.ndarray,
        importance: np.ndarray | None = None,
    ) -> tuple[float, float]:
        """The squared error of f32 ``weights``, and that with each column weighed by its
        importance."""
        import numpy as np

        decoded = self._decode(made, goal.encoding)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = decoded - weights  # for floats, decoded is what will be written
            return _power(difference), _weighted_power(difference, importance)

    def _is_finite(self, weights: np.ndarray, source: SourceTensor, start: int) -> bool:
        at = self.reference.first_nonfinite(weights)
        if at is None or self.allow_nan:
            return at is None
        row, col = divmod(at, source.cols)
        raise BadWeightsError(
            f"{source.name} has a weight that is {weights.flat[at]} at row {start + row}, "
            f"column {col}: the checkpoint is damaged; get a good copy, or pass --allow-nan"
        )

    def _in_range(self, weights: np.ndarray, goal: PlannedTensor, error: float) -> float:
        """``error``, or infinity for weights so large that the encoding has no scale for them: a
        search takes the largest scale there is, where the runtime's rule overflows."""
        if max(-weights.min(initial=0.0), weights.max(initial=0.0)) < _LARGEST_F16:
            return error
        made = self._encode(weights, goal, Known(), "reference")
        plain = self._error(made, goal, weights)[0]
        return error if math.isfinite(plain) else plain

    def _row_order(self, goal: PlannedTensor, source: SourceTensor, rows: int) -> Any:
        """The order of a chunk's rows (columns for a bias) in the output, or ``None``."""
        if goal.rows == "same":
            return None
        config = self.checkpoint.config
        if len(source.shape) == 1:
            heads = heads_of(goal.rows, config, source.cols)
            return "columns", rope_row_order_to_gguf(source.cols, heads)
        head = source.rows // heads_of(goal.rows, config, source.rows)
        return "rows", rope_row_order_to_gguf(rows, rows // head)


def _reorder(data: np.ndarray, order: tuple[str, np.ndarray]) -> np.ndarray:
    axis, index = order
    return data[index] if axis == "rows" else data[:, index]


def _weighted_power(weights: np.ndarray, importance: np.ndarray | None) -> float:
    """Σ w² of f32 ``[rows, cols]``, each column's multiplied by its importance; 0 without one."""
    import numpy as np

    if importance is None:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        columns = np.einsum("rc,rc->c", weights, weights, dtype=np.float64)
        return float(columns @ importance.astype(np.float64))


def _power(weights: np.ndarray) -> float:
    """Σ w², summed in f32 lanes, or in f64 where that over- or underflows."""
    import numpy as np

    flat = weights.reshape(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        total = float(np.einsum("i,i->", flat, flat))
    if not _TINY < total < math.inf:
        wide = flat.astype(np.float64)
        total = float(np.einsum("i,i->", wide, wide))
    return total


def worker_count(threads: int | None) -> int:
    """The number of threads asked for, or the number of usable CPUs."""
    if threads is not None:
        if threads < 1:
            raise UsageError(f"--threads {threads}: use at least 1")
        return threads
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def check_written(stage: Staging) -> None:
    """Read back what was written: each file must parse and hold the planned tensors."""
    from mlxedge.outputs.readback import check_output

    check_output(stage.plan, stage.data_dir)
