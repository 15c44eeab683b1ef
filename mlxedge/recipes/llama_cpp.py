"""Which ggml type each tensor gets: llama.cpp's own mixes.

The rules are those of ``llama_tensor_get_type``, ``tensor_allows_quantization`` and
``tensor_requires_imatrix`` in llama.cpp's src/llama-quant.cpp, as vendored by llama-cpp-python
0.3.36, for the architectures that mlxedge writes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from mlxedge.encodings import F16, F32, GGML, PLAIN, Encoding
from mlxedge.errors import UsageError
from mlxedge.recipes.llama_cpp_mixes import (
    RECIPES,
    SHAPE_FALLBACK,
    Place,
    Shape,
    head_type,
    mix,
)
from mlxedge.recipes.overrides import NONE, Overrides, Role

#: Matrices that are never quantized, by a part of their name.
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "attn_rel_b.weight",
    "position_embd",
    "token_types",
)
_LAYER_EMBEDDINGS = "per_layer_token_embd.weight"
_EMBEDDINGS = ("token_embd.weight", _LAYER_EMBEDDINGS)
_ROLES: dict[str, Role] = {"output": "output", "token_embd": "embedding"}
#: What comes out as garbage without an importance matrix; llama.cpp refuses it, but for the head.
_BLIND = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
#: What ggml has no encoder for without an importance matrix, not for the head either.
_NEVER_BLIND = ("iq1_s", "iq2_xxs", "iq2_xs")


@dataclass(frozen=True)
class Choice:
    """The encoding of one tensor; ``reason`` says why it is not the recipe's main type, and
    ``instead_of`` which type its rows did not divide into blocks of."""

    encoding: Encoding
    reason: str | None = None
    instead_of: Encoding | None = None


_CATEGORIES = (
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "attn_q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in _EMBEDDINGS:
        return "token_embd"
    return next((category for part, category in _CATEGORIES if part in name), "other")


def _sort_key(name: str) -> tuple[int, str]:
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def choose(
    recipe: str,
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    shape: Shape,
    *,
    has_imatrix: bool = False,
    overrides: Overrides = NONE,
) -> dict[str, Choice]:
    """The encoding of every tensor, by GGUF name.

    ``tensors`` are (GGUF name, shape ``[..., cols]``); the order does not matter, since llama.cpp
    counts layers in the order of its own sorted list. ``has_imatrix``: whether the weights will be
    encoded with an importance matrix, which changes some mixes. ``overrides`` count as they do in
    llama-quantize, but also where it ignores them: for the head of tied models in ``pure`` ones,
    and where the recipe is f32, f16 or bf16.
    """
    items = sorted(tensors, key=lambda item: _sort_key(item[0]))
    mixer = _Mixer(recipe, [name for name, _ in items], shape, has_imatrix, overrides)
    return {name: mixer.choose(name, dims) for name, dims in items}


class _Mixer:
    """Goes through the tensors in llama.cpp's order and counts as it does."""

    def __init__(
        self, recipe: str, names: list[str], shape: Shape, has_imatrix: bool, overrides: Overrides
    ) -> None:
        self.recipe, self.shape = recipe, shape
        self.base = RECIPES[recipe][0]
        self.has_imatrix, self.overrides = has_imatrix, overrides
        self.tied = "output.weight" not in names
        # Only what a mix decided is counted, not what was overridden.
        self.counts: dict[str, int] = {}
        self.totals = dict.fromkeys(("ffn_up", "ffn_gate", "ffn_down"), shape.layers)
        self.totals["attn_v"] = sum(_category(name) == "attn_v" for name in names)

    def choose(self, name: str, dims: tuple[int, ...]) -> Choice:
        if reason := _kept(name, dims):
            return Choice(F32, reason)
        category = _category(name)
        if told := self._told(name, category):
            return _fit(told, dims[-1], None if told.name == self.base else "as told")
        if self.base in PLAIN:
            return Choice(PLAIN[self.base])
        if self.overrides.pure:
            return _fit(GGML[self.base], dims[-1], None)
        if category == "output" or (category == "token_embd" and self.tied):
            return self._head(dims[-1])
        kind, reason = self._mix(name, category, dims)
        return _fit(kind, dims[-1], reason)

    def _told(self, name: str, category: str) -> Encoding | None:
        """What the user wants for this tensor."""
        if name == _LAYER_EMBEDDINGS and (rule := self.overrides.named(name, "gguf")):
            return rule  # a large table of its own, which may be named on its own
        return self.overrides.find(name, "gguf", _ROLES.get(category), self.tied)

    def _head(self, cols: int) -> Choice:
        kind, why = head_type(self.recipe, self.base, cols, self.shape)
        what = "tied embedding and output" if self.tied else "output"
        made = _fit(GGML[kind], cols, None if kind == self.base else f"{what}: {why}")
        usual = GGML[head_type(self.recipe, self.base, 0, self.shape)[0]]
        return made if usual == made.encoding else replace(made, instead_of=usual)

    def _mix(self, name: str, category: str, dims: tuple[int, ...]) -> tuple[Encoding, str | None]:
        ordinal = self.counts.get(category, 0)
        self.counts[category] = ordinal + 1
        place = Place(
            category=category,
            ordinal=ordinal,
            total=self.totals.get(category, 0),
            layer=_sort_key(name)[0],
            stacked=len(dims) > 2 and dims[-3] > 1,
            has_imatrix=self.has_imatrix,
        )
        kind = mix(self.recipe, self.base, place, self.shape)
        return GGML[kind], None if kind == self.base else f"{self.recipe} mix"


def is_open(name: str, dims: tuple[int, ...]) -> bool:
    """Whether llama.cpp would quantize this tensor at all."""
    return _kept(name, dims) is None


def _kept(name: str, dims: tuple[int, ...]) -> str | None:
    if len(dims) < 2:
        return "one-dimensional tensors stay f32"
    if not name.endswith("weight") or any(part in name for part in _KEPT):
        return "llama.cpp never quantizes this tensor"
    return None


def _fit(encoding: Encoding, cols: int, reason: str | None) -> Choice:
    if cols % encoding.block == 0:
        return Choice(encoding, reason)
    why = f"rows of {cols} do not divide into blocks of {encoding.block}"
    smaller = GGML[SHAPE_FALLBACK.get(encoding.name, encoding.name)]
    if cols % smaller.block:
        return Choice(F16, f"rows of {cols} divide into no block size", encoding)
    return Choice(smaller, f"{why} ({encoding.name})", encoding)


def needs_importance(recipe: str, name: str, encoding: Encoding) -> bool:
    """Whether llama.cpp refuses to make this GGUF tensor without an importance matrix for it."""
    if name == "output.weight" or name in _EMBEDDINGS:
        return encoding.name in _NEVER_BLIND
    return encoding.name in _BLIND or (encoding.name == "q2_k" and recipe == "q2_k_s")


def check_importance(recipe: str, choices: dict[str, Choice], known: Collection[str]) -> None:
    """Raise UsageError if a tensor needs an importance and its GGUF name is not in ``known``."""
    missing = [
        name
        for name, choice in choices.items()
        if name not in known and needs_importance(recipe, name, choice.encoding)
    ]
    if missing:
        count = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UsageError(
            f"gguf:{recipe}: {missing[0]}{count} would be {choices[missing[0]].encoding}, which is "
            "garbage without an importance matrix: calibrate, or give an imatrix file that covers "
            "the model, or choose a recipe of more bits"
        )


def file_type(recipe: str) -> int:
    """``general.file_type`` of a recipe."""
    return RECIPES[recipe][1]
