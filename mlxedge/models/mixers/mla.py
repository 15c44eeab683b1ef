"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries, keys and values are
projected up from latents of lower rank; a part of each key is rotated, and all heads share it.

It is computed as it is written down, and the cache holds the keys and values of all heads, not the
latents: of a head of 192 and 128 dimensions that is 1.25 KiB a position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxedge.models.rope import rope_settings, score_scale

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph
    from mlxedge.models.shape import Shape

_BLOCK = "self_attn."
_QUERY, _QUERY_DOWN, _QUERY_UP = (f"{_BLOCK}{part}_proj" for part in ("q", "q_a", "q_b"))
_DOWN, _UP, _OUT = (f"{_BLOCK}{part}" for part in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
#: Of the norms of latents: transformers takes no other, whatever a config says of the rest.
EPSILON = 1e-6


@dataclass(frozen=True)
class Latent:
    """Ranks of the latents (``q_rank`` ``None`` for queries without one), and of each head how many
    dimensions of a key are its own, how many are rotated and shared, and those of a value. Scores
    are multiplied by ``scale``; ``neighbours`` as in ``Wiring``. ``most`` is the context up to
    which that is all there is to it, ``None`` for any."""

    q_rank: int | None
    kv_rank: int
    plain: int
    turned: int
    value: int
    scale: float
    neighbours: bool
    most: int | None = None

    @property
    def key(self) -> int:
        return self.plain + self.turned


def settings(config: Mapping[str, Any]) -> Latent:
    plain, turned = int(config["qk_nope_head_dim"]), int(config["qk_rope_head_dim"])
    return Latent(
        q_rank=config.get("q_lora_rank"),
        kv_rank=int(config["kv_lora_rank"]),
        plain=plain,
        turned=turned,
        value=int(config["v_head_dim"]),
        scale=score_scale(rope_settings(config)) * (plain + turned) ** -0.5,
        neighbours=bool(config.get("rope_interleave", True)),
    )


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    heads, latent = config["num_attention_heads"], config["kv_lora_rank"]
    plain, turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value = config["v_head_dim"]
    return {
        "query": heads * (plain + turned),
        "query_rank": config["q_lora_rank"] or 0,
        "latent": latent,
        "latent_rotary": latent + turned,
        "keys_values": heads * (plain + value),
        "mixed": heads * value,
    }


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    if shape.mixing[shape.mixers[layer]].q_rank is None:
        return [(_QUERY, _DOWN), (_UP,), (_OUT,)]
    return [(_QUERY_DOWN, _DOWN), (_QUERY_UP,), (_UP,), (_OUT,)]


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    shape, latent = graph.shape, graph.shape.mixing[graph.shape.mixers[layer]]
    heads, block = shape.heads, f"model.layers.{layer}.{_BLOCK}"
    widths = [heads * size for size in (latent.value, latent.key, latent.key, latent.value)]
    out, q, k, v = graph.buffers("mla", widths)
    c, rotary, kv = graph.buffers(
        "mla latents", [latent.kv_rank, latent.turned, heads * (latent.plain + latent.value)]
    )
    c_q = None if latent.q_rank is None else graph.buffers("mla queries", [latent.q_rank])[0]
    graph.tap(names[0], x)
    query, down = names[0][:2]
    products = graph.weights.products(query, x, [q if c_q is None else c_q])
    graph.tape.linear(x, products + graph.weights.products(down, x, [c, rotary]))
    if c_q is not None:
        _norm(graph, f"{block}q_a_layernorm", c_q)
        graph.tap(names[1], c_q)
        graph.tape.linear(c_q, graph.weights.products(names[1][0], c_q, [q]))
    _norm(graph, f"{block}kv_a_layernorm", c)
    graph.linear(c, names[-1], [kv])
    graph.tape.unfold(kv, rotary, k, v, heads)
    rope = shape.ropes[layer]
    graph.tape.attention(
        q,
        k,
        v,
        out,
        heads=heads,
        kv_heads=heads,
        head_dim=latent.key,
        rotated=0 if rope is None else latent.turned,
        scale=latent.scale,
        rope=0 if rope is None else graph.rope(rope, latent.turned),
        neighbours=latent.neighbours,
        value_dim=latent.value,
        rotated_from=latent.plain,
    )
    return out


def _norm(graph: Graph, module: str, x: Any) -> None:
    graph.tape.norm(x, graph.weights.vector(f"{module}.weight"), EPSILON, x)
