"""SentencePiece models: the tokenizer.model file, and the tokenizer.json that equals one.

The file is a protocol buffer (sentencepiece_model.proto); only the few fields that decide ids are
read. A BPE model merges the pair whose product has the highest score; in ``tokenizers`` that is a
BPE with byte fallback whose merges are all splits of every piece, ordered by score (Sennrich et
al., arXiv:1508.07909; Kudo and Richardson, arXiv:1808.06226). A unigram model takes the pieces
whose scores, which are log probabilities, have the largest sum (Kudo, arXiv:1804.10959).
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxedge.errors import TokenizerError
from mlxedge.tokenizer.pre import flat

SPACE = "▁"
#: Kinds of pieces, numbered as in the file (and in GGUF).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_KINDS = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)
UNIGRAM, _BPE = 1, 2
#: The field of the trainer's settings that names each special piece, and its default.
_NAMED = {"unk": (45, "<unk>"), "bos": (46, "<s>"), "eos": (47, "</s>"), "pad": (48, "<pad>")}
#: How tokenizer.json files take away spaces: around a text, and all but one between words.
_EDGES = (r"\A +| +\z", "^ +| +$", "^ +", " +$")
_EXTRA_SPACES = " {2,}"
#: A piece longer than this is no piece, and would make the list of merges explode.
_LONGEST_PIECE = 1024


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int = NORMAL


@dataclass
class Model:
    """What decides ids in a SentencePiece model. ``kind`` is 1 for unigram, 2 for BPE.

    ``named``: the text of the special piece of each role (``"bos"``, ``"eos"``, ``"unk"``,
    ``"pad"``), whether or not the vocabulary has it.
    """

    pieces: list[Piece] = field(default_factory=list)
    kind: int = UNIGRAM
    charsmap: bytes = b""
    space_prefix: bool = True
    remove_extra_spaces: bool = True
    named: dict[str, str] = field(default_factory=dict)

    def roles(self) -> dict[str, str]:
        """``{"bos_token": text, …}`` of the special pieces that the vocabulary has."""
        texts = {piece.text for piece in self.pieces if piece.kind in (UNKNOWN, CONTROL)}
        return {f"{role}_token": text for role, text in self.named.items() if text in texts}


def padding_piece(number: int) -> str:
    """The text that fills a gap in a GGUF vocabulary."""
    return f"[PAD{number}]"


def is_padding(piece: Piece, number: int) -> bool:
    return piece.kind == UNUSED and piece.text == padding_piece(number)


def parse(raw: bytes) -> Model:
    """Read a tokenizer.model. Raises TokenizerError if it is not one."""
    model = Model()
    try:
        for number, value in _fields(raw):
            if number == 1 and isinstance(value, bytes):
                model.pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                rules = dict(_fields(value))
                model.kind = rules.get(3, UNIGRAM)
                model.named = {
                    role: rules[at].decode() if at in rules else text
                    for role, (at, text) in _NAMED.items()
                }
            elif number == 3 and isinstance(value, bytes):
                rules = dict(_fields(value))
                model.charsmap = bytes(memoryview(rules.get(2, b"")))
                model.space_prefix = bool(rules.get(3, 1))
                model.remove_extra_spaces = bool(rules.get(4, 1))
    except (ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
        # TypeError and AttributeError: a field is a number where bytes should be.
        raise TokenizerError(f"tokenizer.model is not a SentencePiece model: {error}") from error
    # A user's piece is looked for in the text as it is, before spaces are replaced.
    model.pieces = [
        Piece(piece.text.replace(SPACE, " "), piece.score, piece.kind)
        if piece.kind == USER_DEFINED
        else piece
        for piece in model.pieces
    ]
    if not model.pieces:
        raise TokenizerError("tokenizer.model is not a SentencePiece model: it holds no pieces")
    return model


def _piece(raw: bytes) -> Piece:
    found = dict(_fields(raw))
    score = struct.unpack("<f", found[2])[0] if 2 in found else 0.0
    kind = found.get(3, NORMAL)
    if not isinstance(found.get(1), bytes) or not math.isfinite(score) or kind not in _KINDS:
        raise ValueError("a piece has no text, no finite score or an unknown kind")
    return Piece(found[1].decode(), score, kind)


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Field number and value (int, or bytes for 4-byte and length-delimited ones) of a message."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(raw, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if size > len(raw) - at:
            raise ValueError(f"truncated at byte {at}")
        yield number, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"number too long at byte {at}")


def document(model: Model) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece model, with its special pieces as added tokens.

    Raises TokenizerError for a kind of model that language models do not use (words, characters).
    """
    if model.kind == _BPE:
        return bpe_document(model)
    if model.kind != UNIGRAM:
        raise TokenizerError(
            f"tokenizer.model is of SentencePiece kind {model.kind}; only unigram (1) and BPE (2) "
            "models are read"
        )
    return unigram_document(model)


def unigram_document(model: Model) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece unigram model."""
    unknown = [i for i, piece in enumerate(model.pieces) if piece.kind == UNKNOWN]
    return _document(
        model,
        {
            "type": "Unigram",
            "unk_id": unknown[0] if unknown else None,
            "byte_fallback": any(piece.kind == BYTE for piece in model.pieces),
            "vocab": [[piece.text, piece.score] for piece in model.pieces],
        },
    )


def bpe_document(model: Model) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece BPE model (see the module's text)."""
    unknown = [piece.text for piece in model.pieces if piece.kind == UNKNOWN]
    return _document(
        model,
        {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown[0] if unknown else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == BYTE for piece in model.pieces),
            "ignore_merges": False,
            "vocab": {
                piece.text: i for i, piece in enumerate(model.pieces) if not is_padding(piece, i)
            },
            "merges": merges(model.pieces),
        },
    )


def raw_bpe_steps() -> dict[str, Any]:
    """Normalizer and decoder of a BPE over characters with SentencePiece's spelling of a space."""
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "decoder": {"type": "Sequence", "decoders": _decoders()},
    }


def _decoders() -> list[dict[str, Any]]:
    return [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]


def _document(model: Model, inner: dict[str, Any]) -> dict[str, Any]:
    normalizers: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_spaces:
        # Spaces alone: other white space is a character like any other, unless the map says not.
        normalizers += [
            {"type": "Replace", "pattern": {"Regex": _EDGES[0]}, "content": ""},
            {"type": "Replace", "pattern": {"Regex": _EXTRA_SPACES}, "content": " "},
        ]
    if model.space_prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders = _decoders()
    if model.space_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": piece.text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": piece.kind != USER_DEFINED,
            }
            for i, piece in enumerate(model.pieces)
            if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": inner,
    }


def merges(pieces: Sequence[Piece]) -> list[list[str]]:
    """Every split of every normal piece into two pieces, best product first.

    Raises TokenizerError for a piece of more than 1,024 characters.
    """
    ids = {
        piece.text: i
        for i, piece in enumerate(pieces)
        if piece.kind in (NORMAL, UNUSED) and not is_padding(piece, i)
    }
    found: list[tuple[float, int, int, str, str]] = []
    for text, number in ids.items():
        if len(text) > _LONGEST_PIECE:
            raise TokenizerError(f"token {number} has {len(text)} characters, too many for a piece")
        score = -pieces[number].score
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                found.append((score, number, ids[left], left, right))
    found.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in found]


def unigram_rules(document: Mapping[str, Any]) -> Model:
    """What a unigram tokenizer.json does to a text before it looks for pieces, without pieces.

    Raises TokenizerError for a step that a SentencePiece model does not have.
    """
    found = Model(space_prefix=prepends_space(document), remove_extra_spaces=False)
    for step in flat(document.get("normalizer"), "normalizers"):
        kind, pattern = step.get("type"), step.get("pattern") or {}
        expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        if kind == "Precompiled" and not found.charsmap:
            found.charsmap = base64.b64decode(step.get("precompiled_charsmap") or "")
        elif kind == "Replace" and expression == _EXTRA_SPACES:
            found.remove_extra_spaces = True
        elif not (
            kind in ("Strip", "Prepend")
            or (kind == "Replace" and (expression in _EDGES or step.get("content") == SPACE))
        ):
            raise TokenizerError(
                f"the tokenizer normalizes with {kind} {pattern or ''}; a SentencePiece unigram "
                "model has no such step"
            )
    for step in flat(document.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "WhitespaceSplit":
            found.remove_extra_spaces = True
        elif step.get("type") != "Metaspace":
            raise TokenizerError(
                f"the tokenizer cuts with {step.get('type')}; a SentencePiece unigram model has no "
                "such step"
            )
    return found


def prepends_space(document: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json puts SentencePiece's space before a text."""
    for step in flat(document.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend":
            return True
    for step in flat(document.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme")
            return scheme != "never" if scheme else bool(step.get("add_prefix_space", True))
    return False


def rename_pieces(document: Mapping[str, Any], texts: Collection[str]) -> dict[str, Any]:
    """A unigram tokenizer.json in which the unknown piece and ``texts`` are found in no text.

    Their ids stay; before their names stands a space, which no normalized text contains.
    """
    model = document["model"]
    if not isinstance(model["vocab"], list):
        return dict(document)
    vocab = [
        [f" {text}" if text in texts or i == model.get("unk_id") else text, score]
        for i, (text, score) in enumerate(model["vocab"])
    ]
    return {**document, "model": {**model, "vocab": vocab}}


def merges_everything(document: Mapping[str, Any], listed: Collection[tuple[str, str]]) -> bool:
    """Whether ``listed`` are all pairs whose product is a token, as in a SentencePiece model."""
    added = {token["content"] for token in document["added_tokens"]}
    plain = document["model"]["vocab"].keys() - added
    return all(
        (text[:cut], text[cut:]) in listed
        for text in plain
        for cut in range(1, len(text))
        if text[:cut] in plain and text[cut:] in plain
    )
