"""Rotary position embeddings, as config.json describes them.

Two styles are read: ``rope_theta`` beside ``rope_scaling``, and ``rope_parameters`` (transformers
5), which holds both. :func:`rope_settings` understands them, :func:`inverse_frequencies` computes
what a forward pass and a GGUF writer need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxedge.errors import UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np

DEFAULT_THETA = 10000.0
#: Phi's, with factors of its own for each frequency, others beyond the context of the first
#: training: LongRoPE, arXiv 2402.13753.
LONG = "longrope"
#: Gemma 4's: frequencies are those of the whole head, and those of the last pairs zero.
PROPORTIONAL = "proportional"
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", LONG, PROPORTIONAL)


@dataclass(frozen=True)
class Rope:
    """The rotary settings of a model.

    ``type`` is one of ``ROPE_TYPES``. ``original_max_position`` is the context the model was first
    trained with. ``attention_factor`` multiplies cosine and sine (yarn, longrope; 1.0 otherwise),
    and ``fraction`` of each head is rotated: its first dimensions, or ("proportional") the first
    ones of each half, where the others turn by nothing. ``mscale_all_dim`` is yarn's, 0 for none:
    latent attention scales its scores by it. Fields that a type does not use keep their defaults.
    """

    theta: float = DEFAULT_THETA
    type: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    fraction: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def dims(self, head_dim: int) -> int:
        """How many of ``head_dim`` dimensions are rotated, if by nothing."""
        return head_dim if self.type == PROPORTIONAL else int(head_dim * self.fraction)


def rope_settings(config: Mapping[str, Any], layers: str | None = None) -> Rope:
    """Read the rotary settings from a config in either style, those of ``layers`` ("full_attention"
    and the like) where they differ by the type of layer.

    Raises UnsupportedModelError for a type outside ``ROPE_TYPES``, for settings that differ by
    layer where ``layers`` is not told, and for a type whose settings are missing.
    """
    new = config.get("rope_parameters") or {}
    old = config.get("rope_scaling") or {}
    values: Mapping[str, Any] = new or old
    if any(isinstance(v, Mapping) for v in values.values()):
        if layers is None or not isinstance(values.get(layers), Mapping):
            raise UnsupportedModelError(
                "rope_parameters that differ by layer are not part of this architecture"
            )
        values = values[layers]
    kind = values.get("rope_type") or values.get("type") or "default"
    kind = LONG if kind == "su" else kind
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope type {kind!r} is not supported: known are {', '.join(ROPE_TYPES)}"
        )
    theta = _first(values.get("rope_theta"), config.get("rope_theta"), DEFAULT_THETA)
    fraction = _first(values.get("partial_rotary_factor"), config.get("partial_rotary_factor"), 1.0)
    longest = config.get("max_position_embeddings")
    key = "original_max_position_embeddings"
    original = _first(values.get(key), config.get(key), longest, 0)
    factor = values.get("factor")
    if factor is None and kind in ("yarn", LONG) and longest and original:
        factor = longest / original
    if factor is None and kind == PROPORTIONAL:
        factor = 1.0
    if factor is None and kind != "default":
        raise UnsupportedModelError(f"rope type {kind!r} needs a factor, and config.json has none")
    if kind in ("llama3", "yarn", LONG) and not original:
        raise UnsupportedModelError(
            f"rope type {kind!r} needs original_max_position_embeddings, and config.json has none"
        )
    scale = float(_first(factor, 1.0)) if kind != "default" else 1.0
    return Rope(
        theta=float(theta),
        type=kind,
        factor=scale,
        original_max_position=int(original),
        low_freq_factor=float(_first(values.get("low_freq_factor"), 1.0)),
        high_freq_factor=float(_first(values.get("high_freq_factor"), 4.0)),
        beta_fast=float(values.get("beta_fast") or 32.0),
        beta_slow=float(values.get("beta_slow") or 1.0),
        attention_factor=_attention_factor(values, kind, scale, int(original)),
        mscale_all_dim=float(values.get("mscale_all_dim") or 0.0) if kind == "yarn" else 0.0,
        truncate=bool(_first(values.get("truncate"), True)),
        fraction=float(fraction),
        short_factor=_factors(values, "short_factor") if kind == LONG else (),
        long_factor=_factors(values, "long_factor") if kind == LONG else (),
    )


def _factors(values: Mapping[str, Any], key: str) -> tuple[float, ...]:
    given = values.get(key)
    if not isinstance(given, list) or not given:
        raise UnsupportedModelError(f"rope type {LONG!r} needs a list {key}")
    return tuple(float(factor) for factor in given)


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each rotated pair: f64 ``[rope.dims(head_dim) / 2]``.

    "dynamic" stretches only beyond the trained context, which is where generation stops, so it
    equals "default" here, and longrope has its factors for contexts below that. llama3: Llama 3.1's
    smoothed split by wavelength. yarn: Peng et al., 2023 (arXiv 2309.00071), with the ramp between
    ``beta_slow`` and ``beta_fast`` rotations.
    """
    import numpy as np

    dims = rope.dims(head_dim)
    frequencies = rope.theta ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == PROPORTIONAL:
        turning = np.arange(dims // 2) < int(rope.fraction * dims // 2)
        some: np.ndarray = np.where(turning, frequencies / rope.factor, 0.0)
        return some
    if rope.type == LONG:
        if len(rope.short_factor) != dims // 2 or len(rope.long_factor) != dims // 2:
            raise UnsupportedModelError(
                f"short_factor and long_factor are not {dims // 2} numbers each"
            )
        shortened: np.ndarray = frequencies / np.array(rope.short_factor)
        return shortened
    if rope.type == "llama3":
        rotations = rope.original_max_position * frequencies / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = np.clip((rotations - rope.low_freq_factor) / span, 0.0, 1.0)
    elif rope.type == "yarn":
        low, high = (_yarn_dim(rope, n, dims) for n in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        width = high - low if high != low else 0.001
        keep = 1.0 - np.clip((np.arange(dims // 2) - low) / width, 0.0, 1.0)
    else:
        return frequencies
    result: np.ndarray = frequencies * keep + frequencies / rope.factor * (1.0 - keep)
    return result


def _yarn_dim(rope: Rope, rotations: float, dims: int) -> float:
    """The (fractional) pair that turns ``rotations`` times within the original context."""
    turns = rope.original_max_position / (rotations * 2 * math.pi)
    return dims * math.log(turns) / (2 * math.log(rope.theta))


def _attention_factor(values: Mapping[str, Any], kind: str, factor: float, original: int) -> float:
    if kind not in ("yarn", LONG):
        return 1.0
    given = values.get("attention_factor")
    if given is not None:
        return float(given)
    if kind == LONG:
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    mscale, all_dims = values.get("mscale"), values.get("mscale_all_dim")
    if mscale and all_dims:
        return _yarn_scale(factor, mscale) / _yarn_scale(factor, all_dims)
    return _yarn_scale(factor, 1.0)


def score_scale(rope: Rope) -> float:
    """By what latent attention multiplies its scores beside the root of the head's size
    (``DeepseekV3Attention`` in DeepSeek-V3's modeling_deepseek.py)."""
    return _yarn_scale(rope.factor, rope.mscale_all_dim) ** 2


def mscale_of(rope: Rope) -> float:
    """yarn's ``mscale`` that gives the attention factor beside ``mscale_all_dim``."""
    if rope.factor <= 1:
        return rope.mscale_all_dim
    whole = rope.attention_factor * _yarn_scale(rope.factor, rope.mscale_all_dim)
    return float(f"{(whole - 1.0) / (0.1 * math.log(rope.factor)):.7g}")


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)
