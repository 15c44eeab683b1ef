"""Last layers that attend to the keys and values of earlier ones (Gemma 3n and 4), which a config
counts as ``num_kv_shared_layers``."""

from __future__ import annotations

import re

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.spec import Config

_MATRICES = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\..*")


def donors(config: Config) -> list[int | None]:
    """By layer the one whose keys and values it attends to, ``None`` for its own: the last of the
    same type that has some.

    Raises UnsupportedModelError where there is none.
    """
    types, shared = config["layer_types"], config["num_kv_shared_layers"]
    own = types[: len(types) - shared] if shared else types
    last = {kind: layer for layer, kind in enumerate(own)}
    if set(types) - set(last):
        raise UnsupportedModelError(
            f"num_kv_shared_layers ({shared}) leaves no layer of each type with keys of its own"
        )
    return [None if i < len(own) else last[kind] for i, kind in enumerate(types)]


def own_layers(config: Config) -> list[int]:
    """Those with keys and values of their own."""
    return [layer for layer, donor in enumerate(donors(config)) if donor is None]


def unused(name: str, config: Config) -> bool:
    """Published files have matrices for keys and values in layers that have no use for them."""
    found = _MATRICES.fullmatch(name)
    first = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    return found is not None and int(found[1]) >= first


def sharing_objections(config: Config, runtime: str) -> list[str]:
    """llama.cpp takes the last two layers with keys of their own, in this order, for those that
    slide and those that attend to everything (``llama_model::create_memory``)."""
    shared = config["num_kv_shared_layers"]
    if runtime != "gguf":
        return []
    own = config["layer_types"][: len(config["layer_types"]) - shared]
    if len(own) >= 2 and (not shared or own[-2:] == ["sliding_attention", "full_attention"]):
        return []
    return ["llama.cpp lets layers share keys and values of the last two others only"]
