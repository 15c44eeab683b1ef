"""How tiktoken and tekken encode, by the definition: cut, then merge by rank, in plain Python."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import regex

#: The vocabulary of an encoder: bytes of a token → rank.
Ranks = Mapping[bytes, int]


def encode(text: str, ranks: Ranks, pattern: str) -> list[int]:
    """The ranks of ``text``, in which no special token is looked for."""
    return [
        rank
        for piece in _compiled(pattern).findall(text)
        for rank in _merged(piece.encode(), ranks)
    ]


@functools.cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def _merged(piece: bytes, ranks: Ranks) -> list[int]:
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        pairs = [ranks.get(parts[i] + parts[i + 1]) for i in range(len(parts) - 1)]
        known = [rank for rank in pairs if rank is not None]
        if not known:
            break
        at = pairs.index(min(known))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]
