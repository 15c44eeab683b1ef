"""Attention whose output each head multiplies by the sigmoid of a gate, which ``q_proj`` makes
beside the queries: of each head in turn its query, its gate (Qwen3-Next; arXiv 2505.06708)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxedge.models.mixers.attention import attend, cache_bytes, groups, settings

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph

__all__ = ["NAME", "cache_bytes", "groups", "record", "settings", "sizes"]

NAME = "gated_attention"


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return {"gated_q": 2 * config["num_attention_heads"] * config["head_dim"]}


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    shape, weights = graph.shape, graph.weights
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    out, q, gate, k, v = graph.buffers(
        "gated_attention", [q_width, q_width, q_width, kv_width, kv_width]
    )
    (q_name, k_name, v_name) = names[0]
    graph.tap(names[0], x)
    halves = np.arange(2 * q_width).reshape(shape.heads, 2, shape.head_dim)
    products = weights.picked(q_name, x, [q, gate], [halves[:, i].ravel() for i in (0, 1)])
    products += weights.products(k_name, x, [k]) + weights.products(v_name, x, [v])
    graph.tape.linear(x, products)
    attend(graph, layer, q, k, v, out)
    graph.tape.gate(gate, out, "sigmoid")
    return gate
