"""An MLP of two matrices in the place of a mixer: what architectures have that alternate between
one thing a block. Positions are not mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph
    from mlxedge.models.shape import Shape

_UP, _DOWN = ("mlp.up_proj",), ("mlp.down_proj",)


def settings(config: Mapping[str, Any]) -> None:
    """All of it is in the shape."""


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return {}


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    return [_UP, _DOWN]


def cache_bytes(shape: Shape, layer: int, context: int) -> int:
    return 0


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    (up,) = graph.buffers("mlp", [graph.shape.intermediate])
    graph.linear(x, names[0], [up])
    graph.tape.gate(up, None, graph.shape.activation)
    return up
