"""Configs as transformers 5 saves them and as older files on the Hub have them are one model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from oracles.architectures_gemma import NEW
from oracles.checkpoints import OWN, SAVED, SIZES
from oracles.stand_ins import config_of, hub_config

from mlxedge.models import normalise, spec_for, spec_for_gguf
from mlxedge.models.shape import Shape, shape_of


def saved_config(**settings: Any) -> dict[str, Any]:
    """Without weights."""
    model_type = settings.pop("model_type")
    settings = SIZES | OWN.get(model_type, {}) | settings
    made = config_of(model_type, **settings)
    config = made.to_dict() | {"model_type": model_type}
    return hub_config(model_type, settings, config)


def of_old(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings apart, the type of layers left out where it is the usual one."""
    made = dict(config)
    if "rope_parameters" not in config:
        return made
    rope = made.pop("rope_parameters")
    if "full_attention" in rope:
        made["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    scaling = dict(rope)
    made["rope_theta"] = scaling.pop("rope_theta")
    if (fraction := scaling.pop("partial_rotary_factor", None)) is not None:
        made["partial_rotary_factor"] = fraction
    scaling["type"] = scaling.pop("rope_type")
    made["rope_scaling"] = scaling if scaling["type"] != "default" else None
    if config.get("layer_types") and config.get("sliding_window"):
        keys = ("model_type", "num_hidden_layers", "sliding_window", "activation_sparsity_pattern")
        usual = saved_config(**{key: config[key] for key in keys if key in config})
        if config["layer_types"] == usual["layer_types"]:
            del made["layer_types"]
    return made


def shape(config: dict[str, Any]) -> Shape:
    head = [] if config.get("tie_word_embeddings") else ["lm_head.weight"]
    return shape_of(spec_for(config).settle(normalise(config, head)))


@pytest.mark.parametrize("name", [n for n in SAVED if SAVED[n]["model_type"] not in NEW])
def test_old_and_new_configs_mean_the_same(name: str) -> None:
    new = saved_config(**SAVED[name])
    assert shape(of_old(new)) == shape(new)


@pytest.mark.parametrize("name", SAVED)
def test_configs_come_back_from_metadata(name: str) -> None:
    config = saved_config(**SAVED[name])
    spec = spec_for(config)
    config = spec.settle(normalise(config, ["lm_head.weight"]))
    metadata = spec.gguf_metadata(config)
    arch = spec.arch_of(config)
    read = spec if arch == spec.gguf_arch else spec_for_gguf(arch, metadata)
    back = read.config_from_gguf(metadata, spec.gguf_extra(config))
    names = {mapped[0] for n in spec.expected(config) if (mapped := spec.to_gguf(n))}
    back = read.settle(normalise(read.by_tensors(back, names), []))
    back |= {"tie_word_embeddings": config["tie_word_embeddings"]}
    assert _rounded(shape(back)) == _rounded(shape(config))


def _rounded(shape: Shape) -> dict[str, Any]:
    """f32 holds seven digits; a context is that of the file."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items() if k != "context"}
        if isinstance(value, (list, tuple)):
            return [rounded(v) for v in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    made: dict[str, Any] = rounded(asdict(shape))
    return made
