"""Plan a GGUF file: names, recipe, metadata, offsets."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge import gguf_values as gv
from mlxedge.encodings import F32, PLAIN, Encoding
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.spec import ModelSpec
from mlxedge.ops import load_reference
from mlxedge.outputs.folder import window_notes
from mlxedge.outputs.gguf_file import ALIGNMENT, header_bytes
from mlxedge.outputs.published import REASON, note, published
from mlxedge.plan import (
    DataFile,
    OutputPlan,
    PlannedTensor,
    encodings_made,
    how_to_make,
    keeps_codes,
    place_parts,
)
from mlxedge.recipes import llama_cpp
from mlxedge.recipes.overrides import NONE, Overrides
from mlxedge.sources.recasts import recast_only, to_world
from mlxedge.targets import Target

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from mlxedge.sources.checkpoint import Checkpoint, SourceTensor

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
#: How much larger a file is worth a note.
_GROWN = 1.1
_IMATRIX_TEXT = 127  # bytes, as long as llama-quantize writes them


def plan_gguf(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    config: dict[str, Any],
    target: Target,
    path: Path,
    *,
    pre: str | None = None,
    overrides: Overrides = NONE,
    imatrix: bool = False,
    known: Container[str] | None = None,
    about_imatrix: gv.Metadata | None = None,
) -> OutputPlan:
    """Plan one GGUF file.

    ``pre`` names the pre-tokenizer by hand. ``imatrix`` tells whether matrices will be encoded with
    the importance of their columns, which changes the mix; ``known`` holds the source's names of
    those for which it is known, ``None`` for all; ``about_imatrix`` are keys that say where it is
    from (:func:`imatrix_keys`).

    Raises UnsupportedModelError for a tensor that the architecture does not have in GGUF,
    TokenizerError if the tokenizer cannot be expressed, UsageError for an override without a tensor
    and for a type that needs the importance and does not get it.
    """
    from mlxedge.tokenizer import to_gguf

    listed = spec.listed(config["num_hidden_layers"])
    numbers = {name for entries in listed.values() for name, _ in entries}
    tensors = {n: t for n, t in checkpoint.tensors.items() if n not in numbers}
    sources = to_world(spec, config, tensors, "gguf")
    names: dict[str, tuple[str, Any]] = {}
    for hf_name, source in sources.items():
        mapped = (source.name, "same") if source.name != hf_name else spec.to_gguf(hf_name)
        if mapped is None:
            raise UnsupportedModelError(
                f"{hf_name}: {spec.model_type} has no such tensor in GGUF (architecture "
                f"{spec.gguf_arch})"
            )
        names[hf_name] = mapped

    extra, written = spec.gguf_extra(config), spec.gguf_metadata(config)
    shapes = [(names[n][0], _dims(t.shape)) for n, t in sources.items()]
    notes = overrides.unmatched("gguf", [n for n, dims in shapes if llama_cpp.is_open(n, dims)])
    choices = llama_cpp.choose(
        target.recipe,
        shapes,
        _shape(spec, config, written),
        has_imatrix=imatrix,
        overrides=overrides,
    )
    if target.recipe not in PLAIN and not overrides.pure:
        stay = {
            names[n][0]: llama_cpp.Choice(encoding, REASON)
            for n, source in sources.items()
            if (encoding := published(spec, source, "gguf"))
            and overrides.find(names[n][0], "gguf") is None
        }
        choices |= stay
        notes += [note("gguf")] if stay else []
    llama_cpp.check_importance(
        target.recipe,
        choices,
        {
            names[n][0]
            for n, t in sources.items()
            if imatrix and (known is None or (n if t.name == n else t.like) in known)
        },
    )

    planned: list[PlannedTensor] = []
    offset = 0
    infos: list[tuple[str, tuple[int, ...], Encoding, int]] = []
    constants: list[tuple[int, bytes]] = []
    for name, values in extra.items():
        raw = values.astype("<f4").tobytes()
        infos.append((name, values.shape, F32, offset))
        constants.append((offset, raw))
        offset += -(-len(raw) // ALIGNMENT) * ALIGNMENT
    for hf_name, source in sources.items():
        gguf_name, rows = names[hf_name]
        choice, offset_by = choices[gguf_name], spec.offset(hf_name)
        how, kept = how_to_make(source, choice.encoding, keeps_codes)
        tensor = PlannedTensor(
            source=hf_name,
            name=gguf_name,
            shape=source.shape,
            encoding=choice.encoding,
            how="encode" if offset_by else how,
            kept=kept,
            rows=rows,
            offset=offset_by,
            reason=choice.reason,
        )
        places, end = place_parts(tensor.encoding.parts(tensor.shape).values(), offset, 0, 1)
        infos.append((gguf_name, _dims(source.shape), choice.encoding, offset))
        planned.append(replace(tensor, places={"weight": places[0]}))
        offset = -(-end // ALIGNMENT) * ALIGNMENT

    parameters = sum(t.size for t in checkpoint.tensors.values())
    metadata = _general(checkpoint, spec.arch_of(config), target, parameters)
    metadata |= written
    for key, entries in listed.items():
        # Nothing is written of a model of which headers alone are here.
        found = [
            _number(checkpoint.tensors[name]) if checkpoint.has_weights_here else 0.0
            for name, _ in entries
        ]
        metadata[key] = gv.array("f32", found)
    metadata["general.file_type"] = gv.u32(llama_cpp.file_type(target.recipe))
    metadata["general.quantization_version"] = gv.u32(_QUANTIZATION_VERSION)
    if checkpoint.tokenizer is not None:
        metadata |= to_gguf(checkpoint.tokenizer, config, pre=pre)
    if about_imatrix and _gains_by_imatrix(planned):
        metadata |= about_imatrix
    header = header_bytes(metadata, infos)
    shifted = [
        replace(
            t,
            places={k: replace(p, offset=p.offset + len(header)) for k, p in t.places.items()},
        )
        for t in planned
    ]
    data = DataFile(
        path.name,
        header,
        len(header) + offset,
        tuple((len(header) + at, chunk) for at, chunk in constants),
    )
    plan = OutputPlan(target, path, target.recipe.upper(), shifted, [data], {})
    plan.sources = recast_only(sources)
    plan.notes += [*notes, *_larger(plan, choices), *window_notes(spec, config, "gguf")]
    if checkpoint.tokenizer is None:
        plan.notes.append("the source has no tokenizer: llama.cpp can load but not tokenize")
    return plan


def _number(tensor: SourceTensor) -> float:
    """Of a tensor of one."""
    return float(load_reference().decode(tensor.read(), tensor.encoding).item())


def _dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As ggml counts them, without leading ones."""
    return shape[1:] if len(shape) > 1 and shape[0] == 1 else shape


def imatrix_keys(*, file: str, dataset: str, entries: int, chunks: int) -> gv.Metadata:
    """What llama-quantize notes in a file made with an imatrix: its name, the text that it is of,
    and of how many matrices and chunks of that text. Empty and zero ones are left out."""
    metadata: gv.Metadata = {}
    for name, text in (("file", file), ("dataset", dataset)):
        if text:
            cut = text.encode("utf-8", "replace")[:_IMATRIX_TEXT].decode(errors="ignore")
            metadata[f"quantize.imatrix.{name}"] = gv.string(cut)
    for name, number in (("entries_count", entries), ("chunks_count", chunks)):
        if number:
            metadata[f"quantize.imatrix.{name}"] = gv.u32(number)
    return metadata


def _larger(plan: OutputPlan, choices: Mapping[str, llama_cpp.Choice]) -> list[str]:
    """A note where a file grows much since rows do not divide into the blocks of the recipe's
    types: people choose a type by its size."""
    bits, weights = 0.0, 0
    columns: set[int] = set()
    for tensor in plan.tensors:
        size = math.prod(tensor.shape)
        if wanted := choices[tensor.name].instead_of:
            bits += size * (tensor.encoding.bits_per_weight - wanted.bits_per_weight)
            weights += size
            columns.add(tensor.shape[-1])
    made = plan.bits_per_weight
    usual = made - bits / plan.weights
    if made < _GROWN * usual:
        return []
    rows = " and ".join(map(str, sorted(columns)))
    return [
        f"{weights / plan.weights:.0%} of the weights get a larger type, since rows of {rows} do "
        f"not divide into the blocks of the usual one: {made:.2f} bits per weight instead of "
        f"{usual:.2f}"
    ]


def _gains_by_imatrix(tensors: Iterable[PlannedTensor]) -> bool:
    """Of q8_0 and floats it makes no difference, and what is copied has its own history."""
    return any(encoding.bits_per_weight < 8 for encoding in encodings_made(tensors))


def without_imatrix(plan: OutputPlan) -> str | None:
    """What to do instead where a GGUF file was planned with an importance that cannot be had, or
    ``None`` where it makes no difference."""
    if plan.target.format != "gguf" or not _gains_by_imatrix(plan.tensors):
        return None
    recipe = plan.target.recipe
    if any(llama_cpp.needs_importance(recipe, t.name, t.encoding) for t in plan.tensors):
        return (
            f"{plan.target.spec} needs a calibration: get a good copy, give an imatrix file "
            "(--calibrate), or choose a recipe of more bits"
        )
    return f"{plan.target.spec} takes an imatrix file (--calibrate) then, or --no-calibrate"


def _shape(spec: ModelSpec, config: dict[str, Any], written: gv.Metadata) -> llama_cpp.Shape:
    """``written`` is the architecture's metadata, whose heads of keys are those of llama.cpp's
    graph."""
    layers = config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shared = written.get(f"{spec.arch_of(config)}.attention.head_count_kv")
    if shared is not None:  # of the first layer: 0 where that has no attention
        kv_heads = shared.value if type(shared.value) is int else int(shared.value[0])
    many = layers == 80 and (spec.gguf_arch == "qwen2" or heads != kv_heads)
    return llama_cpp.Shape(
        layers=layers,
        gqa=heads // kv_heads if kv_heads else 0,
        experts=config["num_experts"] if spec.experts and spec.experts.present(config) else 0,
        falcon=spec.gguf_arch == "falcon",
        is_70b=many and spec.gguf_arch in ("llama", "qwen2", "deci", "olmo"),
    )


def _general(checkpoint: Checkpoint, arch: str, target: Target, parameters: int) -> gv.Metadata:
    """The ``general.`` keys (gguf specification, "Standardized key-value pairs")."""
    metadata: gv.Metadata = {
        "general.architecture": gv.string(arch),
        "general.type": gv.string("model"),
        "general.name": gv.string(_title(checkpoint.name)),
        "general.size_label": gv.string(_size_label(parameters)),
    }
    if license_id := checkpoint.license:
        metadata["general.license"] = gv.string(license_id)
    if checkpoint.origin.repo:
        url = f"https://huggingface.co/{checkpoint.origin.repo}"
        metadata["general.source.huggingface.repository"] = gv.string(checkpoint.origin.repo)
        metadata["general.source.repo_url"] = gv.string(url)
    return metadata | _base_model(checkpoint) | _sampling(checkpoint.generation_config)


def _base_model(checkpoint: Checkpoint) -> gv.Metadata:
    """The model that the card names as the base, else the repository that this one is made from."""
    base = checkpoint.base_model or checkpoint.origin.repo
    organization, _, name = (base or "").partition("/")
    if not name:
        return {}
    return {
        "general.base_model.count": gv.u32(1),
        "general.base_model.0.name": gv.string(_title(name)),
        "general.base_model.0.organization": gv.string(_title(organization)),
        "general.base_model.0.repo_url": gv.string(f"https://huggingface.co/{base}"),
    }


def _sampling(generation_config: dict[str, Any]) -> gv.Metadata:
    """What llama.cpp samples with unless told otherwise; what is no number is left out."""
    metadata: gv.Metadata = {}
    value: Any
    for key, name in (("temperature", "temp"), ("top_p", "top_p"), ("min_p", "min_p")):
        value = generation_config.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and 0 <= value <= 100:
            metadata[f"general.sampling.{name}"] = gv.f32(value)
    top_k = generation_config.get("top_k")
    if type(top_k) is int and 0 <= top_k < 1 << 31:
        metadata["general.sampling.top_k"] = gv.GgufValue("i32", top_k)
    return metadata


def _title(name: str) -> str:
    return re.sub(r"[-_]+", " ", name).strip()


def _size_label(parameters: int) -> str:
    """1.1B, 135M, 900K: the naming convention of the GGUF specification."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= scale:
            size = parameters / scale
            return f"{size:.0f}{letter}" if size >= 10 else f"{size:.1f}{letter}"
    return str(parameters)
