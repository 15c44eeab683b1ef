"""Which layers attend to a window of positions only, and what configs say of that."""

from __future__ import annotations

from collections.abc import Sequence

from mlxedge.models.spec import Config

SLIDING, FULL = "sliding_attention", "full_attention"


def no_windows(config: Config) -> tuple[int, ...]:
    return (0,) * config["num_hidden_layers"]


def layer_types(config: Config, period: int) -> list[str]:
    """Those that a silent config means: all slide but every ``period``-th."""
    given = config.get("sliding_window_pattern")
    period = given if type(given) is int and given > 0 else period
    layers = range(1, config["num_hidden_layers"] + 1)
    return [SLIDING if period and i % period else FULL for i in layers]


def windows_by_type(config: Config) -> tuple[int, ...]:
    """``sliding_window`` in the layers that ``layer_types`` says."""
    window = int(config.get("sliding_window") or 0)
    return tuple(window if kind == SLIDING else 0 for kind in config["layer_types"])


def period_of(config: Config) -> int | None:
    """The period with which layers attend to everything, or ``None`` if they have none."""
    return every([kind != SLIDING for kind in config["layer_types"]])


def every(layers: Sequence[bool]) -> int | None:
    """The period with which it is true of ``layers``, or ``None`` if there is none."""
    count = len(layers)
    periods = range(1, count + 1)
    return next((p for p in periods if layers == [(i + 1) % p == 0 for i in range(count)]), None)


def periodic(config: Config, runtime: str) -> list[str]:
    """An objection where mlx-lm knows the layers with windows by their period alone."""
    if runtime != "mlx" or period_of(config) is not None:
        return []
    return ["mlx-lm has full attention in every so many layers, this model otherwise (layer_types)"]


def every_layer(config: Config, default: int | None) -> tuple[int, ...]:
    """``sliding_window`` for all layers; ``default`` is what a silent config means."""
    return (int(config.get("sliding_window", default) or 0),) * config["num_hidden_layers"]


def qwen_windows(config: Config) -> tuple[int, ...]:
    """None unless ``use_sliding_window`` is set; then in the layers that ``layer_types`` names, or
    from ``max_window_layers`` on."""
    layers = range(config["num_hidden_layers"])
    window = int(config.get("sliding_window", 4096) or 0)
    if not config.get("use_sliding_window"):
        return no_windows(config)
    if types := config.get("layer_types"):
        return tuple(window if kind == SLIDING else 0 for kind in types)
    first = int(config.get("max_window_layers", 28))
    return tuple(window if layer >= first else 0 for layer in layers)
