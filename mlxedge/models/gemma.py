"""gemma: Gemma 1 and CodeGemma; norms of weights less one, embeddings times the width's root."""

from __future__ import annotations

import math

from mlxedge.models.dense import Dense, plain_rope
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Factors, Wiring

WIRING = Wiring(unit_norm=True, activation="gelu_pytorch_tanh")


def _adopt(config: Config) -> Config:
    """Its first configs say "gelu" and mean what transformers computes for it, the other one."""
    if config.get("hidden_act") == "gelu":
        config = config | {"hidden_act": WIRING.activation}
    return config


def _check(config: Config, runtime: str) -> list[str]:
    if config.get("attention_bias"):
        return ["attention biases are not part of this architecture in llama.cpp and mlx-lm"]
    return plain_rope(config, "mlx-lm") if runtime == "mlx" else []


SPEC = Dense(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    arch="gemma",
    names=names(WIRING),
    wiring=WIRING,
    factors=lambda config: Factors(embedding=math.sqrt(config["hidden_size"])),
    fixed={"attention_bias": False},
    defaults={"head_dim": 256, "tie_word_embeddings": True},
    tied={"gguf": True, "mlx": True},
    adopts=_adopt,
    check=_check,
).spec()
