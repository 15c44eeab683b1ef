"""olmo: AI2's OLMo 1 and 1.7; LayerNorm without weights, q, k and v clipped in some."""

from __future__ import annotations

from mlxedge.models.dense import Dense, Key
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Factors, Wiring

WIRING = Wiring(layer_norm=True, bare_norm=True)


def _check(config: Config, runtime: str) -> list[str]:
    return ["llama.cpp's olmo has no attention biases"] if config.get("attention_bias") else []


def _adopt(config: Config) -> Config:
    return config | {"layer_norm_eps": 1e-5}  # whatever a config says


SPEC = Dense(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    arch="olmo",
    names=names(WIRING, rope_rows=True, qkv_bias="attention_bias", o_bias="attention_bias"),
    wiring=WIRING,
    epsilon="layer_norm_eps",
    factors=lambda config: Factors(qkv_limit=config.get("clip_qkv")),
    fixed={"attention_bias": False},
    keys=(Key("clip_qkv", "attention.clamp_kqv"),),
    head_dim_free=False,
    adopts=_adopt,
    # mlx-lm's is of the checkpoints before transformers had it, under other names.
    lacks=("mlx",),
    check=_check,
).spec()
