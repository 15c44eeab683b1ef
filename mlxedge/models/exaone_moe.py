"""exaone_moe: LG's K-EXAONE; norms of the heads of q and k, windows in all layers but every fourth,
which alone do not rotate, dense layers first, then experts as DeepSeek-V3 has them.

Layers that predict further tokens are left out.
"""

from __future__ import annotations

from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, Get, Key
from mlxedge.models.experts import ROUTER_BIAS
from mlxedge.models.names import names
from mlxedge.models.rope import Rope, rope_settings
from mlxedge.models.routed import (
    EXPERTS,
    KEYS,
    SHARED_EXPERTS,
    after_dense,
    metadata,
    normalised,
    one_expert,
)
from mlxedge.models.spec import Config, Name
from mlxedge.models.windows import windows_by_type
from mlxedge.models.wiring import Wiring

WIRING = Wiring(head_norm="head")
_FIRST = "first_k_dense_replace"


def _adopt(config: Config) -> Config:
    """Published configs say where experts are in other words."""
    config = dict(config)
    sparse = [kind == "sparse" for kind in config.get("mlp_layer_types") or []]
    sparse = sparse or [bool(one) for one in config.get("is_moe_layer") or []]
    if sparse:
        first = sparse.index(True) if any(sparse) else len(sparse)
        if not all(sparse[first:]):
            raise UnsupportedModelError("exaone_moe with dense layers after those with experts")
        config[_FIRST] = first
    elif config.get(_FIRST) is None and config.get("first_last_k_dense_replace") is not None:
        config[_FIRST] = config["first_last_k_dense_replace"]
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern and config.get("layer_types") is None:
        layers = range(config["num_hidden_layers"])
        local = [pattern[i % len(pattern)] == "L" and i != layers[-1] for i in layers]
        config["layer_types"] = ["sliding_attention" if one else "full_attention" for one in local]
    return config


def _settle(config: Config) -> Config:
    config = after_dense(config, count="num_experts", shared="num_shared_experts")
    dense = config["mlp_only_layers"]
    layers = range(config["num_hidden_layers"])
    return config | {
        "mlp_layer_types": ["dense" if i in dense else "sparse" for i in layers],
        "is_moe_layer": [i not in dense for i in layers],
    }


def _ropes(config: Config) -> tuple[Rope | None, ...]:
    """Layers without a window do not rotate, unless there is none at all."""
    rope, everywhere = rope_settings(config), config.get("sliding_window") is None
    return tuple(rope if window or everywhere else None for window in windows_by_type(config))


def _check(config: Config, runtime: str) -> list[str]:
    found = one_expert(config, runtime)
    if {bool(window) for window in windows_by_type(config)} != {True, False}:
        found.append("the runtimes need layers with windows and layers without")
    return found


def _back(config: Config, get: Get) -> Config:
    return config | normalised(get)


def _gguf(config: Config) -> gv.Metadata:
    width = config["shared_expert_intermediate_size"]
    return metadata(config) | {"expert_shared_feed_forward_length": gv.u32(width)}


def _name(name: Name) -> Name:
    """transformers has the correction beside the router."""
    if not name.hf.endswith(ROUTER_BIAS):
        return name
    return replace(name, stored="model.layers.{i}.mlp.e_score_correction_bias")


_KEYS = (Key("num_shared_experts", "expert_shared_count", "u32", 1), *KEYS[1:])

SPEC = Dense(
    model_type="exaone_moe",
    architecture="ExaoneMoeForCausalLM",
    arch="exaone-moe",
    names=tuple(_name(name) for name in names(WIRING, experts=EXPERTS, called=SHARED_EXPERTS)),
    wiring=WIRING,
    experts=EXPERTS,
    fixed={},
    defaults={
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "first_k_dense_replace": 1,
        "num_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
    },
    tied={"gguf": False},
    drops_predicting=True,
    buffers=(r"mtp\..*",),
    keys=_KEYS,
    gguf=_gguf,
    adopts=_adopt,
    settles=_settle,
    freq_factors=True,
    ropes=_ropes,
    windowed={"gguf", "mlx"},
    windows=windows_by_type,
    period=4,
    check=_check,
    back=_back,
).spec()
