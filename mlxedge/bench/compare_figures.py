"""Records of figures beside each other: those of one title, a column for each.

Nothing is ranked: figures are of many units, and those of two devices differ in more than one
thing. Every value stands with its ratio to the first record that has the figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxedge.bench.compare import Difference, text
from mlxedge.bench.figures import Better, key_of
from mlxedge.bench.record import Record
from mlxedge.bench.results import Result
from mlxedge.bench.statistics import Interval


@dataclass(frozen=True)
class Cell:
    """A figure in one record. ``ratio`` is its mean over the first record's (``None`` for the
    first), ``tied`` whether no difference from that is shown."""

    mean: float
    interval: Interval | None
    ratio: float | None
    tied: bool


@dataclass(frozen=True)
class FigureRow:
    """One figure in all records of a title; ``None`` for those without it."""

    name: str
    side: str
    unit: str
    better: Better
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class FigureGroup:
    """Records of one title. ``differences`` names the versions in which they differ."""

    title: str
    results: tuple[Result, ...]
    rows: tuple[FigureRow, ...]
    differences: tuple[Difference, ...]


def compare_figures(results: Sequence[Result]) -> list[FigureGroup]:
    """By title, in the order in which they come."""
    titles: dict[str, list[Result]] = {}
    for result in results:
        titles.setdefault(result.record["title"], []).append(result)
    return [
        FigureGroup(title, tuple(members), tuple(_rows(members)), tuple(_differences(members)))
        for title, members in titles.items()
    ]


def _rows(results: Sequence[Result]) -> list[FigureRow]:
    by_key = [{key_of(f): f for f in result.record["figures"]} for result in results]
    keys = dict.fromkeys(key for figures in by_key for key in figures)
    return [_row([figures.get(key) for figures in by_key]) for key in keys]


def _row(figures: Sequence[Record | None]) -> FigureRow:
    first = next(figure for figure in figures if figure is not None)
    cells = tuple(None if figure is None else _cell(figure, first) for figure in figures)
    return FigureRow(first["name"], first["side"], first["unit"], first["better"], cells)


def _cell(figure: Record, first: Record) -> Cell:
    interval = _interval(figure)
    if figure is first:
        return Cell(figure["mean"], interval, None, False)
    other = _interval(first)
    tied = interval is None or other is None or interval.overlaps(other)
    ratio = figure["mean"] / first["mean"] if first["mean"] else None
    return Cell(figure["mean"], interval, ratio, tied)


def _interval(figure: Record) -> Interval | None:
    low, high = figure["low"], figure["high"]
    return None if low is None or high is None else Interval(low, high)


def _differences(results: Sequence[Result]) -> list[Difference]:
    versions = [{"mlxedge": r.record["mlxedge"], **r.record["versions"]} for r in results]
    found = []
    for package in dict.fromkeys(name for of_one in versions for name in of_one):
        values = tuple(text(of_one.get(package)) for of_one in versions)
        if len(set(values)) > 1:
            found.append(Difference(package, values))
    return found
