"""Records of figures that are no model's run: kernels, and the scripts in ``benchmarks/``.

``record.schema.json`` has them as ``mlxedge-figures``: the same device, conditions and rules as a
model's record, and any number of named figures, each with every value that was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from mlxedge.bench.device import describe
from mlxedge.bench.record import FIGURES, SCHEMA, Record, conditions_part
from mlxedge.bench.sensors import Conditions, Sensors
from mlxedge.bench.statistics import drift, summarise
from mlxedge.version import VERSION

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Figure:
    """What was measured several times: ``side`` says of which program or backend, ``better`` which
    way is good, ``roofline`` the share of what the device's measured memory bandwidth allows."""

    name: str
    side: str
    unit: str
    better: Better
    values: tuple[float, ...]
    roofline: float | None = None


def key_of(figure: Record) -> tuple[str, str, str]:
    """What a described figure is known by in its record and in others of the same title."""
    return figure["name"], figure["side"], figure["unit"]


def figures_record(
    title: str,
    figures: Sequence[Figure],
    versions: Mapping[str, str | None],
    before: Conditions,
    sensors: Sensors | None = None,
    device: Mapping[str, Any] | None = None,
) -> Record:
    """The record of ``figures``, which were measured since ``before``."""
    sensors = sensors or Sensors()
    return {
        "kind": FIGURES,
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "mlxedge": VERSION,
        "title": title,
        "device": dict(device if device is not None else describe()),
        "versions": dict(versions),
        "conditions": {
            "before": conditions_part(before),
            "after": conditions_part(sensors.conditions()),
        },
        "figures": [_described(figure) for figure in figures],
    }


def _described(figure: Figure) -> Record:
    found = summarise(figure.values)
    moved = drift(figure.values)
    return {
        "name": figure.name,
        "side": figure.side,
        "unit": figure.unit,
        "better": figure.better,
        "values": [_short(v) for v in figure.values],
        **{key: _short(value) for key, value in found.items()},
        "drift": _short(moved),
        "roofline": _short(figure.roofline),
    }


def _short(value: float | None) -> float | None:
    """Six digits."""
    return None if value is None else float(f"{value:.6g}")
