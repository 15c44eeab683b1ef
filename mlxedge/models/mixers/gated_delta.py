"""Linear attention by the gated delta rule, behind a short convolution of q, k and v, and with a
gated norm of what each head gives: Gated DeltaNet (arXiv 2412.06464)."""

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

NAME = "gated_delta"
MODULE = "linear_attn"
_IN = tuple(f"{MODULE}.in_proj_{part}" for part in ("qkv", "z", "b", "a"))
_OUT = (f"{MODULE}.out_proj",)


@dataclass(frozen=True)
class DeltaShape:
    """Heads of values, each of which shares one of keys with its neighbours; the sizes of both, and
    how many positions the convolution sees."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def keys(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolution: q, k and v."""
        return 2 * self.keys + self.values

    @property
    def kept(self) -> int:
        """Bytes of a layer's state: what the convolution sees, and a matrix for each head."""
        return STATE_BYTES * (
            self.channels * (self.kernel - 1) + self.value_heads * self.key_dim * self.value_dim
        )


_KEYS = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "kernel": "linear_conv_kernel_dim",
}


def settings(config: Mapping[str, Any]) -> DeltaShape:
    """Raises UnsupportedModelError where the config makes no sense."""
    wrong = [
        key
        for key in _KEYS.values()
        if type(config.get(key)) is not int or not 0 < config[key] < 1 << 16
    ]
    if wrong:
        given = ", ".join(f"{key} ({str(config.get(key, 'absent'))[:40]!r})" for key in wrong)
        raise UnsupportedModelError(f"the config needs positive whole numbers for {given}")
    found = DeltaShape(**{field: config[key] for field, key in _KEYS.items()})
    if found.value_heads % found.key_heads:
        raise UnsupportedModelError(
            f"linear_num_value_heads ({found.value_heads}) is not a multiple of "
            f"linear_num_key_heads ({found.key_heads})"
        )
    return found


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    delta = settings(config)
    return {
        "delta_channels": delta.channels,
        "delta_keys": delta.keys,
        "delta_values": delta.values,
        "delta_heads": delta.value_heads,
        "delta_head": delta.value_dim,
        "delta_kernel": delta.kernel,
    }


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    return [_IN, _OUT]


def cache_bytes(shape: Shape, layer: int, context: int) -> int:
    own: DeltaShape = shape.mixing[NAME]
    return own.kept


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    delta: DeltaShape = graph.shape.mixing[NAME]
    block = f"model.layers.{layer}.{MODULE}"
    heads, values = delta.value_heads, delta.values
    qkv, gate, b, a, out = graph.buffers(NAME, [delta.channels, values, heads, heads, values])
    graph.linear(x, names[0], [qkv, gate, b, a])
    kernel = graph.weights.vector(f"{block}.conv1d.weight").reshape(delta.channels, delta.kernel)
    graph.tape.causal_conv(qkv, qkv, kernel)
    graph.tape.delta_rule(
        (qkv, 0, delta.keys),
        (qkv, delta.keys, delta.keys),
        (qkv, 2 * delta.keys, values),
        a,
        b,
        gate,
        out,
        key_heads=delta.key_heads,
        value_heads=heads,
        rate=-np.exp(graph.weights.vector(f"{block}.A_log")),
        bias=graph.weights.vector(f"{block}.dt_bias"),
        norm=graph.weights.vector(f"{block}.norm.weight"),
        epsilon=graph.shape.epsilon,
    )
    return out
