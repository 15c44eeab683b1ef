"""From a GGUF file's metadata to Hugging Face's tokenizer files.

The files give the ids that llama.cpp gives (llama-vocab.cpp as vendored by llama-cpp-python
0.3.36): no Unicode normalisation, special tokens matched anywhere, its cutting rules by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxedge.errors import TokenizerError
from mlxedge.gguf_values import GgufValue, string
from mlxedge.tokenizer import pre, sentencepiece
from mlxedge.tokenizer.files import Json, added_token, byte_level_document, template_processing
from mlxedge.tokenizer.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
)
from mlxedge.tokenizer.spec import TokenizerSpec
from mlxedge.tokenizer.special import kinds_of_texts

PREFIX = "tokenizer."
MODEL = "tokenizer.ggml.model"
PRE = "tokenizer.ggml.pre"
TOKENS = "tokenizer.ggml.tokens"
TOKEN_TYPES = "tokenizer.ggml.token_type"
SCORES = "tokenizer.ggml.scores"
MERGES = "tokenizer.ggml.merges"
ADD_BOS = "tokenizer.ggml.add_bos_token"
ADD_EOS = "tokenizer.ggml.add_eos_token"
SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
MERGE_SPACES = "tokenizer.ggml.remove_extra_whitespaces"
CHARSMAP = "tokenizer.ggml.precompiled_charsmap"
TEMPLATE = "tokenizer.chat_template"

#: The id of each role's token, by GGUF's key.
ROLE_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",  # so spelled in the format
    "pad": "tokenizer.ggml.padding_token_id",
    "cls": "tokenizer.ggml.cls_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
}
#: What a "llama" and a "t5" vocabulary have where the file does not say.
_SPM_IDS = {"bos": 1, "eos": 2, "unk": 0}
_T5_IDS = {"eos": 1, "unk": 2, "pad": 0}
_LARGEST_VOCABULARY = 1 << 24
#: Why a WordPiece vocabulary is not carried over.
ENCODERS_ONLY = (
    "the tokenizer is WordPiece, which BERT and other encoders have: mlxedge converts models that "
    "generate text, no encoders; llama.cpp's own convert_hf_to_gguf.py converts those"
)


@dataclass
class _Made:
    """A document, and what llama.cpp takes for granted where the file is silent."""

    document: Json
    add_bos: bool = False
    add_eos: bool = False
    always_bos: bool = False
    ids: Mapping[str, int] = field(default_factory=dict)


def from_gguf(metadata: Mapping[str, GgufValue]) -> TokenizerSpec:
    """The tokenizer of a GGUF file: ``tokenizer.json``, its settings, and the metadata itself.

    ``metadata`` is the file's metadata; keys outside ``tokenizer.`` are ignored. Models "gpt2"
    (byte-pair encoding of bytes), "gemma4" (of characters), "llama" (SentencePiece BPE) and "t5"
    (SentencePiece unigram) are read. Raises TokenizerError if the metadata is incomplete,
    contradicts itself, or names a pre-tokenizer that cannot be expressed.
    """
    own = {key: value for key, value in metadata.items() if key.startswith(PREFIX)}
    reader = _Reader(own)
    pieces = _pieces(reader)
    model = reader.text(MODEL)
    if model == "bert":
        raise TokenizerError(ENCODERS_ONLY)
    if model not in _MODELS:
        raise TokenizerError(
            f"{MODEL} is {model!r}; only {', '.join(_MODELS)} are read. Take the tokenizer from "
            "the original model instead"
        )
    made = _MODELS[model](reader, pieces)
    document = made.document
    defaults = {role: i for role, i in made.ids.items() if i < len(pieces)}
    given = {role: reader.token_id(key, len(pieces)) for role, key in ROLE_KEYS.items()}
    numbers = defaults | {role: i for role, i in given.items() if i is not None}
    named = {role: pieces[number].text for role, number in numbers.items()}
    flags = {
        "bos": reader.flag(ADD_BOS, made.add_bos) or made.always_bos,
        "eos": reader.flag(ADD_EOS, made.add_eos),
    }
    for role, wanted in flags.items():
        if wanted and role not in named:
            raise TokenizerError(
                f"tokenizer.ggml.add_{role}_token is set, and {ROLE_KEYS[role]} is missing"
            )
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    ends = [named[role] if flags[role] else None for role in ("bos", "eos")]
    document["post_processor"] = template_processing(ends[0], ends[1], ids)
    special = {f"{role}_token": text for role, text in named.items()}
    config: Json = {
        **special,
        "add_bos_token": flags["bos"],
        "add_eos_token": flags["eos"],
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if SPACE_PREFIX in own:
        config["add_prefix_space"] = reader.flag(SPACE_PREFIX, False)
    if template := _templates(reader):
        config["chat_template"] = template
    files = {
        "tokenizer.json": _json_bytes(document, indent=None),  # large: only then is it quick
        "tokenizer_config.json": _json_bytes(config),
        "special_tokens_map.json": _json_bytes(special),
    }
    return TokenizerSpec(files, own)


def _json_bytes(made: Json, indent: int | None = 2) -> bytes:
    try:
        return json.dumps(made, ensure_ascii=False, indent=indent).encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"the tokenizer's metadata is not Unicode: {error}") from error


class _Reader:
    """Typed access to metadata; every wrong type or range is a TokenizerError."""

    def __init__(self, metadata: Mapping[str, GgufValue]) -> None:
        self._metadata = metadata

    def _scalar(self, key: str, kinds: tuple[str, ...], default: Any) -> Any:
        found = self._metadata.get(key)
        if found is None:
            return default
        if found.kind not in kinds:
            raise TokenizerError(f"{key} is of type {found.kind}, expected {' or '.join(kinds)}")
        return found.value

    def text(self, key: str, default: str | None = None) -> str:
        found = self._scalar(key, ("str",), default)
        if found is None:
            raise TokenizerError(f"{key} is missing")
        return str(found)

    def with_text(self, key: str, text: str) -> _Reader:
        """The same metadata, with another text under a key."""
        return _Reader({**self._metadata, key: string(text)})

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._scalar(key, ("bool",), default))

    def token_id(self, key: str, count: int) -> int | None:
        kinds = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")
        found = self._scalar(key, kinds, None)
        if found is not None and not 0 <= found < count:
            raise TokenizerError(f"{key} is {found}, and the vocabulary has {count} tokens")
        return None if found is None else int(found)

    def items(self, key: str, kinds: tuple[str, ...]) -> Sequence[Any] | None:
        found = self._metadata.get(key)
        if found is None:
            return None
        if found.kind != "array" or found.item not in kinds:
            raise TokenizerError(
                f"{key} is of type {found.item or found.kind}, expected an array of "
                f"{' or '.join(kinds)}"
            )
        return [item.item() if hasattr(item, "item") else item for item in found.value]

    def named(self, prefix: str) -> dict[str, str]:
        """The texts whose keys begin with a prefix, by the rest of the key."""
        return {
            k.removeprefix(prefix): self.text(k) for k in self._metadata if k.startswith(prefix)
        }


def _pieces(reader: _Reader) -> list[Piece]:
    """The vocabulary: text, score and kind of every token."""
    texts = reader.items(TOKENS, ("str",))
    if not texts or len(texts) > _LARGEST_VOCABULARY:
        raise TokenizerError(f"{TOKENS} is missing, empty or too long")
    kinds = reader.items(TOKEN_TYPES, ("i32", "u32")) or [NORMAL] * len(texts)
    scores = reader.items(SCORES, ("f32", "i32")) or [0.0] * len(texts)
    for key, given in ((TOKEN_TYPES, kinds), (SCORES, scores)):
        if len(given) != len(texts):
            raise TokenizerError(f"{key} has {len(given)} items for {len(texts)} tokens")
    pieces: list[Piece] = []
    seen: dict[str, int] = {}
    for number, (text, score, kind) in enumerate(zip(texts, scores, kinds)):
        text = text or f"[EMPTY_{number}]"
        if text in seen:
            raise TokenizerError(f"{TOKENS}: {text!r} is token {seen[text]} and {number}")
        if not math.isfinite(score):
            raise TokenizerError(f"{SCORES}: token {number} has the score {score}")
        seen[text] = number
        pieces.append(Piece(text, score, kind if kind in range(NORMAL, BYTE + 1) else NORMAL))
    kinds_by_text = kinds_of_texts(seen.keys())
    return [
        Piece(piece.text, piece.score, kinds_by_text.get(piece.text, piece.kind))
        for piece in pieces
    ]


def _byte_pair(reader: _Reader, pieces: Sequence[Piece]) -> _Made:
    """A "gpt2" vocabulary, whose pre-tokenizer says how its tokens are spelt."""
    pre_tokenizer, rules = pre.pre_tokenizer(reader.text(PRE, "default"))
    merges = reader.items(MERGES, ("str",))
    if merges is None:
        raise TokenizerError(f"{MERGES} is missing")
    vocab = {p.text: i for i, p in enumerate(pieces) if not sentencepiece.is_padding(p, i)}
    pairs: dict[tuple[str, str], None] = {}  # in order, the first of equal ones
    for number, merge in enumerate(merges):
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or left not in vocab or right not in vocab or left + right not in vocab:
            raise TokenizerError(
                f"{MERGES}: merge {number}, {merge!r}, joins no two tokens into one"
            )
        pairs[left, right] = None
    made = byte_level_document(
        vocab, [list(pair) for pair in pairs], pre_tokenizer, rules.ignore_merges
    )
    if rules.raw:
        made |= sentencepiece.raw_bpe_steps()
        made["model"]["byte_fallback"] = True
    made["added_tokens"] = [
        added_token(piece.text, i, special=piece.kind != USER_DEFINED)
        for i, piece in enumerate(pieces)
        if piece.kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    return _Made(made, rules.add_bos, always_bos=rules.always_bos)


def _gemma4(reader: _Reader, pieces: Sequence[Piece]) -> _Made:
    return _byte_pair(reader.with_text(PRE, "gemma4"), pieces)


def _sentencepiece(reader: _Reader, pieces: Sequence[Piece]) -> _Made:
    model = sentencepiece.Model(
        list(pieces),
        space_prefix=reader.flag(SPACE_PREFIX, True),
        remove_extra_spaces=False,
    )
    return _Made(sentencepiece.bpe_document(model), add_bos=True, ids=_SPM_IDS)


def _unigram(reader: _Reader, pieces: Sequence[Piece]) -> _Made:
    """A "t5" vocabulary. What is no normal piece has no part in the sums of scores."""
    every = list(pieces)
    while every and every[-1].kind == UNUSED and every[-1].text.startswith("[PAD"):
        every.pop()
    lowest = min((piece.score for piece in every if piece.kind == NORMAL), default=0.0)
    every = [
        piece
        if piece.kind in (NORMAL, UNUSED)
        else Piece(piece.text, lowest if piece.kind == BYTE else 0.0, piece.kind)
        for piece in every
    ]
    merge_spaces = reader.flag(MERGE_SPACES, False)
    charsmap = reader.items(CHARSMAP, ("u8", "i8")) or []
    document = sentencepiece.unigram_document(
        sentencepiece.Model(
            every,
            charsmap=bytes(byte & 0xFF for byte in charsmap),
            # Merging spaces puts one before the first word too.
            space_prefix=reader.flag(SPACE_PREFIX, False) or merge_spaces,
            remove_extra_spaces=merge_spaces,
        )
    )
    document["model"]["byte_fallback"] = False  # llama.cpp gives the unknown token
    return _Made(document, add_eos=True, ids=_T5_IDS)


_MODELS: dict[str, Callable[[_Reader, Sequence[Piece]], _Made]] = {
    "gpt2": _byte_pair,
    "gemma4": _gemma4,
    "llama": _sentencepiece,
    "t5": _unigram,
}


def _templates(reader: _Reader) -> str | list[Json] | None:
    """The chat template, or a list of them by name where there are several."""
    default = reader.text(TEMPLATE, "")
    named = reader.named(TEMPLATE + ".")
    if not named:
        return default or None
    every = {"default": default, **named} if default else named
    return [{"name": name, "template": template} for name, template in every.items()]
