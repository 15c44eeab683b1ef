"""What commands share to talk to people: results on stdout, progress and warnings on stderr.

Progress is shown on a terminal only. rich, which draws it, is imported then and not before; it
obeys NO_COLOR.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress

Update = Callable[[int, int, str], None]
FileUpdate = Callable[[str, int, int], None]


def warn(message: str) -> None:
    click.echo(f"warning: {message}", err=True)


def note(message: str) -> None:
    """Something worth knowing that is not the result."""
    click.echo(message, err=True)


def print_json(value: Any) -> None:
    """One JSON document, in ASCII; NaN is refused, for it is not JSON."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def size(nbytes: float) -> str:
    """Bytes in decimal units, three digits: ``98.1 MB``."""
    value, units = float(nbytes), iter(("kB", "MB", "GB", "TB"))
    if value < 1000:
        return f"{nbytes:.0f} B"
    unit = ""
    while value >= 999.5 and (larger := next(units, None)):
        value, unit = value / 1000, larger
    return f"{_digits(value)} {unit}"


def count(number: float) -> str:
    """A count as models are called: ``134.5 M``."""
    value, units = float(number), iter(("k", "M", "B", "T"))
    unit = ""
    while value >= 999.95 and (larger := next(units, None)):
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if unit else f"{number:.0f}"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns on stdout. A column of numbers is set flush right; nothing is cut, so the
    output can be piped and searched."""
    columns = list(zip(headers, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [bool(rows) and all(_is_number(cell) for cell in column[1:]) for column in columns]
    for row in [headers, *rows]:
        cells = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def fields(pairs: Sequence[tuple[str, str]]) -> None:
    """``name  value`` lines with the values in one column."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        click.echo(f"{name.ljust(width)}  {value}")


_NUMBER = re.compile(r"|-|exact|[+-]?[\d.,]+( ± [\d.,]+)?( ([kMBT]|[kMGT]?B|%|s))?")


def _is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell) is not None


def printable(text: str) -> str:
    """``text`` in one line, with what could steer a terminal written as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def progress(what: str, unit: str = "") -> Iterator[Update]:
    """A bar with speed and time left; yields ``update(done, total, name)``.

    ``unit`` "bytes" shows the speed in bytes, anything else as a count of that, "" not at all.
    """
    with progress_beside(what, unit, "") as (update, _):
        yield update


@contextlib.contextmanager
def progress_beside(what: str, unit: str, beside: str) -> Iterator[tuple[Update, Update]]:
    """A bar as :func:`progress` has it, and one for ``beside`` while that is under way: from its
    first update until all of it is done."""
    if not sys.stderr.isatty():
        yield (lambda done, total, name: None), (lambda done, total, name: None)
        return
    with _bars() as bars:
        main = bars.add_task(what, total=None, name="", unit=unit)
        other = bars.add_task(beside, total=None, name="", unit="", visible=False)

        def update(done: int, total: int, name: str) -> None:
            bars.update(main, completed=done, total=total, name=name)

        def update_beside(done: int, total: int, name: str) -> None:
            bars.update(other, completed=done, total=total, name=name, visible=done < total)

        yield update, update_beside


@contextlib.contextmanager
def file_progress() -> Iterator[FileUpdate]:
    """A bar for each file under way; yields ``update(file, done, total)`` in bytes."""
    if not sys.stderr.isatty():
        yield lambda file, done, total: None
        return
    shown: list[Progress] = []
    tasks: dict[str, Any] = {}

    def update(file: str, done: int, total: int) -> None:
        if not shown:
            # Begun by a download and ended with it: a local source shows nothing, and what comes
            # after a download may draw a bar of its own.
            shown.append(_bars())
            shown[0].start()
        if file not in tasks:
            tasks[file] = shown[0].add_task(
                file, total=total, completed=done, name="", unit="bytes"
            )
        shown[0].update(tasks[file], completed=done, total=total, visible=done < total)
        if shown[0].finished:
            shown.pop().stop()
            tasks.clear()

    try:
        yield update
    finally:
        for bars in shown:
            bars.stop()


def _bars() -> Progress:
    """Of tasks with the fields ``name`` and ``unit``."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            unit: str = task.fields["unit"]
            speed = task.finished_speed or task.speed
            if not speed or not unit:
                return Text("")
            shown = size(speed) if unit == "bytes" else f"{count(speed)} {unit}".rstrip()
            return Text(f"{shown}/s")

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            seconds = task.time_remaining
            return Text("" if seconds is None or task.finished else f"{duration(seconds)} left")

    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f} %", table_column=Column(no_wrap=True)),
        Speed(table_column=Column(no_wrap=True)),
        Left(table_column=Column(no_wrap=True)),
        # What a narrow terminal has no room for is the name's end.
        TextColumn(
            "{task.fields[name]}",
            style="dim",
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
        expand=True,
        console=Console(stderr=True),
        transient=True,
    )


def duration(seconds: float) -> str:
    """``45 s``, ``3:07 min``, ``1:02 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
