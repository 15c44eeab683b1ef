"""Grouped-query attention with rotary embeddings: the mixer of most architectures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph
    from mlxedge.models.shape import Shape

#: Runtimes keep keys and values in f16 unless told otherwise.
KEPT_BYTES = 2
#: The states of recurrent layers they keep in f32.
STATE_BYTES = 4
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_FUSED = ("self_attn.qkv_proj",)
_OUT = ("self_attn.o_proj",)


def settings(config: Mapping[str, Any]) -> None:
    """All of it is in the shape."""


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return {}


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    if shape.wiring.qkv_fused:
        return [_FUSED, _OUT]
    heads = shape.attention[layer]
    own = 1 if heads.shared_with is not None else 2 if heads.keys_as_values else 3
    return [_QKV[:own], _OUT]


def cache_bytes(shape: Shape, layer: int, context: int) -> int:
    heads = shape.attention[layer]
    if heads.shared_with is not None:
        return 0
    kept = min(context, shape.windows[layer] or context)
    return 2 * heads.kv * heads.size * kept * KEPT_BYTES


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    shape, heads = graph.shape, graph.shape.attention[layer]
    q_width, kv_width = heads.count * heads.size, heads.kv * heads.size
    out, q = graph.buffers("attention", [q_width, q_width])
    kept = layer if heads.shared_with is None else heads.shared_with
    if kept in shape.shared:
        k, v = graph.columns(f"keys.{kept}"), graph.columns(f"values.{kept}")
    else:
        k, v = graph.buffers("attention keys", [kv_width, kv_width])
    graph.linear(x, names[0], [q, k, v][: 3 if shape.wiring.qkv_fused else len(names[0])])
    if heads.shared_with is None and (heads.keys_as_values or shape.wiring.value_norm):
        given = k if heads.keys_as_values else v
        ones = np.ones(heads.size, np.float32)
        graph.tape.norm(given, ones, shape.epsilon, v, pieces=heads.kv)
    attend(graph, layer, q, k, v, out)
    return out


def attend(graph: Graph, layer: int, q: Any, k: Any, v: Any, out: Any) -> None:
    """out = attention of what q, k and v hold."""
    shape, weights, wiring = graph.shape, graph.weights, graph.shape.wiring
    heads = shape.attention[layer]
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
    # What an earlier layer keeps is in its cache, or where the graph begins later in the stream.
    donor = heads.shared_with
    slot = None if donor is None else graph.kept.get(donor)
    graph.kept[layer] = graph.tape.attention(
        q,
        k,
        v,
        out,
        heads=heads.count,
        kv_heads=heads.kv,
        head_dim=heads.size,
        rotated=0 if rope is None else rope.dims(heads.size),
        scale=heads.size**-0.5 if scale is None else scale,
        q_norm=norms[0],
        k_norm=norms[1],
        epsilon=shape.epsilon,
        window=shape.windows[layer],
        cap=shape.factors.attention_cap,
        rope=0 if rope is None else graph.rope(rope, heads.size),
        neighbours=wiring.neighbours,
        centred=wiring.layer_norm,
        norm_last=wiring.head_norm == "last",
        sinks=weights.optional(f"model.layers.{layer}.self_attn.sinks"),
        slopes=alibi_slopes(heads.count, shape.factors.alibi) if shape.factors.alibi else None,
        slot=slot,
        placed=donor is not None,
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
