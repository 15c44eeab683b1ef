"""Attention and a state space beside each other: both see the same, and what they give is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlxedge.models.mixers import attention, mamba2

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph
    from mlxedge.models.shape import Shape

_QKV = tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v"))
_IN, _SPACE_OUT, _OUT = "mamba.in_proj", ("mamba.out_proj",), ("self_attn.o_proj",)


def settings(config: Mapping[str, Any]) -> mamba2.Mamba2:
    return mamba2.settings(config)


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return mamba2.sizes(config)


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    return [(*_QKV, _IN), _SPACE_OUT, _OUT]


def cache_bytes(shape: Shape, layer: int, context: int) -> int:
    attended = attention.cache_bytes(shape, layer, context)
    return attended + mamba2.state_bytes(shape.mixing["beside"])


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    shape, weights, own = graph.shape, graph.weights, graph.shape.mixing["beside"]
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    out, q, k, v = graph.buffers("attention", [q_width, q_width, kv_width, kv_width])
    graph.tap(names[0], x)
    *qkv, first = names[0]
    products = [
        p for n, to in zip(qkv, (q, k, v), strict=True) for p in weights.products(n, x, [to])
    ]
    products += weights.products(first, x, mamba2.projected(graph, own))
    graph.tape.linear(x, products)
    # The stream does not change what is seen: that is a norm of it.
    (delta,) = graph.buffers("beside", [shape.hidden])
    graph.linear(mamba2.scan(graph, layer, own), names[1], [delta], add_to=graph.x)
    attention.attend(graph, layer, q, k, v, out)
    return out
