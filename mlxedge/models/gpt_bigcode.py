"""gpt_bigcode: StarCoder, SantaCoder, Granite 20B Code; GPT-2's graph, with one head of keys for
all, and matrices that are not transposed."""

from __future__ import annotations

from mlxedge.models.dense import GELUS, Dense, no_ropes
from mlxedge.models.gpt2 import BUFFERS, MODULES, SPELLINGS, adopt, scale_of
from mlxedge.models.names import names
from mlxedge.models.recasts import groups_apart, joined_qkv
from mlxedge.models.rope_files import Get
from mlxedge.models.spec import Config
from mlxedge.models.wiring import NAMES, Factors, Wiring

WIRING = Wiring(layer_norm=True, mlp="plain", activation="gelu_pytorch_tanh")


def _adopt(config: Config) -> Config:
    config = adopt(config)
    if config.get("multi_query") is None:
        config = config | {"multi_query": True}
    keys = 1 if config["multi_query"] else config["num_attention_heads"]
    return config | {"num_key_value_heads": keys}


def _check(config: Config, runtime: str) -> list[str]:
    if config.get("scale_attn_weights", True):
        return []
    return [f"{NAMES[runtime]} always scales attention (scale_attn_weights)"]


def _back(config: Config, get: Get) -> Config:
    return config | {"multi_query": config["num_key_value_heads"] == 1}


SPEC = Dense(
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    arch="starcoder",
    names=names(
        WIRING,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        norm_bias=True,
        called=MODULES,
        learned_positions=True,
    ),
    recasts=(
        # With a head of keys for each the three of a head take turns, but not for mlx-lm.
        *joined_qkv("stored", "transformer.h.{i}.attn.c_attn", groups_apart),
        *joined_qkv("mlx", "transformer.h.{i}.attn.c_attn"),
        *joined_qkv("gguf", "blk.{i}.attn_qkv"),
    ),
    spellings=SPELLINGS,
    buffers=BUFFERS,
    wiring=WIRING,
    nearly=GELUS,
    epsilon="layer_norm_epsilon",
    fixed={},
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    adopts=_adopt,
    factors=lambda config: Factors(attention=scale_of(config)),
    ropes=no_ropes,
    back=_back,
    check=_check,
).spec()
