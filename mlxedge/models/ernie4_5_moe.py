"""ernie4_5_moe: Baidu's ERNIE 4.5 with experts; ernie4_5's attention, dense layers first, scores by
softmax with a correction of the choice.

Layers that predict further tokens are left out.
"""

from __future__ import annotations

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, Get, Key
from mlxedge.models.ernie4_5 import WIRING
from mlxedge.models.experts import ROUTER_BIAS, Experts
from mlxedge.models.names import names
from mlxedge.models.recasts import Recast, Reshape
from mlxedge.models.routed import SHARED_EXPERTS
from mlxedge.models.spec import PREDICTING, Config

_SHARED = "shared_expert_intermediate_size"
EXPERTS = Experts(shared_width=_SHARED, normalise=True, bias=True, shared_gate=False)
_LAYER = "model.layers.{i}."
_COUNTS = {
    "moe_num_experts": 1,
    "moe_k": 1,
    "moe_num_shared_experts": 0,
    "moe_layer_start_index": 0,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
}


def _settle(config: Config) -> Config:
    """With the keys that mixtures of experts are read from."""
    wrong = [
        key
        for key, least in _COUNTS.items()
        if type(config[key]) is not int or not least <= config[key] < 1 << 24
    ]
    if wrong:
        raise UnsupportedModelError(f"the config needs whole numbers for {', '.join(wrong)}")
    if config.get("use_bias"):
        raise UnsupportedModelError("ernie4_5_moe with biases (use_bias) is not supported")
    layers, step = range(config["num_hidden_layers"]), config["moe_layer_interval"]
    end = config["moe_layer_end_index"]
    last = layers[-1] if end == -1 else end
    first = config["moe_layer_start_index"]
    dense = [i for i in layers if (i + 1) % step or not first <= i <= last]
    width = config.get("moe_intermediate_size")
    shared = config["moe_num_shared_experts"]
    return config | {
        "num_experts": config["moe_num_experts"],
        "num_experts_per_tok": config["moe_k"],
        "moe_layer_end_index": last,
        _SHARED: (width if type(width) is int else 0) * shared,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        **{key: 0 for key in PREDICTING if key in config},
    }


def _check(config: Config, runtime: str) -> list[str]:
    first = config["moe_layer_start_index"]
    if config["mlp_only_layers"] != list(range(min(first, config["num_hidden_layers"]))):
        return ["llama.cpp's ernie4_5-moe has experts in all layers from the first with some on"]
    return []


def _back(config: Config, get: Get) -> Config:
    return config | {
        "moe_num_experts": config["num_experts"],
        "moe_k": config["num_experts_per_tok"],
    }


SPEC = Dense(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    arch="ernie4_5-moe",
    names=names(WIRING, experts=EXPERTS, called=SHARED_EXPERTS),
    wiring=WIRING,
    experts=EXPERTS,
    recasts=(
        Recast(
            "stored",
            (f"{_LAYER}{ROUTER_BIAS}",),
            (f"{_LAYER}mlp.moe_statics.e_score_correction_bias",),
            (Reshape(lambda shape: (1, *shape)),),
            exact=True,
        ),
    ),
    fixed={"use_bias": False, "moe_layer_end_index": -1},
    defaults={
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
    },
    theta=5e5,
    lacks=("mlx",),
    unlike={
        "mlx": "mlx-lm's ernie4_5_moe leaves out what is added to scores for the choice of experts "
        "(e_score_correction_bias)"
    },
    drops_predicting=True,
    buffers=(r"model\.mtp_.*",),
    keys=(
        Key("moe_num_shared_experts", "expert_shared_count", "u32", 0),
        Key(_SHARED, "expert_shared_feed_forward_length", "u32", 0),
        Key("moe_layer_interval", "interleave_moe_layer_step", "u32", 1),
        Key("moe_layer_start_index", "leading_dense_block_count", "u32", 0),
    ),
    settles=_settle,
    check=_check,
    back=_back,
).spec()
