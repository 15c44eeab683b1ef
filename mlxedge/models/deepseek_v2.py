"""deepseek_v2: DeepSeek-V2, V2.5, Coder-V2 and their Lite ones; latent attention, experts with
scores by softmax, of the best of all or of the groups with the best single ones."""

from __future__ import annotations

from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models import deepseek_v3, latent
from mlxedge.models.dense import Get
from mlxedge.models.experts import Experts
from mlxedge.models.rope import Rope, rope_settings
from mlxedge.models.rope_files import both_styles
from mlxedge.models.routed import SOFTMAX
from mlxedge.models.spec import Config

EXPERTS = Experts(
    shared_width="shared_expert_intermediate_size",
    normalise=False,
    scale="routed_scaling_factor",
    shared_gate=False,
    plain_router=True,
    groups=("n_group", "topk_group"),
    group_best=1,
)
_GREEDY, _GROUPS = "greedy", "group_limited_greedy"


def _settle(config: Config) -> Config:
    method = config["topk_method"]
    if method not in (_GREEDY, _GROUPS):
        raise UnsupportedModelError(
            f"deepseek_v2 with topk_method {str(method)[:40]!r} is not supported: known are "
            f"{_GREEDY}, {_GROUPS}"
        )
    if config.get("scoring_func", "softmax") != "softmax":
        raise UnsupportedModelError("deepseek_v2 has scores by softmax alone (scoring_func)")
    if config.get("norm_topk_prob"):
        raise UnsupportedModelError(
            "deepseek_v2 with norm_topk_prob is not supported: transformers ignores it, the "
            "model's own code does not"
        )
    if method == _GREEDY:
        config = config | {"n_group": 1, "topk_group": 1}
    return deepseek_v3.settle_experts(config) | {"scoring_func": "softmax"}


def _check(config: Config, runtime: str) -> list[str]:
    rope = rope_settings(config)
    if runtime == "gguf":
        found = deepseek_v3.gguf_objections(config)
        if config["topk_group"] < config["n_group"]:
            found.append(
                "llama.cpp chooses groups of experts by their two best, deepseek_v2 by their best "
                "(topk_method group_limited_greedy)"
            )
        return found
    if rope.type not in ("default", "yarn"):
        return [f"mlx-lm's deepseek_v2 has no {rope.type} rope scaling"]
    return []


def _mlx(config: Config) -> Config:
    """mlx-lm has yarn only, which with a factor of one is none."""
    rope = rope_settings(config)
    if rope.type == "default":
        longest = config.get("max_position_embeddings") or 2048
        rope = Rope(theta=rope.theta, type="yarn", original_max_position=longest)
    return both_styles(latent.told(rope))


def _metadata(config: Config) -> gv.Metadata:
    """Groups that are all chosen from are none."""
    return latent.deepseek2_metadata(config) | {
        "expert_gating_func": gv.u32(SOFTMAX),
        "expert_group_count": gv.u32(1),
        "expert_group_used_count": gv.u32(1),
    }


def _back(config: Config, get: Get) -> Config:
    config = deepseek_v3.back(config, get)
    groups = config["n_group"] > config["topk_group"]
    return config | {"topk_method": _GROUPS if groups else _GREEDY}


SPEC = replace(
    deepseek_v3.DENSE,
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    names=deepseek_v3.tensors(EXPERTS),
    experts=EXPERTS,
    recasts=(latent.SPLIT_GGUF,),
    defaults={
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "moe_intermediate_size": 1407,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": _GREEDY,
    },
    drops_predicting=False,
    gguf=_metadata,
    mlx=_mlx,
    adopts=lambda config: latent.adopt(config, deepseek_v3.SIZES),
    settles=_settle,
    reads=deepseek_v3.of_type("deepseek_v2"),
    check=_check,
    back=_back,
).spec()
