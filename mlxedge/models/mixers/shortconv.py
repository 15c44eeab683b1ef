"""The gated short convolution of LFM2: out = c · conv(b · x), with b, c and x from one matrix.

After ``Lfm2ShortConv`` in transformers' modeling_lfm2.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from mlxedge.models.mixers.attention import STATE_BYTES
from mlxedge.models.recasts import Recast, Reshape
from mlxedge.models.spec import Config, Name

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph
    from mlxedge.models.shape import Shape

_IN, _OUT, _CONV = ("conv.in_proj",), ("conv.out_proj",), "conv.conv"
_BLOCK = "model.layers.{i}."
_KERNEL = f"{_BLOCK}{_CONV}.weight"

#: The kernel of a channel: ``[channels, 1, width]``, in GGUF ``[channels, width]``, in MLX
#: ``[channels, width, 1]``.
RECASTS = (
    Recast(
        "gguf",
        (_KERNEL,),
        ("blk.{i}.shortconv.conv.weight",),
        (Reshape(lambda shape: (shape[0], shape[2])),),
    ),
    Recast("mlx", (_KERNEL,), (_KERNEL,), (Reshape(lambda shape: (shape[0], shape[2], 1)),)),
)


def names(layers: Callable[[Config], Collection[int]]) -> tuple[Name, ...]:
    """Its tensors in those layers; biases if ``conv_bias``. The kernel, which GGUF has in another
    form, has a name of its own for the place."""
    made = []
    for module, leaf, rows, cols in (
        ("conv", "kernel", "hidden", ("one", "conv_width")),
        ("in_proj", "weight", "conv_in", ("hidden",)),
        ("out_proj", "weight", "hidden", ("hidden",)),
    ):
        hf, gguf = f"{_BLOCK}conv.{module}", f"blk.{{i}}.shortconv.{module}"
        made.append(Name(f"{hf}.weight", f"{gguf}.{leaf}", (rows, *cols), layers=layers))
        made.append(Name(f"{hf}.bias", f"{gguf}.bias", (rows,), present=_biased, layers=layers))
    return tuple(made)


def _biased(config: Config) -> bool:
    return bool(config.get("conv_bias"))


def settings(config: Mapping[str, Any]) -> int:
    """How many positions its kernels cover."""
    return int(config["conv_L_cache"])


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return {"conv_width": config["conv_L_cache"], "conv_in": 3 * config["hidden_size"]}


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    return [_IN, _OUT]


def cache_bytes(shape: Shape, layer: int, context: int) -> int:
    return shape.hidden * (shape.mixing["shortconv"] - 1) * STATE_BYTES


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    tape, weights, hidden = graph.tape, graph.weights, graph.shape.hidden
    b, c, v = graph.buffers("shortconv", [hidden] * 3)
    graph.linear(x, names[0], [b, c, v])
    tape.gate(b, v, "none")
    module = f"model.layers.{layer}.{_CONV}"
    kernel = weights.vector(f"{module}.weight").reshape(hidden, graph.shape.mixing["shortconv"])
    bias = weights.optional(f"{module}.bias")
    tape.causal_conv(b, b, kernel, bias=bias, activation="none")
    tape.gate(c, b, "none")
    return c
