"""Grouped-query attention with rotary embeddings: the mixer of most architectures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph
    from mlxedge.models.shape import Shape

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_FUSED = ("self_attn.qkv_proj",)
_OUT = ("self_attn.o_proj",)


def settings(config: Mapping[str, Any]) -> None:
    """All of it is in the shape."""


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return {}


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    return [_FUSED if shape.wiring.qkv_fused else _QKV, _OUT]


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    shape = graph.shape
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    out, q, k, v = graph.buffers("attention", [q_width, q_width, kv_width, kv_width])
    graph.linear(x, names[0], [q, k, v])
    attend(graph, layer, q, k, v, out)
    return out


def attend(graph: Graph, layer: int, q: Any, k: Any, v: Any, out: Any) -> None:
    """out = attention of what q, k and v hold."""
    shape, weights, wiring = graph.shape, graph.weights, graph.shape.wiring
    norms = [
        weights.optional(f"model.layers.{layer}.self_attn.{part}_norm.weight")
        for part in ("q", "k")
    ]
    norms = [w if w is None else w + np.float32(wiring.unit_norm) for w in norms]
    if wiring.head_norm == "width":
        for x, weight in zip((q, k), norms, strict=True):
            graph.tape.norm(x, weight, shape.epsilon, x, centred=wiring.layer_norm)
        norms = [None, None]
    if (limit := shape.factors.qkv_limit) is not None:
        for x in (q, k, v):
            graph.tape.clip(x, float(limit))
    if shape.factors.tempered:
        graph.tape.temper(q, shape.factors.tempered, shape.factors.span)
    rope = shape.ropes[layer]
    scale = shape.factors.attention
    scale = scale[layer] if isinstance(scale, tuple) else scale
    graph.tape.attention(
        q,
        k,
        v,
        out,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rotated=0 if rope is None else rope.dims(shape.head_dim),
        scale=shape.head_dim**-0.5 if scale is None else scale,
        q_norm=norms[0],
        k_norm=norms[1],
        epsilon=shape.epsilon,
        window=shape.windows[layer],
        cap=shape.factors.attention_cap,
        rope=0 if rope is None else graph.rope(rope, shape.head_dim),
        neighbours=wiring.neighbours,
        centred=wiring.layer_norm,
        norm_last=wiring.head_norm == "last",
        sinks=weights.optional(f"model.layers.{layer}.self_attn.sinks"),
        slopes=alibi_slopes(shape.heads, shape.factors.alibi) if shape.factors.alibi else None,
    )


def alibi_slopes(heads: int, largest: float) -> np.ndarray:
    """ALiBi's f32 ``[heads]`` (Press et al., 2021, arXiv 2108.12409, and their code for numbers of
    heads that are no power of two: those of the next smaller power, and then every second one of
    the next larger)."""
    power = 1 << (heads.bit_length() - 1)
    first = -largest / power * np.arange(1, power + 1)
    between = -largest / (2 * power) * np.arange(1, 2 * power, 2)
    exponents: np.ndarray = np.concatenate([first, between])[:heads]
    return np.exp2(exponents).astype(np.float32)
