"""LoRA adapters as PEFT saves them, merged into the tensors that they were trained for.

A folder, or a repository on the Hub, holds ``adapter_config.json`` and
``adapter_model.safetensors``. For a matrix W ``[out, in]`` there are ``….lora_A.weight`` ``[r,
in]`` and ``….lora_B.weight`` ``[out, r]``, and the merged one is W + scaling · B · A with scaling =
alpha / r, or alpha / √r of rank-stabilised ones (``peft/tuners/lora/layer.py``, version 0.21; Hu et
al. 2021; Kalajdzievski 2023). Embeddings have ``lora_embedding_A`` ``[r, tokens]`` and
``lora_embedding_B`` ``[width, r]`` and get the transposed product. Biases and whole modules that
were trained beside replace those of the model. Rows are merged in f64 and rounded to f32 once, when
they are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.encodings import F32
from mlxedge.errors import (
    CorruptFileError,
    SourceNotFoundError,
    UnsafeFileError,
    UnsupportedModelError,
)
from mlxedge.models import known_model_types, spec_for
from mlxedge.models.recasts import WORLDS
from mlxedge.sources.checkpoint import Checkpoint, SourceTensor, Tensors
from mlxedge.sources.files import check_rows, shown
from mlxedge.sources.folder import ADAPTER_CONFIG, PICKLE_ADVICE, read_json
from mlxedge.sources.safetensors import SafetensorsFile

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.ops import Parts
    from mlxedge.sources.hub import Warn
    from mlxedge.sources.hub_download import Progress

CONFIG, WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
#: Stands in the names of what a layer with factors had before: its bias, or a saved embedding.
_BASE = ".base_layer."
#: What ends the names of the two factors, A first, and whether their product is transposed.
_FACTORS = (
    (".lora_A.weight", ".lora_B.weight", False),
    (".lora_embedding_A", ".lora_embedding_B", True),
)
_FLOATS = ("f32", "f16", "bf16")
#: Settings that change what is merged in ways that are not done here.
_REFUSED = ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "megatron_config")
#: Ways to begin that leave the weights of the model alone.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Pair:
    """The factors of a matrix, by their names in the file."""

    a: str
    b: str
    rank: int
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter on this disk; ``repo`` and ``revision`` (the commit) if it came from the Hub."""

    folder: Path
    name: str
    repo: str | None = None
    revision: str | None = None


def find_adapter(
    spec: str | Path, *, progress: Progress | None = None, warn: Warn | None = None
) -> Adapter:
    """The adapter that ``spec`` names: a folder, or a Hub id (``org/name``, ``org/name@revision``)
    that is downloaded. What exists on disk goes first.

    Raises SourceNotFoundError and what :func:`mlxedge.sources.hub.download` does.
    """
    path = Path(spec).expanduser()
    if spec and path.exists():
        return Adapter(path, path.resolve().name)
    from mlxedge.sources.hub import parse_spec

    hub = None if isinstance(spec, Path) else parse_spec(spec)
    if hub is None or hub.file is not None:
        raise SourceNotFoundError(
            f"{spec}: no such folder, and not a Hub id (org/name or org/name@revision): an adapter "
            "is what PEFT's save_pretrained wrote"
        )
    from mlxedge.sources.hub_adapter import download_adapter

    found = download_adapter(hub.repo, revision=hub.revision, progress=progress, warn=warn)
    return Adapter(found.path, hub.repo.rpartition("/")[2], found.repo, found.commit)


def with_adapter(checkpoint: Checkpoint, adapter: Adapter | Path) -> Checkpoint:
    """``checkpoint`` with the adapter (or the one in a folder) merged into it, named after both;
    closing it closes the adapter alone.

    Raises SourceNotFoundError, CorruptFileError (shapes that do not fit, factors without the
    other), UnsafeFileError (pickles) and UnsupportedModelError for an adapter of another kind or of
    another model.
    """
    if isinstance(adapter, Path):
        adapter = find_adapter(adapter)
    folder = adapter.folder
    config = _config(folder)
    file = SafetensorsFile(folder / WEIGHTS)
    try:
        tensors, merged = _merged(checkpoint, config, file)
    except BaseException:
        file.close()
        raise

    origin = checkpoint.origin
    files = (*origin.files, folder / CONFIG, folder / WEIGHTS)
    about = {
        "name": adapter.name,
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "rank_stabilised": bool(config.get("use_rslora")),
        "tensors": merged,
    }
    if adapter.repo:
        about |= {"repo": adapter.repo, "revision": adapter.revision}
    return replace(
        checkpoint,
        name=f"{checkpoint.name}-{adapter.name}",
        tensors=Tensors(tensors),
        origin=replace(origin, files=files),
        adapter=about,
        on_close=file.close,
    )


def check_files(where: str | Path, names: Collection[str]) -> None:
    """Raise SourceNotFoundError or UnsafeFileError unless ``names`` are files of an adapter."""
    if CONFIG not in names:
        model = " (this is a model: give it as SOURCE)" if "config.json" in names else ""
        raise SourceNotFoundError(
            f"{where}: no {CONFIG}: an adapter is what PEFT's save_pretrained wrote{model}"
        )
    if WEIGHTS not in names:
        if _PICKLE in names:
            raise UnsafeFileError(f"{where}/{_PICKLE}: a pickle: {PICKLE_ADVICE}")
        raise SourceNotFoundError(f"{where}: no {WEIGHTS}")


def check_folder(folder: Path) -> None:
    """As :func:`check_files`, for a folder."""
    if not folder.is_dir():
        raise SourceNotFoundError(f"{folder}: an adapter is a folder: give {folder.parent}")
    check_files(folder, {file.name for file in folder.iterdir() if file.is_file()})


def _config(folder: Path) -> dict[str, Any]:
    check_folder(folder)
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    refused = [key for key in _REFUSED if config.get(key)]
    start = config.get("init_lora_weights")
    if kind != "LORA":
        refused = [f"peft_type {shown(str(kind))}"]
    elif start not in _STARTS:
        refused.append(f"init_lora_weights {shown(str(start))}")
    if refused:
        raise UnsupportedModelError(
            f"{folder}: an adapter with {', '.join(refused)}; mlxedge merges plain LoRA: merge "
            "this one with PEFT (merge_and_unload) and convert the result"
        )
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise CorruptFileError(folder / CONFIG, f"lora_alpha is {shown(str(alpha))}, no number")
    return config


def _merged(
    checkpoint: Checkpoint, config: dict[str, Any], file: SafetensorsFile
) -> tuple[dict[str, SourceTensor], int]:
    """All tensors, and how many the adapter changes."""
    tensors = dict(checkpoint.tensors)
    names = _names(checkpoint)
    pairs, others = _pairs(config, file)
    for stored in others:
        name = stored.removeprefix(_PREFIX).replace(_BASE, ".")
        name = names.get(name, name)
        found, have = file.source_tensor(stored), tensors.get(name)
        if have is None and name != "lm_head.weight":  # a tied head that was trained on its own
            raise UnsupportedModelError(
                f"{file.path}: {shown(stored)} is neither a factor nor a tensor of the model"
            )
        if have is not None and have.shape != found.shape:
            raise UnsupportedModelError(
                f"{file.path}: {shown(name)} is {list(found.shape)}, and the model's is "
                f"{list(have.shape)}: merge it with PEFT if it was trained with more tokens"
            )
        tensors[name] = replace(found, name=name)
    for module, pair in pairs.items():
        name = names.get(f"{module}.weight", f"{module}.weight")
        if name not in tensors:
            raise UnsupportedModelError(
                f"{file.path}: it changes {shown(name)}, which {checkpoint.origin.path} does not "
                "have: an adapter of another model, of parameters that are no linear layers, or of "
                "what this file has in another form: merge it into the model that it is made from"
            )
        tensors[name] = _with_product(tensors[name], pair, file)
    if not pairs and not others:
        raise CorruptFileError(file.path, "the adapter holds no tensors")
    return tensors, len(pairs) + len(others)


def _names(checkpoint: Checkpoint) -> dict[str, str]:
    """By the names that transformers has for them, and that adapters are made by, the tensors that
    a checkpoint calls otherwise."""
    if checkpoint.config.get("model_type") not in known_model_types():
        return {}
    spec, world = spec_for(checkpoint.config), WORLDS[checkpoint.origin.kind]
    found = {}
    for name in checkpoint.tensors:
        spelt = spec.spelt(name)
        if world != "stored" and spec.recast_of(world, spelt) is None:
            spelt = spec.to_stored(spec.canonical(spelt, world)[0], 1)[0]
            if spec.recast_of("stored", spelt) is not None:
                continue  # it is transposed there
        if spelt != name:
            found[spelt] = name
    return found


def _pairs(config: dict[str, Any], file: SafetensorsFile) -> tuple[dict[str, _Pair], list[str]]:
    """The factors by the module that they change, and the names of all other tensors."""
    pairs: dict[str, _Pair] = {}
    others = []
    for name, entry in file.entries.items():
        for first, second, transposed in _FACTORS:
            if name.endswith(second) and name.removesuffix(second) + first not in file.entries:
                raise CorruptFileError(file.path, f"{shown(name)} has no {first[1:]}", entry.offset)
            if not name.endswith(first):
                continue
            stem = name.removesuffix(first)
            other = file.entries.get(stem + second)
            rank = entry.shape[0] if len(entry.shape) == 2 else 0
            if other is None or len(other.shape) != 2 or other.shape[1] != rank or not rank:
                raise CorruptFileError(
                    file.path,
                    f"{shown(name)} is {list(entry.shape)} and {second[1:]} "
                    f"{list(other.shape) if other else 'missing'}: they cannot be multiplied",
                    entry.offset,
                )
            module = stem.removeprefix(_PREFIX)
            scaling = _scaling(config, module, rank)
            turned = transposed or bool(config.get("fan_in_fan_out"))
            pairs[module] = _Pair(name, stem + second, rank, scaling, turned)
            break
        else:
            if not any(name.endswith(second) for _, second, _ in _FACTORS):
                others.append(name)
    for name in (n for pair in pairs.values() for n in (pair.a, pair.b)):
        if (entry := file.entries[name]).dtype not in _FLOATS:
            raise CorruptFileError(file.path, f"{shown(name)} is {entry.dtype}", entry.offset)
    return pairs, others


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r; ``alpha_pattern`` has another alpha for modules whose name ends so."""
    alpha = config["lora_alpha"]
    patterns = config.get("alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error:
            found = None
        if found and isinstance(value, (int, float)):
            alpha = value
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _with_product(base: SourceTensor, pair: _Pair, file: SafetensorsFile) -> SourceTensor:
    (_, inner), (outer, _) = (file.entries[name].shape for name in (pair.a, pair.b))
    expected = (inner, outer) if pair.transposed else (outer, inner)
    if base.shape != expected:
        raise CorruptFileError(
            file.path,
            f"{shown(pair.a)} and its partner make {list(expected)}, and {shown(base.name)} is "
            f"{list(base.shape)}",
            file.entries[pair.a].offset,
        )

    def factors(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Left ``[stop - start, r]`` and right ``[r, cols]``."""
        if pair.transposed:
            return file.read_columns(pair.a, start, stop).T, file.read_rows(pair.b, 0, outer).T
        return file.read_rows(pair.b, start, stop), file.read_rows(pair.a, 0, pair.rank)

    return SourceTensor(
        base.name,
        base.shape,
        F32,
        _reader(base, pair.scaling, factors, file, pair.a),
        decoded=base.decoded or base.encoding.family != "plain",
    )


def _reader(
    base: SourceTensor,
    scaling: float,
    factors: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
    file: SafetensorsFile,
    name: str,
) -> Callable[[int, int], Parts]:
    def read_rows(start: int, stop: int) -> Parts:
        import numpy as np

        from mlxedge.ops import load_reference

        check_rows(base.name, base.rows, start, stop)
        weights = load_reference().decode(base.read_rows(start, stop), base.encoding)
        left, right = (factor.astype(np.float64) for factor in factors(start, stop))
        with np.errstate(invalid="ignore", over="ignore"):
            product = (left @ right) * scaling
            if not np.isfinite(product).all():
                raise CorruptFileError(
                    file.path, f"{shown(name)} and its partner hold NaN or infinity"
                )
            merged = weights.astype(np.float64) + product
            return {"weight": merged.astype(np.float32)}

    return read_rows
