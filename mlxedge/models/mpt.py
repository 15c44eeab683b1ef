"""mpt: MosaicML's MPT 7B and 30B and their kin; ALiBi instead of positions, LayerNorm and nothing
else without biases. mlx-lm does not have the architecture."""

from __future__ import annotations

import math

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import GELUS, Dense, mirrored, no_ropes
from mlxedge.models.names import names
from mlxedge.models.recasts import joined_qkv
from mlxedge.models.rope_files import Get, shortest
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Factors, Wiring

WIRING = Wiring(layer_norm=True, mlp="plain", activation="gelu")
_MODULES = {
    "model.layers": "transformer.blocks",
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.norm_f",
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "self_attn.o_proj": "attn.out_proj",
    "mlp.up_proj": "ffn.up_proj",
    "mlp.down_proj": "ffn.down_proj",
}
_KEYS = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "max_seq_len": "max_position_embeddings",
}
#: What transformers computes whatever the config says.
_COMPUTED = {"no_bias": True, "expansion_ratio": 4, "logit_scale": None}
_COMPUTED_OF_ATTENTION = {
    "attn_type": "multihead_attention",
    "prefix_lm": False,
    "qk_ln": False,
    "alibi": True,
    "rope": False,
}


def _adopt(config: Config) -> Config:
    config = mirrored(config, _KEYS)
    longest = config["max_position_embeddings"] or 2048
    made = config | {"max_position_embeddings": longest, "max_seq_len": longest}
    attention = config.get("attn_config") or {}
    if not isinstance(attention, dict):
        raise UnsupportedModelError("the config's attn_config is no table of settings")
    made["attn_config"] = {"clip_qkv": None, "alibi_bias_max": 8} | attention
    hidden = config["hidden_size"]
    return made | ({"intermediate_size": 4 * hidden} if isinstance(hidden, int) else {})


def _settle(config: Config) -> Config:
    attention = config["attn_config"]
    numbers = {key: attention.get(key) for key in ("alibi_bias_max", "clip_qkv", "softmax_scale")}
    for key, value in numbers.items():
        absent = value is None and key != "alibi_bias_max"
        if not absent and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise UnsupportedModelError(f"attn_config's {key} is {str(value)[:40]!r}")
    wrong = [
        f"{key} {str(given[key])[:40]!r}"
        for given, computed in ((config, _COMPUTED), (attention, _COMPUTED_OF_ATTENTION))
        for key, value in computed.items()
        if key in given and given[key] != value
    ]
    if wrong:
        raise UnsupportedModelError(f"mpt with {', '.join(wrong)} is not supported")
    return config


def _factors(config: Config) -> Factors:
    attention = config["attn_config"]
    return Factors(
        attention=attention.get("softmax_scale"),
        qkv_limit=attention["clip_qkv"],
        alibi=float(attention["alibi_bias_max"]),
    )


def _check(config: Config, runtime: str) -> list[str]:
    if runtime == "mlx" or config["attn_config"].get("softmax_scale") is None:
        return []
    return ["llama.cpp's mpt scales attention by the root of the heads' size (softmax_scale)"]


def _gguf(config: Config) -> gv.Metadata:
    attention = config["attn_config"]
    made = {"attention.max_alibi_bias": gv.f32(attention["alibi_bias_max"])}
    if attention["clip_qkv"]:
        made["attention.clamp_kqv"] = gv.f32(attention["clip_qkv"])
    return made


def _back(config: Config, get: Get) -> Config:
    clip, largest = get("attention.clamp_kqv"), get("attention.max_alibi_bias")
    attention = {
        "clip_qkv": shortest(clip) if clip else None,
        "alibi": bool(largest),
        "alibi_bias_max": round(largest or 8),
    }
    return config | {"attn_config": attention}


SPEC = Dense(
    model_type="mpt",
    architecture="MptForCausalLM",
    arch="mpt",
    names=names(WIRING, called=_MODULES),
    recasts=(
        *joined_qkv("stored", "transformer.blocks.{i}.attn.Wqkv"),
        *joined_qkv("gguf", "blk.{i}.attn_qkv"),
    ),
    lacks=("mlx",),
    wiring=WIRING,
    nearly=GELUS,
    epsilon="layer_norm_epsilon",
    fixed={},
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    adopts=_adopt,
    settles=_settle,
    factors=_factors,
    ropes=no_ropes,
    gguf=_gguf,
    back=_back,
    check=_check,
).spec()
