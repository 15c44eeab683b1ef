"""exaone4: LG's EXAONE 4; norms after attention and MLP only. Where some layers have windows, only
those rotate."""

from __future__ import annotations

from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.rope import Rope, rope_settings
from mlxedge.models.spec import Config
from mlxedge.models.windows import windows_by_type
from mlxedge.models.wiring import Wiring

WIRING = Wiring(
    attention_norm=None,
    mlp_norm=None,
    attention_out_norm="post_attention_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
    head_norm="head",
)
#: llama.cpp knows the model with windows, of 32B, by its layers.
WINDOWED = 64


def _settle(config: Config) -> Config:
    """With ``layer_types``; ``sliding_window_pattern`` is a period, or letters for layers in turn:
    L for those with a window, G for the others."""
    if config.get("layer_types") is not None:
        return config
    layers, pattern = config["num_hidden_layers"], config.get("sliding_window_pattern", 4)
    if not config.get("sliding_window") or not pattern:
        letters = "G"
    elif isinstance(pattern, str):
        letters = pattern
    else:
        letters = "L" * (pattern - 1) + "G"
    kinds = {True: "sliding_attention", False: "full_attention"}
    types = [kinds[letters[i % len(letters)] == "L"] for i in range(layers)]
    return config | {"layer_types": types}


def _ropes(config: Config) -> tuple[Rope | None, ...]:
    rope, windows = rope_settings(config), windows_by_type(config)
    if not config.get("sliding_window"):
        return (rope,) * len(windows)
    return tuple(rope if window else None for window in windows)


def _check(config: Config, runtime: str) -> list[str]:
    sliding = bool(config.get("sliding_window"))
    some = {bool(window) for window in windows_by_type(config)}
    if runtime == "gguf" and sliding != (config["num_hidden_layers"] == WINDOWED):
        return [f"llama.cpp's exaone4 has windows with {WINDOWED} layers, and only then"]
    if sliding and len(some) != 2:
        return ["the runtimes need layers with windows and layers without"]
    return []


def _mlx(config: Config) -> Config:
    """mlx-lm reads letters."""
    if not config.get("sliding_window"):
        return {"sliding_window": None, "sliding_window_pattern": None}
    letters = ["L" if window else "G" for window in windows_by_type(config)]
    return {"sliding_window_pattern": "".join(letters)}


SPEC = Dense(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    arch="exaone4",
    names=names(WIRING),
    wiring=WIRING,
    ropes=_ropes,
    fixed={},
    defaults={"rms_norm_eps": 1e-5},
    freq_factors=True,
    head_dim_free=False,
    settles=_settle,
    mlx=_mlx,
    windowed={"gguf", "mlx"},
    windows=windows_by_type,
    check=_check,
).spec()
