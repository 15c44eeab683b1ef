"""cohere: Command R and Aya; attention and MLP side by side, LayerNorm without a bias.

Command R+ has LayerNorms of q and k with weights for each head; llama.cpp knows it by its layers.
"""

from __future__ import annotations

from mlxedge.models.dense import Dense, Key, plain_rope
from mlxedge.models.names import names
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import Factors, Wiring

WIRING = Wiring(mlp_norm=None, parallel=True, layer_norm=True, neighbours=True)


def _qk_norm(part: str, heads: str) -> Name:
    return Name(
        f"model.layers.{{i}}.self_attn.{part}_norm.weight",
        f"blk.{{i}}.attn_{part}_norm.weight",
        (heads, "head"),
        present=lambda config: bool(config.get("use_qk_norm")),
    )


def _adopt(config: Config) -> Config:
    """Its configs say in ``model_max_length`` how long a context may be."""
    longest = config.get("model_max_length")
    return config | {"max_position_embeddings": longest} if longest else config


def check(config: Config, runtime: str) -> list[str]:
    """What cohere and cohere2 lack."""
    found = plain_rope(config, "mlx-lm") if runtime == "mlx" else []
    if runtime == "gguf" and config.get("attention_bias"):
        found.append("llama.cpp has no attention biases in this architecture")
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("the runtime needs heads that add up to the hidden size")
    return found


def _check(config: Config, runtime: str) -> list[str]:
    found = check(config, runtime)
    if runtime == "gguf" and bool(config.get("use_qk_norm")) != (config["num_hidden_layers"] >= 64):
        found.append("llama.cpp's command-r has norms of q and k from 64 layers on, and only then")
    return found


SPEC = Dense(
    model_type="cohere",
    architecture="CohereForCausalLM",
    arch="command-r",
    names=(
        *names(WIRING, qkv_bias="attention_bias", o_bias="attention_bias"),
        _qk_norm("q", "heads"),
        _qk_norm("k", "kv_heads"),
    ),
    wiring=WIRING,
    factors=lambda config: Factors(logits=float(config["logit_scale"])),
    fixed={"attention_bias": False},
    defaults={"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True},
    theta=5e5,
    epsilon="layer_norm_eps",
    keys=(Key("logit_scale", "logit_scale", default=1.0),),
    tied={"gguf": True, "mlx": True},
    adopts=_adopt,
    check=_check,
    back=lambda config, get: config | {"use_qk_norm": config["num_hidden_layers"] >= 64},
).spec()
