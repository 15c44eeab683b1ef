"""olmo2: norms after attention and MLP only, and of all of q and k."""

from __future__ import annotations

from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Wiring

WIRING = Wiring(
    attention_norm=None,
    mlp_norm=None,
    attention_out_norm="post_attention_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
    head_norm="width",
)


def _check(config: Config, runtime: str) -> list[str]:
    if runtime == "gguf" and config.get("attention_bias"):
        return ["llama.cpp's olmo2 has no attention biases"]
    return []


SPEC = Dense(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    arch="olmo2",
    names=names(WIRING, qkv_bias="attention_bias", o_bias="attention_bias"),
    wiring=WIRING,
    fixed={"attention_bias": False},
    defaults={"rms_norm_eps": 1e-5},
    head_dim_free=False,
    tied={"gguf": False},
    reads=lambda metadata: "olmo2.attention.sliding_window" not in metadata,
    check=_check,
).spec()
