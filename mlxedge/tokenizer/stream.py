"""Tokens to text, one token at a time.

A token is a piece of a byte string, not of a text: a character may be spread over several. The
decoder here knows the bytes of every token, and hands out whole characters only.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Callable
from typing import Any

from mlxedge.tokenizer.pre import flat

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_SPACE = "▁"


@functools.cache
def byte_characters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, and its byte.

    Printable Latin-1 stands for itself, the 68 other bytes for U+0100 and on (Radford et al.,
    "Language Models are Unsupervised Multitask Learners", 2019, and its published code).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _byte_level(token: str) -> bytes:
    table = byte_characters()
    try:
        return bytes([table[character] for character in token])
    except KeyError:  # an added token, which is plain text
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(_SPACE, " ").encode()


def bytes_of_token(decoder: Any) -> Callable[[str], bytes] | None:
    """How a vocabulary spells bytes, from the ``decoder`` of its tokenizer.json.

    ``None`` if the decoder is neither byte-level nor SentencePiece's.
    """
    kinds = [str(step.get("type")) for step in flat(decoder, "decoders")]
    if kinds == ["ByteLevel"]:
        return _byte_level
    if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return _byte_fallback
    if kinds in (["Metaspace"], ["ByteFallback", "Metaspace"]):
        return _byte_fallback
    return None


def strips_first_space(decoder: Any) -> bool:
    """Whether the space that SentencePiece puts before a text is taken off again."""
    return any(
        (step.get("type") == "Strip" and step.get("start"))
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in flat(decoder, "decoders")
    )


class ByteStream:
    """Text from tokens whose bytes are known."""

    def __init__(self, token: Callable[[int], bytes], strip_first_space: bool) -> None:
        self._token = token
        self._strip = strip_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, number: int) -> str:
        """The text that this token completes: "" while a character is unfinished.

        Bytes that can never become UTF-8 come out as U+FFFD.
        """
        raw = self._token(number)
        if self._strip and raw:
            raw = raw.removeprefix(b" ")
            self._strip = False
        return self._utf8.decode(raw)

    def finish(self) -> str:
        """What is left when generation ends: nothing. An unfinished character is dropped."""
        self._utf8.reset()
        return ""


class TextStream:
    """Text from tokens through a decoder of whole sequences, for unusual vocabularies."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0

    def add(self, number: int) -> str:
        """The text that this token completes: "" while it may still change."""
        before = self._decode(self._ids[: self._shown])
        self._ids.append(number)
        now = self._decode(self._ids)
        if now.endswith("�") or len(now) <= len(before):
            return ""
        # Only the last tokens shown are needed to see how the next one joins them.
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """The text held back so far, without an unfinished character."""
        before = self._decode(self._ids[: self._shown])
        return self._decode(self._ids)[len(before) :].rstrip("�")
