"""What will be written, known before a byte of it is.

A plan names every tensor of every output with its encoding, its place in a file and the reason
where it keeps another type than the rest. It can be shown, checked against the disk, and written in
any order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlxedge.encodings import F32, Encoding, Part
from mlxedge.models.spec import RowOrder
from mlxedge.ops import Fidelity, load_reference
from mlxedge.targets import Target
from mlxedge.version import VERSION

if TYPE_CHECKING:
    from mlxedge.guidance import Guidance
    from mlxedge.sources.checkpoint import SourceTensor

#: "copy": the stored bytes as they are; "transcode": other bytes, the same weights; "encode".
How = Literal["copy", "transcode", "encode"]
#: What becomes of weights that are quantized already: exactly the same; codes kept, or floats
#: decoded, and only rounded to what the target holds; quantized a second time.
Kept = Literal["exact", "rounded once", "requantized"]
#: How an encoding would keep the codes of a source tensor, ``None`` if it cannot.
Keeps = Callable[["SourceTensor", Encoding], Fidelity | None]
#: Weights whose scales are looked at together.
_SCALED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Place:
    """Where one part of a tensor goes: bytes ``offset : offset + part.nbytes`` of a file."""

    file: int
    offset: int
    part: Part


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of one output. ``source`` is the canonical name that it is made from, or a key of
    ``OutputPlan.sources``; ``pieces`` name the slices of its first axis where each is a tensor of
    its own in the file."""

    source: str
    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    how: How
    #: ``None`` where the source is of floats.
    kept: Kept | None = None
    rows: RowOrder = "same"
    #: What is added to the values.
    offset: float = 0.0
    reason: str | None = None
    pieces: tuple[str, ...] = ()
    places: dict[str, Place] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.encoding.nbytes(self.shape)

    def stored(self, part: str) -> Iterator[tuple[str, Place]]:
        """What the file holds of a part: under which names, and where."""
        place = self.places[part]
        names, whole = self.pieces or (self.name,), place.part
        size, shape = whole.nbytes // len(names), whole.shape[1:] if self.pieces else whole.shape
        for i, name in enumerate(names):
            piece = replace(whole, shape=shape)
            yield part_name(name, part), Place(place.file, place.offset + i * size, piece)


def part_name(tensor: str, part: str) -> str:
    """The stored name of a part: ``X.weight`` keeps its name, its scales become ``X.scales``."""
    return tensor if part == "weight" else tensor.removesuffix("weight") + part


@dataclass(frozen=True)
class DataFile:
    """A file of tensors: its header, its final size, and small tensors known in advance."""

    name: str
    header: bytes
    size: int
    constants: tuple[tuple[int, bytes], ...] = ()


@dataclass
class OutputPlan:
    """One output.

    ``sources`` are tensors that are made of canonical ones (``mlxedge.sources.recasts``), by key.
    ``path`` is final. A folder's ``data`` files and small ``files`` (config.json, …) stand inside
    it; for a GGUF file there is one data file and nothing else. ``label`` is the type of most
    weights, ``notes`` what the user should know.
    """

    target: Target
    path: Path
    label: str
    tensors: list[PlannedTensor]
    data: list[DataFile]
    files: dict[str, bytes]
    notes: list[str] = field(default_factory=list)
    sources: dict[str, SourceTensor] = field(default_factory=dict)
    #: Whether an interrupted run of the same plan had finished this one.
    finished: bool = False

    @property
    def nbytes(self) -> int:
        return sum(f.size for f in self.data) + sum(len(b) for b in self.files.values())

    @property
    def weights(self) -> int:
        return sum(_size(t.shape) for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per weight, unquantized tensors included."""
        return 8 * sum(t.nbytes for t in self.tensors) / max(1, self.weights)

    def exceptions(self) -> dict[tuple[str, str], list[PlannedTensor]]:
        """Tensors that have a reason to differ, by (encoding, reason)."""
        found: dict[tuple[str, str], list[PlannedTensor]] = {}
        for tensor in self.tensors:
            if tensor.reason:
                found.setdefault((tensor.encoding.name, tensor.reason), []).append(tensor)
        return found


@dataclass
class Plan:
    """Everything a conversion will do. ``source`` describes the source for the reader."""

    name: str
    source: dict[str, Any]
    outputs: list[OutputPlan]
    guidance: Guidance
    chunk_weights: int
    parallel: bool = True
    #: What parts of files that are read over the network take of the disk, at most.
    cache_bytes: int = 0

    def sources(self, canonical: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
        """All that is read, by ``PlannedTensor.source``."""
        made = {key: tensor for output in self.outputs for key, tensor in output.sources.items()}
        return {**canonical, **made}

    @property
    def disk_bytes(self) -> int:
        return sum(o.nbytes for o in self.outputs) + self.cache_bytes

    def memory_bytes(self, threads: int) -> int:
        """About the most that the process holds at once: the interpreter with its libraries, the
        vocabulary as objects (many times its bytes in a header), for each thread a chunk as read,
        as f32, as encoded and as decoded, and what calibration needs."""
        headers = max((len(f.header) for o in self.outputs for f in o.data), default=0)
        workers = threads if self.parallel else 1
        chunks = workers * self.chunk_weights * 20
        return 240 * 2**20 + 24 * headers + chunks + self.guidance.memory_bytes

    def fingerprint(self, output: OutputPlan, backend: str, allow_nan: bool) -> str:
        """Tells whether a half-written output belongs to this plan."""
        text = json.dumps(
            [
                self.source,
                output.target.spec,
                VERSION,
                backend,
                allow_nan,
                self.guidance.quality,
                self.guidance.described,
                [(f.name, _digest(f.header), f.size) for f in output.data],
                [(at, _digest(data)) for f in output.data for at, data in f.constants],
                [(name, _digest(data)) for name, data in sorted(output.files.items())],
                [(t.name, t.encoding.name, t.how) for t in output.tensors],
            ],
            sort_keys=True,
            default=str,
        )
        return _digest(text.encode())


def encodings_made(tensors: Iterable[PlannedTensor]) -> set[Encoding]:
    """The encodings of what is encoded anew into something that is not plain."""
    return {t.encoding for t in tensors if t.how == "encode" and t.encoding.family != "plain"}


def place_parts(
    tensor_parts: Iterable[Part], start: int, file: int, align: int
) -> tuple[list[Place], int]:
    """Consecutive places for ``tensor_parts`` from ``start``, each aligned; also the end."""
    places = []
    for part in tensor_parts:
        start = -(-start // align) * align
        places.append(Place(file, start, part))
        start += part.nbytes
    return places, start


def how_to_make(
    source: SourceTensor, encoding: Encoding, keeps: Keeps | None = None
) -> tuple[How, Kept | None]:
    """Prefer the stored bytes, then the stored codes, then a new encoding."""
    how: How = "copy" if source.encoding == encoding else "encode"
    kept: Kept = "exact"
    if how == "encode" and (found := keeps(source, encoding) if keeps else None):
        how, kept = "transcode", found
    elif how == "encode" and encoding != F32:
        kept = "rounded once" if encoding.family == "plain" else "requantized"
    return how, kept if source.decoded or source.encoding.family != "plain" else None


def keeps_codes(source: SourceTensor, encoding: Encoding) -> Fidelity | None:
    """A :data:`Keeps` that asks the fallback, and reads scales where they decide."""
    if "plain" in (source.encoding.family, encoding.family):
        return None
    reference = load_reference()
    if not reference.can_transcode(source.encoding, encoding):
        return None
    worst = reference.fidelity(source.encoding, encoding)
    if worst == "exact" or source.read_scales is None:
        return worst
    best: Fidelity = "exact"
    step = max(1, _SCALED_AT_ONCE // source.cols)
    for start in range(0, source.rows, step):
        scales = source.read_scales(start, min(start + step, source.rows))
        found = reference.fidelity(source.encoding, encoding, scales)
        if found is None:
            return None
        best = found if found == "rounded once" else best
    return best


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
