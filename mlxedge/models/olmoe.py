"""olmoe: experts in every layer, norms of all of q and of all of k."""

from __future__ import annotations

from mlxedge.models.dense import Dense
from mlxedge.models.experts import Experts
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.wiring import NAMES, Factors, Wiring

EXPERTS = Experts(width="intermediate_size", sparse=False)
WIRING = Wiring(head_norm="width")


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if config.get("clip_qkv") is not None:
        found.append(f"{NAMES[runtime]}'s olmoe does not clip queries, keys and values (clip_qkv)")
    if runtime == "mlx":
        return found
    if config["norm_topk_prob"]:
        found.append("llama.cpp's olmoe does not normalise the scores of experts (norm_topk_prob)")
    if config.get("attention_bias"):
        found.append("llama.cpp's olmoe has no attention biases")
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        found.append("llama.cpp's olmoe needs as many heads of keys as of queries")
    return found


SPEC = Dense(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    arch="olmoe",
    names=names(WIRING, qkv_bias="attention_bias", o_bias="attention_bias", experts=EXPERTS),
    wiring=WIRING,
    fixed={"attention_bias": False, "norm_topk_prob": False},
    defaults={"rms_norm_eps": 1e-5},
    head_dim_free=False,
    experts=EXPERTS,
    factors=lambda config: Factors(qkv_limit=config.get("clip_qkv")),
    tied={"gguf": False},
    check=_check,
).spec()
