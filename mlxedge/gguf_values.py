"""Typed metadata of a GGUF file (the specification's key-value section)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: GGUF's value types: name → (number in the file, struct format or ``None``).
VALUE_TYPES: dict[str, tuple[int, str | None]] = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "str": (8, None),
    "array": (9, None),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}


@dataclass(frozen=True)
class GgufValue:
    """A value with the type it has in the file.

    ``kind`` is a name from ``VALUE_TYPES``; for an array it is "array", ``item`` is the kind of
    its items and ``value`` a sequence (a list of str, or a list or NumPy array of numbers).
    """

    kind: str
    value: Any
    item: str | None = None


def u32(value: int) -> GgufValue:
    return GgufValue("u32", int(value))


def f32(value: float) -> GgufValue:
    return GgufValue("f32", float(value))


def boolean(value: bool) -> GgufValue:
    return GgufValue("bool", bool(value))


def string(value: str) -> GgufValue:
    return GgufValue("str", value)


def array(item: str, values: Sequence[Any]) -> GgufValue:
    return GgufValue("array", values, item)


#: A metadata section, in file order.
Metadata = dict[str, GgufValue]
