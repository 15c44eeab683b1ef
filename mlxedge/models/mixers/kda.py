"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692): the gated delta rule with a decay for each
dimension of the keys, of which a projection of low rank tells, as another of the output's gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.mixers.attention import STATE_BYTES

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph
    from mlxedge.models.shape import Shape

NAME = "kda"
_BLOCK = "self_attn."
_IN = tuple(f"{_BLOCK}{part}_proj" for part in ("q", "k", "v", "f_a", "g_a", "b"))
_DECAY, _GATE, _OUT = ((f"{_BLOCK}{part}_proj",) for part in ("f_b", "g_b", "o"))
_KEYS = ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")


@dataclass(frozen=True)
class Kda:
    """Heads and their size, which is also the rank of what tells of decays and gates; and how many
    positions the convolutions see."""

    heads: int
    size: int
    kernel: int

    @property
    def width(self) -> int:
        return self.heads * self.size


def settings(config: Mapping[str, Any]) -> Kda:
    """Raises UnsupportedModelError where the config makes no sense."""
    wrong = [k for k in _KEYS if type(config.get(k)) is not int or not 0 < config[k] < 1 << 16]
    if wrong:
        given = ", ".join(f"{key} ({str(config.get(key, 'absent'))[:40]!r})" for key in wrong)
        raise UnsupportedModelError(f"the config needs positive whole numbers for {given}")
    return Kda(*(config[key] for key in _KEYS))


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    kda = settings(config)
    return {
        "kda": kda.width,
        "kda_heads": kda.heads,
        "kda_head": kda.size,
        "kda_kernel": kda.kernel,
    }


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    return [_IN, _DECAY, _GATE, _OUT]


def cache_bytes(shape: Shape, layer: int, context: int) -> int:
    """Of what the three convolutions see, and a matrix for each head."""
    kda: Kda = shape.mixing[NAME]
    return STATE_BYTES * kda.width * (3 * (kda.kernel - 1) + kda.size)


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    kda: Kda = graph.shape.mixing[NAME]
    block, width, weights = f"model.layers.{layer}.{_BLOCK}", kda.width, graph.weights
    q, k, v, decay, gate, out = graph.buffers(NAME, [width] * 6)
    f, g, b = graph.buffers("kda ranks", [kda.size, kda.size, kda.heads])
    graph.linear(x, names[0], [q, k, v, f, g, b])
    graph.linear(f, names[1], [decay])
    graph.linear(g, names[2], [gate])
    for part, buffer in (("q", q), ("k", k), ("v", v)):
        kernel = weights.vector(f"{block}{part}_conv1d.weight").reshape(width, kda.kernel)
        graph.tape.causal_conv(buffer, buffer, kernel)
    graph.tape.delta_rule(
        (q, 0, width),
        (k, 0, width),
        (v, 0, width),
        decay,
        b,
        gate,
        out,
        key_heads=kda.heads,
        value_heads=kda.heads,
        rate=-np.exp(weights.vector(f"{block}A_log")),
        bias=weights.vector(f"{block}dt_bias"),
        norm=weights.vector(f"{block}o_norm.weight"),
        epsilon=graph.shape.epsilon,
        activation="sigmoid",
    )
    return out
