"""A mixture of experts beside a dense MLP, each with norms of its own (Gemma 4 26B-A4B;
``Gemma4TextRouter`` and ``Gemma4TextDecoderLayer`` of transformers' modeling_gemma4.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxedge.models.experts import ROUTER, STACKS, ExpertShape
from mlxedge.models.recasts import Join, Recast
from mlxedge.models.spec import Config, Name

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph

_DENSE_NORM, _EXPERTS_IN, _EXPERTS_OUT = (
    "post_feedforward_layernorm_1",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_2",
)
_SCALE, _EACH = "router.scale", "router.per_expert_scale"
#: The matrices, those together that have the same input, after those of the dense MLP.
GROUPS: tuple[tuple[str, ...], ...] = ((ROUTER,), STACKS[:2], STACKS[2:])
_BLOCK = "model.layers.{i}."


def names(layers: Callable[[Config], Collection[int]]) -> tuple[Name, ...]:
    def name(hf: str, gguf: str, *shape: str, stored: str | None = None, mlx: str = "") -> Name:
        return Name(
            _BLOCK + hf,
            f"blk.{{i}}.{gguf}",
            shape,
            layers=layers,
            stored=_BLOCK + stored if stored else None,
            mlx=_BLOCK + mlx if mlx else None,
        )

    router, shapes = "router.proj.weight", (("expert", "hidden"),) * 2 + (("hidden", "expert"),)
    return (
        name(f"{ROUTER}.weight", "ffn_gate_inp.weight", "experts", "hidden", stored=router,
             mlx=router),
        name(_SCALE, "ffn_gate_inp.scale", "hidden"),
        name(_EACH, "ffn_down_exps.scale", "experts"),
        name(f"{_DENSE_NORM}.weight", "post_ffw_norm_1.weight", "hidden"),
        name(f"{_EXPERTS_IN}.weight", "pre_ffw_norm_2.weight", "hidden"),
        name(f"{_EXPERTS_OUT}.weight", "post_ffw_norm_2.weight", "hidden"),
        *(
            name(
                f"{stack}.weight",
                f"ffn_{kind}_exps.weight",
                "experts",
                *shape,
                stored=f"experts.{kind}_proj" if kind == "down" else None,
                mlx=f"experts.switch_glu.{kind}_proj.weight",
            )
            for stack, kind, shape in zip(STACKS, ("gate", "up", "down"), shapes, strict=True)
        ),
    )  # fmt: skip


_GATE_UP = tuple(f"{_BLOCK}{stack}.weight" for stack in STACKS[:2])
#: Gate and up are one tensor but for mlx-lm.
RECASTS = (
    Recast("stored", _GATE_UP, (f"{_BLOCK}experts.gate_up_proj",), (Join(),)),
    Recast("gguf", _GATE_UP, ("blk.{i}.ffn_gate_up_exps.weight",), (Join(),)),
)


def record(
    graph: Graph, layer: int, experts: ExpertShape, names: list[tuple[str, ...]], dense: Any
) -> None:
    """dense = the norm of what the dense MLP made, ``dense``, and that of what the experts make of
    x."""
    tape, shape, weights, x = graph.tape, graph.shape, graph.weights, graph.x
    block = f"model.layers.{layer}."
    graph.norm(dense, f"{block}{_DENSE_NORM}", dense)
    seen, made = graph.buffers("experts beside", [shape.hidden, shape.hidden])
    choice, logits, (rows, gate, up, down), _ = graph.expert_buffers
    scale = weights.vector(f"{block}{_SCALE}") * np.float32(shape.hidden**-0.5)
    tape.norm(x, scale, shape.epsilon, seen)
    graph.linear(seen, names[0], [logits])
    each = weights.vector(f"{block}{_EACH}")
    tape.route(logits, choice, score=experts.score, normalise=experts.normalise, each=each)
    graph.norm(x, f"{block}{_EXPERTS_IN}", seen)
    tape.gather(seen, choice, rows)
    graph.expert_products(experts, names[1:], (rows, gate, up, down))
    tape.combine(down, choice, made, add=False)
    graph.norm(made, f"{block}{_EXPERTS_OUT}", made)
    tape.add(made, dense)
