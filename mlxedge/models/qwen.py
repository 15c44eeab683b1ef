"""qwen: the first Qwen, 1.8B to 72B; llama's graph with q, k and v, and their biases, in one.
transformers has it by its own remote code alone.

Its config counts both halves of the MLP in ``intermediate_size``. Beyond ``seq_length`` positions,
which is what files declare, that code stretches rotary embeddings and scales queries.
"""

from __future__ import annotations

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, under
from mlxedge.models.names import names
from mlxedge.models.recasts import joined_qkv
from mlxedge.models.rope import rope_settings
from mlxedge.models.rope_files import Get
from mlxedge.models.spec import Config

_MODULES = {
    "model.layers": "transformer.h",
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.gate_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w1",
    "mlp.down_proj": "mlp.c_proj",
}
_KEYS = {
    "kv_channels": "head_dim",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    "seq_length": "max_position_embeddings",
}


def _adopt(config: Config) -> Config:
    """``ffn_hidden_size`` tells that the width is already that of one half."""
    config = under(config, _KEYS)
    width = config.get("intermediate_size")
    if isinstance(width, int) and width != config.get("ffn_hidden_size"):
        config = config | {"intermediate_size": width // 2, "ffn_hidden_size": width // 2}
    return config


def _settle(config: Config) -> Config:
    if not config["no_bias"]:
        raise UnsupportedModelError("qwen with biases (no_bias: false) is not supported")
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise UnsupportedModelError("qwen needs heads (kv_channels) that add up to hidden_size")
    return config | {
        "kv_channels": config["head_dim"],
        "seq_length": config.get("max_position_embeddings") or 2048,
        "rotary_emb_base": rope_settings(config).theta,
    }


def _stored(config: Config) -> Config:
    return config | {"intermediate_size": 2 * config["intermediate_size"]}


def _check(config: Config, runtime: str) -> list[str]:
    rope = rope_settings(config)
    if runtime == "mlx" and (rope.theta, rope.type) != (1e4, "default"):
        return ["mlx-lm's qwen rotates by a base of 10000 (rotary_emb_base)"]
    return []


def _gguf(config: Config) -> gv.Metadata:
    return {"feed_forward_length": gv.u32(2 * config["intermediate_size"])}


def _back(config: Config, get: Get) -> Config:
    return config | {"no_bias": True}


SPEC = Dense(
    model_type="qwen",
    architecture="QWenLMHeadModel",
    arch="qwen",
    names=names(qkv_bias=True, called=_MODULES),
    recasts=(
        *joined_qkv("stored", "transformer.h.{i}.attn.c_attn"),
        *joined_qkv("mlx", "transformer.h.{i}.attn.c_attn"),
        *joined_qkv("gguf", "blk.{i}.attn_qkv"),
    ),
    epsilon="layer_norm_epsilon",
    fixed={},
    defaults={"layer_norm_epsilon": 1e-6, "no_bias": True, "tie_word_embeddings": False},
    tied={"gguf": False, "mlx": False},
    adopts=_adopt,
    settles=_settle,
    hf=_stored,
    mlx=_stored,
    gguf=_gguf,
    back=_back,
    check=_check,
).spec()
