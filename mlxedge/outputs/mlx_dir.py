"""Plan an MLX folder as mlx-lm and LM Studio read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.encodings import MLX_FLOAT, PLAIN, Affine, Encoding
from mlxedge.models.spec import ModelSpec
from mlxedge.outputs.folder import clean_config, common_files, json_bytes, model_card, window_notes
from mlxedge.outputs.safetensors_file import lay_out
from mlxedge.plan import CanTranscode, OutputPlan, PlannedTensor, how_to_make
from mlxedge.targets import Target

if TYPE_CHECKING:
    from mlxedge.sources.checkpoint import Checkpoint, SourceTensor


def plan_mlx(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    config: dict[str, Any],
    target: Target,
    path: Path,
    *,
    dtype: str,
    can_transcode: CanTranscode,
) -> OutputPlan:
    """Plan one MLX folder. ``dtype`` is that of scales and of unquantized tensors."""
    quantized = _encoding(target, dtype)
    if quantized is None:
        dtype = target.recipe
    tensors = []
    for name, source in checkpoint.tensors.items():
        encoding, reason = _choose(source, quantized, dtype)
        how = how_to_make(source, encoding, can_transcode(source.encoding, encoding))
        tensors.append(PlannedTensor(name, name, source.shape, encoding, how, reason=reason))
    parameters = sum(t.size for t in checkpoint.tensors.values())
    layout = lay_out(tensors, {"format": "mlx"}, parameters)

    made = clean_config(spec.mlx_config(config), dtype)
    if quantized is not None:
        made["quantization"] = {
            "group_size": quantized.block,
            "bits": target.bits or MLX_FLOAT[target.recipe].bits,
            "mode": "affine" if target.bits else target.recipe,
        }
        made["quantization_config"] = dict(made["quantization"])
    files = common_files(checkpoint) | {
        "config.json": json_bytes(made),
        "model.safetensors.index.json": layout.index,
        "README.md": model_card(checkpoint, "mlx", "MLX weights", target.recipe),
    }
    label = quantized.name if quantized else dtype
    plan = OutputPlan(target, path, label, layout.tensors, layout.files, files)
    plan.notes += window_notes(spec, config, "mlx-lm")
    if checkpoint.tokenizer is None:
        plan.notes.append("the source has no tokenizer: mlx-lm can load but not tokenize")
    return plan


def _encoding(target: Target, dtype: str) -> Affine | Encoding | None:
    if target.bits:
        return Affine(target.bits, target.group or 64, dtype)
    return MLX_FLOAT.get(target.recipe)


def _choose(
    source: SourceTensor, quantized: Encoding | None, dtype: str
) -> tuple[Encoding, str | None]:
    if quantized is None:
        return PLAIN[dtype], None
    if len(source.shape) < 2:
        return PLAIN[dtype], f"one-dimensional tensors stay {dtype}"
    if not quantized.fits(source.shape):
        return (
            PLAIN[dtype],
            f"rows of {source.cols} do not divide into groups of {quantized.block}",
        )
    return quantized, None
