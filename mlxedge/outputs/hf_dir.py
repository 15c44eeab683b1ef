"""Plan a folder of floats that transformers loads: the way back from GGUF and MLX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.encodings import PLAIN
from mlxedge.models.spec import ModelSpec
from mlxedge.outputs.folder import clean_config, common_files, json_bytes, model_card, type_note
from mlxedge.outputs.safetensors_file import lay_out
from mlxedge.plan import OutputPlan, PlannedTensor, how_to_make
from mlxedge.sources.recasts import recast_only, to_world
from mlxedge.targets import Target

if TYPE_CHECKING:
    from mlxedge.sources.checkpoint import Checkpoint


def plan_hf(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    config: dict[str, Any],
    target: Target,
    path: Path,
) -> OutputPlan:
    """Plan one folder of ``target.recipe`` floats."""
    tensors = []
    sources = to_world(spec, config, checkpoint.tensors, "stored")
    for name, source in sources.items():
        encoding = PLAIN["f32" if spec.is_exact(source.name) else target.recipe]
        how, kept = how_to_make(source, encoding)
        own = spec.to_stored(source.name, (*source.shape, 1)[0])
        first, *others = names = own
        pieces = names if others else ()
        tensors.append(
            PlannedTensor(
                name, name if pieces else first, source.shape, encoding, how, kept, pieces=pieces
            )
        )
    parameters = sum(t.size for t in checkpoint.tensors.values())
    layout = lay_out(tensors, {"format": "pt"}, parameters)
    made = {
        "architectures": [spec.architecture],
        **clean_config(spec.hf_config(config), target.recipe),
    }
    files, notes = common_files(checkpoint)
    files |= {
        "config.json": json_bytes(made),
        "README.md": model_card(checkpoint, "transformers", "Float weights", target.recipe),
    }
    if len(layout.files) > 1:
        files["model.safetensors.index.json"] = layout.index
    plan = OutputPlan(target, path, target.recipe, layout.tensors, layout.files, files, notes)
    plan.sources = recast_only(sources)
    plan.notes += type_note(config, made, "transformers")
    return plan
