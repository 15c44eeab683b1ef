"""Which results may be ranked, and what their differences support.

Two speeds compare devices only if the model, its quantization, the test and the engine's build are
the same; what differs in one of these stands apart, and the difference is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlxedge.bench.record import Record
from mlxedge.bench.results import Result
from mlxedge.bench.statistics import Interval, mean_interval


@dataclass(frozen=True)
class Difference:
    """What results do not agree on; ``values`` has one text for each, in their order."""

    what: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        distinct = list(dict.fromkeys(self.values))
        return f"{self.what}: {' / '.join(distinct)}"


def _of(section: str, key: str) -> Callable[[Record], Any]:
    return lambda record: record[section][key]


def _hash(record: Record) -> str | None:
    sha256 = record["model"]["sha256"]
    return sha256[:12] if isinstance(sha256, str) else None


def _versions(record: Record) -> str | None:
    known = sorted((k, v) for k, v in record["engine"]["versions"].items() if v and k != "python")
    return ", ".join(f"{k} {v}" for k, v in known) or None


#: What must agree for two results to be ranked, beside the test.
ASPECTS: dict[str, Callable[[Record], Any]] = {
    "model": _of("model", "name"),
    "model hash": _hash,
    "quantization": _of("model", "quantization"),
    "engine": _of("engine", "name"),
    "engine build": _of("engine", "build"),
    "versions": _versions,
    "processor": _of("engine", "processor"),
    "neural accelerators": _of("engine", "neural_accelerators"),
}
#: Not by their name, which anyone may change, are models told apart.
_SHOWN_ONLY = {"model"}


@dataclass(frozen=True)
class Row:
    """One test of one result. ``roofline`` is the share of the speed that the device's nominal
    memory bandwidth would allow (decode; ``None`` where one of the two is not known)."""

    result: Result
    test: Record

    @property
    def speeds(self) -> list[float]:
        return [run["tokens_per_second"] for run in self.test["runs"]]

    @property
    def mean(self) -> float:
        return float(self.test["tokens_per_second"]["mean"])

    @property
    def interval(self) -> Interval | None:
        return mean_interval(self.speeds)

    @property
    def roofline(self) -> float | None:
        return share_of_roofline(self.result.record, self.test)


@dataclass(frozen=True)
class Ranking:
    """Rows of one test that may be ranked, the fastest first. ``ties`` tells of each row after the
    first whether no difference from the first is shown."""

    test: str
    rows: tuple[Row, ...]
    ties: tuple[bool, ...]


@dataclass(frozen=True)
class Group:
    """Results that agree in all ``ASPECTS``; ``about`` says what these are."""

    about: dict[str, str]
    results: tuple[Result, ...]
    rankings: tuple[Ranking, ...]


def compare(results: Sequence[Result], *, force: bool = False) -> list[Group]:
    """Groups of results that may be ranked; with ``force`` all are one."""
    keys: dict[Any, list[Result]] = {}
    for number, result in enumerate(results):
        keys.setdefault("all" if force else _key(result.record, number), []).append(result)
    return [_group(members) for members in keys.values()]


def _key(record: Record, number: int) -> Any:
    values = tuple(str(read(record)) for what, read in ASPECTS.items() if what not in _SHOWN_ONLY)
    # A model without a hash may be any: it agrees with nothing, not even with another.
    return values if record["model"]["sha256"] else (*values, number)


def _group(results: Sequence[Result]) -> Group:
    about = {}
    for what, read in ASPECTS.items():
        values = list(dict.fromkeys(text(read(result.record)) for result in results))
        about[what] = " / ".join(values)
    tests: dict[tuple[str, int, int], list[Row]] = {}
    for result in results:
        for test in result.record["tests"]:
            key = test["kind"], test["tokens"], test["depth"]
            tests.setdefault(key, []).append(Row(result, test))
    order = {"prefill": 0, "decode": 1}
    ranked = sorted(tests, key=lambda key: (order[key[0]], key[2], key[1]))
    return Group(about, tuple(results), tuple(_ranking(tests[key]) for key in ranked))


def _ranking(rows: Sequence[Row]) -> Ranking:
    ranked = sorted(rows, key=lambda row: -row.mean)
    ties = [not differ(ranked[0], row) for row in ranked[1:]]
    return Ranking(rows[0].test["name"], tuple(ranked), (False, *ties))


def differ(one: Row, other: Row) -> bool:
    """Whether the intervals of the means do not overlap; of too few runs nothing is shown."""
    a, b = one.interval, other.interval
    return a is not None and b is not None and not a.overlaps(b)


def differences(results: Sequence[Result]) -> list[Difference]:
    """What the results do not agree on."""
    found = []
    for what, read in ASPECTS.items():
        values = [read(result.record) for result in results]
        unsure = what == "model hash" and None in values and len(values) > 1
        if unsure or any(value != values[0] for value in values):
            found.append(Difference(what, tuple(map(text, values))))
    return found


def text(value: Any) -> str:
    """What tables show of it."""
    return "not available" if value is None else str(value)


def share_of_roofline(record: Record, test: Record) -> float | None:
    """Of a decode test: bytes read for a token · tokens per second / nominal memory bandwidth."""
    read, bandwidth = record["model"]["bytes_per_token"], record["device"]["bandwidth_gb_s"]
    if test["kind"] != "decode" or not read or not bandwidth:
        return None
    return float(test["tokens_per_second"]["mean"] * read / (bandwidth * 1e9))
