"""Plan an MLX folder as mlx-lm and LM Studio read it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.encodings import MLX_FLOAT, PLAIN, Affine, Encoding, MlxFloat
from mlxedge.models.spec import ModelSpec
from mlxedge.outputs.folder import (
    clean_config,
    common_files,
    json_bytes,
    model_card,
    type_note,
    window_notes,
)
from mlxedge.outputs.published import REASON, note, published
from mlxedge.outputs.safetensors_file import lay_out
from mlxedge.plan import OutputPlan, PlannedTensor, how_to_make, keeps_codes
from mlxedge.recipes.overrides import NONE, Overrides, Role, with_scales
from mlxedge.sources.recasts import recast_only, to_world
from mlxedge.targets import Target

if TYPE_CHECKING:
    from mlxedge.sources.checkpoint import Checkpoint, SourceTensor

_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: By the GGUF name, which every architecture has the same.
_ROLES: dict[str, Role] = {"output.weight": "output", "token_embd.weight": "embedding"}


def plan_mlx(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    config: dict[str, Any],
    target: Target,
    path: Path,
    *,
    dtype: str,
    overrides: Overrides = NONE,
) -> OutputPlan:
    """Plan one MLX folder. ``dtype`` is that of scales and of unquantized tensors.

    Raises UsageError for an override without a tensor.
    """
    quantized = _encoding(target, dtype)
    if quantized is None:
        dtype = target.recipe
    sources = to_world(spec, config, checkpoint.tensors, "mlx")
    matrices = [
        name
        for name, source in sources.items()
        if len(source.shape) > 1 and source.name.endswith("weight") and not spec.is_norm(name)
    ]
    notes = overrides.unmatched("mlx", matrices)
    told = _told(matrices, spec, overrides)
    tensors = []
    for name, source in sources.items():
        encoding, reason = _choose(source, quantized, dtype)
        if spec.is_norm(name):
            encoding, reason = PLAIN[dtype], reason and f"norms stay {dtype}"
        if quantized is not None and spec.is_router(name):
            encoding, reason = _choose(source, Affine(8, 64, dtype), dtype)
            reason = reason or "routers get 8 bits"
            if spec.experts is not None and spec.experts.plain_router:
                encoding, reason = PLAIN[dtype], "mlx-lm has no quantized router of this kind"
        if quantized is not None and (stays := published(spec, source, "mlx")):
            encoding, reason = stays, REASON
        if spec.is_exact(source.name):
            encoding, reason = PLAIN["f32"], None
        if name in told:
            encoding, reason = _choose(source, with_scales(told[name], dtype), dtype)
            reason = reason or (None if encoding == quantized else "as told")
        how, kept = how_to_make(source, encoding, keeps_codes)
        count = (*source.shape, 1)[0]
        own = tuple(spec.mlx_prefix + part for part in spec.to_mlx(source.name, count))
        made, pieces = (name, own) if own[1:] else (own[0], ())
        tensors.append(
            PlannedTensor(
                name, made, source.shape, encoding, how, kept, reason=reason, pieces=pieces
            )
        )
    twice = spec.unties and config["tie_word_embeddings"]
    if twice:
        tensors += [replace(t, name=_HEAD) for t in tensors if t.name == spec.to_mlx(_TABLE, 1)[0]]
    parameters = sum(t.size for t in checkpoint.tensors.values())
    layout = lay_out(tensors, {"format": "mlx"}, parameters)

    written = clean_config(spec.mlx_config(config), dtype)
    if settings := _quantization(quantized, tensors, told):
        written["quantization"] = settings
        written["quantization_config"] = dict(settings)
    files, about_tokenizer = common_files(checkpoint)
    files |= {
        "config.json": json_bytes(written),
        "model.safetensors.index.json": layout.index,
        "README.md": model_card(checkpoint, "mlx", "MLX weights", target.recipe),
    }
    label = quantized.name if quantized else dtype
    plan = OutputPlan(target, path, label, layout.tensors, layout.files, files)
    plan.sources = recast_only(sources)
    if any(tensor.reason == REASON for tensor in tensors):
        plan.notes.append(note("mlx"))
    plan.notes += [*notes, *window_notes(spec, config, "mlx"), *about_tokenizer]
    plan.notes += type_note(config, written, "mlx-lm")
    if twice:
        plan.notes.append(
            "the table of tied embeddings stands twice: mlx-lm needs a head of its own"
        )
    if checkpoint.tokenizer is None:
        plan.notes.append("the source has no tokenizer: mlx-lm can load but not tokenize")
    return plan


def _encoding(target: Target, dtype: str) -> Affine | Encoding | None:
    if target.bits:
        return Affine(target.bits, target.group or 64, dtype)
    return MLX_FLOAT.get(target.recipe)


def _told(matrices: list[str], spec: ModelSpec, overrides: Overrides) -> dict[str, Encoding]:
    """What the user wants, by the name of the matrix."""
    if not overrides:
        return {}
    roles: dict[str, Role] = {}
    for name in matrices:
        mapped = spec.to_gguf(name)
        if mapped and mapped[0] in _ROLES:
            roles[name] = _ROLES[mapped[0]]
    tied = "output" not in roles.values()
    found = {name: overrides.find(name, "mlx", roles.get(name), tied) for name in matrices}
    return {name: encoding for name, encoding in found.items() if encoding is not None}


def _quantization(
    main: Encoding | None, tensors: list[PlannedTensor], told: dict[str, Encoding]
) -> dict[str, Any]:
    """config.json's ``quantization``: how most matrices are quantized, and by the path of its
    module what is quantized otherwise or, as the user wants it, not at all. mlx-lm asks for an
    entry first, then for scales."""
    own: dict[str, Any] = {}
    for tensor in tensors:
        found = _settings(tensor.encoding)
        if tensor.encoding != main and (found or (main is not None and tensor.source in told)):
            own[tensor.name.removesuffix(".weight")] = found or False
    settings = _settings(main) if main else next((v for v in own.values() if v), {})
    return settings | own


def _settings(encoding: Encoding) -> dict[str, Any]:
    if isinstance(encoding, (Affine, MlxFloat)):
        return {"group_size": encoding.group, "bits": encoding.bits, "mode": encoding.mode}
    return {}


def _choose(
    source: SourceTensor, quantized: Encoding | None, dtype: str
) -> tuple[Encoding, str | None]:
    if quantized is None:
        return PLAIN[dtype], None
    if len(source.shape) < 2:
        return PLAIN[dtype], f"one-dimensional tensors stay {dtype}"
    if source.name.endswith("bias"):
        return PLAIN[dtype], f"biases stay {dtype}"
    if not quantized.fits(source.shape):
        return (
            PLAIN[dtype],
            f"rows of {source.cols} do not divide into groups of {quantized.block}",
        )
    return quantized, None
