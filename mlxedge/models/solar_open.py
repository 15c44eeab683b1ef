"""solar_open: Upstage's Solar-Open; glm4_moe's graph without norms of q and k, experts in every
layer. In GGUF it is a glm4_moe, and read as one."""

from __future__ import annotations

from dataclasses import replace

from mlxedge.models.dense import Dense, Get, plain_rope
from mlxedge.models.names import names
from mlxedge.models.routed import (
    EXPERTS,
    KEYS,
    SHARED_EXPERTS,
    after_dense,
    metadata,
    normalised,
    one_expert,
)
from mlxedge.models.spec import Config, Name


def _settle(config: Config) -> Config:
    """All layers have experts, whatever ``first_k_dense_replace`` says."""
    return after_dense(config | {"first_k_dense_replace": 0})


def _check(config: Config, runtime: str) -> list[str]:
    if runtime == "gguf":
        return []
    return [*plain_rope(config, "mlx-lm"), *one_expert(config, runtime)]


def _back(config: Config, get: Get) -> Config:
    return config | {"n_routed_experts": config["num_experts"], **normalised(get)}


def _name(name: Name) -> Name:
    """llama.cpp calls the MLP's norm by where it stands."""
    return replace(name, gguf=name.gguf.replace("ffn_norm", "post_attention_norm"))


SPEC = Dense(
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    arch="glm4moe",
    names=tuple(
        _name(name)
        for name in names(qkv_bias="attention_bias", experts=EXPERTS, called=SHARED_EXPERTS)
    ),
    experts=EXPERTS,
    fixed={"attention_bias": False, "use_qk_norm": False, "partial_rotary_factor": 1.0},
    defaults={
        "rms_norm_eps": 1e-5,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
    theta=1e6,
    drops_predicting=True,
    keys=KEYS,
    gguf=metadata,
    tied={"mlx": False},
    settles=_settle,
    reads=lambda metadata: False,
    check=_check,
    back=_back,
).spec()
