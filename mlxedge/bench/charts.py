"""Charts as SVG: speeds with their intervals, bandwidth against decode speed, drift over the runs.

Every chart is complete in itself: it brings its style, is readable in light and dark, and has a
title for those who do not see it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from mlxedge.bench.statistics import Interval

_WIDTH, _MARGIN = 680, 12
_STYLE = """
svg{font:13px system-ui,-apple-system,"Segoe UI",sans-serif;max-width:100%;height:auto}
.ink{fill:#1c1d21}.dim{fill:#5b5e66}.line{stroke:#c9ccd3}.bar{fill:#3a6fd8}.whisker{stroke:#1c1d21}
.roof{stroke:#b3261e}.roof-text{fill:#b3261e}.s0{--c:#3a6fd8}.s1{--c:#b3561e}.s2{--c:#1e7d4f}
.s3{--c:#8a3ab3}.s4{--c:#9a7400}.s5{--c:#0d7f8c}.stroke{stroke:var(--c);fill:none}
.dot{fill:var(--c)}
@media (prefers-color-scheme:dark){.ink{fill:#e9eaee}.dim{fill:#a5a9b4}.line{stroke:#44474f}
.bar{fill:#7ba2f0}.whisker{stroke:#e9eaee}.roof{stroke:#f2867e}.roof-text{fill:#f2867e}
.s0{--c:#7ba2f0}.s1{--c:#f0a878}.s2{--c:#6fce9f}.s3{--c:#cf9cf0}.s4{--c:#e3c24d}.s5{--c:#66cbd8}}
""".replace("\n", "")
_SERIES = 6


@dataclass(frozen=True)
class Bar:
    """``note`` is shown after the value."""

    label: str
    value: float
    interval: Interval | None
    note: str = ""


@dataclass(frozen=True)
class Point:
    label: str
    x: float
    y: float


@dataclass(frozen=True)
class Line:
    """Values by run, the first run first."""

    label: str
    values: tuple[float, ...]


def bars(title: str, sections: Sequence[tuple[str, Sequence[Bar]]], unit: str) -> str:
    """Horizontal bars with whiskers for their intervals, in sections each with a scale of its own
    that starts at zero."""
    parts, y = _heading(title)
    y += 14
    for heading, rows in sections:
        parts.append(_text(0, y + 12, f"{heading}, {unit}", "dim"))
        y += 22
        most = max(max(r.value, r.interval.high if r.interval else 0.0) for r in rows)
        # A whisker far beyond the bars would leave no room for them.
        room = _WIDTH - (230 if any(r.note for r in rows) else 100)
        scale = room / min(most, 2.5 * max(r.value for r in rows))
        for row in rows:
            parts.append(_text(0, y + 12, row.label, "ink"))
            y += 17
            width = max(row.value * scale, 1.0)
            parts.append(
                f'<rect class="bar" x="0" y="{y}" width="{width:.1f}" height="12" rx="2"/>'
            )
            end = width
            if row.interval is not None:
                low, high = (
                    min(max(v, 0.0) * scale, float(room))
                    for v in (row.interval.low, row.interval.high)
                )
                end = max(end, high)
                parts.append(_whisker(low, high, y + 6))
            value = f"{row.value:.2f}" + (f"  {row.note}" if row.note else "")
            parts.append(_text(end + 8, y + 11, value, "ink"))
            y += 22
        y += 8
    return _svg(title, parts, y)


def _heading(title: str) -> tuple[list[str], float]:
    """A title in as many lines as it needs, and where it ends."""
    parts, y = [], 0.0
    for line in textwrap.wrap(title, 84) or [""]:
        y += 18
        parts.append(_text(0, y, line, "ink", bold=True))
    return parts, y


def _whisker(low: float, high: float, y: float) -> str:
    path = f"M{low:.1f} {y - 4}v8M{low:.1f} {y}H{high:.1f}M{high:.1f} {y - 4}v8"
    return f'<path class="whisker" d="{path}" fill="none"/>'


def scatter(title: str, points: Sequence[Point], bytes_per_token: float) -> str:
    """Memory bandwidth (GB/s) against decode speed (tokens/s), both from zero, and the line that no
    speed can exceed: bandwidth / bytes read for a token."""
    parts, y = _heading(title)
    left, top, width, height = 56.0, y + 20, _WIDTH - 80.0, 300.0
    roof = 1e9 / bytes_per_token  # tokens/s for each GB/s
    x_most = _nice(1.1 * max(p.x for p in points))
    y_most = _nice(1.1 * max(max(p.y for p in points), 0.6 * x_most * roof))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * x / x_most, top + height * (1 - y / y_most)

    for share in range(5):
        value = y_most * share / 4
        y = at(0, value)[1]
        parts.append(f'<path class="line" d="M{left} {y:.1f}h{width}" fill="none"/>')
        parts.append(_text(left - 8, y + 4, f"{value:g}", "dim", anchor="end"))
        value = x_most * share / 4
        parts.append(
            _text(at(value, 0)[0], top + height + 18, f"{value:g}", "dim", anchor="middle")
        )
    parts.append(_text(left, top - 8, "tokens/s", "dim"))
    parts.append(_text(left + width, top + height + 36, "GB/s", "dim", anchor="end"))
    end_x = min(x_most, y_most / roof)
    (x0, y0), (x1, y1) = at(0, 0), at(end_x, end_x * roof)
    parts.append(f'<path class="roof" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" fill="none"/>')
    parts.append(_text(x1 - 6, y1 + 14, "roofline", "roof-text", anchor="end"))
    taken: list[tuple[float, float]] = []
    for number, point in enumerate(points):
        x, y = at(point.x, point.y)
        name = escape(f"{point.label}: {point.y:.1f} tokens/s at {point.x:.0f} GB/s")
        parts.append(
            f'<circle class="dot s{number % _SERIES}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            f"<title>{name}</title></circle>"
        )
        # A label only where it covers no other.
        if all(abs(y - b) > 13 or abs(x - a) > 110 for a, b in taken):
            taken.append((x, y))
            right = x > left + 0.75 * width
            parts.append(
                _text(x - 8 if right else x + 8, y + 4, point.label, "dim",
                      anchor="end" if right else "start")
            )  # fmt: skip
    return _svg(title, parts, top + height + 44)


def lines(title: str, series: Sequence[Line]) -> str:
    """Every run's speed over the first one's, by run."""
    parts, y = _heading(title)
    left, top, width, height = 56.0, y + 20, _WIDTH - 80.0, 200.0
    relative = [[v / s.values[0] for v in s.values] for s in series]
    low = min(0.9, math.floor(10 * min(map(min, relative))) / 10)
    high = max(1.1, math.ceil(10 * max(map(max, relative))) / 10)
    most = max(len(s.values) for s in series)

    def at(run: int, value: float) -> tuple[float, float]:
        x = left + width * (run / max(most - 1, 1))
        return x, top + height * (1 - (value - low) / (high - low))

    steps = 4
    for step in range(steps + 1):
        value = low + (high - low) * step / steps
        y = at(0, value)[1]
        parts.append(f'<path class="line" d="M{left} {y:.1f}h{width}" fill="none"/>')
        parts.append(_text(left - 8, y + 4, f"{value:.0%}", "dim", anchor="end"))
    for run in {0, most - 1}:
        parts.append(_text(at(run, low)[0], top + height + 18, f"run {run + 1}", "dim",
                           anchor="start" if run == 0 else "end"))  # fmt: skip
    y = top + height + 40
    for number, (one, values) in enumerate(zip(series, relative, strict=True)):
        kind = f"s{number % _SERIES}"
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in (at(i, v) for i, v in enumerate(values)))
        dashes = ' stroke-dasharray="6 4"' if number >= _SERIES else ""
        parts.append(f'<path class="stroke {kind}" stroke-width="2"{dashes} d="M{path}"/>')
        parts.append(f'<rect class="dot {kind}" x="{left}" y="{y - 9}" width="14" height="4"/>')
        parts.append(_text(left + 22, y, one.label, "ink"))
        y += 19
    return _svg(title, parts, y)


def stacked(charts: Iterable[str]) -> str:
    """Several charts below each other, as one."""
    parts, y = [], 0.0
    for chart in charts:
        *_, width, height = map(float, chart.split('viewBox="', 1)[1].split('"', 1)[0].split(" "))
        place = f'x="{-_MARGIN}" y="{y}" width="{width}" height="{height}"'
        inner = chart.replace("<svg ", f"<svg {place} ", 1)
        parts.append(inner)
        y += height + 16
    return _svg("Speeds", parts, y)


def _nice(value: float) -> float:
    """The next 1, 2, 4 or 8 times a power of ten, or of ten and a half."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(n * power for n in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if n * power >= value)


def _text(
    x: float, y: float, text: str, kind: str, *, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>'
        f"{escape(text)}</text>"
    )


def _svg(title: str, parts: Sequence[str], height: float) -> str:
    size = f"{_WIDTH + 2 * _MARGIN} {height + 2 * _MARGIN:.0f}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="{-_MARGIN} {-_MARGIN} {size}" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"{''.join(parts)}</svg>"
    )
