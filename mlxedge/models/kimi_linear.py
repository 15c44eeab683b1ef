"""kimi_linear: Kimi Linear; layers of Kimi Delta Attention and, as ``layer_types`` says, of latent
attention without rotation, experts as in DeepSeek-V3, dense layers first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models import latent
from mlxedge.models.delta_nets import FULL, LINEAR, RATE, of_kind
from mlxedge.models.dense import Dense, Get, Key
from mlxedge.models.experts import Experts
from mlxedge.models.mixers import kda
from mlxedge.models.names import names
from mlxedge.models.recasts import Recast, Reshape
from mlxedge.models.rope import Rope
from mlxedge.models.spec import Config, Name

EXPERTS = Experts(
    shared_width="shared_expert_intermediate_size",
    score="sigmoid",
    scale="routed_scaling_factor",
    bias=True,
    shared_gate=False,
)
#: llama.cpp's number for scores by sigmoid.
_SIGMOID = 2
_MIXERS = {LINEAR: kda.NAME, FULL: "mla"}
_BLOCK = "model.layers.{i}."
_ATTENTION = f"{_BLOCK}self_attn."
_CONVOLUTIONS = tuple(f"{_ATTENTION}{part}_conv1d.weight" for part in "qkv")
#: Our keys, and those of published configs.
_CALLED = {
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
}
_LINEAR = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}
_SIZES = {
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 32,
    "linear_head_dim": 128,
    "linear_num_heads": 32,
    "linear_conv_kernel_dim": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1024,
    "routed_scaling_factor": 2.446,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 1048576,
}


def _names() -> tuple[Name, ...]:
    own = names(
        experts=EXPERTS,
        block="block_sparse_moe",
        parts=("w1", "w3", "w2"),
        called={
            f"mlp.shared_expert.{part}_proj": f"block_sparse_moe.shared_experts.{part}_proj"
            for part in ("gate", "up", "down")
        },
    )
    full = tuple(
        replace(name, layers=of_kind(FULL)) if name.hf.startswith(_ATTENTION) else name
        for name in latent.latent_names(own, biases=False)
    )
    linear: list[tuple[str, str, tuple[str, ...]]] = [
        *((f"{p}_proj.weight", f"attn_{p}.weight", ("kda", "hidden")) for p in "qkv"),
        *((f"{p}_a_proj.weight", f"ssm_{p}_a.weight", ("kda_head", "hidden")) for p in "fg"),
        *((f"{p}_b_proj.weight", f"ssm_{p}_b.weight", ("kda", "kda_head")) for p in "fg"),
        *((f"{p}_conv1d.weight", f"ssm_conv1d_{p}.weight", ("kda", "one", "kda_kernel"))
          for p in "qkv"),
        ("b_proj.weight", "ssm_beta.weight", ("kda_heads", "hidden")),
        ("A_log", "ssm_a", ("one", "one", "kda_heads", "one")),
        ("dt_bias", "ssm_dt.bias", ("kda",)),
        ("o_norm.weight", "ssm_norm.weight", ("kda_head",)),
        ("o_proj.weight", "attn_output.weight", ("hidden", "kda")),
    ]  # fmt: skip
    made = (
        Name(f"{_ATTENTION}{hf}", f"blk.{{i}}.{gguf}", shape, layers=of_kind(LINEAR),
             exact=hf in ("A_log", "dt_bias"))
        for hf, gguf, shape in linear
    )  # fmt: skip
    return tuple(_name(name) for name in (*full, *made))


def _name(name: Name) -> Name:
    """mlx-lm calls the module of experts as that of dense layers."""
    if name.hf.endswith("e_score_correction_bias"):
        stored = f"{_BLOCK}block_sparse_moe.gate.e_score_correction_bias"
        return replace(name, stored=stored, mlx=f"{_BLOCK}mlp.e_score_correction_bias")
    if name.mlx is not None:
        return replace(name, mlx=name.mlx.replace("block_sparse_moe", "mlp"))
    return name


def _adopt(config: Config) -> Config:
    """What published configs say of linear attention in a part of their own, and under other
    keys."""
    own = config.get("linear_attn_config")
    own = own if isinstance(own, dict) else {}
    config = config | {key: own[name] for key, name in _LINEAR.items() if name in own}
    for ours, other in _CALLED.items():
        if config.get(other) is not None:
            config = config | {ours: config[other]}
    if config.get("layer_types") is None and isinstance(own.get("full_attn_layers"), list):
        layers = range(1, int(config.get("num_hidden_layers") or 0) + 1)
        kinds = [FULL if i in own["full_attn_layers"] else LINEAR for i in layers]
        config = config | {"layer_types": kinds}
    if isinstance(given := config.get("mlp_layer_types"), list):
        dense = next((i for i, kind in enumerate(given) if kind != "dense"), len(given))
        if "dense" in given[dense:]:
            raise UnsupportedModelError("kimi_linear has dense layers first (mlp_layer_types)")
        config = config | {"first_k_dense_replace": dense}
    return latent.adopt(config, _SIZES)


def _settle(config: Config) -> Config:
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or [
        FULL if i and i % 4 == 0 else LINEAR for i in range(layers)
    ]
    if other := sorted({str(kind)[:40] for kind in kinds if kind not in _MIXERS}):
        raise UnsupportedModelError(f"layers of type {', '.join(other)} are not supported")
    latent.check_sizes(config)
    settings = kda.settings(config)
    config = config | {"first_k_dense_replace": config.get("first_k_dense_replace", 1)}
    counts = {"n_shared_experts": 1, "first_k_dense_replace": 0}
    wrong = [k for k, n in counts.items() if type(config.get(k)) is not int or config[k] < n]
    if wrong:
        raise UnsupportedModelError(f"the config needs whole numbers for {', '.join(wrong)}")
    only = {"n_group": 1, "moe_router_activation_func": "sigmoid", "moe_layer_freq": 1,
            "mla_use_nope": True}  # fmt: skip
    for key, value in only.items():
        if config.get(key, value) != value:
            raise UnsupportedModelError(
                f"kimi_linear with {key} {str(config[key])[:40]!r} is not supported, {value!r} is"
            )
    dense = min(config["first_k_dense_replace"], layers)
    shared = (config.get("moe_intermediate_size") or 0) * config["n_shared_experts"]
    config = config | only | {
        "layer_types": kinds,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
        "shared_expert_intermediate_size": shared,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(dense)),
        "linear_attn_config": {
            "head_dim": settings.size,
            "num_heads": settings.heads,
            "short_conv_kernel_size": settings.kernel,
            "full_attn_layers": [i + 1 for i, kind in enumerate(kinds) if kind == FULL],
            "kda_layers": [i + 1 for i, kind in enumerate(kinds) if kind == LINEAR],
        },
    }  # fmt: skip
    return config | {other: config[ours] for ours, other in _CALLED.items()}


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if config["q_lora_rank"] is not None:
        found.append("the runtime has no latents of queries here (q_lora_rank)")
    if set(config["layer_types"]) != {LINEAR, FULL}:
        found.append("the runtime needs layers of both kinds (layer_types)")
    if runtime == "mlx":
        if config["num_experts_per_tok"] == 1 and config["norm_topk_prob"]:
            found.append("mlx-lm does not normalise the score of one expert (norm_topk_prob)")
        return found
    if config["linear_num_heads"] != config["num_attention_heads"]:
        found.append("llama.cpp has as many heads of both kinds (linear_num_heads)")
    if not config["norm_topk_prob"]:
        found.append("llama.cpp always normalises scores: norm_topk_prob is false")
    return found


def _no_ropes(config: Config) -> tuple[Rope | None, ...]:
    return (None,) * config["num_hidden_layers"]


def _gguf(config: Config) -> gv.Metadata:
    rank, apart = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return {
        # As many heads of latents, 0 where there is no attention.
        "attention.head_count_kv": gv.array(
            "i32", [int(kind == FULL) for kind in config["layer_types"]]
        ),
        "attention.kv_lora_rank": gv.u32(rank),
        "attention.key_length": gv.u32(rank + apart),
        "attention.value_length": gv.u32(rank),
        "attention.key_length_mla": gv.u32(config["qk_nope_head_dim"] + apart),
        "attention.value_length_mla": gv.u32(config["v_head_dim"]),
        "ssm.conv_kernel": gv.u32(config["linear_conv_kernel_dim"]),
        "kda.head_dim": gv.u32(config["linear_head_dim"]),
        "expert_gating_func": gv.u32(_SIGMOID),
        "expert_weights_norm": gv.boolean(config["norm_topk_prob"]),
    }


def _back(config: Config, get: Get) -> Config:
    heads = [int(count) for count in get("attention.head_count_kv")]
    return latent.sizes_from_gguf(config, get) | {
        "layer_types": [FULL if count else LINEAR for count in heads],
        "linear_head_dim": get("kda.head_dim"),
        "linear_num_heads": config["num_attention_heads"],
        "linear_conv_kernel_dim": get("ssm.conv_kernel"),
        "norm_topk_prob": True,
    }


def _as_it_is(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


_MLX_CONVOLUTIONS = tuple(f"{_ATTENTION}{part}_conv.conv.weight" for part in "qkv")
_LAST = Reshape(lambda shape: (shape[0], shape[2], shape[1]))

SPEC = Dense(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    arch="kimi-linear",
    names=_names(),
    experts=EXPERTS,
    mixers=lambda config: tuple(_MIXERS[kind] for kind in config["layer_types"]),
    ropes=_no_ropes,
    recasts=(
        latent.SPLIT_GGUF,
        latent.SPLIT_MLX,
        # Files of llama.cpp's converter have more axes of one.
        *(
            Recast("gguf", (conv,), (f"blk.{{i}}.ssm_conv1d_{part}.weight",),
                   (Reshape(_as_it_is),))
            for part, conv in zip("qkv", _CONVOLUTIONS, strict=True)
        ),
        Recast("gguf", (f"{_ATTENTION}A_log",), ("blk.{i}.ssm_a",),
               (RATE, Reshape(lambda shape: (int(np.prod(shape)), 1)))),
        *(
            Recast("mlx", (ours,), (other,), (_LAST,))
            for ours, other in zip(_CONVOLUTIONS, _MLX_CONVOLUTIONS, strict=True)
        ),
        # Dense layers as transformers 5 saves them.
        *(
            Recast("stored", (f"{_BLOCK}mlp.{part}_proj.weight",),
                   (f"{_BLOCK}block_sparse_moe.{part}_proj.weight",), (), written=False)
            for part in ("gate", "up", "down")
        ),
    ),
    fixed={"attention_bias": False},
    defaults=_DEFAULTS,
    keys=(
        Key("n_shared_experts", "expert_shared_count", "u32", 1),
        Key("first_k_dense_replace", "leading_dense_block_count", "u32", 0),
        Key("routed_scaling_factor", "expert_weights_scale", default=1.0),
    ),
    tied={"gguf": False},
    adopts=_adopt,
    settles=_settle,
    notes=lambda config, runtime: latent.epsilon_notes(config, ("gguf", "mlx"), runtime),
    mlx=lambda config: {"layer_types": config["layer_types"]},
    gguf=_gguf,
    check=_check,
    back=_back,
).spec()  # fmt: skip
