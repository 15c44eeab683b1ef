"""glm4_moe: GLM-4.5 and 4.6; scores by sigmoid with a correction of the choice, shared experts,
dense layers first, a part of each head rotated.

The layers that predict further tokens are left out.
"""

from __future__ import annotations

from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, Get, Key, plain_rope
from mlxedge.models.experts import Experts
from mlxedge.models.names import names
from mlxedge.models.spec import PREDICTING, Config, Name
from mlxedge.models.wiring import Wiring

EXPERTS = Experts(
    shared_width="shared_expert_intermediate_size",
    score="sigmoid",
    scale="routed_scaling_factor",
    bias=True,
    shared_gate=False,
    plain_router=True,
    groups=("n_group", "topk_group"),
)
WIRING = Wiring(head_norm="head", partial=True)
#: llama.cpp's number for scores by sigmoid.
_SIGMOID = 2
_COUNTS = {"n_routed_experts": 1, "n_shared_experts": 1, "first_k_dense_replace": 0}


def _settle(config: Config) -> Config:
    """With the keys that mixtures of experts are read from."""
    wrong = [
        key
        for key, least in _COUNTS.items()
        if type(config.get(key)) is not int or not least <= config[key] < 1 << 24
    ]
    if wrong:
        raise UnsupportedModelError(f"the config needs whole numbers for {', '.join(wrong)}")
    width = config.get("moe_intermediate_size")
    dense = min(config["first_k_dense_replace"], config["num_hidden_layers"])
    return config | {
        "num_experts": config["n_routed_experts"],
        "shared_expert_intermediate_size": (width or 0) * config["n_shared_experts"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(dense)),
        **({"n_group": 1, "topk_group": 1} if config["n_group"] == config["topk_group"] else {}),
        **{key: 0 for key in PREDICTING if key in config},
    }


def _check(config: Config, runtime: str) -> list[str]:
    if runtime == "gguf":
        return []
    found = plain_rope(config, "mlx-lm")
    if config["num_experts_per_tok"] == 1 and config["norm_topk_prob"]:
        found.append("mlx-lm does not normalise the score of one expert (norm_topk_prob)")
    return found


def _back(config: Config, get: Get) -> Config:
    """``n_routed_experts`` is what transformers and mlx-lm call their number."""
    normalised = bool(get("expert_weights_norm", False))
    return config | {"n_routed_experts": config["num_experts"], "norm_topk_prob": normalised}


def _name(name: Name) -> Name:
    """llama.cpp calls the MLP's norm by where it stands; not all models have norms of q and k."""
    name = replace(name, gguf=name.gguf.replace("ffn_norm", "post_attention_norm"))
    if name.hf.endswith(("q_norm.weight", "k_norm.weight")):
        return replace(name, present=lambda config: bool(config.get("use_qk_norm")))
    return name


_NAMES = names(
    WIRING,
    qkv_bias="attention_bias",
    experts=EXPERTS,
    called={
        f"mlp.shared_expert.{part}_proj": f"mlp.shared_experts.{part}_proj"
        for part in ("gate", "up", "down")
    },
)

SPEC = Dense(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    arch="glm4moe",
    names=tuple(_name(name) for name in _NAMES),
    wiring=WIRING,
    experts=EXPERTS,
    fixed={"attention_bias": False, "use_qk_norm": False},
    defaults={
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": False,
    },
    drops_predicting=True,
    keys=(
        Key("n_shared_experts", "expert_shared_count", "u32", 1),
        Key("first_k_dense_replace", "leading_dense_block_count", "u32", 0),
        Key("n_group", "expert_group_count", "u32", 1),
        Key("topk_group", "expert_group_used_count", "u32", 1),
        Key("routed_scaling_factor", "expert_weights_scale", default=1.0),
    ),
    gguf=lambda config: {
        "expert_gating_func": gv.u32(_SIGMOID),
        "expert_weights_norm": gv.boolean(config["norm_topk_prob"]),
    },
    tied={"mlx": False},
    settles=_settle,
    check=_check,
    back=_back,
).spec()
