"""Statistics of one layer in a file: sums, and Hessians where they were asked for.

A safetensors file. For group i of matrices that share an input it holds ``i.sums`` f32
``[experts · cols]`` and ``i.hessian`` f32 ``[experts · cols · (cols + 1) / 2]``: of each symmetric
Hessian, the rows from the diagonal on, one after the other. Its ``__metadata__`` tells of each
group the names and for each expert (one where there are none) the number of tokens, and what model
and what text they are of.

``mlxedge calibrate -o FILE --hessians`` leaves a folder ``FILE.hessians`` of them, one for each
layer and one for the head: 2 · cols² bytes for each group, so 0.2 GB for a model of 135 M weights
and 16 GB for one of 8·10⁹.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxedge.calibration.collect import Collected, input_groups
from mlxedge.calibration.statistics import Statistics
from mlxedge.errors import CorruptFileError, SourceNotFoundError, UsageError
from mlxedge.models.shape import Shape, shape_of
from mlxedge.ops import load_reference
from mlxedge.sources.safetensors import SafetensorsFile

if TYPE_CHECKING:
    from mlxedge.calibration.statistics import Calibration
    from mlxedge.models.rope import Rope
    from mlxedge.sources.checkpoint import Checkpoint, SourceTensor

FORMAT = "mlxedge-statistics-2"
_SUFFIX = ".safetensors"


def hessian_folder(file: Path) -> Path:
    """Where the Hessians are that belong to an imatrix file."""
    return file.with_name(f"{file.name}.hessians")


def layer_file(layer: int | None) -> str:
    """The name of a layer's file, or of the head's."""
    return f"head{_SUFFIX}" if layer is None else f"layer-{layer:05d}{_SUFFIX}"


def model_fingerprint(checkpoint: Checkpoint, context: int) -> str:
    """A hash of what decides the activations of a prepared checkpoint in chunks of ``context``
    tokens: its shapes, all its vectors, two rows of each matrix, decoded, and its settings.

    It is the same for files of any kind that hold the same weights, and read at once. Raises
    UnsupportedModelError for a model that cannot be run.
    """
    digest = hashlib.sha256()
    reference = load_reference()
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        digest.update(json.dumps([name, tensor.shape]).encode())
        for row in sorted({0, tensor.rows // 2}):
            parts = tensor.read_rows(row, row + 1)
            digest.update(reference.decode(parts, tensor.encoding).astype("<f4").tobytes())
    settings = _settings(shape_of(checkpoint.config), context)
    digest.update(json.dumps(settings, sort_keys=True, default=sorted).encode())
    return digest.hexdigest()


#: What the shapes of tensors tell, and what makes no difference below the context.
_NOT_SETTINGS = ("hidden", "layers", "intermediate", "widths", "vocab", "context")
#: Of the rotary settings those that a type has a use for, beside theta and fraction.
_ROPE = {
    "default": (),
    "dynamic": (),
    "linear": ("factor",),
    "proportional": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position"),
    "yarn": (
        "factor", "beta_fast", "beta_slow", "truncate", "attention_factor",
        "original_max_position",
    ),
    "longrope": (
        "factor", "short_factor", "long_factor", "attention_factor", "original_max_position",
    ),
}  # fmt: skip


def _settings(shape: Shape, context: int) -> dict[str, Any]:
    """The settings of ``shape`` that bear on chunks of ``context`` tokens. Numbers have six digits,
    since GGUF keeps them in f32; windows that no chunk fills are none, since it has none."""
    made = {key: value for key, value in asdict(shape).items() if key not in _NOT_SETTINGS}
    made["windows"] = [w if w < context else 0 for w in shape.windows]
    made["ropes"] = [_rope(rope) for rope in shape.ropes]
    rounded: dict[str, Any] = _rounded(made)
    return rounded


def _rope(rope: Rope | None) -> dict[str, Any] | None:
    if rope is None:
        return None
    used = {name: getattr(rope, name) for name in ("theta", "fraction", *_ROPE[rope.type])}
    return {rope.type: used} if _ROPE[rope.type] else used


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_layer(path: Path, found: list[Collected], metadata: Mapping[str, str]) -> None:
    """Write a layer's statistics: under a temporary name, synced, renamed. Raises OSError."""
    groups = [{"names": one.names, "counts": one.statistics.counts.tolist()} for one in found]
    arrays: dict[str, tuple[int, Iterator[np.ndarray]]] = {}
    for i, one in enumerate(found):
        sums = one.statistics.sums
        experts, cols = sums.shape
        arrays[f"{i}.sums"] = sums.size, iter(sums)
        if (hessians := one.hessians) is not None:
            arrays[f"{i}.hessian"] = experts * (cols * (cols + 1) // 2), _upper(hessians)
    about = {**metadata, "format": FORMAT, "groups": json.dumps(groups)}
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, (size, _) in arrays.items():
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [end, end + 4 * size]}
        end += 4 * size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, rows in arrays.values():
            for row in rows:
                file.write(row.astype("<f4", copy=False).data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _upper(hessians: np.ndarray) -> Iterator[np.ndarray]:
    return (row[i:] for hessian in hessians for i, row in enumerate(hessian))


def read_layer(path: Path, hessians: bool = True) -> tuple[list[Collected], dict[str, str]]:
    """What :func:`write_layer` wrote, and its metadata. Raises CorruptFileError."""
    file = SafetensorsFile(path)
    try:
        groups = _groups(path, file.metadata)
        found = []
        for i, (names, counts) in enumerate(groups):
            sums = _read(file, f"{i}.sums")
            if sums.size % len(counts):
                raise CorruptFileError(path, f"{len(counts)} experts cannot have {sums.size} sums")
            statistics = Statistics(sums.reshape(len(counts), -1), counts)
            packed = f"{i}.hessian"
            unpacked = None
            if hessians and packed in file.entries:
                unpacked = _unpacked(path, _read(file, packed), *statistics.sums.shape)
            found.append(Collected(names, statistics, unpacked))
        return found, dict(file.metadata)
    finally:
        file.close()


def _groups(path: Path, metadata: Mapping[str, str]) -> list[tuple[tuple[str, ...], np.ndarray]]:
    try:
        if metadata["format"] != FORMAT:
            raise ValueError
        groups = [(tuple(g["names"]), g["counts"]) for g in json.loads(metadata["groups"])]
        if not all(names and _are_counts(counts) for names, counts in groups):
            raise ValueError
        return [(names, np.array(counts, np.int64)) for names, counts in groups]
    except (KeyError, TypeError, ValueError):
        raise CorruptFileError(path, "not statistics that mlxedge calibrate wrote") from None


def _are_counts(counts: list[int]) -> bool:
    """Whether they are numbers of tokens, and not all of them none."""
    return all(type(n) is int and 0 <= n < 1 << 53 for n in counts) and any(counts)


def _read(file: SafetensorsFile, name: str) -> np.ndarray:
    entry = file.entries.get(name)
    if entry is None or entry.dtype != "f32" or len(entry.shape) != 1:
        raise CorruptFileError(file.path, f"it has no {name} of f32")
    values = file.read_rows(name, 0, 1).reshape(-1)
    if not np.isfinite(values).all():
        raise CorruptFileError(file.path, f"{name} is not finite", entry.offset)
    return values


def _unpacked(path: Path, packed: np.ndarray, experts: int, cols: int) -> np.ndarray:
    if packed.size != experts * (cols * (cols + 1) // 2):
        raise CorruptFileError(
            path, f"{experts} Hessians of {cols} columns cannot have {packed.size} values"
        )
    hessians = np.empty((experts, cols, cols), np.float32)
    start = 0
    for hessian in hessians:
        for i in range(cols):
            row = packed[start : start + cols - i]
            hessian[i, i:] = row
            hessian[i:, i] = row
            start += cols - i
    return hessians


def read_hessians(folder: str | Path, checkpoint: Checkpoint) -> Generator[Collected]:
    """What ``mlxedge calibrate --hessians`` kept, just as :func:`collect` yields it, for a prepared
    checkpoint; one layer is in memory at a time.

    Raises SourceNotFoundError where there is no such folder, UsageError if they are another
    model's, and CorruptFileError for damaged or missing files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceNotFoundError(
            f"{folder}: no such folder; make it with mlxedge calibrate --hessians"
        )
    fingerprint = ""
    expected = input_groups(checkpoint)
    for layer in [*range(checkpoint.config["num_hidden_layers"]), None]:
        path = folder / layer_file(layer)
        if not path.is_file():
            raise CorruptFileError(path, "this layer's Hessians are missing: calibrate again")
        found, metadata = read_layer(path)
        fingerprint = fingerprint or model_fingerprint(checkpoint, _context(path, metadata))
        if metadata.get("model") != fingerprint:
            raise _of_another_model(folder, checkpoint)
        for one in found:
            tensor = checkpoint.tensors.get(one.names[0])
            if not expected or one.names != expected.pop(0) or not _fits(one, tensor):
                raise CorruptFileError(path, f"{one.names[0]} is not what should be here")
        while found:
            yield found.pop(0)


def check_hessians(folder: Path, checkpoint: Checkpoint, calibration: Calibration) -> None:
    """Raise UsageError unless the Hessians in ``folder`` are of this prepared checkpoint and of the
    run that ``calibration`` tells of, and CorruptFileError for a damaged first layer."""
    path = folder / layer_file(0)
    found, metadata = read_layer(path, hessians=False)
    if metadata.get("model") != model_fingerprint(checkpoint, _context(path, metadata)):
        raise _of_another_model(folder, checkpoint)
    for one in found:
        known = calibration.tensors.get(one.names[0])
        mean = one.statistics.importance()
        if known is None or not np.allclose(known.importance(), mean, rtol=1e-3):
            raise UsageError(
                f"{folder} is of another run than the file that it stands beside: calibrate again "
                "with --hessians"
            )


def _context(path: Path, metadata: Mapping[str, str]) -> int:
    try:
        return int(metadata["context"])
    except (KeyError, ValueError):
        raise CorruptFileError(path, "its metadata has no context") from None


def _of_another_model(folder: Path, checkpoint: Checkpoint) -> UsageError:
    return UsageError(
        f"{folder} holds Hessians of another model than {checkpoint.origin.path}: calibrate this "
        "one"
    )


def _fits(one: Collected, tensor: SourceTensor | None) -> bool:
    if tensor is None or one.hessians is None:
        return False
    experts = tensor.shape[0] if len(tensor.shape) > 2 else 1
    return one.statistics.sums.shape == (experts, tensor.cols)
