"""olmo3: olmo2 with windows in all layers but every fourth; only layers without one scale their
rotary embeddings."""

from __future__ import annotations

from typing import Any

from mlxedge.models.dense import Dense, Get
from mlxedge.models.names import names
from mlxedge.models.olmo2 import WIRING
from mlxedge.models.rope import Rope, rope_settings
from mlxedge.models.spec import Config
from mlxedge.models.windows import layer_types, windows_by_type

_KINDS = ("full_attention", "sliding_attention")
_THETA = 5e5


def _settle(config: Config) -> Config:
    """With ``layer_types``, and rotary settings in both styles: by the type of layer, and those of
    the layers without windows alone."""
    if config.get("layer_types") is None:
        config = config | {"layer_types": layer_types(config, 4)}
    nested = config.get("rope_parameters") or {}
    if _KINDS[0] not in nested:
        scaling = config.get("rope_scaling") or nested
        plain = {"rope_type": "default", "rope_theta": config.get("rope_theta", _THETA)}
        full = {("rope_type" if k == "type" else k): v for k, v in scaling.items()}
        nested = {_KINDS[0]: plain | full, _KINDS[1]: plain}
    full = nested[_KINDS[0]]
    scaling = {k: v for k, v in full.items() if k != "rope_theta"}
    return config | {
        "rope_parameters": nested,
        "rope_theta": full.get("rope_theta", _THETA),
        "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None,
    }


def _ropes(config: Config) -> tuple[Rope | None, ...]:
    return tuple(rope_settings(config, kind) for kind in config["layer_types"])


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    full, sliding = (rope_settings(config, kind) for kind in _KINDS)
    if sliding != Rope(theta=full.theta, original_max_position=sliding.original_max_position):
        found.append("layers with windows have the base of the others and no scaling in runtimes")
    if {bool(window) for window in windows_by_type(config)} != {True, False}:
        found.append("the runtimes need layers with windows and layers without")
    if runtime == "gguf" and config.get("attention_bias"):
        found.append("llama.cpp's olmo2 has no attention biases")
    return found


def _mlx(config: Config) -> Config:
    keys = ("rope_parameters", "rope_theta", "rope_scaling")
    made: dict[str, Any] = {key: config[key] for key in keys}
    return made


def _back(config: Config, get: Get) -> Config:
    return _settle({k: v for k, v in config.items() if k != "rope_parameters"})


SPEC = Dense(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    arch="olmo2",
    names=names(WIRING, qkv_bias="attention_bias", o_bias="attention_bias"),
    wiring=WIRING,
    ropes=_ropes,
    fixed={"attention_bias": False},
    defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
    theta=_THETA,
    head_dim_free=False,
    tied={"gguf": False},
    settles=_settle,
    mlx=_mlx,
    windowed={"gguf", "mlx"},
    windows=windows_by_type,
    reads=lambda metadata: "olmo2.attention.sliding_window" in metadata,
    check=_check,
    back=_back,
).spec()
