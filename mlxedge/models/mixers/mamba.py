"""The mixer of Mamba (arXiv 2312.00752): a convolution, and a selective scan of each channel.

The time steps, B and C are made of what the convolution gives, the former through a matrix of low
rank. After ``MambaMixer`` in transformers' modeling_mamba.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.mixers.attention import STATE_BYTES
from mlxedge.models.spaces import KERNEL, RATES, in_gguf, namer, rates, whole_numbers
from mlxedge.models.spec import Config, Name

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph
    from mlxedge.models.shape import Shape

_IN, _MADE, _STEPS, _OUT = (
    (f"mamba.{part}",) for part in ("in_proj", "x_proj", "dt_proj", "out_proj")
)
RECASTS = (*KERNEL, in_gguf("A_log", "ssm_a", RATES))


@dataclass(frozen=True)
class Mamba:
    """``inner`` channels with states of ``size``, time steps of ``rank``, convolutions of ``width``
    positions."""

    inner: int
    size: int
    rank: int
    width: int


def settings(config: Mapping[str, Any]) -> Mamba:
    return Mamba(
        inner=config["mamba_inner"],
        size=config["mamba_d_state"],
        rank=config["mamba_dt_rank"],
        width=config["mamba_d_conv"],
    )


def adopt(config: Config, called: Mapping[str, str], defaults: Mapping[str, Any]) -> Config:
    """``config`` with the keys that are read here, which are jamba's: those that an architecture
    calls otherwise (``called``), and ``defaults`` by the names here; and with the number of
    channels. Raises UnsupportedModelError for what makes no sense."""
    made = dict(config)
    for key, default in defaults.items():
        given = made.get(called.get(key, key))
        made[key] = default if given is None else given
    if made["mamba_dt_rank"] == "auto":
        made["mamba_dt_rank"] = math.ceil(made["hidden_size"] / 16)
    whole_numbers(made, 1, "mamba_d_state", "mamba_d_conv", "mamba_dt_rank")
    expand = made["mamba_expand"]
    if type(expand) not in (int, float) or not 0 < expand * made["hidden_size"] < 1 << 31:
        raise UnsupportedModelError(f"the state spaces expand by {str(expand)[:40]!r}")
    return made | {"mamba_inner": int(expand * made["hidden_size"])}


def names(layers: Callable[[Config], Collection[int]] | None = None) -> tuple[Name, ...]:
    """Its tensors in those layers, or in all. Those that GGUF has in another form have a name of
    their own for the place."""
    own = namer(layers)
    return (
        own("in_proj.weight", "ssm_in.weight", "ssm_in", "hidden"),
        own("in_proj.bias", "ssm_in.bias", "ssm_in", key="mamba_proj_bias"),
        own("conv1d.weight", "ssm_conv1d.kernel", "ssm_inner", "one", "ssm_width"),
        own("conv1d.bias", "ssm_conv1d.bias", "ssm_inner", key="mamba_conv_bias"),
        own("x_proj.weight", "ssm_x.weight", "ssm_made", "ssm_inner"),
        own("dt_proj.weight", "ssm_dt.weight", "ssm_inner", "ssm_rank"),
        own("dt_proj.bias", "ssm_dt.bias", "ssm_inner", exact=True),
        own("A_log", "ssm_a.log", "ssm_inner", "ssm_size", exact=True),
        own("D", "ssm_d", "ssm_inner"),
        own("out_proj.weight", "ssm_out.weight", "hidden", "ssm_inner"),
        own("out_proj.bias", "ssm_out.bias", "hidden", key="mamba_proj_bias"),
    )


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    own = settings(config)
    return {
        "ssm_in": 2 * own.inner,
        "ssm_inner": own.inner,
        "ssm_made": own.rank + 2 * own.size,
        "ssm_rank": own.rank,
        "ssm_size": own.size,
        "ssm_width": own.width,
    }


def metadata(config: Mapping[str, Any]) -> dict[str, int]:
    """GGUF's, without the architecture."""
    own = settings(config)
    return {
        "ssm.conv_kernel": own.width,
        "ssm.inner_size": own.inner,
        "ssm.state_size": own.size,
        "ssm.time_step_rank": own.rank,
    }


def objections(config: Mapping[str, Any], runtime: str) -> list[str]:
    """What the runtimes do not have of it."""
    own, found = settings(config), []
    if runtime == "gguf" and config["mamba_proj_bias"]:
        found.append("llama.cpp has no biases around a state space")
    if runtime == "gguf" and not config["mamba_conv_bias"]:
        found.append("llama.cpp needs biases of the convolution")
    if runtime == "gguf" and own.inner != 2 * config["hidden_size"]:
        found.append("llama.cpp's state spaces have twice as many channels (expand)")
    if own.width < 2:
        found.append("the runtimes need convolutions of more than one position")
    return found


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    return [_IN, _MADE, _STEPS, _OUT]


def cache_bytes(shape: Shape, layer: int, context: int) -> int:
    own = shape.mixing["mamba"]
    return own.inner * (own.width - 1 + own.size) * STATE_BYTES


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    import numpy as np

    tape, weights, own = graph.tape, graph.weights, graph.shape.mixing["mamba"]
    module = f"model.layers.{layer}.mamba."
    v, gate, dt = graph.buffers("mamba", [own.inner] * 3)
    low, b, c = graph.buffers("mamba made", [own.rank, own.size, own.size])
    graph.linear(x, names[0], [v, gate])
    kernel = weights.vector(f"{module}conv1d.weight").reshape(own.inner, own.width)
    tape.causal_conv(v, v, kernel, bias=weights.optional(f"{module}conv1d.bias"))
    graph.linear(v, names[1], [low, b, c])
    for part, made in (("dt", low), ("b", b), ("c", c)):
        weight = weights.optional(f"{module}{part}_layernorm.weight")
        if weight is not None:
            tape.norm(made, weight, graph.shape.epsilon, made)
    # The bias is part of the product.
    graph.linear(low, names[2], [dt])
    tape.time_steps(dt, np.zeros(own.inner, np.float32))
    a = rates(weights.vector(f"{module}A_log")).reshape(own.inner, own.size)
    tape.scan_channels(v, b, c, dt, v, a=a, d=weights.vector(f"{module}D"))
    tape.gate(gate, v)
    return gate
