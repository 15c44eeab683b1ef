"""The gated delta rule with projections of q, k and v each on its own, as in OLMo Hybrid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxedge.models.mixers import gated_delta
from mlxedge.models.mixers.gated_delta import MODULE, DeltaShape

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph
    from mlxedge.models.shape import Shape

NAME = "gated_delta_apart"
_IN = tuple(f"{MODULE}.{part}_proj" for part in "qkvabg")
_OUT = (f"{MODULE}.o_proj",)
#: Of the norm of heads: transformers takes no other, whatever a config says of the rest.
_EPSILON = 1e-5


@dataclass(frozen=True)
class Apart:
    """``beta``: the most by which a state corrects itself; above one it may turn over."""

    delta: DeltaShape
    beta: float


def settings(config: Mapping[str, Any]) -> Apart:
    turns = config.get("linear_allow_neg_eigval", True)
    return Apart(gated_delta.settings(config), 2.0 if turns else 1.0)


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return gated_delta.sizes(config)


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    return [_IN, _OUT]


def cache_bytes(shape: Shape, layer: int, context: int) -> int:
    own: Apart = shape.mixing[NAME]
    return own.delta.kept


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    own: Apart = graph.shape.mixing[NAME]
    delta, weights = own.delta, graph.weights
    block = f"model.layers.{layer}.{MODULE}"
    heads, keys, values = delta.value_heads, delta.keys, delta.values
    widths = [keys, keys, values, heads, heads, values, values]
    q, k, v, a, b, gate, out = graph.buffers(NAME, widths)
    graph.linear(x, names[0], [q, k, v, a, b, gate])
    kernel = weights.vector(f"{block}.conv1d.weight").reshape(delta.channels, delta.kernel)
    for part, rows in zip((q, k, v), np.split(kernel, [keys, 2 * keys]), strict=True):
        graph.tape.causal_conv(part, part, rows)
    graph.tape.delta_rule(
        (q, 0, keys),
        (k, 0, keys),
        (v, 0, values),
        a,
        b,
        gate,
        out,
        key_heads=delta.key_heads,
        value_heads=heads,
        rate=-np.exp(weights.vector(f"{block}.A_log")),
        bias=weights.vector(f"{block}.dt_bias"),
        norm=weights.vector(f"{block}.o_norm.weight"),
        epsilon=_EPSILON,
        beta=own.beta,
    )
    return out
