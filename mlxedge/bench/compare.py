"""Which records may stand beside each other.

Two speeds compare devices only if the model, its quantization, the prompt and generation lengths
and the engine are the same; anything else is a difference and is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """What two or more records do not agree on; ``values`` has one text for each record."""

    what: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        distinct = list(dict.fromkeys(self.values))
        return f"{self.what}: {' / '.join(distinct)}"


def _of(section: str, key: str) -> Callable[[Record], Any]:
    return lambda record: record[section].get(key)


def _shape(record: Record) -> str:
    settings = record["settings"]
    return f"p{settings.get('prompt_tokens')} n{settings.get('generated_tokens')}"


def _hash(record: Record) -> str | None:
    sha256 = record["model"].get("sha256")
    return sha256[:12] if isinstance(sha256, str) else None


def _version(package: str) -> Callable[[Record], Any]:
    return lambda record: (record["engine"].get("versions") or {}).get(package)


#: What must agree.
ASPECTS: dict[str, Callable[[Record], Any]] = {
    "model hash": _hash,
    "quantization": _of("model", "quantization"),
    "prompt and generation": _shape,
    "engine": _of("engine", "name"),
    "processor": _of("engine", "processor"),
    "mlxedge": lambda record: record.get("mlxedge"),
}


def differences(records: Sequence[Record]) -> list[Difference]:
    """What the records do not agree on; the versions of engines are compared package by package.

    An unknown model hash agrees with nothing, not even with another.
    """
    aspects = dict(ASPECTS)
    packages = {p: None for r in records for p in r["engine"].get("versions") or {}}
    aspects |= {package: _version(package) for package in packages}
    found = []
    for what, read in aspects.items():
        values = [read(record) for record in records]
        unsure = what == "model hash" and None in values and len(values) > 1
        if unsure or any(value != values[0] for value in values):
            found.append(Difference(what, tuple(map(_text, values))))
    return found


def _text(value: Any) -> str:
    return "not available" if value is None else str(value)


def ratio(record: Record, first: Record, part: str) -> float | None:
    """The mean speed of ``part`` ("prefill", "decode") over that of ``first``."""
    mine, theirs = record.get(part), first.get(part)
    if mine is None or theirs is None:
        return None
    return float(mine["mean"]) / float(theirs["mean"])
