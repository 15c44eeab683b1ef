"""Rotary settings in files: what GGUF's metadata and tensors say of them, and config.json in either
style."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.rope import LONG, PROPORTIONAL, Rope, inverse_frequencies, rope_settings

if TYPE_CHECKING:
    import numpy as np

#: Gives a GGUF key of the architecture, or a default (``None``).
Get = Callable[..., Any]

#: GGUF tensors that hold rotary settings.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_FREQUENCIES, _LONG, _SHORT = ROPE_TENSORS
_ORIGINAL = "rope.scaling.original_context_length"
#: The architectures for which llama.cpp reads other ends of yarn's ramp than its own.
_READS_RAMP = ("grok", "mistral3")
_RAMP = (32.0, 1.0)
_SHARE = "rope.scaling.yarn_log_multiplier"
_YARN = {
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
#: The factor by which llama.cpp's converter divides frequencies that are to be zero.
_NEVER = 1e30


def rope_metadata(rope: Rope) -> gv.Metadata:
    """GGUF's keys for what scales a rotary embedding, without the architecture."""
    if rope.type == LONG:
        return {
            _ORIGINAL: gv.u32(rope.original_max_position),
            "rope.scaling.attn_factor": gv.f32(rope.attention_factor),
        }
    if rope.type not in ("linear", "yarn"):
        return {}
    values = {
        "rope.scaling.type": gv.string(rope.type),
        "rope.scaling.factor": gv.f32(rope.factor),
    }
    if rope.type == "yarn":
        values[_ORIGINAL] = gv.u32(rope.original_max_position)
        values["rope.scaling.yarn_beta_fast"] = gv.f32(rope.beta_fast)
        values["rope.scaling.yarn_beta_slow"] = gv.f32(rope.beta_slow)
        if share := _yarn_share(rope):
            values[_SHARE] = gv.f32(share)
    return values


def rope_tensors(rope: Rope, head_dim: int) -> dict[str, np.ndarray]:
    """GGUF's tensors f32 ``[pairs]``: for llama3 and proportional rope plain over scaled
    frequencies, for longrope its factors."""
    import numpy as np

    if rope.type == LONG:
        made = {_LONG: rope.long_factor, _SHORT: rope.short_factor}
        return {name: np.array(factors, np.float32) for name, factors in made.items()}
    if rope.type == PROPORTIONAL:
        turning = inverse_frequencies(rope, head_dim) > 0
        return {_FREQUENCIES: np.where(turning, rope.factor, _NEVER).astype(np.float32)}
    if rope.type != "llama3":
        return {}
    plain = inverse_frequencies(Rope(theta=rope.theta, fraction=rope.fraction), head_dim)
    return {_FREQUENCIES: (plain / inverse_frequencies(rope, head_dim)).astype(np.float32)}


def rope_from_gguf(
    get: Get, extra: Mapping[str, np.ndarray], head_dim: int, partial: bool
) -> dict[str, Any]:
    """``rope_parameters`` of a GGUF file with these tensors; raises UnsupportedModelError for a
    scaling that is not known. ``partial``: whether a part of each head may turn."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(get("rope.freq_base", 10000.0)),
    }
    kind = get("rope.scaling.type")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(get("rope.scaling.factor", 1.0))}
    elif kind not in (None, "none", LONG):
        raise UnsupportedModelError(f"rope scaling {kind!r} of a GGUF file is not supported")
    if kind == "yarn":
        rope |= _original(get)
        for key, gguf_key in _YARN.items():
            if (value := get(gguf_key)) is not None:
                rope[key] = float(value)
        if share := get(_SHARE):
            rope |= {"mscale": 1.0, "mscale_all_dim": shortest(float(share))}
    if partial:
        rope["partial_rotary_factor"] = get("rope.dimension_count", head_dim) / head_dim
    if _LONG in extra and _SHORT in extra:
        rope |= _original(get) | {
            "rope_type": LONG,
            "long_factor": [shortest(float(f)) for f in extra[_LONG]],
            "short_factor": [shortest(float(f)) for f in extra[_SHORT]],
        }
    if (factors := extra.get(_FREQUENCIES)) is not None:
        found = proportional_from_factors(factors)
        rope |= found or llama3_from_factors(factors, rope["rope_theta"], head_dim)
    return rope


def _original(get: Get) -> dict[str, int]:
    value = get(_ORIGINAL)
    if not isinstance(value, int) or value <= 0:
        raise UnsupportedModelError(f"the GGUF metadata lacks a positive {_ORIGINAL}")
    return {"original_max_position_embeddings": value}


def rope_values(rope: Rope) -> dict[str, Any]:
    """``rope_parameters`` of these settings, nothing left to defaults."""
    values: dict[str, Any] = {"rope_type": rope.type, "rope_theta": rope.theta}
    if rope.type == LONG:
        values |= {"long_factor": list(rope.long_factor), "short_factor": list(rope.short_factor)}
    elif rope.type != "default":
        values["factor"] = rope.factor
    if rope.type == PROPORTIONAL:
        values["partial_rotary_factor"] = rope.fraction
    if rope.type == "llama3":
        values["low_freq_factor"] = rope.low_freq_factor
        values["high_freq_factor"] = rope.high_freq_factor
    if rope.type == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        values |= {} if rope.truncate else {"truncate": False}
        if share := _yarn_share(rope):
            values |= {"mscale": 1.0, "mscale_all_dim": share}
    if rope.type in ("llama3", "yarn", LONG):
        values["original_max_position_embeddings"] = rope.original_max_position
    return values


def both_styles(rope: dict[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` for older readers, ``rope_parameters`` for newer."""
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling if rope["rope_type"] != "default" else None,
        "rope_parameters": rope,
    }


def rope_objections(
    rope: Rope, runtime: str, arch: str, freq_factors: bool, yarn_told: bool = False
) -> list[str]:
    """Why a runtime cannot be told these settings; ``freq_factors``: whether llama.cpp reads
    frequency factors for ``arch``; ``yarn_told``: whether the runtime reads how much yarn scales
    cosine and sine."""
    found = []
    if runtime == "gguf" and rope.type == "dynamic":
        found.append("llama.cpp has no dynamic rope scaling")
    if runtime == "gguf" and rope.type == "llama3" and not freq_factors:
        found.append(f"llama.cpp reads no llama3 rope factors for {arch}")
    own_ramp = rope.type == "yarn" and (rope.beta_fast, rope.beta_slow) != _RAMP
    if runtime == "gguf" and own_ramp and arch not in _READS_RAMP:
        found.append(f"llama.cpp reads no beta_fast and beta_slow of yarn for {arch}")
    if rope.type == "yarn" and not rope.truncate:
        found.append("the runtime cannot be told this yarn truncate: false")
    if _yarn_share(rope) and not yarn_told:
        found.append("the runtime cannot be told this yarn attention_factor")
    return found


def _yarn_share(rope: Rope) -> float:
    """What configs call ``mscale_all_dim``, beside an ``mscale`` of 1: the attention factor is
    (0.1·log(factor) + 1) / (0.1·share·log(factor) + 1). 0 where it is yarn's own, or there is no
    yarn."""
    if rope.type != "yarn" or rope.factor <= 1:
        return 0.0
    grown = 0.1 * math.log(rope.factor)
    share = ((grown + 1.0) / rope.attention_factor - 1.0) / grown
    return shortest(share) if abs(share) > 1e-5 else 0.0


def shortest(value: float) -> float:
    """The decimal number that an f32 was made from: 9.999999747378752e-06 → 1e-05."""
    return float(f"{value:.7g}")


def proportional_from_factors(factors: np.ndarray) -> dict[str, Any] | None:
    """The proportional rope settings of frequency factors f32 ``[pairs]``, which are all the same
    but for those that let the last pairs not turn; ``None`` if they are others, or all one."""
    turning = factors[factors < _NEVER / 2]
    if not turning.size or (turning != turning[0]).any() or (factors == 1.0).all():
        return None
    if (factors[: turning.size] != turning[0]).any():
        return None
    return {
        "rope_type": PROPORTIONAL,
        "factor": shortest(float(turning[0])),
        "partial_rotary_factor": turning.size / factors.size,
    }


def llama3_from_factors(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 rope settings that give these frequency factors f32 ``[head_dim / 2]``.

    Between the two wavelengths 1/factor is linear in the frequency, so two points of that stretch
    tell them; only ratios matter, so ``low_freq_factor`` is taken as 1, as published models do.
    Raises UnsupportedModelError if the factors are not of this form.
    """
    import numpy as np

    f = np.asarray(factors, dtype=np.float64)
    plain = inverse_frequencies(Rope(theta=theta), head_dim)
    if f.shape != plain.shape:
        raise UnsupportedModelError(
            f"rope_freqs.weight has {f.size} factors for {plain.size} pairs"
        )
    factor = float(f.max())
    settings: dict[str, Any] = {"rope_type": "llama3", "factor": float(f"{factor:.6g}")}
    candidates = [(8192.0, 4.0)]
    inner = np.flatnonzero((f > 1.0) & (f < factor))
    if inner.size >= 2:
        keep = (1 / f[inner] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(plain[inner] / (2 * math.pi), keep, 1)
        candidates.append((float(slope / -offset), float(1 + 1 / -offset)))
    for original, high in candidates:
        trial = settings | {
            "low_freq_factor": 1.0,
            "high_freq_factor": float(f"{high:.4g}"),
            "original_max_position_embeddings": round(original),
        }
        rope = rope_settings({"rope_parameters": trial | {"rope_theta": theta}})
        if np.allclose(plain / inverse_frequencies(rope, head_dim), f, rtol=1e-3):
            return trial
    raise UnsupportedModelError("rope_freqs.weight holds factors that are not llama3's")
