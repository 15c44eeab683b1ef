"""Records on a tape what a model computes."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from mlxedge.models import altup, beside, per_layer
from mlxedge.models.experts import ROUTER, ROUTER_BIAS, SHARED, SHARED_GATE, STACKS, ExpertShape
from mlxedge.models.mixers import load_mixer
from mlxedge.models.rope import Rope, inverse_frequencies
from mlxedge.models.shape import Shape
from mlxedge.models.weights import Weights
from mlxedge.models.wiring import TRAINED

EMBEDDING_NORM = "model.embed_norm"
POSITIONS = "model.embed_positions.weight"
TABLE, HEAD, HEAD_BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
#: The matrices of an MLP, those together that have the same input.
_MLP = {
    "gated": ("mlp.gate_proj", "mlp.up_proj"),
    "fused": ("mlp.gate_up_proj",),
    "plain": ("mlp.up_proj",),
    "none": (),
}
_LAUREL = (("laurel.linear_left",), ("laurel.linear_right",))
_ROUTED = ((ROUTER,), STACKS[:2], STACKS[2:])
_SHARING = ((ROUTER, SHARED_GATE, *SHARED[:2]), *_ROUTED[1:], SHARED[2:])
_SHARING_ALL = ((ROUTER, *SHARED[:2]), *_ROUTED[1:], SHARED[2:])


def layer_parts(shape: Shape, layer: int) -> dict[str, list[tuple[str, ...]]]:
    """The names of a layer's matrices by the part that has them, those together that have the same
    input, in the order in which they compute."""
    experts, wiring = shape.experts, shape.wiring
    own = _MLP[wiring.mlp]
    mlp: tuple[tuple[str, ...], ...] = (own, ("mlp.down_proj",)) if own else ()
    if experts is None or layer not in experts.layers:
        pass
    elif experts.beside:
        mlp += beside.GROUPS
    else:
        sharing = _SHARING if experts.shared_gate else _SHARING_ALL
        mlp = sharing if experts.shared_width else _ROUTED
    parts = {
        "before": altup.BEFORE if shape.altup else (),
        "mixer": load_mixer(shape.mixers[layer]).groups(shape, layer),
        "laurel": _LAUREL if wiring.laurel else (),
        "mlp": mlp,
        "after": altup.AFTER[1:] if shape.altup else (),
        "inputs": per_layer.GROUPS if shape.per_layer else (),
    }
    return {
        part: [tuple(f"model.layers.{layer}.{n}.weight" for n in group) for group in groups]
        for part, groups in parts.items()
    }


def layer_groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    """All of a layer's, in the order in which they compute."""
    return [group for groups in layer_parts(shape, layer).values() for group in groups]


def prelude_groups(shape: Shape) -> list[tuple[str, ...]]:
    """The names of the matrices before the first layer."""
    found = [(per_layer.PROJECTION,)] if shape.per_layer else []
    return found + ([altup.PROJECTIONS] if shape.altup else [])


def postlude_groups(shape: Shape) -> list[tuple[str, ...]]:
    """The names of the matrices between the last layer and the head."""
    return [(name,) for name in altup.MERGES] if shape.altup else []


def tables(shape: Shape) -> list[tuple[str, str, float]]:
    """What a token's rows are taken from: the table, the columns of the stream that they become,
    and the factor that they are multiplied by."""
    found = [(TABLE, "x", shape.factors.embedding)]
    if shape.per_layer:
        found.append((per_layer.TABLE, "inputs", math.sqrt(shape.per_layer)))
    return found


def head_name(tensors: Container[str]) -> str:
    """The matrix that makes logits: the embedding's where they are tied."""
    return HEAD if HEAD in tensors else TABLE


class Graph:
    """Records what a model computes on a tape, block by block.

    ``tapped`` puts a tap on the input of every group of linears, named by the tuple of their
    weights. Between blocks the hidden states are in the buffer ``stream``, and what else goes from
    layer to layer. ``x`` is what blocks work on: the stream, columns of it, or with AltUp a copy.
    """

    def __init__(self, shape: Shape, weights: Weights, ops: Any, tapped: bool = False) -> None:
        self.tape = tape = ops.Tape()
        self.shape, self.weights = shape, weights
        self._ops, self._tapped = ops, tapped
        self.stream, self._h = tape.buffer(shape.stream), tape.buffer(shape.hidden)
        self._columns: dict[str, Any] = {}
        self.x = tape.buffer(shape.hidden) if shape.altup else self.columns("x")
        self._shared: dict[tuple[str, tuple[int, ...]], list[Any]] = {}
        #: The slots of layers that keep keys and values.
        self.kept: dict[int, int] = {}
        #: Rotary embeddings, and of how many dimensions of a head, in the order of their numbers.
        self._ropes: dict[tuple[Rope, int], int] = {}

    @cached_property
    def _parallel_buffer(self) -> Any:
        """What attention gives, until the MLP has seen the stream without it."""
        return self.tape.buffer(self.shape.hidden)

    @cached_property
    def _delta(self) -> Any:
        """What a part of a block adds to the stream."""
        return self.tape.buffer(self.shape.hidden)

    @cached_property
    def _mixed(self) -> Any:
        """What experts give, until it is normed or scaled."""
        return self.tape.buffer(self.shape.hidden)

    def buffers(self, key: str, widths: Sequence[int]) -> list[Any]:
        """Buffers that all layers share which ask for a ``key`` and these widths, made when they
        are first asked for."""
        found = key, tuple(widths)
        if found not in self._shared:
            self._shared[found] = [self.tape.buffer(width) for width in widths]
        return self._shared[found]

    def columns(self, name: str) -> Any:
        """What the stream holds under a name (``Shape.columns``)."""
        if len(self.shape.columns) == 1:
            return self.stream
        if name not in self._columns:
            self._columns[name] = self.tape.columns(self.stream, *self.shape.columns[name])
        return self._columns[name]

    @cached_property
    def expert_buffers(self) -> tuple[Any, ...]:
        """The choice of experts; logits; by slot the input, gate, up and down; and of a shared
        expert how much it counts, gate and up."""
        experts, tape = self.shape.experts, self.tape
        assert experts is not None
        choice = tape.choice(experts.count, experts.used)
        hidden, width, shared = self.shape.hidden, experts.width, experts.shared_width
        slots = [tape.buffer(size, choice) for size in (hidden, width, width, hidden)]
        counts = [1] if experts.shared_gate else []
        sharing = [tape.buffer(size) for size in (*counts, shared, shared)] if shared else []
        return choice, tape.buffer(experts.count), slots, sharing

    @cached_property
    def streams(self) -> Any:
        """All hidden states of AltUp, side by side."""
        last, width = self.shape.columns[altup.columns(altup.COUNT - 1)]
        return self.tape.columns(self.stream, 0, last + width)

    def embed(self) -> Any:
        """The stream = the rows of the tokens; returns the table of x."""
        found = []
        for name, columns, factor in tables(self.shape):
            out = self.columns(columns)
            rows = self.weights.tensor(name).rows if columns != "x" else self.shape.vocab
            found.append(self.weights.matrix(name, rows, out.width))
            self.tape.embed(found[-1], out)
            if factor != 1.0:
                self.tape.scale(out, factor)
        if POSITIONS in self.weights:
            rows = self.weights.matrix(POSITIONS, self.shape.context, self.shape.hidden)
            self.tape.embed(rows, self._delta, of="positions")
            self.tape.add(self._delta, self.columns("x"))
        return found[0]

    def prelude(self) -> None:
        """The stream = what the first block sees, of the rows of the tokens."""
        if self.shape.per_layer:
            per_layer.prelude(self)
        if self.shape.altup:
            altup.prelude(self)

    def block(self, layer: int) -> None:
        """x = block ``layer`` of x."""
        shape, tape = self.shape, self.tape
        wiring = shape.wiring.of(shape.mixers[layer])
        x, h = self.x, self._h
        block = f"model.layers.{layer}."
        mixer = load_mixer(shape.mixers[layer])
        parts = layer_parts(shape, layer)
        *mixing, o_names = parts["mixer"]
        mlp_names = parts["mlp"]
        if layer == 0 and wiring.embedding_norm:
            self.norm(x, EMBEDDING_NORM, x)
        if shape.altup:
            altup.predict(self, layer, shape.altup)
        seen = self._normed(block, wiring.attention_norm, h)
        mixed = mixer.record(self, layer, mixing, seen)
        if not wiring.parallel:
            self._linear_onto(mixed, o_names, block, wiring.attention_out_norm)
            if wiring.laurel:
                self._laurel(parts["laurel"], block)
            if not mlp_names:
                return
            seen = self._normed(block, wiring.mlp_norm, h)
        else:
            # What the MLP sees is x before attention is added.
            after = self._parallel_buffer
            self.linear(mixed, o_names, [after])
            if wiring.mlp_norm is not None:
                seen = self._normed(block, wiring.mlp_norm, h)
        experts = shape.experts
        mixed_in = experts is not None and layer in experts.layers
        if experts is not None and mixed_in and not experts.beside:
            self._mixture(experts, mlp_names, seen, block)
        else:
            count = 1 if wiring.mlp == "plain" else 2
            gate, *up = self.buffers("mlp", [shape.widths[layer]] * count)
            self.linear(seen, mlp_names[0], [gate, *up])
            if shape.sparsity and shape.sparsity[layer]:
                tape.cut(gate, NormalDist().inv_cdf(shape.sparsity[layer]))
            numbers = self._trained(block)
            tape.gate(gate, up[0] if up else None, shape.activation, numbers)
            if experts is not None and mixed_in:
                self.linear(gate, mlp_names[1], [self._delta])
                beside.record(self, layer, experts, mlp_names[2:], self._delta)
                self._onto(block, wiring.mlp_out_norm)
            else:
                self._linear_onto(gate, mlp_names[1], block, wiring.mlp_out_norm)
        if wiring.parallel:
            tape.add(after, x, shape.factors.residual)
        if shape.altup:
            altup.correct(self, layer, shape.altup)
        elif shape.per_layer:
            per_layer.record(self, layer)
        if wiring.layer_scalar:
            tape.scale(x, float(self.weights.vector(f"{block}layer_scalar")[0]))

    def _trained(self, block: str) -> np.ndarray | None:
        """What the activation of an MLP has trained, as the tape takes it."""
        parts = TRAINED.get(self.shape.activation)
        if parts is None:
            return None
        found = [self.weights.vector(f"{block}mlp.act_fn.{part}") for part in parts]
        alpha_p, alpha_n, beta, epsilon = np.concatenate(found).astype(np.float64)
        # Trained are those of which the softplus counts.
        alphas = np.logaddexp(0.0, alpha_p), beta + np.logaddexp(0.0, alpha_n)
        return np.array([*alphas, beta, epsilon], np.float32)

    def _linear_onto(self, x: Any, names: tuple[str, ...], block: str, norm: str | None) -> None:
        """The stream += the factor · the norm, where there is one, of the product of x."""
        factor, delta = self.shape.factors.residual, self._delta
        if factor == 1.0 and norm is None:
            self.linear(x, names, [delta], add_to=self.x)
            return
        self.linear(x, names, [delta])
        self._onto(block, norm)

    def _onto(self, block: str, norm: str | None) -> None:
        """The stream += the factor · the norm, where there is one, of what a part made."""
        delta = self._delta
        if norm is not None:
            self.norm(delta, f"{block}{norm}", delta)
        self.tape.add(delta, self.x, self.shape.factors.residual)

    def _laurel(self, names: list[tuple[str, ...]], block: str) -> None:
        """x = (x + h + the norm of two matrices' product with h) / √2; attention saw h."""
        rank = self.weights.tensor(names[0][0]).shape[0]
        (low,) = self.buffers("laurel", [rank])
        self.linear(self._h, names[0], [low])
        self._linear_onto(low, names[1], block, "laurel.post_laurel_norm")
        self.tape.add(self._h, self.x)
        self.tape.scale(self.x, math.sqrt(0.5))

    def _mixture(
        self, experts: ExpertShape, names: list[tuple[str, ...]], seen: Any, block: str
    ) -> None:
        """x += the chosen experts' output for what they see, and the shared expert's."""
        tape, weights = self.tape, self.weights
        choice, logits, (rows, gate, up, down), sharing = self.expert_buffers
        routers, gate_up, last, *shared_down = names
        factor, norm = self.shape.factors.residual, self.shape.wiring.mlp_out_norm
        direct = factor == 1.0 and norm is None
        out = self.x if direct else self._mixed
        self.linear(seen, routers, [logits, *sharing])
        tape.route(
            logits,
            choice,
            score=experts.score,
            normalise=experts.normalise,
            scale=experts.scale,
            bias=weights.optional(f"{block}{ROUTER_BIAS}"),
            groups=experts.groups,
            top_groups=experts.top_groups,
            group_best=experts.group_best,
        )
        tape.gather(seen, choice, rows)
        self.expert_products(experts, [gate_up, last], (rows, gate, up, down))
        tape.combine(down, choice, out, add=direct)
        if sharing:
            *counts, gate, up = sharing
            self._gate_experts(experts, gate, up)
            self.tap(shared_down[0], gate)
            if counts:
                tape.scale_by_sigmoid(gate, counts[0])
            tape.linear(gate, weights.products(shared_down[0][0], gate, [self._delta], out))
        if norm is not None:
            self.norm(out, f"{block}{norm}", out)
        if not direct:
            tape.add(out, self.x, factor)

    def _gate_experts(self, experts: ExpertShape, gate: Any, up: Any) -> None:
        """gate = what gates up, and up."""
        if experts.clamped is None:
            self.tape.gate(gate, up, self.shape.activation)
        else:
            self.tape.clamped_gate(gate, up, *experts.clamped)

    def expert_products(
        self, experts: ExpertShape, names: list[tuple[str, ...]], buffers: tuple[Any, ...]
    ) -> None:
        """down = each slot's expert of rows, by way of gate and up (the four ``buffers``)."""
        tape, (rows, gate, up, down) = self.tape, buffers
        choice = self.expert_buffers[0]
        for group, source, outs in ((names[0], rows, [gate, up]), (names[1], gate, [down])):
            if self._tapped:
                tape.expert_tap(group, source, choice)
            pairs = zip(group, outs, strict=True)
            products = [self.weights.experts(n, experts.count, source, out) for n, out in pairs]
            tape.expert_linear(source, choice, products)
            if source is rows:
                self._gate_experts(experts, gate, up)

    def head(self, table: Any = None) -> Any:
        """Logits of x; returns their buffer. ``table`` is the embedding's, where it is known."""
        self.final_norm()
        logits = self.tape.buffer(self.shape.vocab)
        name = head_name(self.weights)
        if table is None or name != TABLE:
            table = self.weights.matrix(name, self.shape.vocab, self.shape.hidden)
        bias = self.weights.optional(HEAD_BIAS)
        self.tape.linear(self._h, [self._ops.Product(table, logits, bias)])
        factors = self.shape.factors
        if factors.logits != 1.0 or factors.logits_cap:
            self.tape.scale(logits, factors.logits, factors.logits_cap)
        return logits

    def final_norm(self) -> None:
        """Up to the head's input, which is tapped."""
        self.tape.head()
        if self.shape.altup:
            altup.merge(self)
        self.norm(self.x, "model.norm", self._h)
        self.tap((head_name(self.weights),), self._h)

    def rope(self, rope: Rope, head_dim: int) -> int:
        """The number under which steps know a rotary embedding of heads of ``head_dim``."""
        return self._ropes.setdefault((rope, head_dim), len(self._ropes))

    def runner(self, team: Any, rows: int, result: Any = None) -> Any:
        """What walks the tape, once all is recorded; passes have up to ``rows`` positions."""
        return self._ops.Runner(
            self.tape,
            team,
            hidden=self.stream,
            result=result,
            ropes=[
                (inverse_frequencies(rope, head_dim), rope.attention_factor)
                for rope, head_dim in self._ropes
            ],
            rows=rows,
        )

    def cache(self) -> Any:
        """An empty cache of keys and values for one sequence."""
        return self._ops.Cache(self.tape, self.shape.context)

    def _normed(self, block: str, module: str | None, h: Any) -> Any:
        """The buffer ``h`` with the norm of the stream, or the stream where there is no norm."""
        if module is None:
            return self.x
        self.norm(self.x, f"{block}{module}", h)
        return h

    def norm(self, x: Any, module: str, out: Any) -> None:
        """out = the norm of x with the weights of ``module``."""
        wiring = self.shape.wiring
        if wiring.bare_norm:
            weight = np.ones(x.width, np.float32)
        else:
            weight = self.weights.vector(f"{module}.weight")
        if wiring.unit_norm:
            weight = weight + np.float32(1.0)
        bias = self.weights.optional(f"{module}.bias")
        self.tape.norm(x, weight, self.shape.epsilon, out, centred=wiring.layer_norm, bias=bias)

    def linear(self, x: Any, names: tuple[str, ...], outs: list[Any], add_to: Any = None) -> None:
        """The products of x with matrices, one for each of ``outs``, or one for all of them."""
        self.tap(names, x)
        if len(names) == 1:
            products = self.weights.products(names[0], x, outs, add_to)
        else:
            pairs = zip(names, outs, strict=True)
            products = [p for n, out in pairs for p in self.weights.products(n, x, [out], add_to)]
        self.tape.linear(x, products)

    def product(self, matrix: Any, out: Any, bias: np.ndarray | None) -> Any:
        """``out = x @ matrix.T + bias``."""
        return self._ops.Product(matrix, out, bias)

    def tap(self, names: tuple[str, ...], x: Any) -> None:
        if self._tapped:
            self.tape.tap(names, x)
