"""Grouped-query attention whose output is multiplied by the sigmoid of a projection of its input,
``gate_proj`` (arXiv 2505.06708), as in Arcee's Trinity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxedge.models.mixers.attention import attend, settings, sizes

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph
    from mlxedge.models.shape import Shape

__all__ = ["groups", "record", "settings", "sizes"]

_INPUTS = tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v", "gate"))


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    return [_INPUTS, ("self_attn.o_proj",)]


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    shape = graph.shape
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widths = [q_width, q_width, kv_width, kv_width, q_width]
    out, q, k, v, gate = graph.buffers("output_gate", widths)
    graph.linear(x, names[0], [q, k, v, gate])
    attend(graph, layer, q, k, v, out)
    graph.tape.gate(gate, out, "sigmoid")
    return gate
