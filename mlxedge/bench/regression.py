"""Results now against a baseline: what became worse, and whether the runs support that it did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mlxedge.bench.compare import ASPECTS
from mlxedge.bench.figures import Better, key_of
from mlxedge.bench.record import FIGURES, KIND, Record
from mlxedge.bench.results import Result
from mlxedge.bench.statistics import Interval, ratio_interval
from mlxedge.errors import UsageError

SPEED = "tokens/s"


@dataclass(frozen=True)
class Change:
    """One test or figure now against a baseline: ``ratio`` is its mean now over that before, with
    the interval of that, ``None`` for too few values. ``better`` says which way is good."""

    name: str
    test: str
    unit: str
    better: Better
    before: float
    now: float
    ratio: float
    interval: Interval | None

    @property
    def verdict(self) -> str:
        """ "few" values to tell, "worse", "better", or the "same": no difference is shown."""
        if self.interval is None:
            return "few"
        if self.interval.low <= 1 <= self.interval.high:
            return "same"
        return "better" if (self.interval.low > 1) == (self.better == "higher") else "worse"

    def worse_by(self, bound: float) -> bool:
        """Whether it is worse by more than a share (0.05) of what it was, and the values support
        that it is worse at all."""
        if self.verdict != "worse":
            return False
        gain = self.ratio if self.better == "higher" else 1 / self.ratio
        return gain < 1 - bound


def against(
    baseline: Sequence[Result], results: Sequence[Result], *, force: bool = False
) -> list[Change]:
    """Every test of ``results`` that the baseline has too, for the same model, quantization, engine
    and device, and every figure of the same title, whatever the builds: those are what has changed.

    Raises UsageError if there is none, or with another device unless ``force``.
    """
    found: list[Change] = []
    other_devices = 0
    for result in results:
        compared: set[tuple[object, ...]] = set()
        for old in baseline:
            if not _same_work(old.record, result.record):
                continue
            if not force and not _same_device(old.record, result.record):
                other_devices += 1
                continue
            for key, change in _changes(old.record, result):
                if key not in compared:
                    compared.add(key)
                    found.append(change)
    if found:
        return found
    if other_devices:
        raise UsageError(
            "the baseline was measured on another device, whose speeds tell nothing of a change "
            "(--force compares them all the same)"
        )
    raise UsageError(
        "the baseline has no test of the same model, quantization and engine to compare with, and "
        "no figures of the same title"
    )


def _same_work(one: Record, other: Record) -> bool:
    if FIGURES in (one["kind"], other["kind"]):
        return one["kind"] == other["kind"] and one["title"] == other["title"]
    read = ASPECTS
    known = one["model"]["sha256"] is not None
    return all(
        read[what](one) == read[what](other)
        for what in ("model hash", "quantization", "engine", *(() if known else ("model",)))
    )


def _same_device(one: Record, other: Record) -> bool:
    keys = ("cpu", "gpu", "gpu_cores", "memory_bytes", "usable_processors")
    return all(one["device"][key] == other["device"][key] for key in keys)


@dataclass(frozen=True)
class _Measured:
    """A test or a figure, however its record has it."""

    key: tuple[object, ...]
    name: str
    unit: str
    better: Better
    values: list[float]
    mean: float


def _tests(record: Record) -> Iterable[_Measured]:
    for test in record["tests"]:
        speeds = [run["tokens_per_second"] for run in test["runs"]]
        key = test["kind"], test["tokens"], test["depth"]
        mean = test["tokens_per_second"]["mean"]
        yield _Measured(key, test["name"], SPEED, "higher", speeds, mean)


def _figures(record: Record) -> Iterable[_Measured]:
    for figure in record["figures"]:
        name = f"{figure['name']}, {figure['side']}"
        about = name, figure["unit"], figure["better"]
        yield _Measured(key_of(figure), *about, figure["values"], figure["mean"])


_READ: dict[str, Callable[[Record], Iterable[_Measured]]] = {KIND: _tests, FIGURES: _figures}


def _changes(old: Record, new: Result) -> Iterable[tuple[tuple[object, ...], Change]]:
    read = _READ[new.record["kind"]]
    before = {measured.key: measured for measured in read(old)}
    for now in read(new.record):
        was = before.get(now.key)
        if was is None or was.mean == 0:
            continue
        interval = ratio_interval(now.values, was.values)
        about = new.name, now.name, now.unit, now.better
        change = Change(*about, was.mean, now.mean, now.mean / was.mean, interval)
        yield now.key, change
