"""lfm2_moe: LFM2 with experts after the first layers, chosen by sigmoid with a correction."""

from __future__ import annotations

from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models import lfm2
from mlxedge.models.dense import Dense, Key
from mlxedge.models.experts import ROUTER_BIAS, Experts
from mlxedge.models.mixers import shortconv
from mlxedge.models.names import names
from mlxedge.models.spec import Config, Name

EXPERTS = Experts(score="sigmoid", scale="routed_scaling_factor", bias=True)
_BLOCK, _MLP = "model.layers.{i}.", "feed_forward."
#: llama.cpp's number for scores by sigmoid.
_SIGMOID = 2


def _name(name: Name) -> Name:
    """mlx-lm calls the matrices of the first layers otherwise, and not all models correct."""
    module = name.hf.removeprefix(f"{_BLOCK}mlp.")
    if name.hf == f"{_BLOCK}{ROUTER_BIAS}":
        own = f"{_BLOCK}{_MLP}expert_bias"
        return replace(name, stored=own, mlx=own, present=_corrected)
    if module in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
        return replace(name, mlx=f"{_BLOCK}{_MLP}{module}")
    return name


def _corrected(config: Config) -> bool:
    return bool(config["use_expert_bias"])


def _settle(config: Config) -> Config:
    config = lfm2.settle_types(config)
    dense = config["num_dense_layers"]
    if type(dense) is not int or dense < 0:
        raise UnsupportedModelError(f"num_dense_layers is {str(dense)[:40]!r}")
    layers = config["num_hidden_layers"]
    return config | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(min(dense, layers))),
    }


def _check(config: Config, runtime: str) -> list[str]:
    found = lfm2.check(config, runtime)
    if runtime == "gguf" and not config["use_expert_bias"]:
        found.append("llama.cpp's lfm2moe needs a correction of the choice (use_expert_bias)")
    if runtime == "gguf" and not config["norm_topk_prob"]:
        found.append("llama.cpp's lfm2moe always normalises scores: norm_topk_prob is false")
    if runtime == "gguf" and config["routed_scaling_factor"] != 1:
        found.append("llama.cpp's lfm2moe does not scale scores (routed_scaling_factor)")
    return found


_NAMES = names(
    lfm2.WIRING,
    experts=EXPERTS,
    block="feed_forward",
    parts=("w1", "w3", "w2"),
    called=lfm2.CALLED,
)

SPEC = Dense(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    arch="lfm2moe",
    names=lfm2.tensors(tuple(_name(name) for name in _NAMES)),
    wiring=lfm2.WIRING,
    experts=EXPERTS,
    mixers=lfm2.mixers,
    epsilon="norm_eps",
    theta=1e6,
    fixed={"conv_bias": False, "use_expert_bias": True, "norm_topk_prob": True},
    defaults={
        **lfm2.DEFAULTS,
        "num_dense_layers": 2,
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    keys=(
        Key("conv_L_cache", "shortconv.l_cache", "u32", 3),
        Key("num_dense_layers", "leading_dense_block_count", "u32", 0),
    ),
    recasts=shortconv.RECASTS,
    head_dim_free=False,
    tied={"mlx": True},
    adopts=lfm2.adopt,
    settles=_settle,
    gguf=lambda config: {**lfm2.metadata(config), "expert_gating_func": gv.u32(_SIGMOID)},
    back=lfm2.back,
    mlx=lfm2.mlx,
    check=_check,
).spec()
