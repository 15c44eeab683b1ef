"""dots1: rednote's dots.llm1; norms of the heads of q and k, dense layers first, then experts as
DeepSeek-V3 has them."""

from __future__ import annotations

from mlxedge.models.dense import Dense, Get
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
from mlxedge.models.spec import Config
from mlxedge.models.wiring import NAMES, Wiring

WIRING = Wiring(head_norm="head")


def _windows(config: Config) -> tuple[int, ...]:
    """Those of ``layer_types``, or of layers from ``max_window_layers`` on."""
    layers = range(config["num_hidden_layers"])
    window = int(config.get("sliding_window", 4096) or 0)
    if types := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    first = int(config.get("max_window_layers", 62))
    return tuple(window if layer >= first else 0 for layer in layers)


def _check(config: Config, runtime: str) -> list[str]:
    found = one_expert(config, runtime)
    if config.get("attention_bias"):
        found.append(f"{NAMES[runtime]}'s dots1 has no attention biases")
    if runtime == "gguf" and config["num_key_value_heads"] != config["num_attention_heads"]:
        found.append("llama.cpp's dots1 needs as many heads of keys as of queries")
    return found


def _back(config: Config, get: Get) -> Config:
    return config | {"n_routed_experts": config["num_experts"], **normalised(get)}


SPEC = Dense(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    arch="dots1",
    names=names(
        WIRING,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        experts=EXPERTS,
        stacks="experts",
        called=SHARED_EXPERTS,
    ),
    wiring=WIRING,
    experts=EXPERTS,
    fixed={"attention_bias": False},
    defaults={
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
    keys=KEYS,
    gguf=metadata,
    tied={"gguf": False},
    windows=_windows,
    settles=after_dense,
    check=_check,
    back=_back,
).spec()
