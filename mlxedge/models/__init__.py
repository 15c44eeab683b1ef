"""Architectures. One file per ``model_type``; the file's name is its registration.

A file ``NAME.py`` here with a ``SPEC`` makes ``"model_type": "NAME"`` known; nothing else lists it.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.layout import rope_row_order, rope_row_order_to_gguf
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
_SHARED = {"decoder", "dense", "layout", "rope", "spec"}


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


def spec_for_gguf(arch: str) -> ModelSpec:
    """The architecture of a GGUF file's ``general.architecture``."""
    for model_type in known_model_types():
        spec = _spec(model_type)
        # mistral and llama share an arch; the type that is named like it stands for both.
        if spec.gguf_arch == arch and spec.model_type == _canonical(arch):
            return spec
    known = sorted({_spec(t).gguf_arch for t in known_model_types()})
    raise UnsupportedModelError(
        f"GGUF architecture {arch!r} is not supported; known: {', '.join(known)}"
    )


def _canonical(arch: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", arch)


def normalise(config: dict[str, Any], tensor_names: Iterable[str]) -> dict[str, Any]:
    """A copy of ``config`` in which what transformers leaves to defaults is spelled out.

    ``head_dim``, ``num_key_value_heads`` and ``tie_word_embeddings`` are always set; the head is
    tied if the config says so or if there is no ``lm_head.weight``.
    """
    config = dict(config)
    missing = [
        key
        for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
        if not isinstance(config.get(key), int) or config[key] <= 0
    ]
    if missing:
        raise UnsupportedModelError(f"config.json lacks a positive {', '.join(missing)}")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    tied = config.get("tie_word_embeddings", False)
    config["tie_word_embeddings"] = bool(tied) or "lm_head.weight" not in set(tensor_names)
    return config
