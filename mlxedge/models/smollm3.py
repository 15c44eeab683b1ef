"""smollm3: llama's graph with layers that rotate nothing, every fourth unless the config says."""

from __future__ import annotations

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.rope import Rope, rope_settings
from mlxedge.models.spec import Config
from mlxedge.models.windows import no_windows, windows_by_type


def _settle(config: Config) -> Config:
    """With ``no_rope_layers``, which holds 1 for each layer that rotates."""
    layers, step = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    given = config.get("no_rope_layers")
    if given is None:
        given = [int((i + 1) % step != 0) for i in range(layers)]
    if not isinstance(given, list) or len(given) < layers:
        raise UnsupportedModelError("the config's no_rope_layers is not a list of all layers")
    return config | {"no_rope_layers": given[:layers]}


def _ropes(config: Config) -> tuple[Rope | None, ...]:
    rope = rope_settings(config)
    return tuple(rope if rotates else None for rotates in config["no_rope_layers"])


def _windows(config: Config) -> tuple[int, ...]:
    sliding = config.get("use_sliding_window") and config.get("layer_types")
    return windows_by_type(config) if sliding else no_windows(config)


def _check(config: Config, runtime: str) -> list[str]:
    if runtime == "mlx":
        return []
    found = []
    if config["no_rope_layers"] != [int(i % 4 != 3) for i in range(config["num_hidden_layers"])]:
        found.append("llama.cpp's smollm3 rotates in all layers but every fourth")
    if config.get("attention_bias") or config.get("mlp_bias"):
        found.append("llama.cpp's smollm3 has no biases")
    return found


SPEC = Dense(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    arch="smollm3",
    names=names(
        rope_rows=True, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    fixed={"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    theta=2e6,
    settles=_settle,
    ropes=_ropes,
    windows=_windows,
    check=_check,
).spec()
