"""What a model file or folder holds, without reading its weights.

Anything that can be listed is listed, known architecture or not: Hugging Face and MLX folders,
GGUF files, a safetensors file alone, and repositories on the Hub, of which only the heads of the
weight files are read.
"""

from __future__ import annotations

import math
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.errors import DiskFullError, MlxedgeError
from mlxedge.sources import open_source
from mlxedge.sources.files import Opener, RandomAccessFile

if TYPE_CHECKING:
    from mlxedge.gguf_values import GgufValue, Metadata
    from mlxedge.sources.checkpoint import Checkpoint
    from mlxedge.sources.folder import Shards, Weights
    from mlxedge.sources.hub import HubSpec, Warn
    from mlxedge.sources.hub_download import Progress
    from mlxedge.sources.safetensors import SafetensorsFile

#: What is tried to tell whether a model can be converted: one target of each format.
_TRIALS = {"mlx": "mlx:bf16", "gguf": "gguf:bf16", "hf": "hf:bf16"}
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_ABBREVIATED = 8


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file has it; ``shape`` is row-major and in weights, not in packed words."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    nbytes: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TypeCount:
    """What one encoding holds: ``tensors``, ``weights``, ``nbytes``."""

    tensors: int = 0
    weights: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Inspection:
    """What was found. A field is ``None`` where the source does not say.

    ``kind`` is "hf", "mlx", "gguf" or "safetensors"; ``files`` maps the names of the files that
    make up the model to their sizes; ``metadata`` is a GGUF file's, or what the JSON files of a
    folder and the headers of its weights say, under ``config.``, ``generation_config.`` and
    ``safetensors.``. ``reopen`` opens the model as a checkpoint, if there is enough of it.
    """

    name: str
    kind: str
    files: dict[str, int]
    tensors: list[TensorInfo]
    metadata: dict[str, Any]
    architecture: str | None = None
    quantization: str | None = None
    context_length: int | None = None
    vocab_size: int | None = None
    license: str | None = None
    base_model: str | None = None
    has_tokenizer: bool = False
    has_chat_template: bool = False
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None
    reopen: Callable[[], Checkpoint] | None = field(default=None, repr=False, compare=False)

    @property
    def parameters(self) -> int:
        return sum(t.size for t in self.tensors)

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float | None:
        """Over all tensors, scales included; ``None`` without weights."""
        return 8 * self.weight_bytes / self.parameters if self.parameters else None

    @property
    def disk_bytes(self) -> int:
        return sum(self.files.values())

    def types(self) -> dict[str, TypeCount]:
        """Encodings by bytes, the largest first."""
        counts: dict[str, TypeCount] = {}
        for t in self.tensors:
            c = counts.get(t.encoding, TypeCount())
            counts[t.encoding] = TypeCount(c.tensors + 1, c.weights + t.size, c.nbytes + t.nbytes)
        return dict(sorted(counts.items(), key=lambda item: -item[1].nbytes))


def inspect(
    source: str | Path,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Inspection:
    """Look at ``source``: whatever :func:`mlxedge.open_source` takes, a safetensors file, and
    models of any architecture.

    Of a Hub repository the config, the tokenizer and the heads of the weight files are read.
    Raises SourceError and its kind.
    """
    path = Path(source).expanduser()
    if not path.exists():
        from mlxedge.sources import one_revision
        from mlxedge.sources.hub import parse_spec

        if isinstance(source, str) and (spec := parse_spec(source)):
            return _inspect_hub(spec, one_revision(spec.revision, revision), progress, warn)
        open_source(source)  # says what a source can be
    from mlxedge.sources.folder import PICKLES

    if path.is_dir():
        return _inspect_folder(path)
    if path.suffix == ".safetensors":
        return _inspect_safetensors(path)
    if PICKLES.fullmatch(path.name):
        open_source(path)  # refuses it
    return _inspect_gguf(path)


def _inspect_hub(
    spec: HubSpec, revision: str | None, progress: Progress | None, warn: Warn | None
) -> Inspection:
    from mlxedge.sources.hub import Snapshot
    from mlxedge.sources.hub_peek import peek

    seen = peek(spec.repo, revision=revision, gguf=spec.file, progress=progress, warn=warn)
    if isinstance(seen, Snapshot):
        found = inspect(seen.path)
    elif spec.file is not None:
        found = _inspect_gguf(next(iter(seen.files)), seen.open_file)
    else:
        found = _inspect_folder(seen.folder, seen.shards, seen.open_file)
    path = found.path if isinstance(seen, Snapshot) else None
    return replace(found, path=path, repo=seen.repo, revision=seen.commit)


def _inspect_gguf(path: Path, open_file: Opener = RandomAccessFile) -> Inspection:
    from mlxedge.sources.gguf_model import model_name, open_gguf
    from mlxedge.sources.gguf_split import read_model

    gguf = read_model(path, open_file)
    values = {key: _shortest(v) for key, v in gguf.metadata.items()}
    arch = values.get("general.architecture")
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    vocab = values.get(f"{arch}.vocab_size")
    return Inspection(
        name=model_name(path),
        kind="gguf",
        path=path,
        files={part.name: _size(part, open_file) for part in gguf.parts or (path,)},
        tensors=[TensorInfo(t.name, t.shape, t.encoding.name, t.nbytes) for t in gguf.tensors],
        metadata={"gguf.version": gguf.version, **values},
        reopen=lambda: open_gguf(path, open_file=open_file),
        architecture=_string(arch),
        quantization=gguf_label(gguf.metadata),
        context_length=_integer(values.get(f"{arch}.context_length")),
        vocab_size=_integer(vocab) or (len(tokens.value) if tokens else None),
        license=_string(values.get("general.license")),
        base_model=_string(values.get("general.base_model.0.name")),
        has_tokenizer=tokens is not None,
        has_chat_template="tokenizer.chat_template" in values,
    )


def _inspect_folder(
    folder: Path, shards: Shards | None = None, open_file: Opener = RandomAccessFile
) -> Inspection:
    from mlxedge.sources import folder as common
    from mlxedge.sources.hf_dir import open_folder

    config = _json_if_there(folder / common.CONFIG)
    shards = shards or common.find_shards(folder)
    with closing(common.Weights(shards, open_file)) as weights:
        kind, tensors = _folder_tensors(folder, config, weights)
        header = _headers(weights.files)
    tokenizer, side = common.read_tokenizer(folder)
    generation = _json_if_there(folder / common.GENERATION_CONFIG)
    side += [
        folder / n for n in (common.CONFIG, common.GENERATION_CONFIG) if (folder / n).is_file()
    ]
    side += [shards.index] if shards.index else []
    sizes = {f: _size(f, open_file) for f in shards.files} | {f: f.stat().st_size for f in side}
    return Inspection(
        name=common.model_name(folder),
        kind=kind,
        path=folder,
        files={f.relative_to(folder).as_posix(): size for f, size in sizes.items()},
        tensors=tensors,
        metadata=_prefixed("config", config) | _prefixed("generation_config", generation) | header,
        reopen=lambda: open_folder(folder, shards=shards, open_file=open_file),
        quantization=folder_label(config, tensors),
        license=common.read_license(folder),
        has_tokenizer=tokenizer is not None,
        has_chat_template=tokenizer is not None and _has_template(tokenizer.files),
        **_of_config(config),
    )


def _size(path: Path, open_file: Opener) -> int:
    with closing(open_file(path)) as file:
        return file.size


def _inspect_safetensors(path: Path) -> Inspection:
    from mlxedge.sources.safetensors import SafetensorsFile

    with closing(SafetensorsFile(path)) as file:
        tensors = _entries([file])
        header = _headers([file])
    return Inspection(
        name=path.stem,
        kind="safetensors",
        path=path,
        files={path.name: path.stat().st_size},
        tensors=tensors,
        metadata=header,
        quantization=folder_label({}, tensors),
    )


def _folder_tensors(
    folder: Path, config: dict[str, Any], weights: Weights
) -> tuple[str, list[TensorInfo]]:
    """ "hf" or "mlx", and the tensors; codes, scales and biases count as one tensor."""
    from mlxedge.sources.mlx_dir import is_mlx, mlx_tensors
    from mlxedge.sources.quantized import quantization_rules

    if not is_mlx(config, weights):
        if rules := quantization_rules(folder, config):
            return "hf", _quantized(folder, rules, weights)
        return "hf", _entries(weights.files)
    try:
        found = mlx_tensors(folder, config, weights)
    except MlxedgeError:
        # What is wrong is said by the obstacles; here the parts are listed as they are.
        return "mlx", _entries(weights.files)
    return "mlx", [TensorInfo(t.name, t.shape, t.encoding.name, t.nbytes) for t in found.values()]


def _quantized(folder: Path, rules: dict[str, Any], weights: Weights) -> list[TensorInfo]:
    """Matrices with the bytes of all arrays that are called after them, and what belongs to none;
    decoded ones go by the name of their scheme."""
    from mlxedge.sources.quantized import quantized_tensors

    try:
        found = quantized_tensors(folder, rules, weights)
    except MlxedgeError:
        return _entries(weights.files)  # as above
    stems = {name.removesuffix(".weight"): name for name in found}
    sizes = dict.fromkeys(found, 0)
    others = []
    for entry in (e for file in weights.files for e in file.entries.values()):
        stem = entry.name
        while stem and stem not in stems and stem not in found:
            stem = stem[: max(stem.rfind("."), stem.rfind("_"), 0)]
        if stem:
            sizes[stems.get(stem, stem)] += entry.nbytes
        else:
            others.append(TensorInfo(entry.name, entry.shape, entry.dtype, entry.nbytes))
    method = str(rules["quant_method"])
    return [
        TensorInfo(name, t.shape, method if t.decoded else t.encoding.name, sizes[name])
        for name, t in found.items()
    ] + others


def _entries(files: Iterable[SafetensorsFile]) -> list[TensorInfo]:
    return [
        TensorInfo(e.name, e.shape, e.dtype, e.nbytes) for f in files for e in f.entries.values()
    ]


def _headers(files: Iterable[SafetensorsFile]) -> dict[str, Any]:
    merged: dict[str, str] = {}
    for file in files:
        merged |= file.metadata
    return _prefixed("safetensors", merged)


def _of_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that config.json tells; multimodal models keep the text model's inside."""
    inner = config.get("text_config")
    text = config | inner if isinstance(inner, dict) else config
    contexts = (_integer(text.get(key)) for key in _CONTEXT)
    base = config.get("base_model") or config.get("_name_or_path")
    return {
        "architecture": _string(config.get("model_type")),
        "context_length": next((c for c in contexts if c), None),
        "vocab_size": _integer(text.get("vocab_size")),
        "base_model": _string(base) or None,
    }


def _has_template(files: Mapping[str, bytes]) -> bool:
    return any(name.endswith((".jinja", "chat_template.json")) for name in files) or (
        b'"chat_template"' in files.get("tokenizer_config.json", b"")
    )


def obstacles(found: Inspection) -> dict[str, str | None]:
    """Why the model cannot be converted to "mlx", "gguf" and "hf", or ``None`` where it can.

    A conversion to each is planned, and its complaint kept.
    """
    from mlxedge.conversion import plan_conversion
    from mlxedge.targets import parse_target

    if found.reopen is None:
        return dict.fromkeys(_TRIALS, "weights alone: a model also needs config.json")
    try:
        checkpoint = found.reopen()
    except MlxedgeError as error:
        return dict.fromkeys(_TRIALS, str(error))
    why: dict[str, str | None] = {}
    here = tuple(file for file in checkpoint.origin.files if file.exists())
    checkpoint = replace(checkpoint, origin=replace(checkpoint.origin, files=here))
    with checkpoint:
        for kind, spec in _TRIALS.items():
            target = parse_target(spec)
            # Nothing is written there; the name is new, so that nothing is in the way.
            out = Path(tempfile.gettempdir()) / target.default_name(f"mlxedge-{uuid.uuid4().hex}")
            try:
                plan_conversion(checkpoint, [target], out, quality="reference")
                why[kind] = None
            except DiskFullError:
                why[kind] = None  # the disk of the trial is not the one to write to
            except MlxedgeError as error:
                why[kind] = str(error)
    return why


def gguf_label(metadata: Metadata) -> str | None:
    """``general.file_type`` by the name that llama.cpp prints: "Q4_K_M", "F16"."""
    from gguf import LlamaFileType

    value = metadata.get("general.file_type")
    if value is None or type(value.value) is not int:
        return None
    try:
        return LlamaFileType(value.value).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return f"file type {value.value}"


def folder_label(config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> str | None:
    """How a folder's weights are stored: "4-bit g64", "mxfp4", a foreign method, or the dtype that
    takes most bytes."""
    rules = config.get("quantization")
    if isinstance(rules, dict) and rules:
        mode = rules.get("mode", "affine")
        mixed = any(isinstance(v, dict) for v in rules.values())
        name = mode if mode != "affine" else f"{rules.get('bits')}-bit g{rules.get('group_size')}"
        return f"{name} mixed" if mixed else str(name)
    foreign = config.get("quantization_config")
    if isinstance(foreign, dict) and foreign.get("quant_method"):
        return str(foreign["quant_method"])
    sizes: dict[str, int] = {}
    for t in tensors:
        sizes[t.encoding] = sizes.get(t.encoding, 0) + t.nbytes
    return max(sizes, key=lambda name: sizes[name], default=None)


def abbreviate(value: Any) -> Any:
    """``value`` with long arrays cut to ``{"length": n, "first": […]}``."""
    if isinstance(value, list) and len(value) > _ABBREVIATED:
        return {"length": len(value), "first": [abbreviate(v) for v in value[:_ABBREVIATED]]}
    if isinstance(value, list):
        return [abbreviate(v) for v in value]
    if isinstance(value, dict):
        return {k: abbreviate(v) for k, v in value.items()}
    return value


def plain(value: Any) -> Any:
    """``value`` in JSON's types: arrays as lists, NaN and infinities as text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return value


def _shortest(value: GgufValue) -> Any:
    """``plain``, with an f32 as the shortest decimal that gives it: 1e-05."""
    import numpy as np

    if value.kind == "f32" and math.isfinite(value.value):
        return float(str(np.float32(value.value)))
    return plain(value.value)


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{key}": plain(value) for key, value in values.items()}


def _json_if_there(path: Path) -> dict[str, Any]:
    from mlxedge.sources.folder import read_json

    return read_json(path) if path.is_file() else {}


def _integer(value: Any) -> int | None:
    return value if type(value) is int else None


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None
