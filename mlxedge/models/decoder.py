"""The forward pass that llama, qwen, gemma and their kind share.

Blocks of grouped-query attention with rotary embeddings and of an MLP, or a mixture of experts.
What differs between them an architecture declares (``mlxedge.models.wiring``), or it is found in
the checkpoint: biases, a head of its own. Names and layouts are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxedge.errors import CorruptFileError, UnsupportedModelError
from mlxedge.models import spec_for
from mlxedge.models.experts import ROUTER, ROUTER_BIAS, SHARED, SHARED_GATE, STACKS, ExpertShape
from mlxedge.models.rope import LONG, Rope, inverse_frequencies
from mlxedge.models.wiring import Factors, Wiring, activation_of
from mlxedge.ops import load_forward, load_reference

if TYPE_CHECKING:
    from mlxedge.sources.checkpoint import Checkpoint, SourceTensor


@dataclass(frozen=True)
class Shape:
    """Sizes and settings. ``windows`` is the sliding window of each layer, 0 for none, ``ropes``
    the rotary embedding of each, ``None`` for none."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    epsilon: float
    ropes: tuple[Rope | None, ...]
    windows: tuple[int, ...]
    activation: str
    wiring: Wiring
    factors: Factors
    experts: ExpertShape | None = None


def shape_of(config: dict[str, Any]) -> Shape:
    """Read a prepared config; raises UnsupportedModelError if a forward pass would be wrong."""
    spec = spec_for(config)
    activation = activation_of(config, spec.wiring)
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        layers = int(config["num_hidden_layers"])
        intermediate, vocab = int(config["intermediate_size"]), int(config["vocab_size"])
    except KeyError as missing:
        raise UnsupportedModelError(f"config.json has no {missing.args[0]}") from None
    ropes = spec.ropes(config)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise UnsupportedModelError(f"{heads} attention heads cannot share {kv_heads} of keys")
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate=intermediate,
        vocab=vocab,
        context=_context(config, ropes),
        epsilon=float(config.get(spec.epsilon) or 1e-6),
        ropes=ropes,
        windows=spec.windows(config),
        activation=activation,
        wiring=spec.wiring,
        factors=spec.factors(config),
        experts=spec.experts.shape(config) if spec.experts else None,
    )


def _context(config: dict[str, Any], ropes: Sequence[Rope | None]) -> int:
    """Beyond the context of the first training longrope would turn what is in the cache anew."""
    longest = int(config.get("max_position_embeddings") or 2048)
    limits = [rope.original_max_position for rope in ropes if rope and rope.type == LONG]
    return min(longest, *limits) if limits else longest


class Weights:
    """The tensors of a checkpoint as matrices and vectors of a forward pass.

    ``nbytes`` counts the matrices that were read. Raises CorruptFileError for a tensor that is
    missing or has another shape.
    """

    def __init__(self, checkpoint: Checkpoint, ops: Any) -> None:
        self.nbytes = 0
        self._ops = ops
        self._tensors = checkpoint.tensors
        self._path = checkpoint.origin.path

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def matrix(self, name: str, rows: int, cols: int) -> Any:
        return self._part(self.tensor(name, (rows, cols)), 0, rows)

    def _part(self, tensor: SourceTensor, start: int, stop: int) -> Any:
        parts = tensor.read_rows(start, stop)
        matrix = self._ops.Matrix(parts, tensor.encoding, stop - start, tensor.cols)
        self.nbytes += matrix.nbytes
        return matrix

    def products(self, name: str, x: Any, outs: Sequence[Any], add_to: Any = None) -> list[Any]:
        """``out = x @ W.T + b`` of a linear layer whose rows are those of all ``outs`` in turn, and
        then ``add_to += out``."""
        tensor = self.tensor(name, (sum(out.width for out in outs), x.width))
        bias = self.optional(name.removesuffix("weight") + "bias")
        found, start = [], 0
        for out in outs:
            stop = start + out.width
            part = None if bias is None else bias[start:stop]
            found.append(self._ops.Product(self._part(tensor, start, stop), out, part, add_to))
            start = stop
        return found

    def experts(self, name: str, count: int, x: Any, out: Any) -> Any:
        """``out = x @ W[e].T`` for the slots of each of ``count`` experts."""
        tensor = self.tensor(name, (count, out.width, x.width))
        matrix = self._ops.Matrix(tensor.read(), tensor.encoding, count * out.width, x.width)
        self.nbytes += matrix.nbytes
        return self._ops.ExpertProduct(matrix, out)

    def vector(self, name: str) -> np.ndarray:
        """f32 ``[size]``."""
        tensor = self.tensor(name)
        vector = load_reference().decode(tensor.read(), tensor.encoding)
        return vector.reshape(-1)

    def optional(self, name: str) -> np.ndarray | None:
        return self.vector(name) if name in self._tensors else None

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> SourceTensor:
        if name not in self._tensors:
            raise CorruptFileError(self._path, f"the tensor {name} is missing")
        tensor = self._tensors[name]
        if shape is not None and tensor.shape != shape:
            raise CorruptFileError(
                self._path, f"the tensor {name} is {list(tensor.shape)}, not {list(shape)}"
            )
        return tensor


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: The matrices of a block, those together that have the same input.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKV_FUSED = ("self_attn.qkv_proj",)
_MLP = {
    "gated": ("mlp.gate_proj", "mlp.up_proj"),
    "fused": ("mlp.gate_up_proj",),
    "plain": ("mlp.up_proj",),
}
_ROUTED = ((ROUTER,), STACKS[:2], STACKS[2:])
_SHARING = ((ROUTER, SHARED_GATE, *SHARED[:2]), *_ROUTED[1:], SHARED[2:])
_SHARING_ALL = ((ROUTER, *SHARED[:2]), *_ROUTED[1:], SHARED[2:])


def layer_groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    """The names of a layer's matrices, those together that have the same input, in the order in
    which they compute."""
    experts, wiring = shape.experts, shape.wiring
    if experts is None or layer not in experts.layers:
        mlp: tuple[tuple[str, ...], ...] = (_MLP[wiring.mlp], ("mlp.down_proj",))
    else:
        sharing = _SHARING if experts.shared_gate else _SHARING_ALL
        mlp = sharing if experts.shared_width else _ROUTED
    groups = (_QKV_FUSED if wiring.qkv_fused else _QKV, ("self_attn.o_proj",), *mlp)
    return [tuple(f"model.layers.{layer}.{n}.weight" for n in group) for group in groups]


def head_name(tensors: Container[str]) -> str:
    """The matrix that makes logits: the embedding's where they are tied."""
    return HEAD if HEAD in tensors else TABLE


class Graph:
    """Records what a model computes on a tape, block by block.

    ``tapped`` puts a tap on the input of every group of linears, named by the tuple of their
    weights. The hidden states are in the buffer ``x``, between blocks and at the end.
    """

    def __init__(self, shape: Shape, weights: Weights, ops: Any, tapped: bool = False) -> None:
        self.tape = tape = ops.Tape()
        self.shape, self.weights = shape, weights
        self._ops, self._tapped = ops, tapped
        self.x, self._h = tape.buffer(shape.hidden), tape.buffer(shape.hidden)
        self._ropes = list(dict.fromkeys(rope for rope in shape.ropes if rope is not None))

    @cached_property
    def _parallel_buffer(self) -> Any:
        """What attention gives, until the MLP has seen the stream without it."""
        return self.tape.buffer(self.shape.hidden)

    @cached_property
    def _block_buffers(self) -> tuple[Any, ...]:
        shape, buffer = self.shape, self.tape.buffer
        mixed, delta = buffer(shape.heads * shape.head_dim), buffer(shape.hidden)
        q = buffer(shape.heads * shape.head_dim)
        k, v = (buffer(shape.kv_heads * shape.head_dim) for _ in range(2))
        return mixed, delta, q, k, v

    @cached_property
    def _dense_buffers(self) -> list[Any]:
        count = 1 if self.shape.wiring.mlp == "plain" else 2
        return [self.tape.buffer(self.shape.intermediate) for _ in range(count)]

    @cached_property
    def _expert_buffers(self) -> tuple[Any, ...]:
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

    def embed(self) -> Any:
        """x = the rows of the tokens; returns the table."""
        table = self.weights.matrix(TABLE, self.shape.vocab, self.shape.hidden)
        self.tape.embed(table, self.x)
        if self.shape.factors.embedding != 1.0:
            self.tape.scale(self.x, self.shape.factors.embedding)
        return table

    def block(self, layer: int) -> None:
        """x = block ``layer`` of x."""
        shape, tape, weights, wiring = self.shape, self.tape, self.weights, self.shape.wiring
        x, h = self.x, self._h
        mixed, _, q, k, v = self._block_buffers
        block = f"model.layers.{layer}."
        qkv_names, o_names, *mlp_names = layer_groups(shape, layer)
        seen = self._normed(block, wiring.attention_norm, h)
        self._linear(seen, qkv_names, [q, k, v])
        self._attention(layer, q, k, v, mixed)
        if not wiring.parallel:
            self._linear_onto(mixed, o_names, block, wiring.attention_out_norm)
            seen = self._normed(block, wiring.mlp_norm, h)
        else:
            # What the MLP sees is x before attention is added.
            after = self._parallel_buffer
            self._linear(mixed, o_names, [after])
            if wiring.mlp_norm is not None:
                seen = self._normed(block, wiring.mlp_norm, h)
        if shape.experts is not None and layer in shape.experts.layers:
            bias = weights.optional(f"{block}{ROUTER_BIAS}")
            self._mixture(shape.experts, mlp_names, bias)
        else:
            gate, *up = self._dense_buffers
            self._linear(seen, mlp_names[0], [gate, *up])
            tape.gate(gate, up[0] if up else None, shape.activation)
            self._linear_onto(gate, mlp_names[1], block, wiring.mlp_out_norm)
        if wiring.parallel:
            tape.add(after, x, shape.factors.residual)

    def _attention(self, layer: int, q: Any, k: Any, v: Any, out: Any) -> None:
        """out = attention of what q, k and v hold."""
        shape, weights, wiring = self.shape, self.weights, self.shape.wiring
        norms = [
            weights.optional(f"model.layers.{layer}.self_attn.{part}_norm.weight")
            for part in ("q", "k")
        ]
        norms = [w if w is None else w + np.float32(wiring.unit_norm) for w in norms]
        if wiring.head_norm == "width":
            for x, weight in zip((q, k), norms, strict=True):
                self.tape.norm(x, weight, shape.epsilon, x, centred=wiring.layer_norm)
            norms = [None, None]
        rope = shape.ropes[layer]
        scale = shape.factors.attention
        self.tape.attention(
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
            rope=0 if rope is None else self._ropes.index(rope),
            neighbours=wiring.neighbours,
            centred=wiring.layer_norm,
            norm_last=wiring.head_norm == "last",
        )

    def _linear_onto(self, x: Any, names: tuple[str, ...], block: str, norm: str | None) -> None:
        """The stream += the factor · the norm, where there is one, of the product of x."""
        factor, delta = self.shape.factors.residual, self._block_buffers[1]
        if factor == 1.0 and norm is None:
            self._linear(x, names, [delta], add_to=self.x)
            return
        self._linear(x, names, [delta])
        if norm is not None:
            self._norm(delta, f"{block}{norm}", delta)
        self.tape.add(delta, self.x, factor)

    def _mixture(
        self, experts: ExpertShape, names: list[tuple[str, ...]], bias: np.ndarray | None
    ) -> None:
        """x += the chosen experts' output for h, and the shared expert's."""
        tape, weights, h, x = self.tape, self.weights, self._h, self.x
        choice, logits, (rows, gate, up, down), sharing = self._expert_buffers
        routers, gate_up, last, *shared_down = names
        self._linear(h, routers, [logits, *sharing])
        tape.route(
            logits,
            choice,
            score=experts.score,
            normalise=experts.normalise,
            scale=experts.scale,
            bias=bias,
        )
        tape.gather(h, choice, rows)
        for group, source, outs in ((gate_up, rows, [gate, up]), (last, gate, [down])):
            if self._tapped:
                tape.expert_tap(group, source, choice)
            pairs = zip(group, outs, strict=True)
            products = [weights.experts(n, experts.count, source, out) for n, out in pairs]
            tape.expert_linear(source, choice, products)
            if source is rows:
                tape.gate(gate, up, self.shape.activation)
        tape.combine(down, choice, x)
        if sharing:
            *counts, gate, up = sharing
            tape.gate(gate, up, self.shape.activation)
            self._tap(shared_down[0], gate)
            if counts:
                tape.scale_by_sigmoid(gate, counts[0])
            delta = self._block_buffers[1]
            tape.linear(gate, weights.products(shared_down[0][0], gate, [delta], x))

    def head(self, table: Any = None) -> Any:
        """Logits of x; returns their buffer. ``table`` is the embedding's, where it is known."""
        self.final_norm()
        logits = self.tape.buffer(self.shape.vocab)
        name = head_name(self.weights)
        if table is None or name != TABLE:
            table = self.weights.matrix(name, self.shape.vocab, self.shape.hidden)
        self.tape.linear(self._h, [self._ops.Product(table, logits)])
        factors = self.shape.factors
        if factors.logits != 1.0 or factors.logits_cap:
            self.tape.scale(logits, factors.logits, factors.logits_cap)
        return logits

    def final_norm(self) -> None:
        """Up to the head's input, which is tapped."""
        self.tape.head()
        self._norm(self.x, "model.norm", self._h)
        self._tap((head_name(self.weights),), self._h)

    def runner(self, team: Any, rows: int, result: Any = None) -> Any:
        """What walks the tape, once all is recorded; passes have up to ``rows`` positions."""
        return self._ops.Runner(
            self.tape,
            team,
            hidden=self.x,
            result=result,
            ropes=[
                (inverse_frequencies(rope, self.shape.head_dim), rope.attention_factor)
                for rope in self._ropes
            ],
            rows=rows,
        )

    def cache(self) -> Any:
        """An empty cache of keys and values for one sequence."""
        return self._ops.Cache(self.tape, self.shape.kv_heads, self.shape.context)

    def _normed(self, block: str, module: str | None, h: Any) -> Any:
        """The buffer ``h`` with the norm of the stream, or the stream where there is no norm."""
        if module is None:
            return self.x
        self._norm(self.x, f"{block}{module}", h)
        return h

    def _norm(self, x: Any, module: str, out: Any) -> None:
        wiring = self.shape.wiring
        weight = self.weights.vector(f"{module}.weight")
        if wiring.unit_norm:
            weight = weight + np.float32(1.0)
        bias = self.weights.optional(f"{module}.bias")
        self.tape.norm(x, weight, self.shape.epsilon, out, centred=wiring.layer_norm, bias=bias)

    def _linear(self, x: Any, names: tuple[str, ...], outs: list[Any], add_to: Any = None) -> None:
        """The products of x with matrices, one for each of ``outs``, or one for all of them."""
        self._tap(names, x)
        if len(names) == 1:
            products = self.weights.products(names[0], x, outs, add_to)
        else:
            pairs = zip(names, outs, strict=True)
            products = [p for n, out in pairs for p in self.weights.products(n, x, [out], add_to)]
        self.tape.linear(x, products)

    def _tap(self, names: tuple[str, ...], x: Any) -> None:
        if self._tapped:
            self.tape.tap(names, x)


#: The most positions of one pass: longer prompts go in pieces.
CHUNK = 512


class Decoder:
    """A checkpoint's weights, as they are stored, and the tape that computes with them.

    ``threads`` defaults to the processors that this process may use.
    """

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None) -> None:
        self.shape = shape = shape_of(checkpoint.config)
        ops = load_forward()
        weights = Weights(checkpoint, ops)
        self.threads = threads or ops.available_threads()
        self.rows = min(CHUNK, shape.context)
        self._graph = graph = Graph(shape, weights, ops)
        table = graph.embed()
        for layer in range(shape.layers):
            graph.block(layer)
        logits = graph.head(table)
        self._runner = graph.runner(ops.Team(self.threads), self.rows, logits)
        self.weight_bytes = weights.nbytes

    def cache(self) -> Any:
        """An empty cache of keys and values for one sequence."""
        return self._graph.cache()

    def run(self, tokens: np.ndarray, start: int, cache: Any, results: int) -> np.ndarray:
        """Logits f32 ``[results, vocab]`` of the last ``results`` of ``tokens`` (int64 ``[n]``,
        n <= ``rows``), which stand at positions ``start``… after what ``cache`` holds."""
        logits: np.ndarray = self._runner.run(tokens, start, cache, results)
        return logits

    def close(self) -> None:
        """End the threads."""
        self._runner.team.close()
