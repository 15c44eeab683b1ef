"""deepseek: DeepSeekMoE (deepseek-moe-16b), whose own code computes it; llama's graph, dense layers
first, then experts with scores by softmax and some that all tokens share."""

from __future__ import annotations

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, Get
from mlxedge.models.experts import Experts
from mlxedge.models.names import names
from mlxedge.models.rope import rope_settings
from mlxedge.models.routed import KEYS, SHARED_EXPERTS, after_dense
from mlxedge.models.spec import Config
from mlxedge.models.wiring import NAMES

EXPERTS = Experts(
    shared_width="shared_expert_intermediate_size", shared_gate=False, plain_router=True
)


def _settle(config: Config) -> Config:
    if config["moe_layer_freq"] != 1:
        raise UnsupportedModelError("deepseek with dense layers between those with experts")
    if config["scoring_func"] != "softmax":
        raise UnsupportedModelError("deepseek is supported with scoring_func softmax")
    return after_dense(config, fewest_shared=0)


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if config["norm_topk_prob"]:
        found.append(f"{NAMES[runtime]}'s deepseek does not normalise scores (norm_topk_prob)")
    if runtime == "gguf":
        if config.get("attention_bias"):
            found.append("llama.cpp's deepseek has no attention biases")
        if not config["n_shared_experts"]:
            found.append("llama.cpp's deepseek needs shared experts")
        return found
    if (kind := rope_settings(config).type) not in ("default", "linear"):
        found.append(f"mlx-lm's deepseek has no {kind} rope scaling")
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("mlx-lm's deepseek needs heads that add up to the hidden size")
    return found


def _mlx(config: Config) -> Config:
    """mlx-lm takes zero shared experts for some, and reads the older name of a scaling's type."""
    made: Config = {"n_shared_experts": config["n_shared_experts"] or None}
    rope = rope_settings(config)
    if rope.type == "linear":
        made["rope_scaling"] = {"type": "linear", "rope_type": "linear", "factor": rope.factor}
    return made


def _back(config: Config, get: Get) -> Config:
    return config | {"n_routed_experts": config["num_experts"]}


SPEC = Dense(
    model_type="deepseek",
    architecture="DeepseekForCausalLM",
    arch="deepseek",
    names=names(
        rope_rows=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        experts=EXPERTS,
        called=SHARED_EXPERTS,
    ),
    experts=EXPERTS,
    fixed={
        "attention_bias": False,
        "norm_topk_prob": False,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
    },
    defaults={
        "first_k_dense_replace": 0,
        "n_shared_experts": 0,
        "norm_topk_prob": False,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
    },
    head_dim_free=False,
    keys=KEYS[:2],
    tied={"mlx": False},
    gguf=lambda config: {"expert_weights_scale": gv.f32(1.0)},
    mlx=_mlx,
    settles=_settle,
    check=_check,
    back=_back,
).spec()
