"""glm4_moe: GLM-4.5 and 4.6; scores by sigmoid with a correction of the choice, shared experts,
dense layers first, a part of each head rotated.

The layers that predict further tokens are left out.
"""

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
from mlxedge.models.wiring import Wiring

WIRING = Wiring(head_norm="head", partial=True)


def _check(config: Config, runtime: str) -> list[str]:
    if runtime == "gguf":
        return []
    return [*plain_rope(config, "mlx-lm"), *one_expert(config, runtime)]


def _back(config: Config, get: Get) -> Config:
    """``n_routed_experts`` is what transformers and mlx-lm call their number. A file of whole heads
    that rotate says nothing of a part, which a silent config means."""
    rope = {"partial_rotary_factor": 1.0} | config["rope_parameters"]
    return config | {
        "n_routed_experts": config["num_experts"],
        "rope_parameters": rope,
        "partial_rotary_factor": rope["partial_rotary_factor"],
        **normalised(get),
    }


def _name(name: Name) -> Name:
    """llama.cpp calls the MLP's norm by where it stands; not all models have norms of q and k."""
    name = replace(name, gguf=name.gguf.replace("ffn_norm", "post_attention_norm"))
    if name.hf.endswith(("q_norm.weight", "k_norm.weight")):
        return replace(name, present=lambda config: bool(config.get("use_qk_norm")))
    return name


_NAMES = names(
    WIRING,
    qkv_bias="attention_bias",
    experts=EXPERTS,
    called=SHARED_EXPERTS,
)

SPEC = Dense(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    arch="glm4moe",
    names=tuple(_name(name) for name in _NAMES),
    wiring=WIRING,
    experts=EXPERTS,
    fixed={"attention_bias": False, "use_qk_norm": False},
    defaults={
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": False,
    },
    drops_predicting=True,
    keys=KEYS,
    gguf=metadata,
    tied={"mlx": False},
    settles=after_dense,
    check=_check,
    back=_back,
).spec()
