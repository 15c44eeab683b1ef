"""The forward pass that llama, mistral, qwen2, qwen3 and their kind share.

Pre-norm blocks of grouped-query attention with rotary embeddings and of a gated MLP. What differs
between them is optional and found in the checkpoint: biases, norms of the heads of Q and K, a
sliding window, a head of its own. Names and layouts are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlxedge.errors import CorruptFileError, UnsupportedModelError
from mlxedge.models import spec_for
from mlxedge.models.experts import ROUTER, SHARED, SHARED_GATE, STACKS, ExpertShape
from mlxedge.models.rope import Rope, inverse_frequencies, rope_settings
from mlxedge.ops import load_forward, load_reference

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.sources.checkpoint import Checkpoint, SourceTensor

_SILU = ("silu", "swish")


@dataclass(frozen=True)
class Shape:
    """Sizes and settings. ``windows`` is the sliding window of each layer, 0 for none."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    epsilon: float
    rope: Rope
    windows: tuple[int, ...]
    experts: ExpertShape | None = None


def shape_of(config: dict[str, Any]) -> Shape:
    """Read a prepared config; raises UnsupportedModelError if a forward pass would be wrong."""
    spec = spec_for(config)
    activation = config.get("hidden_act") or config.get("hidden_activation") or "silu"
    if activation not in _SILU:
        raise UnsupportedModelError(f"hidden_act {activation!r} is not supported: only silu is")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        layers = int(config["num_hidden_layers"])
        intermediate, vocab = int(config["intermediate_size"]), int(config["vocab_size"])
    except KeyError as missing:
        raise UnsupportedModelError(f"config.json has no {missing.args[0]}") from None
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
        context=int(config.get("max_position_embeddings") or 2048),
        epsilon=float(config.get("rms_norm_eps") or 1e-6),
        rope=rope_settings(config),
        windows=spec.windows(config),
        experts=spec.experts.shape(config) if spec.experts else None,
    )


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
        tensor = self.tensor(name, (rows, cols))
        matrix = self._ops.Matrix(tensor.read(), tensor.encoding, rows, cols)
        self.nbytes += matrix.nbytes
        return matrix

    def product(self, name: str, x: Any, out: Any, add_to: Any = None) -> Any:
        """``out = x @ W.T + b`` of a linear layer, and then ``add_to += out``."""
        matrix = self.matrix(name, out.width, x.width)
        bias = self.optional(name.removesuffix("weight") + "bias")
        return self._ops.Product(matrix, out, bias, add_to)

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
_ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
_DENSE = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
_ROUTED = ((ROUTER,), STACKS[:2], STACKS[2:])
_SHARING = ((ROUTER, SHARED_GATE, *SHARED[:2]), STACKS[:2], STACKS[2:], SHARED[2:])


def layer_groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    """The names of a layer's matrices, those together that have the same input, in the order in
    which they compute."""
    experts = shape.experts
    if experts is None or layer not in experts.layers:
        mlp: tuple[tuple[str, ...], ...] = _DENSE
    else:
        mlp = _SHARING if experts.shared_width else _ROUTED
    groups = (*_ATTENTION, *mlp)
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

    @cached_property
    def _block_buffers(self) -> tuple[Any, ...]:
        shape, buffer = self.shape, self.tape.buffer
        mixed, delta = buffer(shape.heads * shape.head_dim), buffer(shape.hidden)
        q = buffer(shape.heads * shape.head_dim)
        k, v = (buffer(shape.kv_heads * shape.head_dim) for _ in range(2))
        return mixed, delta, q, k, v

    @cached_property
    def _dense_buffers(self) -> tuple[Any, Any]:
        width = self.shape.intermediate
        return self.tape.buffer(width), self.tape.buffer(width)

    @cached_property
    def _expert_buffers(self) -> tuple[Any, ...]:
        """The choice of experts; logits; by slot the input, gate, up and down; and of a shared
        expert how much it counts, gate and up."""
        experts, tape = self.shape.experts, self.tape
        assert experts is not None
        choice = tape.choice(experts.count, experts.used)
        hidden, width, shared = self.shape.hidden, experts.width, experts.shared_width
        slots = [tape.buffer(size, choice) for size in (hidden, width, width, hidden)]
        sharing = [tape.buffer(size) for size in (1, shared, shared)] if shared else []
        return choice, tape.buffer(experts.count), slots, sharing

    def embed(self) -> Any:
        """x = the rows of the tokens; returns the table."""
        table = self.weights.matrix(TABLE, self.shape.vocab, self.shape.hidden)
        self.tape.embed(table, self.x)
        return table

    def block(self, layer: int) -> None:
        """x = block ``layer`` of x."""
        shape, tape, weights = self.shape, self.tape, self.weights
        x, h = self.x, self._h
        mixed, delta, q, k, v = self._block_buffers
        block = f"model.layers.{layer}."
        attend = f"{block}self_attn."
        qkv_names, o_names, *mlp_names = layer_groups(shape, layer)
        self._norm(f"{block}input_layernorm.weight")
        self._linear(h, qkv_names, [q, k, v])
        tape.attention(
            q,
            k,
            v,
            mixed,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rotated=shape.rope.dims(shape.head_dim),
            scale=shape.head_dim**-0.5,
            q_norm=weights.optional(f"{attend}q_norm.weight"),
            k_norm=weights.optional(f"{attend}k_norm.weight"),
            epsilon=shape.epsilon,
            window=shape.windows[layer],
        )
        self._linear(mixed, o_names, [delta], add_to=x)
        self._norm(f"{block}post_attention_layernorm.weight")
        if shape.experts is None or layer not in shape.experts.layers:
            gate, up = self._dense_buffers
            self._linear(h, mlp_names[0], [gate, up])
            tape.gate(gate, up)
            self._linear(gate, mlp_names[1], [delta], add_to=x)
        else:
            self._mixture(shape.experts, mlp_names)

    def _mixture(self, experts: ExpertShape, names: list[tuple[str, ...]]) -> None:
        """x += the chosen experts' output for h, and the shared expert's."""
        tape, weights, h, x = self.tape, self.weights, self._h, self.x
        choice, logits, (rows, gate, up, down), sharing = self._expert_buffers
        routers, gate_up, last, *shared_down = names
        self._linear(h, routers, [logits, *sharing])
        tape.route(logits, choice, score=experts.score, normalise=experts.normalise)
        tape.gather(h, choice, rows)
        for group, source, outs in ((gate_up, rows, [gate, up]), (last, gate, [down])):
            if self._tapped:
                tape.expert_tap(group, source, choice)
            pairs = zip(group, outs, strict=True)
            products = [weights.experts(n, experts.count, source, out) for n, out in pairs]
            tape.expert_linear(source, choice, products)
            if source is rows:
                tape.gate(gate, up)
        tape.combine(down, choice, x)
        if sharing:
            counts, gate, up = sharing
            tape.gate(gate, up)
            self._tap(shared_down[0], gate)
            tape.scale_by_sigmoid(gate, counts)
            delta = self._block_buffers[1]
            tape.linear(gate, [weights.product(shared_down[0][0], gate, delta, x)])

    def head(self, table: Any = None) -> Any:
        """Logits of x; returns their buffer. ``table`` is the embedding's, where it is known."""
        self.final_norm()
        logits = self.tape.buffer(self.shape.vocab)
        name = head_name(self.weights)
        if table is None or name != TABLE:
            table = self.weights.matrix(name, self.shape.vocab, self.shape.hidden)
        self.tape.linear(self._h, [self._ops.Product(table, logits)])
        return logits

    def final_norm(self) -> None:
        """Up to the head's input, which is tapped."""
        self.tape.head()
        self._norm("model.norm.weight")
        self._tap((head_name(self.weights),), self._h)

    def runner(self, team: Any, rows: int, result: Any = None) -> Any:
        """What walks the tape, once all is recorded; passes have up to ``rows`` positions."""
        return self._ops.Runner(
            self.tape,
            team,
            hidden=self.x,
            result=result,
            ropes=[
                (
                    inverse_frequencies(self.shape.rope, self.shape.head_dim),
                    self.shape.rope.attention_factor,
                )
            ],
            rows=rows,
        )

    def cache(self) -> Any:
        """An empty cache of keys and values for one sequence."""
        return self._ops.Cache(self.tape, self.shape.kv_heads, self.shape.context)

    def _norm(self, weight: str) -> None:
        """h = RMSNorm(x)."""
        self.tape.norm(self.x, self.weights.vector(weight), self.shape.epsilon, self._h)

    def _linear(self, x: Any, names: tuple[str, ...], outs: list[Any], add_to: Any = None) -> None:
        self._tap(names, x)
        pairs = zip(names, outs, strict=True)
        self.tape.linear(x, [self.weights.product(n, x, out, add_to) for n, out in pairs])

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
