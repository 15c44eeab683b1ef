"""Architectures. One file per ``model_type``; the file's name is its registration.

A file ``NAME.py`` here with a ``SPEC`` makes ``"model_type": "NAME"`` known; nothing else lists it.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from mlxedge.errors import UnsupportedModelError
from mlxedge.gguf_values import GgufValue
from mlxedge.models.layout import rope_row_order, rope_row_order_to_gguf
from mlxedge.models.rope import Rope, rope_settings
from mlxedge.models.spec import ModelSpec

__all__ = [
    "ModelSpec",
    "known_model_types",
    "normalise",
    "rope_row_order",
    "rope_row_order_to_gguf",
    "spec_for",
    "spec_for_gguf",
]

#: Modules of this package that serve the architectures and are none themselves.
_SHARED = {
    *("altup", "beside", "decoder", "dense", "experts", "graph", "latent", "layout", "mixers"),
    *("names", "per_layer", "recasts", "rope", "rope_files", "routed", "shape", "sharing"),
    *("delta_nets", "qwen3_5_nets", "spaces", "spec", "weights", "windows"),
    "wiring",
}


@cache
def known_model_types() -> tuple[str, ...]:
    """Every ``model_type`` that can be converted, sorted."""
    found = {m.name for m in pkgutil.iter_modules(__path__)}
    return tuple(sorted(found - _SHARED))


@cache
def _spec(model_type: str) -> ModelSpec:
    spec: ModelSpec = importlib.import_module(f"{__name__}.{model_type}").SPEC
    return spec


def spec_for(config: dict[str, Any]) -> ModelSpec:
    """The architecture of a config.json; raises UnsupportedModelError that lists the known ones."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in known_model_types():
        return _spec(model_type)
    remote = " (its own remote code is never run)" if "auto_map" in config else ""
    raise UnsupportedModelError(
        f"model_type {model_type!r} is not supported{remote}; known: "
        + ", ".join(known_model_types())
    )


def spec_for_gguf(arch: str, metadata: Mapping[str, GgufValue]) -> ModelSpec:
    """The architecture of a GGUF file, by its ``general.architecture`` and its other metadata."""
    for model_type in known_model_types():
        spec = _spec(model_type)
        if spec.gguf_arch == arch and spec.reads(metadata):
            return spec
    known = sorted({_spec(t).gguf_arch for t in known_model_types()})
    raise UnsupportedModelError(
        f"GGUF architecture {arch!r} is not supported; known: {', '.join(known)}"
    )


def normalise(config: dict[str, Any], tensor_names: Iterable[str]) -> dict[str, Any]:
    """A copy of ``config`` in which what transformers leaves to defaults is spelled out.

    ``head_dim``, ``num_key_value_heads``, the norms' epsilon and ``tie_word_embeddings`` are always
    set; the head is tied if the config says so, or if it is silent and there is no
    ``lm_head.weight``. Raises UnsupportedModelError if a size is missing or makes no sense.
    """
    spec = spec_for(config)
    config = spec.adopt(dict(config))
    wrong = [key for key in _SIZES if not _positive_int(config.get(key))]
    wrong += [
        key
        for key in _OPTIONAL_SIZES
        if config.get(key) is not None and not _positive_int(config[key])
    ]
    wrong += [key for key in _WINDOW if config.get(key) and not _positive_int(config[key])]
    if wrong:
        given = ", ".join(f"{key} ({str(config.get(key, 'absent'))[:40]!r})" for key in wrong)
        raise UnsupportedModelError(f"the config needs positive whole numbers for {given}")
    if spec.attends:
        _settle_heads(config)
    epsilon = config.get(spec.epsilon)
    config[spec.epsilon] = epsilon = 1e-6 if epsilon is None else epsilon
    if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
        raise UnsupportedModelError(f"{spec.epsilon} is {str(epsilon)[:40]!r}, not a small number")
    types = config.get("layer_types")
    if types is not None and not (
        isinstance(types, list) and len(types) == config["num_hidden_layers"]
    ):
        raise UnsupportedModelError("the config's layer_types is not a list of all layers")
    _check_rope(config)
    tied = config.get("tie_word_embeddings")
    if tied is None:
        tied = "lm_head.weight" not in set(tensor_names)
    config["tie_word_embeddings"] = bool(tied)
    return config


def _settle_heads(config: dict[str, Any]) -> None:
    """Spell out what is known of attention."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise UnsupportedModelError(
            f"hidden_size ({hidden}) does not divide into {heads} attention heads, "
            "and the config has no head_dim"
        )
    config["head_dim"] = config.get("head_dim") or hidden // heads
    if config["head_dim"] % 2:
        raise UnsupportedModelError(f"head_dim ({config['head_dim']}) is odd: rotation needs pairs")


_SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
)
_OPTIONAL_SIZES = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
#: Zero, too, has a meaning here.
_WINDOW = ("sliding_window", "max_window_layers")


def _positive_int(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _sane(rope: Rope) -> bool:
    numbers = (rope.factor, rope.beta_fast, rope.beta_slow, rope.fraction, rope.theta - 1)
    return all(0 < n < math.inf for n in numbers) and (
        rope.type != "llama3" or rope.low_freq_factor < rope.high_freq_factor
    )


def _check_rope(config: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for rotary settings that are not numbers, or no sane ones."""
    try:
        given = config.get("rope_parameters") or {}
        kinds = [kind for kind, values in given.items() if isinstance(values, Mapping)]
        sane = all(_sane(rope_settings(config, kind)) for kind in kinds or [None])
    except UnsupportedModelError:
        return  # it concerns the runtimes: ModelSpec.objections says it for them
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        sane = False
    if not sane:
        raise UnsupportedModelError(
            "the config's rotary settings (rope_theta, rope_scaling, rope_parameters) make no sense"
        )
