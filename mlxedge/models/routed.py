"""What architectures with DeepSeek-V3's kind of experts share: dense layers first, scores by
sigmoid with a correction of the choice, experts that all tokens share, and groups."""

from __future__ import annotations

from typing import Any

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Key
from mlxedge.models.experts import Experts
from mlxedge.models.rope_files import Get
from mlxedge.models.spec import PREDICTING, Config

EXPERTS = Experts(
    shared_width="shared_expert_intermediate_size",
    score="sigmoid",
    scale="routed_scaling_factor",
    bias=True,
    shared_gate=False,
    plain_router=True,
    groups=("n_group", "topk_group"),
)
#: What transformers calls the shared experts, against the canonical name.
SHARED_EXPERTS = {
    f"mlp.shared_expert.{part}_proj": f"mlp.shared_experts.{part}_proj"
    for part in ("gate", "up", "down")
}
#: The keys that GGUF has of them.
KEYS = (
    Key("n_shared_experts", "expert_shared_count", "u32", 1),
    Key("first_k_dense_replace", "leading_dense_block_count", "u32", 0),
    Key("n_group", "expert_group_count", "u32", 1),
    Key("topk_group", "expert_group_used_count", "u32", 1),
    Key("routed_scaling_factor", "expert_weights_scale", default=1.0),
)
#: llama.cpp's numbers for scores by softmax and by sigmoid.
SOFTMAX, SIGMOID = 1, 2


def after_dense(
    config: Config,
    count: str = "n_routed_experts",
    shared: str = "n_shared_experts",
    first: str = "first_k_dense_replace",
    fewest_shared: int = 1,
) -> Config:
    """``config`` with the keys that mixtures of experts are read from, of one whose ``first`` key
    tells how many layers are dense and whose others tell how many experts there are, and how many
    of their width are ``shared``.

    Raises UnsupportedModelError where these are no such numbers.
    """
    least = {count: 1, shared: fewest_shared, first: 0}
    wrong = [
        key
        for key, low in least.items()
        if type(config.get(key)) is not int or not low <= config[key] < 1 << 24
    ]
    if wrong:
        raise UnsupportedModelError(f"the config needs whole numbers for {', '.join(wrong)}")
    width: Any = config.get("moe_intermediate_size")
    made: Config = {
        "num_experts": config[count],
        "shared_expert_intermediate_size": (width if type(width) is int else 0) * config[shared],
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(min(config[first], config["num_hidden_layers"]))),
        **{key: 0 for key in PREDICTING if key in config},
    }
    if "n_group" in config and config["n_group"] == config.get("topk_group"):
        made |= {"n_group": 1, "topk_group": 1}  # that is no choice
    return config | made


def metadata(config: Config) -> gv.Metadata:
    """GGUF's keys for how the router scores."""
    return {
        "expert_gating_func": gv.u32(SIGMOID),
        "expert_weights_norm": gv.boolean(config["norm_topk_prob"]),
    }


def normalised(get: Get) -> Config:
    """What those keys say."""
    return {"norm_topk_prob": bool(get("expert_weights_norm", False))}


def one_expert(config: Config, runtime: str) -> list[str]:
    """An objection where one expert serves a token and its score is normalised."""
    if runtime == "mlx" and config["num_experts_per_tok"] == 1 and config["norm_topk_prob"]:
        return ["mlx-lm does not normalise the score of one expert (norm_topk_prob)"]
    return []
