"""glm: GLM-4-9B; neighbouring dimensions of a part of each head rotated, gate and up in one."""

from __future__ import annotations

from mlxedge.models.dense import Dense, plain_rope
from mlxedge.models.names import names
from mlxedge.models.rope import rope_settings
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Wiring

WIRING = Wiring(mlp="fused", neighbours=True, partial=True)


def _check(config: Config, runtime: str) -> list[str]:
    found = plain_rope(config, "mlx-lm") if runtime == "mlx" else []
    if runtime == "mlx" and rope_settings(config).fraction != 1.0:
        found.append("mlx-lm's glm rotates all of a head (partial_rotary_factor)")
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("the runtimes need heads that add up to the hidden size")
    return found


SPEC = Dense(
    model_type="glm",
    architecture="GlmForCausalLM",
    arch="chatglm",
    names=names(WIRING, qkv_bias="attention_bias"),
    wiring=WIRING,
    fixed={"attention_bias": False},
    defaults={
        "attention_bias": True,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-7,
    },
    check=_check,
).spec()
