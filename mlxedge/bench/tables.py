"""Results as tables: what compare and bench print, and Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mlxedge.bench.chips import REFERENCE_WEIGHT_BYTES, Chip
from mlxedge.bench.compare import Group, Ranking
from mlxedge.bench.compare_figures import Cell, FigureGroup
from mlxedge.bench.record import Record
from mlxedge.bench.regression import SPEED, Change
from mlxedge.bench.results import Result
from mlxedge.bench.statistics import LEVEL, Interval

Table = tuple[list[str], list[list[str]]]
NOT_AVAILABLE = "not available"


def device_name(device: Record) -> str:
    """``Apple M2 Max, 30 GPU cores, 32 GiB`` or what is known of it."""
    cores, memory, processors = (
        device.get(key) for key in ("gpu_cores", "memory_bytes", "usable_processors")
    )
    parts = [
        device.get("gpu") if not device.get("cpu") else device.get("cpu"),
        f"{cores} GPU cores" if cores else f"{processors} processors" if processors else None,
        f"{memory / 2**30:.0f} GiB" if memory else None,
    ]
    known = [part for part in parts if part]
    return ", ".join(known) or device.get("machine") or NOT_AVAILABLE


def device_folder(device: Record) -> str:
    """A folder's name for results of a device: ``apple-m2-max-30-gpu-cores-32-gib``."""
    return "-".join(re.findall(r"[a-z0-9]+", device_name(device).lower()))


def engine_name(engine: Record) -> str:
    """``llama.cpp, gpu`` or ``numpy, 8 threads``."""
    threads, processor = engine["threads"], engine["processor"]
    if threads and processor != "gpu":
        return f"{engine['name']}, {threads} threads"
    return f"{engine['name']}, {processor}" if processor else str(engine["name"])


def speed(test: Record) -> str:
    """``35.10 ± 0.42``, tokens per second and their standard deviation."""
    found = test["tokens_per_second"]
    spread = found["stddev"]
    return f"{found['mean']:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f} %"


def drift(test: Record) -> str:
    """The drift from first run to last; marked where it is beyond the bound."""
    return percent(test["drift"]) + (" !" if test["drifted"] else "")


def span(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.low:.2f} to {interval.high:.2f}"


def milliseconds(found: Record | None, key: str) -> str:
    return "-" if found is None else f"{1e3 * found[key]:.1f}"


def latency(test: Record) -> str:
    """TTFT of a prefill, median and 95th percentile between tokens of a decode: in ms."""
    if test["kind"] == "prefill":
        return milliseconds(test["ttft_seconds"], "median")
    found = test["inter_token_seconds"]
    if found is None:
        return "-"
    return f"{milliseconds(found, 'median')} / {milliseconds(found, 'p95')}"


def measured(records: Sequence[Record]) -> Table:
    """What bench shows of what it measured: nothing is ranked."""
    rows = [
        [
            str(record["model"]["name"]),
            str(record["model"]["quantization"] or NOT_AVAILABLE),
            bits(record),
            engine_name(record["engine"]),
            test["name"],
            speed(test),
            drift(test),
            latency(test),
            energy(test),
        ]
        for record in records
        for test in record["tests"]
    ]
    return (
        [
            *("model", "quantization", "bits", "engine", "test", "tokens/s", "drift"),
            *("TTFT or between tokens, ms", "tokens/J"),
        ],
        rows,
    )


def bits(record: Record) -> str:
    found = record["model"]["bits_per_weight"]
    return "-" if found is None else f"{found:.2f}"


def energy(test: Record) -> str:
    found = test["tokens_per_joule"]
    return NOT_AVAILABLE if found is None else f"{found:.2f}"


def ranked(group: Group) -> Table:
    """One group's rankings below each other, each with the ratio to its fastest."""
    rows = [row for ranking in group.rankings for row in _ranking(ranking)]
    headers = ["test", "result", "device", "threads", "tokens/s", f"{LEVEL:.0%} interval"]
    return [*headers, "ratio", "roofline", "drift"], rows


def _ranking(ranking: Ranking) -> Iterable[list[str]]:
    first = ranking.rows[0]
    for row, tied in zip(ranking.rows, ranking.ties, strict=True):
        ratio = f"{row.mean / first.mean:.2f}"
        yield [
            ranking.test,
            row.result.name,
            device_name(row.result.record["device"]),
            str(row.result.record["engine"]["threads"] or "-"),
            speed(row.test),
            span(row.interval),
            f"{ratio} (no difference shown)" if tied else ratio,
            share(row.roofline),
            drift(row.test),
        ]


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def about(group: Group) -> str:
    """One line on what the results of a group have in common."""
    found = group.about
    parts = [found["model"], found["quantization"], found["engine"], found["engine build"]]
    known = [part for part in parts if part != NOT_AVAILABLE]
    digest = found["model hash"]
    return ", ".join(known) + (
        f", model {digest}" if digest != NOT_AVAILABLE else ", no model hash"
    )


def to_markdown(table: Table) -> str:
    """A table as GitHub renders it; what would end a cell is escaped."""
    headers, rows = table

    def line(cells: Sequence[str]) -> str:
        safe = [cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells]
        return f"| {' | '.join(safe)} |"

    return "\n".join([line(headers), line(["---"] * len(headers)), *map(line, rows)]) + "\n"


#: The columns of CSV: a run a line, so that nothing is averaged away.
_COLUMNS: dict[str, tuple[str, str]] = {
    "created": ("", "created"),
    "device": ("device", "cpu"),
    "gpu_cores": ("device", "gpu_cores"),
    "memory_bytes": ("device", "memory_bytes"),
    "bandwidth_gb_s": ("device", "bandwidth_gb_s"),
    "os": ("device", "os"),
    "model": ("model", "name"),
    "sha256": ("model", "sha256"),
    "quantization": ("model", "quantization"),
    "bits_per_weight": ("model", "bits_per_weight"),
    "engine": ("engine", "name"),
    "build": ("engine", "build"),
    "processor": ("engine", "processor"),
    "threads": ("engine", "threads"),
}
_RUN_COLUMNS = ("seconds", "started", "tokens_per_second", "joules")


def to_csv(records: Iterable[Record]) -> str:
    """A line for each run of each test."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_COLUMNS, "test", "kind", "tokens", "depth", "run", *_RUN_COLUMNS])
    for record in records:
        shared: list[Any] = [
            (record[section] if section else record)[key] for section, key in _COLUMNS.values()
        ]
        for test in record["tests"]:
            for number, run in enumerate(test["runs"], 1):
                own = [test[key] for key in ("name", "kind", "tokens", "depth")]
                writer.writerow([*shared, *own, number, *(run[key] for key in _RUN_COLUMNS)])
    return out.getvalue()


def figures(records: Sequence[Record]) -> Table:
    """Of records of figures."""
    rows = [
        [
            figure["name"],
            figure["side"],
            f"{figure['median']:.4g}",
            figure["unit"],
            _ends(figure),
            share(figure["roofline"]),
        ]
        for record in records
        for figure in record["figures"]
    ]
    return ["figure", "of", "median", "unit", f"{LEVEL:.0%} interval", "roofline"], rows


def _ends(figure: Record) -> str:
    low, high = figure["low"], figure["high"]
    return "-" if low is None else f"{low:.4g} to {high:.4g}"


def labels(results: Sequence[Result]) -> list[str]:
    """What to call each of several records: its device, or its name where devices are the same."""
    devices = [device_name(result.record["device"]) for result in results]
    names = [result.name for result in results]
    if len(set(devices)) == len(devices):
        return devices
    if len(set(names)) == len(names):
        return names
    return [f"{name} [{number}]" for number, name in enumerate(names, 1)]


def figures_beside(group: FigureGroup) -> Table:
    """Figures of one title, a column for each record."""
    rows = [
        [row.name, row.side, row.unit, row.better, *map(_cell, row.cells)] for row in group.rows
    ]
    return ["figure", "of", "unit", "better", *labels(group.results)], rows


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    if cell.ratio is None:
        return f"{cell.mean:.4g}"
    return f"{cell.mean:.4g} (× {cell.ratio:.2f}{', no difference shown' if cell.tied else ''})"


def figures_csv(records: Iterable[Record]) -> str:
    """A line for each value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["created", "device", "title", "figure", "of", "unit", "run", "value"])
    for record in records:
        shared = [record["created"], record["device"]["cpu"], record["title"]]
        for figure in record["figures"]:
            own = [figure[key] for key in ("name", "side", "unit")]
            for number, value in enumerate(figure["values"], 1):
                writer.writerow([*shared, *own, number, value])
    return out.getvalue()


def reference(chips: Sequence[Chip]) -> Table:
    """The published results: what each is from, and how sure it is."""
    headers = ["chip", "GPU cores", "GB/s", "pp512", "tg128", "roofline"]
    rows = [
        [
            chip.name,
            str(chip.gpu_cores),
            f"{chip.bandwidth_gb_s:.0f}",
            f"{chip.prefill:.1f}",
            f"{chip.decode:.1f}",
            share(chip.decode * REFERENCE_WEIGHT_BYTES / (chip.bandwidth_gb_s * 1e9)),
            chip.build,
            chip.source,
            chip.confidence,
        ]
        for chip in chips
    ]
    return [*headers, "build", "source", "confidence"], rows


def changes(found: Sequence[Change]) -> Table:
    """Tests and figures now and before."""
    rows = [
        [
            change.name,
            change.test,
            _value(change, change.before),
            _value(change, change.now),
            f"{change.ratio:.3f}",
            "-" if change.interval is None else span3(change.interval),
            verdict(change),
        ]
        for change in found
    ]
    return ["result", "test", "before", "now", "ratio", f"{LEVEL:.0%} interval", ""], rows


def _value(change: Change, value: float) -> str:
    return f"{value:.2f}" if change.unit == SPEED else f"{value:.4g} {change.unit}"


def span3(interval: Interval) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}"


_VERDICTS = {"few": "too few runs", "same": "no difference shown"}
_OF_SPEED = {"worse": "slower", "better": "faster"}


def verdict(change: Change) -> str:
    """In words: a speed is slower, other figures are worse."""
    found = _VERDICTS.get(change.verdict, change.verdict)
    return _OF_SPEED.get(found, found) if change.unit == SPEED else found
