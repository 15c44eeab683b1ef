"""Vocabularies in tiktoken's format: Llama 3's own tokenizer.model, Qwen's qwen.tiktoken.

Every line is a token in base64 and its rank (``load_tiktoken_bpe`` in tiktoken/load.py). That is
all: how a text is cut, which special tokens follow and what is added to a text stands in the code
that comes with a model. What belongs to two vocabularies is written down here, by their hash (of
others see ``recognised``): to Llama 3's from llama_models/llama3/tokenizer.py of llama-models 0.3.0
and the tokenizer.json of the Hub's Llama 3.1, to Qwen's from tokenization_qwen.py of Qwen-7B.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxedge.errors import TokenizerError

#: Names under which folders hold such a file; the first may be a SentencePiece model too.
FILES = ("tokenizer.model", "qwen.tiktoken", "tiktoken.model")
_FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?(\n|\Z)")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Known:
    """What belongs to a vocabulary: the cutting expressions, one after the other, the special
    tokens, whose ids follow those of the others, their roles, and which of these roles are added to
    a text.

    ``ignore_merges``: a whole word that is a token is taken as it is; so it is in tiktoken, and
    where merges find all tokens it makes no difference.
    """

    name: str
    expressions: tuple[str, ...]
    special: tuple[str, ...]
    roles: Mapping[str, str]
    adds: tuple[str, ...] = ()
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False


def _llama3_special() -> tuple[str, ...]:
    """As Llama 3.1 names them; in Llama 3 those of other uses are reserved ones."""
    named = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
    }
    reserved = iter(range(256))
    return tuple(
        f"<|{named[i]}|>" if i in named else f"<|reserved_special_token_{next(reserved)}|>"
        for i in range(256)
    )


#: By the SHA-256 of the file, as it is written with one line feed after each line.
_KNOWN = {
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": Known(
        "Llama 3",
        (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",),
        _llama3_special(),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        adds=("bos_token",),
        ignore_merges=True,
    ),
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": Known(
        "Qwen",
        (rf"{_WORDS}|\p{{N}}|{_REST}",),
        (
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            *(f"<|extra_{i}|>" for i in range(205)),
        ),
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        normalizer={"type": "NFC"},
    ),
}


def is_tiktoken(raw: bytes) -> bool:
    """Whether a file is one, by its first line. A SentencePiece model begins with a byte of 10."""
    return _FIRST_LINE.match(raw[:4096]) is not None


def find(files: Mapping[str, bytes]) -> str | None:
    """The name of the first file that is one."""
    return next((name for name in FILES if name in files and is_tiktoken(files[name])), None)


def known(raw: bytes, name: str) -> Known | None:
    """What is written down here of a vocabulary. Raises TokenizerError for a damaged file."""
    lines = (b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(read(raw, name)))
    return _KNOWN.get(hashlib.sha256(b"".join(lines)).hexdigest())


@functools.lru_cache(2)
def read(raw: bytes, name: str) -> list[bytes]:
    """The tokens in the order of their ranks. Raises TokenizerError for a damaged file."""
    tokens = []
    for number, line in enumerate(raw.splitlines()):
        try:
            token, rank = line.split()
            tokens.append(base64.b64decode(token, validate=True))
            if int(rank) != number:
                raise ValueError(f"rank {int(rank)} where {number} is next")
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(f"{name}, line {number + 1}: {error}") from error
    if len(set(tokens)) != len(tokens):
        raise TokenizerError(f"{name}: a token stands there twice")
    return tokens
