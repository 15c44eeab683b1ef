"""What a forward pass is told of a model: its sizes and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxedge.errors import UnsupportedModelError
from mlxedge.models import spec_for
from mlxedge.models.experts import ExpertShape
from mlxedge.models.mixers import load_mixer
from mlxedge.models.rope import LONG, Rope
from mlxedge.models.wiring import Factors, Wiring, activation_of


@dataclass(frozen=True)
class Shape:
    """Sizes and settings. By layer: ``mixers`` names what mixes positions (one of
    ``mlxedge.models.mixers``), ``windows`` is the sliding window, 0 for none, and ``ropes`` the
    rotary embedding, ``None`` for none. ``mixing`` holds what each mixer reads from the config,
    ``None`` where it takes what is here."""

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
    activation: str
    wiring: Wiring
    factors: Factors
    experts: ExpertShape | None = None
    mixing: Mapping[str, Any] = field(default_factory=dict)


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
    experts = spec.experts.shape(config) if spec.experts else None
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise UnsupportedModelError(f"{heads} attention heads cannot share {kv_heads} of keys")
    mixing = {name: load_mixer(name).settings(config) for name in dict.fromkeys(mixers)}
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate=intermediate,
        vocab=vocab,
        context=_context(config, ropes, mixing),
        epsilon=float(config.get(spec.epsilon) or 1e-6),
        mixers=mixers,
        ropes=ropes,
        windows=spec.windows(config),
        activation=activation,
        wiring=spec.wired(config),
        factors=spec.factors(config),
        experts=experts if experts and experts.layers else None,
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
