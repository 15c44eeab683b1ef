"""gemma2: gemma with norms after attention and MLP too, caps, and windows in every other layer.

mlx-lm attends to everything; llama.cpp has the windows.
"""

from __future__ import annotations

import math

from mlxedge.models.dense import Dense, Get, Key, plain_rope
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.windows import windows_by_type
from mlxedge.models.wiring import Factors, Wiring

WIRING = Wiring(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
    unit_norm=True,
    activation="gelu_pytorch_tanh",
)
#: The 27B model alone scales attention by the width per head (``gemma2.cpp`` of llama.cpp).
LARGE = 46


def width_per_head(config: Config, large: int) -> int:
    """What llama.cpp takes for ``query_pre_attn_scalar``, by the number of layers."""
    if config["num_hidden_layers"] == large:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def scale_objections(config: Config, runtime: str, large: int) -> list[str]:
    scalar = config["query_pre_attn_scalar"]
    if runtime == "mlx" or scalar == width_per_head(config, large):
        return []
    return [f"llama.cpp cannot be told this query_pre_attn_scalar ({scalar})"]


def _check(config: Config, runtime: str) -> list[str]:
    found = scale_objections(config, runtime, LARGE)
    if not (config["attn_logit_softcapping"] and config["final_logit_softcapping"]):
        found.append("the runtime always caps scores and logits (…_logit_softcapping)")
    if config.get("attention_bias") or config.get("use_bidirectional_attention"):
        found.append("attention_bias and use_bidirectional_attention are not in the runtimes")
    return found + (plain_rope(config, "mlx-lm") if runtime == "mlx" else [])


def _factors(config: Config) -> Factors:
    return Factors(
        embedding=math.sqrt(config["hidden_size"]),
        attention=float(config["query_pre_attn_scalar"]) ** -0.5,
        attention_cap=float(config["attn_logit_softcapping"] or 0.0),
        logits_cap=float(config["final_logit_softcapping"] or 0.0),
    )


def _back(config: Config, get: Get) -> Config:
    return config | {"query_pre_attn_scalar": width_per_head(config, LARGE)}


SPEC = Dense(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    arch="gemma2",
    names=names(WIRING),
    wiring=WIRING,
    factors=_factors,
    fixed={"attention_bias": False},
    defaults={
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    settles=lambda config: {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        **config,
    },
    keys=(
        Key("attn_logit_softcapping", "attn_logit_softcapping", default=50.0),
        Key("final_logit_softcapping", "final_logit_softcapping", default=30.0),
    ),
    tied={"gguf": True, "mlx": True},
    windowed={"gguf"},
    period=2,
    windows=windows_by_type,
    check=_check,
    back=_back,
).spec()
