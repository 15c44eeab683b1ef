"""``mlxedge compare``, and the table that bench shows too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True,
              help="Show records that differ in more than the device, with a warning.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def command(files: tuple[Path, ...], force: bool, as_json: bool) -> None:
    """Compare records that bench wrote: FILES, or folders of them.

    Speeds are set side by side only if model hash, quantization, prompt and generation lengths and
    the engine with its versions are the same; otherwise the differences are named and the exit
    status is 2, unless --force is given.
    """
    from mlxedge.bench.compare import differences, ratio
    from mlxedge.bench.record import read_records
    from mlxedge.cli import ui
    from mlxedge.errors import UsageError

    named = read_records(files)
    records = [record for _, record in named]
    found = differences(records)
    if found and not force:
        raise UsageError(
            f"these records differ in {'; '.join(map(str, found))}: their speeds do not compare "
            "(--force shows them all the same)"
        )
    if as_json:
        ui.print_json(
            {
                "differences": [{"what": d.what, "values": list(d.values)} for d in found],
                "records": [
                    {
                        "name": name,
                        **record,
                        "ratio": {p: ratio(record, records[0], p) for p in ("prefill", "decode")},
                    }
                    for name, record in named
                ],
            }
        )
        return
    for difference in found:
        ui.warn(f"differs: {difference}")
    show_table(named, ratios=not found and len(named) > 1)


def show_table(
    named: Sequence[tuple[str, dict[str, Any]]], *, ratios: bool = False, record_name: bool = True
) -> None:
    """Records below each other; ``ratios`` adds each speed over that of the first."""
    from mlxedge.cli import ui

    headers = ["record", "device", "model", "quantization", "engine", "test", "tokens/s", "drift"]
    first = 0 if record_name else 1
    last = None if ratios else -1
    ui.table(
        [*headers, "ratio"][first:last],
        [
            [ui.printable(cell) for cell in row][first:last]
            for name, record in named
            for row in _rows(name, record, named[0][1])
        ],
    )


def _rows(name: str, record: dict[str, Any], first: dict[str, Any]) -> list[list[str]]:
    from mlxedge.bench.compare import ratio

    engine = record["engine"]
    threads = engine.get("threads")
    shared = [
        name,
        device_name(record["device"]),
        str(record["model"].get("name")),
        str(record["model"].get("quantization") or "not available"),
        f"{engine.get('name')}, {threads} threads" if threads else _engine(engine),
    ]
    rows = []
    for part, letter in (("prefill", "pp"), ("decode", "tg")):
        series = record.get(part)
        if series is None:
            continue
        spread = series.get("stddev")
        speed = f"{series['mean']:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
        drift = series.get("drift")
        factor = ratio(record, first, part)
        rows.append(
            [
                *shared,
                f"{letter}{series.get('tokens')}",
                speed,
                f"{100 * drift:+.1f} %" if drift is not None else "-",
                f"{factor:.2f}" if factor is not None else "-",
            ]
        )
    return rows


def _engine(engine: dict[str, Any]) -> str:
    name, processor = engine.get("name"), engine.get("processor")
    return f"{name}, {processor}" if processor else str(name)


def device_name(device: dict[str, Any]) -> str:
    """``Apple M2 Max, 30 GPU cores, 32 GB`` or what is known of it."""
    cores, memory = device.get("gpu_cores"), device.get("memory_bytes")
    processors = device.get("usable_processors")
    parts = [
        device.get("cpu") or device.get("machine") or "not available",
        f"{cores} GPU cores" if cores else f"{processors} processors" if processors else None,
        f"{memory / 2**30:.0f} GiB" if memory else None,
    ]
    return ", ".join(p for p in parts if p)
