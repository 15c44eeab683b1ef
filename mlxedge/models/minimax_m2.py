"""minimax_m2: MiniMax-M2; norms of all of q and of all of k, a part of each head rotated, experts
in every layer with scores by sigmoid and a correction of the choice."""

from __future__ import annotations

from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.models.dense import Dense, plain_rope
from mlxedge.models.experts import ROUTER_BIAS, Experts
from mlxedge.models.names import names
from mlxedge.models.rope import rope_settings
from mlxedge.models.routed import SIGMOID
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import Wiring

EXPERTS = Experts(
    width="intermediate_size", sparse=False, score="sigmoid", normalise=True, bias=True
)
WIRING = Wiring(head_norm="width", partial=True)
_BLOCK = "block_sparse_moe"


def _adopt(config: Config) -> Config:
    """``rotary_dim``, as published configs have it, is a number of dimensions."""
    rope = config.get("rope_parameters") or {}
    dims, head = config.get("rotary_dim"), config.get("head_dim", 128)
    if type(dims) is int and type(head) is int and head and "partial_rotary_factor" not in rope:
        return {"partial_rotary_factor": dims / head} | config
    return config


def _check(config: Config, runtime: str) -> list[str]:
    return plain_rope(config, "mlx-lm") if runtime == "mlx" else []


def _mlx(config: Config) -> Config:
    """What mlx-lm asks for."""
    dims = rope_settings(config).dims(config["head_dim"])
    return {"rotary_dim": dims, "shared_intermediate_size": 0, "use_qk_norm": True}


def _name(name: Name) -> Name:
    """Files have the correction beside the router."""
    if not name.hf.endswith(ROUTER_BIAS):
        return name
    own = f"model.layers.{{i}}.{_BLOCK}.e_score_correction_bias"
    return replace(name, stored=own, mlx=own)


SPEC = Dense(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    arch="minimax-m2",
    names=tuple(
        _name(name)
        for name in names(WIRING, experts=EXPERTS, block=_BLOCK, parts=("w1", "w3", "w2"))
    ),
    wiring=WIRING,
    experts=EXPERTS,
    fixed={"scoring_func": "sigmoid"},
    defaults={"rms_norm_eps": 1e-6, "head_dim": 128},
    theta=5e6,
    adopts=_adopt,
    tied={"gguf": False},
    gguf=lambda config: {"expert_gating_func": gv.u32(SIGMOID)},
    mlx=_mlx,
    check=_check,
).spec()
