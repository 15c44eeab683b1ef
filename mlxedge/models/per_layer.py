"""Inputs that each layer has of its own beside the stream: rows of a second table by token, and a
projection of the first embedding (Gemma 3n and 4; ``get_per_layer_inputs`` and
``project_per_layer_inputs`` of transformers' modeling_gemma4.py).

They are made once, before the first layer, and go along in the stream. At its end a layer adds what
a gate makes of its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mlxedge.models.spec import Config, Name

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph

TABLE = "model.embed_tokens_per_layer.weight"
PROJECTION = "model.per_layer_model_projection.weight"
_NORM = "model.per_layer_projection_norm"
#: A layer's matrices, in the order in which they compute.
GROUPS = (("per_layer_input_gate",), ("per_layer_projection",))
_LAYER_NORM = "post_per_layer_input_norm"

_BLOCK = "model.layers.{i}."


def _given(config: Config) -> bool:
    return bool(config["hidden_size_per_layer_input"])


NAMES = tuple(
    Name(hf, f"{gguf}.weight", shape, present=_given)
    for hf, gguf, shape in (
        (TABLE, "per_layer_token_embd", ("vocab_per_layer", "per_layers")),
        (PROJECTION, "per_layer_model_proj", ("per_layers", "hidden")),
        (f"{_NORM}.weight", "per_layer_proj_norm", ("per_layer",)),
        (f"{_BLOCK}{GROUPS[0][0]}.weight", "blk.{i}.inp_gate", ("per_layer", "hidden")),
        (f"{_BLOCK}{GROUPS[1][0]}.weight", "blk.{i}.proj", ("hidden", "per_layer")),
        (f"{_BLOCK}{_LAYER_NORM}.weight", "blk.{i}.post_norm", ("hidden",)),
    )
)


def prelude(graph: Graph) -> None:
    """inputs = (the norm, layer by layer, of the projection of x + inputs) / √2."""
    shape, tape = graph.shape, graph.tape
    inputs = graph.columns("inputs")
    (projected,) = graph.buffers("per layer", [inputs.width])
    graph.linear(graph.columns("x"), (PROJECTION,), [projected])
    tape.scale(projected, shape.hidden**-0.5)
    weight = graph.weights.vector(f"{_NORM}.weight")
    tape.norm(projected, weight, shape.epsilon, projected, pieces=shape.layers)
    tape.add(projected, inputs)
    tape.scale(inputs, math.sqrt(0.5))


def computed(graph: Graph, layer: int, x: Any) -> Any:
    """The norm of the projection of the layer's inputs times a gate of x."""
    shape, tape = graph.shape, graph.tape
    first, _ = shape.columns["inputs"]
    own = tape.columns(graph.stream, first + layer * shape.per_layer, shape.per_layer)
    gate, delta = graph.buffers("per layer", [shape.per_layer, shape.hidden])
    names = [tuple(f"model.layers.{layer}.{n}.weight" for n in group) for group in GROUPS]
    graph.linear(x, names[0], [gate])
    tape.gate(gate, own, shape.activation)
    graph.linear(gate, names[1], [delta])
    graph.norm(delta, f"model.layers.{layer}.{_LAYER_NORM}", delta)
    return delta


def record(graph: Graph, layer: int) -> None:
    """x += what is computed of the layer's inputs."""
    graph.tape.add(computed(graph, layer, graph.x), graph.x)


__all__ = ["GROUPS", "NAMES", "PROJECTION", "TABLE", "computed", "prelude", "record"]
