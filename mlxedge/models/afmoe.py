"""afmoe: Arcee's Trinity; norms before and after attention and MLP, gated attention with norms of
the heads of q and k, windows in all layers but every fourth, which alone do not rotate, dense
layers first, then experts as DeepSeek-V3 has them."""

from __future__ import annotations

import math
from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, Key
from mlxedge.models.experts import ROUTER_BIAS
from mlxedge.models.names import names
from mlxedge.models.rope import Rope, rope_settings
from mlxedge.models.routed import EXPERTS as DEEPSEEK
from mlxedge.models.routed import SHARED_EXPERTS, SIGMOID, after_dense
from mlxedge.models.spec import Config, Name
from mlxedge.models.windows import layer_types, windows_by_type
from mlxedge.models.wiring import NAMES, Factors, Wiring

EXPERTS = replace(DEEPSEEK, normalise=True, scale="route_scale", plain_router=False, groups=None)
WIRING = Wiring(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_mlp_layernorm",
    mlp_out_norm="post_mlp_layernorm",
    head_norm="head",
)
_LAYER = "model.layers.{i}."
#: What runtimes read from published configs, and transformers takes for granted.
_ALWAYS = {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}


def _adopt(config: Config) -> Config:
    every = config.get("global_attn_every_n_layers")
    if config.get("layer_types") is None and type(every) is int and every > 0:
        kinds = layer_types(config | {"sliding_window_pattern": every}, every)
        return config | {"layer_types": kinds}
    return config


def _settle(config: Config) -> Config:
    for key, value in _ALWAYS.items():
        if config.get(key, value) != value:
            raise UnsupportedModelError(f"afmoe with another {key} than {value} is not supported")
    return after_dense(
        config, count="num_experts", shared="num_shared_experts", first="num_dense_layers"
    )


def _ropes(config: Config) -> tuple[Rope | None, ...]:
    """Layers without a window do not rotate."""
    rope = rope_settings(config)
    return tuple(rope if kind == "sliding_attention" else None for kind in config["layer_types"])


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if config.get("attention_bias"):
        found.append(f"{NAMES[runtime]}'s afmoe has no attention biases")
    turns = [rope is not None for rope in _ropes(config)]
    if runtime == "gguf":
        if not config["mup_enabled"]:
            found.append("llama.cpp's afmoe always scales embeddings (mup_enabled)")
        if turns != [(i + 1) % 4 != 0 for i in range(len(turns))]:
            found.append("llama.cpp's afmoe rotates in all layers but every fourth")
        return found
    if all(turns):
        found.append("mlx-lm's afmoe needs a layer with full attention")
    if config["num_experts_per_tok"] == 1:
        found.append("mlx-lm's afmoe does not normalise the score of one expert")
    return found


def _name(name: Name) -> Name:
    """Files have the correction beside the router."""
    if not name.hf.endswith(ROUTER_BIAS):
        return name
    return replace(name, stored=f"{_LAYER}mlp.expert_bias", mlx=f"{_LAYER}mlp.expert_bias")


_NAMES = names(
    WIRING,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    experts=EXPERTS,
    stacks="experts",
    called=SHARED_EXPERTS | {"mlp.gate": "mlp.router.gate"},
)
_GATE = Name(f"{_LAYER}self_attn.gate_proj.weight", "blk.{i}.attn_gate.weight", ("q", "hidden"))

SPEC = Dense(
    model_type="afmoe",
    architecture="AfmoeForCausalLM",
    arch="afmoe",
    names=(*(_name(name) for name in _NAMES), _GATE),
    wiring=WIRING,
    experts=EXPERTS,
    mixers=lambda config: ("output_gate",) * config["num_hidden_layers"],
    factors=lambda config: Factors(
        embedding=math.sqrt(config["hidden_size"]) if config["mup_enabled"] else 1.0
    ),
    fixed={"attention_bias": False, "mup_enabled": True, **_ALWAYS},
    defaults={
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
        "sliding_window": 1024,
        "num_dense_layers": 1,
        "num_shared_experts": 2,
        "route_scale": 1.0,
        "mup_enabled": False,
    },
    keys=(
        Key("num_shared_experts", "expert_shared_count", "u32", 1),
        Key("num_dense_layers", "leading_dense_block_count", "u32", 0),
        Key("route_scale", "expert_weights_scale", default=1.0),
    ),
    gguf=lambda config: {
        "expert_gating_func": gv.u32(SIGMOID),
        "expert_weights_norm": gv.boolean(True),
    },
    adopts=_adopt,
    settles=_settle,
    ropes=_ropes,
    windowed={"gguf", "mlx"},
    windows=windows_by_type,
    period=4,
    check=_check,
).spec()
