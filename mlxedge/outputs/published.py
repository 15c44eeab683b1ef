"""Experts that keep the codes in which a model is published.

llama-quantize refuses to quantize such codes a second time unless it is told to, and mlx-lm leaves
what is quantized already as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxedge.encodings import GGML, MLX_FLOAT, Encoding
from mlxedge.models.experts import STACKS

if TYPE_CHECKING:
    from mlxedge.models.spec import ModelSpec
    from mlxedge.recipes.overrides import Format
    from mlxedge.sources.checkpoint import SourceTensor

REASON = "experts stay as they are published"
_ENDS = tuple(f"{stack}.weight" for stack in STACKS)


def published(spec: ModelSpec, source: SourceTensor, form: Format) -> Encoding | None:
    """The encoding in which a target of ``form`` holds the very codes of a stack of experts that
    ``source`` has as the architecture is published; ``None`` for all other tensors."""
    name = spec.experts.published if spec.experts else None
    if name is None or not source.name.endswith(_ENDS):
        return None
    both: dict[Format, Encoding] = {"gguf": GGML[name], "mlx": MLX_FLOAT[name]}
    return both[form] if source.encoding in both.values() else None


def note(form: Format) -> str:
    """What to say where they do."""
    rule = "_exps=TYPE" if form == "gguf" else "experts=TYPE"
    return f"{REASON}, whatever the rest becomes: --tensor {rule} would quantize them again"
