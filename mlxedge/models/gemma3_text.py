"""gemma3_text: gemma2 with norms of q and k in place of caps; five layers of six have windows, and
a rotary base of their own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from mlxedge.models.dense import Dense, Get, Key
from mlxedge.models.gemma2 import WIRING as GEMMA2
from mlxedge.models.gemma2 import scale_objections, width_per_head
from mlxedge.models.names import names
from mlxedge.models.rope import Rope, rope_settings
from mlxedge.models.spec import Config
from mlxedge.models.windows import period_of, periodic, windows_by_type
from mlxedge.models.wiring import Factors

WIRING = replace(GEMMA2, head_norm="head")
#: The 27B model, as in gemma2.
LARGE = 62


def settle_ropes(config: Config) -> Config:
    """Both styles of rotary settings: by the type of layer, and with a base for those with windows
    beside that of the others."""
    nested = config.get("rope_parameters") or {}
    if "full_attention" not in nested:
        scaling = config.get("rope_scaling") or nested
        nested = {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": config.get("rope_theta", 1e6),
                **{("rope_type" if k == "type" else k): v for k, v in scaling.items()},
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": config.get("rope_local_base_freq", 1e4),
            },
        }
    full = nested["full_attention"]
    scaling = {k: v for k, v in full.items() if k != "rope_theta"}
    return config | {
        "rope_parameters": nested,
        "rope_theta": full.get("rope_theta", 1e6),
        "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None,
        "rope_local_base_freq": nested["sliding_attention"].get("rope_theta", 1e4),
    }


def ropes_by_type(config: Config) -> tuple[Rope | None, ...]:
    return tuple(rope_settings(config, kind) for kind in config["layer_types"])


def _factors(config: Config) -> Factors:
    return Factors(
        embedding=math.sqrt(config["hidden_size"]),
        attention=float(config["query_pre_attn_scalar"]) ** -0.5,
        attention_cap=float(config.get("attn_logit_softcapping") or 0.0),
        logits_cap=float(config.get("final_logit_softcapping") or 0.0),
    )


def _check(config: Config, runtime: str) -> list[str]:
    found = scale_objections(config, runtime, LARGE) + periodic(config, runtime)
    if config.get("attn_logit_softcapping"):
        found.append("attn_logit_softcapping is not part of this architecture in the runtimes")
    if config.get("final_logit_softcapping") and runtime == "mlx":
        found.append("mlx-lm's gemma3_text does not cap logits (final_logit_softcapping)")
    if config.get("attention_bias") or config.get("use_bidirectional_attention"):
        found.append("attention_bias and use_bidirectional_attention are not in the runtimes")
    if rope_settings(config, "sliding_attention").type != "default":
        found.append("layers with windows have no rope scaling in the runtimes")
    if runtime == "gguf" and rope_settings(config, "full_attention").type not in _SCALED:
        found.append("llama.cpp's gemma3 has no rope scaling but linear")
    return found


_SCALED = ("default", "linear")


def _mlx(config: Config) -> Config:
    keys = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq")
    made: dict[str, Any] = {key: config[key] for key in keys}
    return made | {"sliding_window_pattern": period_of(config)}


def _back(config: Config, get: Get) -> Config:
    scalar = {"query_pre_attn_scalar": width_per_head(config, LARGE)}
    return settle_ropes({k: v for k, v in config.items() if k != "rope_parameters"} | scalar)


SPEC = Dense(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    arch="gemma3",
    names=names(WIRING),
    wiring=WIRING,
    factors=_factors,
    fixed={"attention_bias": False},
    theta=1e6,
    # Configs within those of larger models leave out what is usual.
    defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    settles=settle_ropes,
    ropes=ropes_by_type,
    keys=(
        Key("final_logit_softcapping", "final_logit_softcapping"),
        Key("rope_local_base_freq", "rope.freq_base_swa", default=1e4),
    ),
    mlx=_mlx,
    windowed={"gguf", "mlx"},
    period=6,
    windows=windows_by_type,
    check=_check,
    back=_back,
).spec()
