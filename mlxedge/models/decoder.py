"""The forward pass that llama, mistral, qwen2, qwen3 and their kind share.

Pre-norm blocks of grouped-query attention with rotary embeddings and of a gated MLP. What differs
between them is optional and found in the checkpoint: biases, norms of the heads of Q and K, a
sliding window, a head of its own. Names and layouts are Hugging Face's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxedge.errors import CorruptFileError, UnsupportedModelError
from mlxedge.models.dense import layer_windows
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


def shape_of(config: dict[str, Any]) -> Shape:
    """Read a config.json; raises UnsupportedModelError if a forward pass would be wrong."""
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
        windows=layer_windows(config, layers),
    )


class Decoder:
    """A checkpoint's weights, as they are stored, and the tape that computes with them.

    ``threads`` defaults to the processors that this process may use.
    """

    #: The most positions of one pass: longer prompts go in pieces.
    CHUNK = 512

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None) -> None:
        self.shape = shape = shape_of(checkpoint.config)
        self._ops = ops = load_forward()
        self._tensors = dict(checkpoint.tensors)
        self._path = checkpoint.origin.path
        self.weight_bytes = 0
        self.threads = threads or ops.available_threads()
        self.rows = min(self.CHUNK, shape.context)

        tape = ops.Tape()
        x, h, mixed, delta = (
            tape.buffer(width)
            for width in (shape.hidden, shape.hidden, shape.heads * shape.head_dim, shape.hidden)
        )
        q = tape.buffer(shape.heads * shape.head_dim)
        k, v = (tape.buffer(shape.kv_heads * shape.head_dim) for _ in range(2))
        gate, up = (tape.buffer(shape.intermediate) for _ in range(2))
        logits = tape.buffer(shape.vocab)

        table = self._matrix("model.embed_tokens.weight", shape.vocab, shape.hidden)
        tape.embed(table, x)
        for layer, window in enumerate(shape.windows):
            block = f"model.layers.{layer}."
            attend, mlp = f"{block}self_attn.", f"{block}mlp."
            tape.norm(x, self._vector(f"{block}input_layernorm.weight"), shape.epsilon, h)
            tape.linear(
                h, [self._product(f"{attend}{n}_proj", h, out) for n, out in _named(q, k, v)]
            )
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
                q_norm=self._optional(f"{attend}q_norm.weight"),
                k_norm=self._optional(f"{attend}k_norm.weight"),
                epsilon=shape.epsilon,
                window=window,
            )
            tape.linear(mixed, [self._product(f"{attend}o_proj", mixed, delta, add_to=x)])
            tape.norm(x, self._vector(f"{block}post_attention_layernorm.weight"), shape.epsilon, h)
            tape.linear(
                h,
                [self._product(f"{mlp}gate_proj", h, gate), self._product(f"{mlp}up_proj", h, up)],
            )
            tape.gate(gate, up)
            tape.linear(gate, [self._product(f"{mlp}down_proj", gate, delta, add_to=x)])
        tape.head()
        tape.norm(x, self._vector("model.norm.weight"), shape.epsilon, h)
        head = table
        if "lm_head.weight" in self._tensors:
            head = self._matrix("lm_head.weight", shape.vocab, shape.hidden)
        tape.linear(h, [ops.Product(head, logits)])

        self._runner = ops.Runner(
            tape,
            ops.Team(self.threads),
            hidden=x,
            result=logits,
            frequencies=inverse_frequencies(shape.rope, shape.head_dim),
            amplitude=shape.rope.attention_factor,
            rows=self.rows,
        )
        self._tape = tape

    def cache(self) -> Any:
        """An empty cache of keys and values for one sequence."""
        return self._ops.Cache(self._tape, self.shape.kv_heads, self.shape.context)

    def run(self, tokens: np.ndarray, start: int, cache: Any, results: int) -> np.ndarray:
        """Logits f32 ``[results, vocab]`` of the last ``results`` of ``tokens`` (int64 ``[n]``,
        n <= ``rows``), which stand at positions ``start``… after what ``cache`` holds."""
        logits: np.ndarray = self._runner.run(tokens, start, cache, results)
        return logits

    def close(self) -> None:
        """End the threads."""
        self._runner.team.close()

    def _tensor(self, name: str, shape: tuple[int, ...]) -> SourceTensor:
        if name not in self._tensors:
            raise CorruptFileError(self._path, f"the tensor {name} is missing")
        tensor = self._tensors[name]
        if tensor.shape != shape:
            raise CorruptFileError(
                self._path, f"the tensor {name} is {list(tensor.shape)}, not {list(shape)}"
            )
        return tensor

    def _matrix(self, name: str, rows: int, cols: int) -> Any:
        tensor = self._tensor(name, (rows, cols))
        matrix = self._ops.Matrix(tensor.read(), tensor.encoding, rows, cols)
        self.weight_bytes += matrix.nbytes
        return matrix

    def _product(self, name: str, x: Any, out: Any, add_to: Any = None) -> Any:
        matrix = self._matrix(f"{name}.weight", out.width, x.width)
        return self._ops.Product(matrix, out, self._optional(f"{name}.bias"), add_to)

    def _vector(self, name: str) -> np.ndarray:
        if name not in self._tensors:
            raise CorruptFileError(self._path, f"the tensor {name} is missing")
        tensor = self._tensors[name]
        vector = load_reference().decode(tensor.read(), tensor.encoding)
        return vector.reshape(-1)

    def _optional(self, name: str) -> np.ndarray | None:
        return self._vector(name) if name in self._tensors else None


def _named(q: Any, k: Any, v: Any) -> list[tuple[str, Any]]:
    return [("q", q), ("k", k), ("v", v)]
