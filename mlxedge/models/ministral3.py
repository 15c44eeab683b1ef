"""ministral3: Mistral's Ministral 3 and Devstral 2; llama's graph whose queries grow with their
position."""

from __future__ import annotations

from typing import Any

from mlxedge import gguf_values as gv
from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.rope import rope_settings
from mlxedge.models.rope_files import Get, both_styles, rope_values, shortest
from mlxedge.models.spec import Config
from mlxedge.models.windows import every_layer
from mlxedge.models.wiring import Factors

_BETA, _SPAN = "llama_4_scaling_beta", "original_max_position_embeddings"
_SCALE = "attention.temperature_scale"
#: What transformers takes where a config says nothing of rotary embeddings.
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    _BETA: 0.1,
}


def _adopt(config: Config) -> Config:
    silent = not (config.get("rope_parameters") or config.get("rope_scaling"))
    return config | ({"rope_parameters": _ROPE} if silent else {})


def _beta(config: Config) -> float:
    values: dict[str, Any] = config.get("rope_parameters") or config["rope_scaling"]
    return float(values.get(_BETA) or 0.0)


def _span(config: Config) -> int:
    return rope_settings(config).original_max_position


def _gguf(config: Config) -> gv.Metadata:
    if not (beta := _beta(config)):
        return {}
    span = gv.u32(_span(config))
    return {_SCALE: gv.f32(beta), "rope.scaling.original_context_length": span}


def _mlx(config: Config) -> Config:
    """mlx-lm reads all of ``rope_parameters``."""
    values = rope_values(rope_settings(config))
    return both_styles(values | {_BETA: _beta(config), _SPAN: _span(config)})


def _back(config: Config, get: Get) -> Config:
    values = config["rope_parameters"] | {_BETA: shortest(float(get(_SCALE, 0.0)))}
    if span := get("rope.scaling.original_context_length"):
        values[_SPAN] = span
    return config | both_styles(values)


SPEC = Dense(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    arch="mistral3",
    names=names(rope_rows=True),
    factors=lambda config: Factors(tempered=_beta(config), span=_span(config)),
    fixed={},
    defaults={"rms_norm_eps": 1e-5, "head_dim": 128, "max_position_embeddings": 262144},
    theta=1e6,
    freq_factors=True,
    yarn_told=("gguf", "mlx"),
    windows=lambda config: every_layer(config, None),
    adopts=_adopt,
    gguf=_gguf,
    mlx=_mlx,
    back=_back,
).spec()
