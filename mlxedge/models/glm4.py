"""glm4: GLM-4-0414; norms before and after attention and MLP, a part of each head rotated."""

from __future__ import annotations

from mlxedge.models.dense import Dense, plain_rope
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Wiring

WIRING = Wiring(
    attention_out_norm="post_self_attn_layernorm",
    mlp_out_norm="post_mlp_layernorm",
    mlp="fused",
    neighbours=True,
    partial=True,
)


def check(config: Config, runtime: str) -> list[str]:
    return plain_rope(config, "mlx-lm") if runtime == "mlx" else []


SPEC = Dense(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    arch="glm4",
    names=names(WIRING, qkv_bias="attention_bias"),
    wiring=WIRING,
    fixed={"attention_bias": False},
    defaults={"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5},
    tied={"mlx": False},
    check=check,
).spec()
