"""phi: Phi 1, 1.5 and 2; attention and MLP side by side, LayerNorm, biases everywhere, a part of
each head rotated."""

from __future__ import annotations

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, plain_rope
from mlxedge.models.names import names
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import Wiring

WIRING = Wiring(
    mlp_norm=None,
    parallel=True,
    layer_norm=True,
    mlp="plain",
    activation="gelu_new",
    partial=True,
)


def _settle(config: Config) -> Config:
    if config.get("qk_layernorm"):
        raise UnsupportedModelError("phi with norms of q and k (qk_layernorm) is not supported")
    return config


def _check(config: Config, runtime: str) -> list[str]:
    found = plain_rope(config, "mlx-lm") if runtime == "mlx" else []
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("the runtimes need heads that add up to the hidden size")
    return found


SPEC = Dense(
    model_type="phi",
    architecture="PhiForCausalLM",
    arch="phi2",
    names=(
        *names(
            WIRING,
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
            norm_bias=True,
            called={
                "model.norm": "model.final_layernorm",
                "self_attn.o_proj": "self_attn.dense",
                "mlp.up_proj": "mlp.fc1",
                "mlp.down_proj": "mlp.fc2",
            },
        ),
        Name("lm_head.bias", "output.bias", ("vocab",)),
    ),
    wiring=WIRING,
    epsilon="layer_norm_eps",
    fixed={"qk_layernorm": False},
    defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    tied={"gguf": False, "mlx": False},
    settles=_settle,
    check=_check,
).spec()
