"""The tables of llama.cpp's mixes: which tensors get more or fewer bits than the rest.

They say what ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` say in llama.cpp's
src/llama-quant.cpp, as vendored by llama-cpp-python 0.3.36, for all architectures but bailingmoe3
and glm5-next, which have rules of their own there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mlxedge.encodings import GGML

#: Recipe → (type of most matrices, ``general.file_type``: llama.h's ``enum llama_ftype``).
RECIPES: dict[str, tuple[str, int]] = {
    "f32": ("f32", 0),
    "f16": ("f16", 1),
    "bf16": ("bf16", 32),
    "q4_0": ("q4_0", 2),
    "q4_1": ("q4_1", 3),
    "q8_0": ("q8_0", 7),
    "q5_0": ("q5_0", 8),
    "q5_1": ("q5_1", 9),
    "q2_k": ("q2_k", 10),
    "q3_k_s": ("q3_k", 11),
    "q3_k_m": ("q3_k", 12),
    "q3_k_l": ("q3_k", 13),
    "q4_k_s": ("q4_k", 14),
    "q4_k_m": ("q4_k", 15),
    "q5_k_s": ("q5_k", 16),
    "q5_k_m": ("q5_k", 17),
    "q6_k": ("q6_k", 18),
    "iq2_xxs": ("iq2_xxs", 19),
    "iq2_xs": ("iq2_xs", 20),
    "q2_k_s": ("q2_k", 21),
    "iq3_xs": ("iq3_s", 22),
    "iq3_xxs": ("iq3_xxs", 23),
    "iq1_s": ("iq1_s", 24),
    "iq4_nl": ("iq4_nl", 25),
    "iq3_s": ("iq3_s", 26),
    "iq3_m": ("iq3_s", 27),
    "iq2_s": ("iq2_xs", 28),
    "iq2_m": ("iq2_s", 29),
    "iq4_xs": ("iq4_xs", 30),
    "iq1_m": ("iq1_m", 31),
    "tq1_0": ("tq1_0", 36),
    "tq2_0": ("tq2_0", 37),
    "mxfp4_moe": ("mxfp4", 38),
}

#: What a type becomes where the row is not a multiple of its block of 256.
SHAPE_FALLBACK = {
    **dict.fromkeys(
        ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"
    ),
    **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}


@dataclass(frozen=True)
class Shape:
    """What the rules ask about a model. ``gqa`` is query heads per key/value head in layer 0;
    ``falcon``: whether it is one, for which some are others."""

    layers: int
    gqa: int
    experts: int = 0
    is_70b: bool = False
    falcon: bool = False


@dataclass(frozen=True)
class Place:
    """What the rules ask about a tensor.

    ``ordinal`` counts the tensors of its category so far, of ``total``; ``layer`` is the number in
    its name. ``stacked``: it holds the matrices of several experts.
    """

    category: str
    ordinal: int
    total: int
    layer: int
    stacked: bool
    has_imatrix: bool


#: A rule returns a type, or ``None`` for the recipe's main type. It gets the index of the tensor
#: among its kind, their number, the tensor and the model.
_Rule = Callable[[int, int, Place, Shape], str | None]


def _always(kind: str) -> _Rule:
    return lambda i, n, p, s: kind


def _first(share: int, kind: str, rest: str | None = None) -> _Rule:
    """The first 1/``share`` of them."""
    return lambda i, n, p, s: kind if i < n // share else rest


def _more_bits(i: int, n: int) -> bool:
    """The first and last eighth, and every third between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _ends_and_thirds(kind: str) -> _Rule:
    return lambda i, n, p, s: kind if _more_bits(i, n) else None


def _middle(kind: str) -> _Rule:
    """All but the first and last eighth."""
    return lambda i, n, p, s: kind if n // 8 <= i < 7 * n // 8 else None


def _shared(kind: str, rest: str | None = None) -> _Rule:
    """Where four or more query heads share a key/value head."""
    return lambda i, n, p, s: kind if s.gqa >= 4 else rest


def _blind(rule: _Rule) -> _Rule:
    """Without an importance matrix."""
    return lambda i, n, p, s: None if p.has_imatrix else rule(i, n, p, s)


def _informed(rule: _Rule) -> _Rule:
    """With an importance matrix."""
    return lambda i, n, p, s: rule(i, n, p, s) if p.has_imatrix else None


#: Category → recipe → rule.
_MIXES: Mapping[str, Mapping[str, _Rule]] = {
    "attn_v": {
        "q2_k": _shared("q4_k", "q3_k"),
        "q2_k_s": _shared("q4_k"),
        "q3_k_m": lambda i, n, p, s: "q5_k" if i < 2 else "q4_k",
        "q3_k_l": _always("q5_k"),
        "q4_k_s": lambda i, n, p, s: "q5_k" if i < 4 else None,
        "q4_k_m": _ends_and_thirds("q6_k"),
        "q5_k_m": _ends_and_thirds("q6_k"),
        "iq3_xxs": lambda i, n, p, s: "q4_k" if s.gqa >= 4 else None if p.has_imatrix else "iq3_s",
        "iq3_xs": _shared("q4_k"),
        "iq3_s": _shared("q4_k"),
        "iq3_m": _always("q4_k"),
        "iq4_nl": _shared("q5_k"),
        "iq4_xs": _shared("q5_k"),
    },
    "attn_k": {"iq3_xs": _always("iq3_xxs"), "iq3_xxs": _always("iq2_s")},
    "attn_q": {"iq3_xs": _always("iq3_xxs"), "iq3_xxs": _always("iq2_s")},
    "ffn_down": {
        "q2_k": _always("q3_k"),
        "q2_k_s": _first(8, "q4_k"),
        "q3_k_m": _first(16, "q5_k", "q4_k"),
        "q3_k_l": _always("q5_k"),
        "q4_k_s": _first(8, "q5_k"),
        "q4_k_m": _ends_and_thirds("q6_k"),
        "q5_k_m": _ends_and_thirds("q6_k"),
        "q4_0": _informed(_first(8, "q4_1")),
        "q5_0": _informed(_first(8, "q5_1")),
        "iq3_xxs": _blind(_first(8, "q4_k", "q3_k")),
        "iq3_m": lambda i, n, p, s: (
            "q4_k" if i < n // 8 or (s.experts == 8 and _more_bits(i, n)) else None
        ),
        "iq4_nl": _blind(_first(8, "q5_k")),
        "iq4_xs": _blind(_first(8, "q5_k")),
    },
    "attn_output": {
        "q2_k": _always("q3_k"),
        "q3_k_m": _always("q4_k"),
        "q3_k_l": _always("q5_k"),
        "iq3_xxs": _always("iq3_s"),
        "iq3_m": _always("q4_k"),
    },
    "ffn_gate": {"iq3_xs": _middle("iq3_xxs")},
    "ffn_up": {"iq3_xs": _middle("iq3_xxs")},
    "token_embd": {
        **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"), _always("q2_k")),
        **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), _always("iq3_s")),
        **dict.fromkeys(("tq1_0", "tq2_0"), _always("q4_k")),
    },
}

#: Falcon's, where they are others.
_FALCON: Mapping[str, Mapping[str, _Rule]] = {
    "ffn_down": {
        **_MIXES["ffn_down"],
        "q3_k_m": lambda i, n, p, s: (
            "q5_k" if i < n // 16 else "q4_k" if _more_bits(i, n) else "q3_k"
        ),
        "q3_k_l": _always("q4_k"),
        "q4_k_m": lambda i, n, p, s: (
            "q6_k" if i < n // 16 else "q5_k" if _more_bits(i, n) else "q4_k"
        ),
        "q4_k_s": _always("q4_k"),
    },
    "attn_output": {"q3_k_l": _always("q4_k")},
}

#: The recipes of about two bits and fewer go by rules of their own: recipe → (what attn_v and the
#: first ffn_down get, what attn_output gets).
_LOWEST: dict[str, tuple[str, str | None]] = {
    "iq1_s": ("q2_k", "iq2_xxs"),
    "iq1_m": ("q2_k", "iq2_xxs"),
    "iq2_xxs": ("q2_k", None),
    "iq2_xs": ("q2_k", None),
    "iq2_s": ("iq3_s", "iq3_s"),
    "iq2_m": ("iq3_s", "iq3_s"),
}

#: With eight experts, attention is so small a part that it gets more.
_EIGHT_EXPERTS_OUTPUT = (
    "q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m",
    "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs",
)  # fmt: skip


def mix(recipe: str, base: str, place: Place, shape: Shape) -> str:
    """The type of a matrix that is not the output head."""
    if recipe == "mxfp4_moe":
        return "mxfp4" if place.stacked else "q8_0"
    if recipe in _LOWEST and place.category != "token_embd":
        return _lowest(recipe, place, shape) or base
    eight = shape.experts == 8
    if eight and place.category in ("attn_v", "attn_k"):
        return "q8_0"
    if eight and place.category == "attn_output":
        return "q5_k" if recipe in _EIGHT_EXPERTS_OUTPUT else base
    kind = base
    own = _FALCON.get(place.category) if shape.falcon else None
    rules = _MIXES.get(place.category, {}) if own is None else own
    if rule := rules.get(recipe):
        by_name = shape.experts > 1 and place.category.startswith("ffn_")
        index = place.layer if by_name else place.ordinal
        kind = rule(index, place.total, place, shape) or base
    if place.category == "attn_v" and shape.is_70b and kind in ("q3_k", "q4_k"):
        return "q5_k"
    return kind


def _lowest(recipe: str, place: Place, shape: Shape) -> str | None:
    more, output = _LOWEST[recipe]
    if place.category == "attn_v":
        return "q4_k" if shape.gqa >= 4 or shape.experts >= 4 else more
    if place.category == "attn_k":
        return "q4_k" if shape.experts == 8 else None
    if place.category == "ffn_down":
        return more if place.ordinal < place.total // 8 else None
    if place.category == "attn_output":
        return "q5_k" if shape.experts == 8 else output
    return None


def head_type(recipe: str, base: str, cols: int, shape: Shape) -> tuple[str, str]:
    """The type of the output head, or of the embedding where it is the head, and why."""
    if recipe != "mxfp4_moe" and cols % GGML[base].block:
        return "q8_0", f"rows of {cols} do not divide into blocks of {GGML[base].block}"
    if recipe == "mxfp4_moe" or base == "q8_0" or shape.falcon:
        kind = "q8_0"
    elif recipe in _LOWEST or recipe == "iq3_xxs":
        kind = "q5_k"
    else:
        kind = "q6_k"
    return kind, f"{recipe} mix"
