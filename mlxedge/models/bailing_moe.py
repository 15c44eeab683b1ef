"""bailing_moe: inclusionAI's Ling 2.0 (Ling-mini, Ling-flash, Ring), whose own code computes it; q,
k and v in one matrix, norms of the heads of q and k, a part of each head rotated, dense layers
first, then experts as DeepSeek-V3 has them.

Layers that predict further tokens are left out. The first Ling models have this type too: mlx-lm
computes both, llama.cpp knows them under another architecture.
"""

from __future__ import annotations

from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, Get, Key
from mlxedge.models.experts import ROUTER, ROUTER_BIAS
from mlxedge.models.names import names
from mlxedge.models.rope import rope_settings
from mlxedge.models.routed import EXPERTS as DEEPSEEK
from mlxedge.models.routed import (
    KEYS,
    SHARED_EXPERTS,
    SIGMOID,
    SOFTMAX,
    after_dense,
    metadata,
    normalised,
    one_expert,
)
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import Wiring

EXPERTS = replace(DEEPSEEK, plain_router=False, score_key="score_function")
WIRING = Wiring(qkv_fused=True, head_norm="head", partial=True)
_BIAS, _NORMS = "moe_router_enable_expert_bias", "use_qk_norm"
_SCORES = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
#: What some configs have and nothing here computes.
_REFUSED = ("use_bias", "norm_head", "norm_softmax")
_CALLED = {
    "model.embed_tokens": "model.word_embeddings",
    "self_attn.qkv_proj": "attention.query_key_value",
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    **SHARED_EXPERTS,
}


def _adopt(config: Config) -> Config:
    """``rotary_dim`` is a number of dimensions, for configs that tell no part."""
    dims, heads = config.get("rotary_dim"), config.get("num_attention_heads")
    rope = config.get("rope_parameters") or {}
    if "partial_rotary_factor" in {**config, **rope} or type(dims) is not int or not heads:
        return config
    head = config.get("head_dim") or config["hidden_size"] // heads
    return config | {"partial_rotary_factor": dims / head}


def _settle(config: Config) -> Config:
    for key in _REFUSED:
        if config.get(key):
            raise UnsupportedModelError(f"bailing_moe with {key} is not supported")
    if config["score_function"] not in _SCORES:
        kind = str(config["score_function"])[:40]
        raise UnsupportedModelError(f"score_function {kind!r} is not supported")
    own = config.get("moe_shared_expert_intermediate_size")
    if own not in (None, config.get("moe_intermediate_size")):
        raise UnsupportedModelError(
            "bailing_moe whose shared experts have a width of their own is not supported"
        )
    if config["n_group"] == 1:
        config = config | {"topk_group": 1}
    return after_dense(config, count="num_experts", shared="num_shared_experts", fewest_shared=0)


def _check(config: Config, runtime: str) -> list[str]:
    found = one_expert(config, runtime)
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("the runtimes need heads that add up to the hidden size")
    if runtime == "mlx":
        return found
    if not config[_NORMS]:
        found.append("llama.cpp's bailingmoe2 needs norms of q and k: the first Ling has none")
    if config.get("use_qkv_bias"):
        found.append("llama.cpp's bailingmoe2 has no attention biases (use_qkv_bias)")
    if not config["num_shared_experts"]:
        found.append("llama.cpp's bailingmoe2 needs shared experts")
    return found


def _gguf(config: Config) -> gv.Metadata:
    return metadata(config) | {"expert_gating_func": gv.u32(_SCORES[config["score_function"]])}


def _back(config: Config, get: Get) -> Config:
    score = get("expert_gating_func", SIGMOID)
    named = {number: name for name, number in _SCORES.items()}
    return config | normalised(get) | {"score_function": named.get(score, str(score))}


def _mlx(config: Config) -> Config:
    return {"rotary_dim": rope_settings(config).dims(config["head_dim"])}


def _name(name: Name) -> Name:
    """What some models do not have, and what mlx-lm calls the router."""
    if name.hf.endswith(ROUTER_BIAS):
        own = "model.layers.{i}.mlp.gate.expert_bias"
        return replace(name, stored=own, mlx=own, present=lambda config: bool(config.get(_BIAS)))
    if name.hf.endswith(("q_norm.weight", "k_norm.weight")):
        return replace(name, present=lambda config: bool(config.get(_NORMS)))
    if name.hf.endswith(f"{ROUTER}.weight"):
        return replace(name, mlx="model.layers.{i}.mlp.gate.gate_proj.weight")
    return name


SPEC = Dense(
    model_type="bailing_moe",
    architecture="BailingMoeV2ForCausalLM",
    arch="bailingmoe2",
    names=tuple(
        _name(name)
        for name in names(WIRING, qkv_bias="use_qkv_bias", experts=EXPERTS, called=_CALLED)
    ),
    wiring=WIRING,
    experts=EXPERTS,
    fixed={"use_qkv_bias": False, "use_bias": False, _NORMS: True, _BIAS: True},
    defaults={
        "rms_norm_eps": 1e-6,
        "first_k_dense_replace": 0,
        "num_shared_experts": 0,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "score_function": "softmax",
        _NORMS: False,
    },
    drops_predicting=True,
    keys=(Key("num_shared_experts", "expert_shared_count", "u32", 1), *KEYS[1:]),
    tied={"gguf": False},
    gguf=_gguf,
    mlx=_mlx,
    adopts=_adopt,
    settles=_settle,
    check=_check,
    back=_back,
).spec()
