"""How an architecture wires its blocks: what its forward pass does beside sizes.

``Wiring`` is what every model of an architecture has in common, ``Factors`` are numbers that a
config sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlxedge.errors import UnsupportedModelError

Activation = Literal["silu", "gelu_tanh", "gelu", "relu2", "xielu"]
#: Activation functions by the names in configs. transformers' "gelu_new" and "gelu_fast" are the
#: same function as "gelu_pytorch_tanh", computed in other steps.
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
    "xielu": "xielu",
}
#: What an activation trains, of each layer: numbers in tensors of the module ``mlp.act_fn``.
TRAINED = {"xielu": ("alpha_p", "alpha_n", "beta", "eps")}
#: The runtimes of each format, as people call them.
NAMES = {"gguf": "llama.cpp", "mlx": "mlx-lm"}
_ACTIVATION_KEYS = ("hidden_activation", "hidden_act")


@dataclass(frozen=True)
class Heads:
    """The heads of attention in one layer: ``count`` of queries, ``kv`` of keys and of values, each
    of ``size``. ``keys_as_values``: there is no matrix for values, which are the keys before their
    norm and rotation. ``shared_with`` is the earlier layer whose keys and values the layer attends
    to, ``None`` where it has its own."""

    count: int
    kv: int
    size: int
    keys_as_values: bool = False
    shared_with: int | None = None


@dataclass(frozen=True)
class Wiring:
    """What one block does with the stream of hidden states x.

    The fields ``*_norm`` name modules of a layer. Attention sees ``attention_norm`` of x, the MLP
    ``mlp_norm`` of x after attention, and what each gives is added to x after its ``*_out_norm``;
    ``None`` is no norm. If ``parallel`` the MLP sees x as attention does, and what attention saw
    where there is no ``mlp_norm``.

    - ``layer_norm``: LayerNorm, not RMSNorm; ``unit_norm``: weights are stored less one;
      ``bare_norm``: there are none; ``embedding_norm``: embeddings have one too.
    - ``activation``: what the runtimes compute, as configs call it; ``mlp``: the product of a gate
      and up, those two in one matrix ("fused"), or up alone ("plain"); "none" for no MLP.
    - ``qkv_fused``: q, k and v are one matrix.
    - ``head_norm``: a norm of q and k, over each head, over all heads together ("width"), or over
      each head after the rotation ("last"); always RMSNorm but if ``layer_norm``.
    - ``laurel``: beside attention goes a small residual of two matrices (LAuReL, arXiv 2411.07501,
      as in transformers' modeling_gemma3n.py), and x is divided by √2 after both.
    - ``value_norm``: an RMSNorm without weights over each head of v.
    - ``layer_scalar``: x is multiplied by a tensor of one number after the block.
    - ``apart``: what layers of a mixer have instead of this, by its name; of it only the norms of
      the stream count.
    - ``neighbours``: rotation turns neighbouring dimensions against each other, not the two halves
      of a head; ``partial``: only a part of each head may turn.
    - ``sinks``: each head has a score of nothing, which takes its share of attention.
    """

    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    attention_out_norm: str | None = None
    mlp_out_norm: str | None = None
    parallel: bool = False
    layer_norm: bool = False
    unit_norm: bool = False
    bare_norm: bool = False
    embedding_norm: bool = False
    activation: str = "silu"
    mlp: Literal["gated", "fused", "plain", "none"] = "gated"
    qkv_fused: bool = False
    head_norm: Literal["head", "width", "last"] | None = None
    laurel: bool = False
    value_norm: bool = False
    layer_scalar: bool = False
    neighbours: bool = False
    partial: bool = False
    sinks: bool = False
    apart: tuple[tuple[str, Wiring], ...] = ()

    def of(self, mixer: str) -> Wiring:
        """That of the layers with this mixer."""
        return next((wiring for name, wiring in self.apart if name == mixer), self)


#: llama's.
PRE_NORM = Wiring()


@dataclass(frozen=True)
class Factors:
    """What scales and caps activations: of embeddings, of q·k (``None`` for one over the root of
    the head's size, several for one of each layer), of what a block adds to x, and of logits; caps
    are 0 for none. Queries, keys and values stay within ± ``qkv_limit``. ``tempered`` is the β by
    which queries grow, as 1 + β·log(1 + ⌊position / ``span``⌋) (Llama 4's attention temperature).
    ``alibi`` is the exponent of ALiBi's slopes: of n heads they are 2^(-``alibi``/n) and its
    powers (arXiv 2108.12409)."""

    embedding: float = 1.0
    attention: float | tuple[float, ...] | None = None
    residual: float = 1.0
    logits: float = 1.0
    attention_cap: float = 0.0
    logits_cap: float = 0.0
    qkv_limit: float | None = None
    tempered: float = 0.0
    span: int = 0
    alibi: float = 0.0


def activation_name(config: Mapping[str, Any], wiring: Wiring) -> str:
    """As the config calls it, or what the architecture has where it is silent."""
    found = next((config[key] for key in _ACTIVATION_KEYS if config.get(key)), wiring.activation)
    return str(found)


def activation_of(config: Mapping[str, Any], wiring: Wiring) -> Activation:
    """As the tape calls it; raises UnsupportedModelError if it is none of ``ACTIVATIONS``."""
    name = activation_name(config, wiring)
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act {name[:40]!r} is not supported: known are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]
