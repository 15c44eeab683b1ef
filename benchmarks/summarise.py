"""Tables of the records in ``results/``, as ``results/README.md``.

    python benchmarks/summarise.py                 # after a script ran with --record
    python benchmarks/summarise.py RECORD.json ... # first puts these into their device's folder

Every device has a folder there. Of each title the newest record is shown, older ones stay beside
it. Nothing in the page is written by hand: ``tests/unit/test_benchmark_results.py`` holds that it
is what this script makes of the records.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from mlxedge.bench.record import FIGURES, Record, check_record, save_records
from mlxedge.bench.results import Result, read_results
from mlxedge.bench.tables import NOT_AVAILABLE, device_folder, device_name, to_markdown

RESULTS = Path(__file__).resolve().parent / "results"
_HEAD = """# Results

Made by `benchmarks/summarise.py` of the records in this folder, which hold every single value, the
versions of all packages and what the device said of its state; `mlxedge compare` reads them too.
Each record is one run of a script in `benchmarks/` with `--record benchmarks/results`, or of
`mlxedge bench --kernels`. Nothing here was measured on a Mac.

- *median* of all values; *interval*: 95 % for their mean, of three values or more (see
  [docs/benchmarking.md](../../docs/benchmarking.md)); *range*: the least and the largest value.
- The unit × is how many times as good the first side was as the second, by round: both sides took
  turns, so a busy device moves it less than the values themselves.
- *spread* says how far values of one figure lie apart. Where that is much more than a tenth the
  device did other work meanwhile, of which the records cannot tell: then read the intervals, trust
  no single figure, and no ratio to a program whose threads wait by spinning (llama.cpp on several
  threads), which such work slows most.
- *roofline*: the share of what the memory bandwidth, measured in the same run, allows; above 100 %
  the data came from caches.
"""


def read(folder: Path) -> dict[str, list[Record]]:
    """Of each device's folder the newest record of every title, by name. Raises CorruptFileError
    for what is no record, and ValueError for one of another device."""
    found = {}
    for device in sorted(path for path in folder.iterdir() if path.is_dir()):
        titles: dict[str, Record] = {}
        for result in read_results([str(device)]):
            _check(device, result)
            old = titles.get(result.record["title"])
            if old is None or old["created"] < result.record["created"]:
                titles[result.record["title"]] = result.record
        found[device.name] = [titles[title] for title in sorted(titles)]
    return found


def _check(device: Path, result: Result) -> None:
    if result.record["kind"] != FIGURES:
        raise ValueError(f"{device.name}/{result.name} is no record of figures")
    if device_folder(result.record["device"]) != device.name:
        raise ValueError(f"{device.name}/{result.name} is of another device")


def page(devices: dict[str, list[Record]]) -> str:
    return "\n".join([_HEAD, *(part for records in devices.values() for part in _device(records))])


def _device(records: list[Record]) -> Iterator[str]:
    yield f"## {device_name(records[0]['device'])}\n"
    for record in records:
        yield f"### {record['title']}\n"
        yield f"{record['created'][:10]}, {record['device']['os']}. {_conditions(record)}\n"
        versions = [f"{name} {version}" for name, version in record["versions"].items() if version]
        yield f"mlxedge {record['mlxedge']}, {', '.join(versions)}.\n"
        yield f"{_spread(record)}\n"
        yield to_markdown(_table(record))


def _conditions(record: Record) -> str:
    """What the device said of its state, before and after."""
    names = {
        "power_source": "power",
        "temperature_c": "temperature (°C)",
        "thermal_state": "thermal state",
    }
    states = record["conditions"]["before"], record["conditions"]["after"]
    parts = []
    for key, name in names.items():
        before, after = (NOT_AVAILABLE if s[key] is None else str(s[key]) for s in states)
        parts.append(f"{name} {before if before == after else f'{before} to {after}'}")
    return f"State: {', '.join(parts)}."


def _spread(record: Record) -> str:
    """Of figures of several values: the middle one and the worst, of the largest over the least."""
    known = [f["values"] for f in record["figures"] if min(f["values"]) > 0]
    ratios = [max(values) / min(values) for values in known if len(values) > 1]
    if not ratios:
        return f"Spread: {NOT_AVAILABLE}, each figure is one value."
    return (
        f"Spread: the largest value is {statistics.median(ratios):.2f} times the least for the "
        f"middle figure, {max(ratios):.2f} times for the worst."
    )


def _table(record: Record) -> tuple[list[str], list[list[str]]]:
    shares = any(figure["roofline"] is not None for figure in record["figures"])
    headers = ["figure", "of", "unit", "median", "95 % interval", "range", "values"]
    rows = []
    for figure in record["figures"]:
        values = figure["values"]
        row = [figure["name"], figure["side"], figure["unit"], f"{figure['median']:.4g}"]
        row += [_span(figure["low"], figure["high"]), _span(min(values), max(values))]
        row.append(str(len(values)))
        if shares:
            row.append("" if figure["roofline"] is None else f"{figure['roofline']:.0%}")
        rows.append(row)
    return headers + ["roofline"] * shares, rows


def _span(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        found = json.loads(path.read_text(encoding="utf-8"))
        for record in found if isinstance(found, list) else [found]:
            folder = device_folder(check_record(path, record)["device"])
            print(*save_records([record], RESULTS / folder))
    (RESULTS / "README.md").write_text(page(read(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
