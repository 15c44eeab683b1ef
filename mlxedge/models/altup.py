"""Alternating updates (AltUp, Baykal et al., NeurIPS 2023): several streams of hidden states, of
which a layer computes with one, predicts all before and corrects all after (``Gemma3nTextAltUp`` of
transformers' modeling_gemma3n.py).

The streams are columns of what goes from layer to layer; a layer's x is a copy of the active one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxedge.models import per_layer

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph

#: As many streams as there are names for: the first is the embedding's.
COUNT = 4
PROJECTIONS = tuple(f"model.altup_projections.{i}.weight" for i in range(COUNT - 1))
MERGES = tuple(f"model.altup_unembed_projections.{i}.weight" for i in range(COUNT - 1))
#: The matrices of a layer before and after the block itself.
BEFORE = (("altup.modality_router",), ("altup.prediction_coefs",))
AFTER = (("altup.modality_router",), ("altup.correction_coefs",))
ROUTER_NORM, OUTPUT_SCALE = "altup.router_norm", "altup.correct_output_scale"


@dataclass(frozen=True)
class AltUp:
    """Which stream is ``active``, and whether what the layer's own inputs see of it is ``scaled``
    by weights of its own."""

    active: int
    scaled: bool


def columns(number: int) -> str:
    """The name of a stream's columns."""
    return "x" if number == 0 else f"x.{number}"


def prelude(graph: Graph) -> None:
    """The other streams: projections of the first one, of its magnitude."""
    first = graph.columns(columns(0))
    others = [graph.columns(columns(i)) for i in range(1, COUNT)]
    graph.linear(first, PROJECTIONS, others)
    for other in others:
        graph.tape.match(other, first)


def _factors(graph: Graph, layer: int, x: Any, group: tuple[str, ...], bias: float) -> Any:
    """What a router makes of x: a number for each stream, or for each pair."""
    shape, tape, block = graph.shape, graph.tape, f"model.layers.{layer}."
    count = COUNT * COUNT if group is BEFORE[1] else COUNT
    seen, routed = graph.buffers("altup router", [shape.hidden, COUNT])
    (found,) = graph.buffers("altup factors", [count])
    weight = graph.weights.vector(f"{block}{ROUTER_NORM}.weight")
    tape.norm(x, weight * np.float32(1 / shape.hidden), shape.epsilon, seen)
    graph.linear(seen, (f"{block}{BEFORE[0][0]}.weight",), [routed])
    tape.scale(routed, 1.0, 1.0)  # tanh
    (name,) = (f"{block}{group[0]}.weight",)
    graph.tap((name,), routed)
    (product,) = graph.weights.products(name, routed, [found])
    given = np.full(count, bias, np.float32) if bias else None
    tape.linear(routed, [graph.product(product.matrix, found, given)])
    return found


def predict(graph: Graph, layer: int, altup: AltUp) -> None:
    """x = the active one of the predictions."""
    tape, hidden = graph.tape, graph.shape.hidden
    streams, predicted = graph.streams, _predicted(graph)
    factors = _factors(graph, layer, graph.columns(columns(altup.active)), BEFORE[1], 0.0)
    tape.mix(streams, streams, factors, predicted, COUNT)
    tape.multiply(_piece(graph, altup.active), np.ones(hidden, np.float32), graph.x)


def correct(graph: Graph, layer: int, altup: AltUp) -> None:
    """streams = the predictions and what was wrong with the active one, of which each takes as much
    as it is told; then all but the first take the layer's own inputs."""
    tape, shape, x = graph.tape, graph.shape, graph.x
    factors = _factors(graph, layer, x, AFTER[1], 1.0)
    tape.add(_piece(graph, altup.active), x, -1.0)
    tape.mix(_predicted(graph), x, factors, graph.streams, COUNT)
    block = f"model.layers.{layer}."
    scale = np.ones(shape.hidden, np.float32)
    if altup.scaled:
        scale = graph.weights.vector(f"{block}{OUTPUT_SCALE}")
    tape.multiply(graph.columns(columns(altup.active)), scale, x)
    delta = per_layer.computed(graph, layer, x)
    for number in range(1, COUNT):
        tape.add(delta, graph.columns(columns(number)))


def merge(graph: Graph) -> None:
    """x = the mean of the streams, each projected and of the first one's magnitude."""
    tape, x = graph.tape, graph.x
    first = graph.columns(columns(0))
    tape.multiply(first, np.ones(graph.shape.hidden, np.float32), x)
    (other,) = graph.buffers("altup merge", [graph.shape.hidden])
    for number, name in enumerate(MERGES, 1):
        graph.linear(graph.columns(columns(number)), (name,), [other])
        tape.match(other, first)
        tape.add(other, x)
    tape.scale(x, 1 / COUNT)


def _predicted(graph: Graph) -> Any:
    return graph.buffers("altup predicted", [graph.streams.width])[0]


def _piece(graph: Graph, number: int) -> Any:
    """One of the predictions."""
    whole = _predicted(graph)
    return graph.tape.columns(whole, whole.stored // COUNT * number, graph.shape.hidden)
