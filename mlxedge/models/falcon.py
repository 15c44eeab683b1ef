"""falcon: Falcon 7B, 40B, 180B and Falcon 2 11B; attention and MLP side by side.

q, k and v are one matrix, by heads of keys. The larger ones ("new_decoder_architecture") have
several of these, and mostly a norm of its own for attention; that of the MLP is then the one that
others have for both. Falcon-RW, which tells positions by ALiBi, is not read. mlx-lm does not have
the architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import GELUS, Dense, mirrored
from mlxedge.models.names import names
from mlxedge.models.recasts import Recast, groups_apart, joined_qkv
from mlxedge.models.rope_files import Get
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import Wiring

_NORM, _OWN = "input_layernorm", "ln_attn"
WIRING = Wiring(
    layer_norm=True, mlp="plain", activation="gelu", parallel=True, mlp_norm=None
)  # what 7B does
_TWO_NORMS = replace(WIRING, attention_norm=_OWN, mlp_norm=_NORM)
_IN_TURN = replace(WIRING, parallel=False, mlp_norm="post_attention_layernorm")
_MODULES = {
    "model.layers": "transformer.h",
    "model.embed_tokens": "transformer.word_embeddings",
    "model.norm": "transformer.ln_f",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
_KEYS = {
    "num_kv_heads": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "activation": "hidden_act",
}


def _two(config: Config) -> bool:
    """Whether attention has a norm of its own."""
    return bool(config["new_decoder_architecture"] and config["num_ln_in_parallel_attn"] == 2)


def _wires(config: Config) -> Wiring:
    if _two(config):
        return _TWO_NORMS
    return WIRING if config["parallel_attn"] else _IN_TURN


def _back(config: Config, get: Get) -> Config:
    """GGUF does not say how the model came by its heads of keys; a tensor tells of the norm."""
    keys, heads = config["num_key_value_heads"], config["num_attention_heads"]
    return config | {
        "own_attention_norm": False,
        "multi_query": keys == 1,
        "new_decoder_architecture": keys not in (1, heads),
    }


def _adopt(config: Config) -> Config:
    if (own := config.pop("own_attention_norm", None)) is not None:
        new = own or config["new_decoder_architecture"]
        norms = 2 if own else 1
        config = config | {"new_decoder_architecture": new, "num_ln_in_parallel_attn": norms}
    new = bool(config.get("new_decoder_architecture"))
    heads = config.get("num_attention_heads")
    if not new:
        config = config | {"num_kv_heads": 1 if config.get("multi_query", True) else heads}
    config = mirrored(config, _KEYS)
    width = config["intermediate_size"]
    if width is None and isinstance(config.get("hidden_size"), int):
        width = 4 * config["hidden_size"]
    norms = config.get("num_ln_in_parallel_attn") or (2 if new else 1)
    return config | {
        "intermediate_size": width,
        "ffn_hidden_size": width,
        "num_ln_in_parallel_attn": norms,
        "new_decoder_architecture": new,
    }


def _settle(config: Config) -> Config:
    if config["alibi"]:
        raise UnsupportedModelError("falcon with alibi is not supported")
    several = config["new_decoder_architecture"] or config["num_ln_in_parallel_attn"] == 2
    if several and not (config["new_decoder_architecture"] and config["parallel_attn"]):
        raise UnsupportedModelError(
            "falcon with new_decoder_architecture and without parallel_attn, or with two norms "
            "(num_ln_in_parallel_attn) and without it, is not supported"
        )
    return config


def _check(config: Config, runtime: str) -> list[str]:
    found: list[str] = []
    if runtime == "mlx":
        return found
    if config["bias"]:
        found.append("llama.cpp's falcon has no biases")
    if not config["parallel_attn"]:
        found.append("llama.cpp's falcon has attention and MLP side by side (parallel_attn)")
    return found


def _names() -> Iterator[Name]:
    for name in names(
        _IN_TURN, qkv_bias="bias", o_bias="bias", mlp_bias="bias", norm_bias=True, called=_MODULES
    ):
        if ".post_attention_layernorm." in name.hf:
            name = replace(name, present=lambda config: not config["parallel_attn"])
        yield name
    for leaf in ("weight", "bias"):
        yield Name(
            f"model.layers.{{i}}.{_OWN}.{leaf}",
            f"blk.{{i}}.attn_norm_2.{leaf}",
            ("hidden",),
            present=_two,
        )


def _norms(leaf: str) -> Recast:
    """What files call the MLP's norm where attention has its own."""
    return Recast(
        "stored",
        tuple(f"model.layers.{{i}}.{module}.{leaf}" for module in (_NORM, _OWN)),
        tuple(f"transformer.h.{{i}}.{module}.{leaf}" for module in ("ln_mlp", _OWN)),
        (),
    )


SPEC = Dense(
    model_type="falcon",
    architecture="FalconForCausalLM",
    arch="falcon",
    names=tuple(_names()),
    recasts=(
        *joined_qkv("stored", "transformer.h.{i}.self_attention.query_key_value", groups_apart),
        *joined_qkv("gguf", "blk.{i}.attn_qkv"),
        _norms("weight"),
        _norms("bias"),
    ),
    lacks=("mlx",),
    wiring=WIRING,
    nearly=GELUS,
    wires=_wires,
    epsilon="layer_norm_epsilon",
    fixed={},
    hf=lambda config: {key: value for key, value in config.items() if key != "head_dim"},
    defaults={
        "layer_norm_epsilon": 1e-5,
        "parallel_attn": True,
        "multi_query": True,
        "bias": False,
        "alibi": False,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    head_dim_free=False,
    gguf=lambda config: {"tensor_data_layout": gv.string("jploski")},
    adopts=_adopt,
    back=_back,
    settles=_settle,
    check=_check,
).spec()
