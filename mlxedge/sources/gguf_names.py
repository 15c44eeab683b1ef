"""What GGUF files are called that hold a model in parts: ``NAME-00001-of-00003.gguf``."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def stem_of(name: str) -> str | None:
    """What the parts of a model are called before their numbers; ``None`` if ``name`` is no
    part's."""
    match = _NAME.fullmatch(name)
    return match["stem"] if match else None


def part_names(name: str) -> list[str]:
    """The names of all parts, the first one first, of the model that ``name`` is a part of; of any
    other file its own name."""
    match = _NAME.fullmatch(name)
    count = int(match["count"]) if match else 0
    if match is None or not 1 <= int(match["number"]) <= count:
        return [name]
    return [f"{match['stem']}-{i:05d}-of-{match['count']}.gguf" for i in range(1, count + 1)]


def first_parts(names: Iterable[str]) -> list[str]:
    """``names`` without the parts of a model that follow the first."""
    return [name for name in names if part_names(name)[0] == name]
