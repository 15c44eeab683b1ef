"""gemma4_unified_text: gemma4_text within Gemma 4 12B, without inputs of each layer's own.

The runtimes know it as gemma4_text.
"""

from __future__ import annotations

from dataclasses import replace

from mlxedge.models import gemma4_text
from mlxedge.models.spec import Config

_NONE = {"hidden_size_per_layer_input": 0, "enable_moe_block": False}


def _mlx(config: Config) -> Config:
    return gemma4_text.DENSE.mlx(config) | {"model_type": "gemma4_text"}


SPEC = replace(
    gemma4_text.DENSE,
    model_type="gemma4_unified_text",
    architecture="Gemma4UnifiedForCausalLM",
    defaults={
        **gemma4_text.DENSE.defaults,
        "max_position_embeddings": 262144,
        "sliding_window": 1024,
    },
    adopts=lambda config: config | _NONE,
    mlx=_mlx,
    reads=lambda metadata: False,  # a GGUF file does not tell the two
).spec()
