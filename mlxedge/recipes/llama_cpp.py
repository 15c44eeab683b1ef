"""Which ggml type each tensor gets: llama.cpp's own mixes.

The rules are those of ``llama_tensor_get_type`` and ``tensor_allows_quantization`` in llama.cpp's
src/llama-quant.cpp, as vendored by llama-cpp-python 0.3.36, without an imatrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlxedge.encodings import F16, F32, GGML, PLAIN, Encoding

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
}

#: What a type becomes where the row is not a multiple of its block of 256.
SHAPE_FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}

#: Matrices that are never quantized, by a part of their name.
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "attn_rel_b.weight",
    "position_embd",
    "token_types",
)


@dataclass(frozen=True)
class Shape:
    """What the rules ask about a model. ``gqa`` is query heads per key/value head in layer 0."""

    layers: int
    gqa: int
    experts: int = 0
    is_70b: bool = False


@dataclass(frozen=True)
class Choice:
    """The encoding of one tensor; ``reason`` says why it is not the recipe's main type."""

    encoding: Encoding
    reason: str | None = None


def _more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


#: A rule gets the ordinal of the tensor among its kind, their number, and the shape; it returns a
#: type, or ``None`` for the recipe's main type.
_Rule = Callable[[int, int, Shape], str | None]

_ATTN_V: dict[str, _Rule] = {
    "q2_k": lambda i, n, s: "q4_k" if s.gqa >= 4 else "q3_k",
    "q3_k_m": lambda i, n, s: "q5_k" if i < 2 else "q4_k",
    "q3_k_l": lambda i, n, s: "q5_k",
    "q4_k_s": lambda i, n, s: "q5_k" if i < 4 else None,
    "q4_k_m": lambda i, n, s: "q6_k" if _more_bits(i, n) else None,
    "q5_k_m": lambda i, n, s: "q6_k" if _more_bits(i, n) else None,
}
_FFN_DOWN: dict[str, _Rule] = {
    "q2_k": lambda i, n, s: "q3_k",
    "q3_k_m": lambda i, n, s: "q5_k" if i < n // 16 else "q4_k",
    "q3_k_l": lambda i, n, s: "q5_k",
    "q4_k_s": lambda i, n, s: "q5_k" if i < n // 8 else None,
    "q4_k_m": lambda i, n, s: "q6_k" if _more_bits(i, n) else None,
    "q5_k_m": lambda i, n, s: "q6_k" if _more_bits(i, n) else None,
}
_EIGHT_EXPERTS_OUT = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")
_ATTN_OUTPUT: dict[str, _Rule] = {
    "q2_k": lambda i, n, s: "q3_k",
    "q3_k_m": lambda i, n, s: "q4_k",
    "q3_k_l": lambda i, n, s: "q5_k",
}


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    for part, category in (
        ("attn_qkv.weight", "attn_v"),
        ("attn_kv_b.weight", "attn_v"),
        ("attn_v.weight", "attn_v"),
        ("attn_k.weight", "attn_k"),
        ("attn_output.weight", "attn_output"),
        ("ffn_down", "ffn_down"),
    ):
        if part in name:
            return category
    return "other"


def _sort_key(name: str) -> tuple[int, str]:
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def choose(
    recipe: str, tensors: Iterable[tuple[str, tuple[int, ...]]], shape: Shape
) -> dict[str, Choice]:
    """The encoding of every tensor, by GGUF name.

    ``tensors`` are (GGUF name, shape ``[..., cols]``); the order does not matter, since llama.cpp
    counts layers in the order of its own sorted list.
    """
    base = RECIPES[recipe][0]
    items = sorted(tensors, key=lambda item: _sort_key(item[0]))
    names = {name for name, _ in items}
    tied = "output.weight" not in names
    counts: dict[str, int] = {}
    attn_v = sum(_category(n) == "attn_v" for n in names)
    totals = {"attn_v": attn_v, "ffn_down": shape.layers}

    chosen: dict[str, Choice] = {}
    for name, dims in items:
        if reason := _kept(name, dims):
            chosen[name] = Choice(F32, reason)
            continue
        if base in PLAIN:
            chosen[name] = Choice(PLAIN[base])
            continue
        category = _category(name)
        ordinal = counts.get(category, 0)
        counts[category] = ordinal + 1
        kind, reason = _rule(recipe, base, category, name, dims[-1], ordinal, totals, shape, tied)
        chosen[name] = _fit(kind, dims[-1], reason)
    return chosen


def _kept(name: str, dims: tuple[int, ...]) -> str | None:
    if len(dims) < 2:
        return "one-dimensional tensors stay f32"
    if not name.endswith("weight") or any(part in name for part in _KEPT):
        return "llama.cpp never quantizes this tensor"
    return None


def _rule(
    recipe: str,
    base: str,
    category: str,
    name: str,
    cols: int,
    ordinal: int,
    totals: dict[str, int],
    shape: Shape,
    tied: bool,
) -> tuple[str, str | None]:
    mix = f"{recipe} mix"
    kind: str | None = None
    if category == "output" or (category == "token_embd" and tied):
        what = "tied embedding and output" if tied else "output"
        if cols % GGML[base].block:
            return "q8_0", f"{what}: rows of {cols} do not divide into blocks of 256"
        kind = "q8_0" if base == "q8_0" else "q6_k"
        return kind, None if kind == base else f"{what}: {mix}"
    if category == "attn_v":
        if rule := _ATTN_V.get(recipe):
            kind = rule(ordinal, totals["attn_v"], shape)
        if shape.is_70b and (kind or base) in ("q3_k", "q4_k"):
            kind = "q5_k"
        if shape.experts == 8:
            kind = "q8_0"
    elif category == "attn_k":
        kind = "q8_0" if shape.experts == 8 else None
    elif category == "ffn_down":
        if rule := _FFN_DOWN.get(recipe):
            layer = _sort_key(name)[0] if shape.experts > 1 else ordinal
            kind = rule(layer, totals["ffn_down"], shape)
    elif category == "attn_output":
        if shape.experts == 8:
            kind = "q5_k" if recipe in _EIGHT_EXPERTS_OUT else None
        elif rule := _ATTN_OUTPUT.get(recipe):
            kind = rule(ordinal, 0, shape)
    if kind is None or kind == base:
        return base, None
    return kind, mix


def _fit(kind: str, cols: int, reason: str | None) -> Choice:
    encoding: Encoding = GGML[kind]
    if cols % encoding.block == 0:
        return Choice(encoding, reason)
    why = f"rows of {cols} do not divide into blocks of {encoding.block}"
    encoding = GGML[SHAPE_FALLBACK.get(kind, kind)]
    if cols % encoding.block:
        return Choice(F16, f"rows of {cols} divide into no block size")
    return Choice(encoding, f"{why} ({kind})")


def file_type(recipe: str) -> int:
    """``general.file_type`` of a recipe."""
    return RECIPES[recipe][1]
