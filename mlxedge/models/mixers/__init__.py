"""What mixes positions in a block. One file per mixer; the file's name is its registration."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph
    from mlxedge.models.shape import Shape


class Mixer(Protocol):
    """What the module of a mixer has. Names of matrices are those of a layer, in full."""

    def settings(self, config: Mapping[str, Any]) -> Any:
        """What it reads from a settled config, as a frozen dataclass (``Shape.mixing``), or
        ``None``. A field ``most`` is the context up to which it can be computed."""

    def sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """What the words in the shapes of its tensors stand for, beside those of
        ``ModelSpec.sizes``."""

    def groups(self, shape: Shape, layer: int) -> list[tuple[str, ...]]:
        """The modules within a layer that hold its matrices, those together that have the same
        input, in the order in which they compute. The last one projects onto the stream."""

    def record(self, graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
        """Record the steps from the buffer ``x``, the block's input, up to what is to be projected
        onto the stream; returns the buffer of that. ``names`` are the weights of ``groups`` but for
        the last."""


def load_mixer(name: str) -> Mixer:
    return cast("Mixer", importlib.import_module(f"{__name__}.{name}"))
