"""What is known of the input of each matrix when it is encoded, and the quality this allows."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlxedge.encodings import Encoding
from mlxedge.errors import CorruptFileError, MlxedgeError, TokenizerError, UsageError
from mlxedge.gguf_values import Metadata
from mlxedge.ops import Feedback, Quality, load_reference
from mlxedge.outputs.gguf import imatrix_keys

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.calibration.collect import Collected
    from mlxedge.calibration.states import KeptStates
    from mlxedge.calibration.statistics import Calibration
    from mlxedge.calibration.texts import Sample
    from mlxedge.models.spec import ModelSpec
    from mlxedge.sources.checkpoint import Checkpoint

#: Called with steps done, steps in all, and what runs now.
ProgressHook = Callable[[int, int, str], None]

#: With fewer bits a search that knows nothing of the inputs may do harm: the least squares of
#: weights are not those of what a layer computes, and outliers get clipped that matter most.
LEAST_BITS_UNCALIBRATED = 4.0
#: Experts whose error feedback is kept ready.
_EXPERTS_READY = 4
#: From here on, inputs make no difference that a model could show.
MOST_BITS_CALIBRATED = 8.0


@dataclass(frozen=True)
class Known:
    """Of the inputs of one matrix: ``importance`` f32 ``[cols]``, their mean squares, and what
    error feedback needs."""

    importance: np.ndarray | None = None
    feedback: Feedback | None = None


@dataclass(frozen=True)
class Hint:
    """What is known of a tensor: ``importance`` f32 ``[cols]``, or ``[experts, cols]`` of a stack
    of experts, and ``feedback`` by expert, 0 where there are none."""

    importance: np.ndarray | None = None
    feedback: Callable[[int], Feedback] | None = None

    @property
    def experts(self) -> int:
        """How many matrices it tells apart."""
        if self.importance is None or self.importance.ndim == 1:
            return 1
        return len(self.importance)

    def of(self, expert: int, quality: Quality) -> Known:
        """For one matrix of the tensor, that is to be encoded in ``quality``."""
        feedback = self.feedback(expert) if self.feedback and quality == "best" else None
        if self.importance is None or self.importance.ndim == 1:
            return Known(self.importance, feedback)
        return Known(self.importance[expert], feedback)


class Guide:
    """Nothing is known of any input. Other guides know more."""

    def __init__(self, asked: Quality = "reference") -> None:
        self.asked = asked

    def order(self, names: Iterable[str]) -> list[str]:
        """In which order tensors are to be encoded."""
        return list(names)

    def hint(self, name: str, columns: np.ndarray | None = None) -> Hint:
        """What is known of the tensor ``name``, or of one with its columns in the order
        ``columns``; asked in ``order``, from one thread."""
        return Hint()

    def quality(self, encoding: Encoding, hint: Hint) -> Quality:
        """The quality that a tensor gets."""
        from mlxedge.grids import has_grid

        if self.asked == "reference" or encoding.family == "plain":
            return "reference"
        if hint.importance is None and encoding.bits_per_weight < LEAST_BITS_UNCALIBRATED:
            return "reference"
        return "best" if hint.feedback is not None and has_grid(encoding) else "fast"

    def close(self) -> None:
        """Free what a run of the model holds."""


class CalibratedGuide(Guide):
    """The importance of columns, as an imatrix file or a calibration tells it."""

    def __init__(self, asked: Quality, calibration: Calibration) -> None:
        super().__init__(asked)
        self._calibration = calibration

    def hint(self, name: str, columns: np.ndarray | None = None) -> Hint:
        importance = self._calibration.importance(name)
        if importance is None or columns is None:
            return Hint(importance)
        return Hint(importance[..., columns])


class GuideOnTheWay(Guide):
    """Importance, and Hessians where there are some, layer by layer as ``collected`` yields them.

    ``groups`` names the tensors that share an input, in the order in which they come. What was made
    of a group is dropped when the next is asked for, so that memory holds two or three of them.
    """

    def __init__(
        self, asked: Quality, groups: Iterable[tuple[str, ...]], collected: Generator[Collected]
    ) -> None:
        super().__init__(asked)
        self._rank: dict[str, int] = {}
        self._last_of_layer: dict[str, int] = {}
        for i, names in enumerate(groups):
            self._rank |= dict.fromkeys(names, i)
            self._last_of_layer[_layer_of(names[0])] = i
        self._collected = collected
        self._current: Mapping[str, Hint] = {}
        self._hessians: np.ndarray | None = None

    def order(self, names: Iterable[str]) -> list[str]:
        """What stands outside the layers first, then layer by layer, in each of them group by group
        before its vectors: a layer is read once, if it may be kept that long."""

        def place(name: str) -> float:
            if name in self._rank:
                return self._rank[name]
            return self._last_of_layer.get(_layer_of(name) or "none", -1.5) + 0.5

        return sorted(names, key=place)

    def hint(self, name: str, columns: np.ndarray | None = None) -> Hint:
        if name not in self._rank:
            return Hint()
        while name not in self._current:
            found = next(self._collected)
            if name not in found.names:
                continue
            importance = found.statistics.importance()
            if len(importance) == 1:
                importance = importance[0]
            feedback = None if found.hessians is None else _feedback(found.hessians)
            self._current = dict.fromkeys(found.names, Hint(importance, feedback))
            self._hessians = found.hessians
        hint = self._current[name]
        if columns is None or hint.importance is None:
            return hint
        if hint.feedback is None or self._hessians is None:
            return Hint(hint.importance[..., columns])
        moved = self._hessians[:, columns[:, None], columns]
        return Hint(hint.importance[..., columns], _feedback(moved))

    def close(self) -> None:
        self._collected.close()


def _feedback(hessians: np.ndarray) -> Callable[[int], Feedback]:
    """Made ready when it is asked for. Of many experts only the last few are kept: ready, each
    takes several times the memory of its Hessian."""
    guard = threading.Lock()
    prepare = functools.lru_cache(_EXPERTS_READY)(
        lambda expert: load_reference().feedback(hessians[expert])
    )

    def of(expert: int) -> Feedback:
        with guard:
            return prepare(expert)

    if len(hessians) == 1:
        of(0)
    return of


@dataclass(frozen=True)
class Guidance:
    """How a plan's tensors are to be encoded: settled when planning, carried out when running.

    ``quality`` is the one asked for, or what it comes to. ``described`` is what the record says of
    the calibration, ``None`` without one; ``note`` says why there is none. Of ``calibration`` (from
    an imatrix file), ``sample`` (tokens to run) and ``hessians`` (a folder) those are set that the
    calibration is made of; ``known`` are the tensors whose inputs it tells of.
    """

    quality: Quality = "reference"
    described: Mapping[str, object] | None = None
    note: str | None = None
    known: frozenset[str] = frozenset()
    #: What the calibration takes beside the encoding.
    memory_bytes: int = 0
    calibration: Calibration | None = None
    sample: Sample | None = None
    hessians: Path | None = None
    #: Whether MLX matrices are encoded by a rule that has no use for it.
    unused_by_mlx: bool = False

    @property
    def calibrates(self) -> bool:
        return self.described is not None

    def needed_for(self, encodings: Iterable[Encoding]) -> Guidance:
        """This, or one without a calibration if none of ``encodings`` gains by it."""
        gaining = {e.family for e in encodings if e.bits_per_weight < MOST_BITS_CALIBRATED}
        if self.calibrates and not gaining:
            return Guidance("fast" if self.quality == "best" else self.quality)
        return replace(self, unused_by_mlx=self.quality == "reference" and "mlx" in gaining)

    @property
    def about_imatrix(self) -> Metadata:
        """What a GGUF file says of it, in llama-quantize's keys."""
        if self.described is None:
            return {}
        described: Mapping[str, Any] = self.described
        return imatrix_keys(
            file=described["what"] if described["kind"] == "imatrix" else "",
            dataset=", ".join(described["texts"]),
            entries=len(self.known),
            chunks=described["tokens"] // max(described["context"], 1),
        )

    def sentence(self) -> str:
        """For the reader of a plan."""
        if self.described is None:
            return f"quality {self.quality}" + (f": {self.note}" if self.note else "")
        unused = "; MLX's rule takes no notice of that, so there it only serves to measure"
        made = f"quality {self.quality}, calibrated on {self.described['what']}"
        return made + (unused if self.unused_by_mlx else "")

    def guide(
        self,
        checkpoint: Checkpoint,
        threads: int,
        progress: ProgressHook | None,
        feedback_for: Set[str],
        kept: KeptStates | None = None,
    ) -> Guide:
        """Run the model if that is planned, and say what is known of each tensor.

        For quality "best", and where weights come over the network, the model is run on the way, as
        tensors are asked for, from where an earlier run ``kept`` its states; Hessians are computed
        for the tensors ``feedback_for`` alone. Raises what ``mlxedge.calibration`` does.
        """
        from mlxedge.calibration.collect import calibrate, collect, input_groups
        from mlxedge.calibration.store import read_hessians

        if self.hessians is not None:
            stored = read_hessians(self.hessians, checkpoint)
            return GuideOnTheWay(self.quality, input_groups(checkpoint), stored)
        if self.calibration is not None:
            return CalibratedGuide(self.quality, self.calibration)
        if self.sample is None:
            return Guide(self.quality)
        best = self.quality == "best"
        if best or checkpoint.cache is not None:
            found = collect(
                checkpoint,
                self.sample,
                hessians=lambda names: best and not feedback_for.isdisjoint(names),
                threads=threads,
                progress=progress,
                kept=kept,
            )
            return GuideOnTheWay(self.quality, input_groups(checkpoint), found)
        calibration = calibrate(checkpoint, self.sample, threads=threads, progress=progress)
        return CalibratedGuide(self.quality, calibration)


def plan_guidance(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    quality: Quality,
    calibrate: str | Path | Literal[False] | None,
) -> Guidance:
    """Settle how to calibrate a prepared ``checkpoint`` for ``quality``, as
    ``mlxedge.conversion.convert`` says of ``calibrate``.

    Raises UsageError and CorruptFileError for a file that does not serve, and whatever says that a
    model cannot be run on a text which the user asked for.
    """
    if calibrate is False:
        if quality == "best":
            raise UsageError("quality best needs a calibration: leave --no-calibrate out")
        return Guidance(note="without a calibration")
    if calibrate is None:
        return _by_default(checkpoint, quality)
    path = Path(calibrate)
    if _is_imatrix(path):
        return _by_imatrix(checkpoint, spec, quality, path)
    from mlxedge.calibration.texts import read_text, sample

    taken = sample(checkpoint, read_text(path), name=path.name)
    return _by_sample(checkpoint, quality, taken)


def _by_default(checkpoint: Checkpoint, quality: Quality) -> Guidance:
    """A short calibration, as well as it can be done; for "best" it must be possible."""
    from mlxedge.calibration.texts import random_sample, sample
    from mlxedge.models.shape import shape_of

    if quality == "reference":
        return Guidance()
    try:
        shape_of(checkpoint.config)
        try:
            taken = sample(checkpoint, varied=quality == "best")
        except TokenizerError:
            taken = random_sample(checkpoint, varied=quality == "best")
        return _by_sample(checkpoint, quality, taken)
    except MlxedgeError as error:
        if quality == "best":
            raise
        return Guidance(note=f"no calibration, since {error}")


def _by_sample(checkpoint: Checkpoint, quality: Quality, taken: Sample) -> Guidance:
    from mlxedge.calibration.collect import input_groups

    groups = input_groups(checkpoint)
    layers: dict[str, int] = {}
    for names in groups:
        layer = _layer_of(names[0])
        tensors = [checkpoint.tensors[name] for name in names]
        layers[layer] = layers.get(layer, 0) + sum(t.nbytes for t in tensors)
    states = 8 * taken.tokens * int(checkpoint.config["hidden_size"])
    squares = _square_bytes(checkpoint) if quality == "best" else 0
    return Guidance(
        quality,
        {
            "kind": "text",
            "what": f"{taken.tokens} tokens of {taken.text}",
            "texts": [taken.text],
            "sha256": taken.sha256,
            "tokens": taken.tokens,
            "context": taken.context,
        },
        known=frozenset(name for names in groups for name in names),
        memory_bytes=max(layers.values()) + states + squares,
        sample=taken,
    )


def _square_bytes(checkpoint: Checkpoint) -> int:
    """Of the Hessians of a layer, and of what is made of the widest for error feedback."""
    from mlxedge.calibration.collect import input_groups

    layers: dict[str, int] = {}
    widest = 0
    for names in input_groups(checkpoint):
        first = checkpoint.tensors[names[0]]
        experts = first.shape[0] if len(first.shape) > 2 else 1
        layer = _layer_of(names[0])
        layers[layer] = layers.get(layer, 0) + 4 * experts * first.cols**2
        widest = max(widest, 20 * min(experts, _EXPERTS_READY) * first.cols**2)
    return max(layers.values()) + widest


def _layer_of(name: str) -> str:
    """The number of the layer that a tensor is in, empty for one outside the layers."""
    before, _, after = name.rpartition(".layers.")
    return after.partition(".")[0] if before else ""


def _is_imatrix(path: Path) -> bool:
    """GGUF by its first bytes, the older format because it is no text."""
    from mlxedge.sources.gguf import MAGIC

    if path.is_dir():
        raise UsageError(
            f"{path} is a folder: give a text, or the imatrix file that Hessians stand beside"
        )
    try:
        with path.open("rb") as file:
            head = file.read(1 << 12)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    return head.startswith(MAGIC) or (b"\0" in head and not utf16)


def _by_imatrix(checkpoint: Checkpoint, spec: ModelSpec, quality: Quality, path: Path) -> Guidance:
    from mlxedge.calibration.imatrix import check_fits, read_imatrix, unstacked
    from mlxedge.calibration.store import check_hessians, hessian_folder
    from mlxedge.record import sha256_file

    try:
        calibration = read_imatrix(path, spec, checkpoint.config)
    except CorruptFileError as error:
        raise CorruptFileError(
            path,
            f"neither a text (UTF-8 without NUL) nor a whole imatrix file: {error.problem}",
            error.offset,
        ) from error
    shapes = {n: t.shape for n, t in checkpoint.tensors.items()}
    calibration = unstacked(calibration, spec, checkpoint.config, path)
    check_fits(path, calibration, shapes)
    known = {
        name
        for name, found in calibration.tensors.items()
        if found.total and name in checkpoint.tensors
    }
    hessians = None
    if quality == "best":
        hessians = hessian_folder(path)
        if not hessians.is_dir():
            raise UsageError(
                f"quality best needs Hessians, and there is no {hessians}: make it with mlxedge "
                "calibrate --hessians, give a text instead, or take --quality fast"
            )
        check_hessians(hessians, checkpoint, calibration)
    return Guidance(
        quality,
        {
            "kind": "imatrix",
            "what": path.name,
            "sha256": sha256_file(path),
            "texts": list(calibration.texts),
            "tokens": calibration.tokens,
            "context": calibration.context,
        },
        known=frozenset(known),
        memory_bytes=_square_bytes(checkpoint) if quality == "best" else 0,
        calibration=calibration,
        hessians=hessians,
    )
