"""What a forward pass is told of a model: its sizes and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mlxedge.errors import UnsupportedModelError
from mlxedge.models import spec_for
from mlxedge.models.altup import COUNT, AltUp, columns
from mlxedge.models.experts import ExpertShape
from mlxedge.models.mixers import load_mixer
from mlxedge.models.rope import LONG, Rope
from mlxedge.models.wiring import Factors, Heads, Wiring, activation_of

#: Floats of a vector: columns of the stream begin with one.
_LANES = 16


@dataclass(frozen=True)
class Shape:
    """Sizes and settings. By layer: ``mixers`` names what mixes positions (one of
    ``mlxedge.models.mixers``), ``windows`` is the sliding window, 0 for none, and ``ropes`` the
    rotary embedding, ``None`` for none, ``attention`` the heads and ``widths`` the MLP's, which in
    most models are ``heads``, ``kv_heads``, ``head_dim`` and ``intermediate`` everywhere.
    ``per_layer`` is the width of the inputs that each layer has of its own, 0 for none, ``altup``
    tells how several streams alternate and ``sparsity`` which part of gates is zero. ``mixing``
    holds what each mixer reads from the config, ``None`` where it takes what is here."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    epsilon: float
    mixers: tuple[str, ...]
    ropes: tuple[Rope | None, ...]
    windows: tuple[int, ...]
    attention: tuple[Heads, ...]
    widths: tuple[int, ...]
    activation: str
    wiring: Wiring
    factors: Factors
    experts: ExpertShape | None = None
    per_layer: int = 0
    altup: AltUp | None = None
    sparsity: tuple[float, ...] = ()
    mixing: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def shared(self) -> frozenset[int]:
        """The layers whose keys and values later ones attend to."""
        return frozenset(h.shared_with for h in self.attention if h.shared_with is not None)

    @cached_property
    def columns(self) -> dict[str, tuple[int, int]]:
        """What the stream holds, which goes from layer to layer: by name the first column and how
        many. Beside the hidden states "x" these are the inputs of each layer, and keys and values
        that later layers attend to."""
        streams = COUNT if self.altup else 1
        widths = dict.fromkeys(map(columns, range(streams)), self.hidden)
        if self.per_layer:
            widths["inputs"] = self.per_layer * self.layers
        for layer in sorted(self.shared):
            heads = self.attention[layer]
            widths |= dict.fromkeys((f"keys.{layer}", f"values.{layer}"), heads.kv * heads.size)
        found, start = {}, 0
        for name, width in widths.items():
            found[name] = start, width
            start += -(-width // _LANES) * _LANES
        return found

    @property
    def stream(self) -> int:
        """Columns of the stream."""
        return max(start + width for start, width in self.columns.values())


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
    mixers = spec.mixers(config)
    experts = spec.experts.shape(config) if spec.experts and spec.experts.present(config) else None
    mixing = {name: load_mixer(name).settings(config) for name in dict.fromkeys(mixers)}
    attention = spec.heads(config)
    for own in attention:
        if own.count % own.kv:
            raise UnsupportedModelError(
                f"{own.count} attention heads cannot share {own.kv} of keys"
            )
    per_layer, sparsity = spec.per_layer(config), spec.sparsity(config)
    if per_layer % _LANES:
        raise UnsupportedModelError(
            f"inputs of {per_layer} for each layer are not of whole vectors"
        )
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate=intermediate,
        vocab=vocab,
        context=_context(config, ropes, mixing),
        epsilon=float(config.get(spec.epsilon) or 1e-6),
        mixers=mixers,
        ropes=ropes,
        windows=spec.windows(config),
        attention=attention,
        widths=spec.widths(config),
        activation=activation,
        wiring=spec.wired(config),
        factors=spec.factors(config),
        experts=experts if experts and experts.layers else None,
        per_layer=per_layer,
        altup=spec.altup(config),
        sparsity=sparsity,
        mixing=mixing,
    )


def _context(
    config: dict[str, Any], ropes: Sequence[Rope | None], mixing: Mapping[str, Any]
) -> int:
    """Beyond the context of the first training longrope would turn what is in the cache anew, and a
    mixer may have a limit of its own."""
    longest = int(config.get("max_position_embeddings") or 2048)
    limits = [rope.original_max_position for rope in ropes if rope and rope.type == LONG]
    limits += [most for own in mixing.values() if (most := getattr(own, "most", None))]
    return min(longest, *limits) if limits else longest
