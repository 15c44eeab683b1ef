"""A comparison as one page that needs no network, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mlxedge.bench import charts, tables
from mlxedge.bench.chips import REFERENCE_MODEL, REFERENCE_WEIGHT_BYTES, chips
from mlxedge.bench.compare import Group, Row, differences
from mlxedge.bench.compare_figures import FigureGroup
from mlxedge.bench.results import Result
from mlxedge.bench.statistics import DRIFT_BOUND
from mlxedge.errors import BackendError, OutputExistsError, UsageError
from mlxedge.version import VERSION

#: A page with more runs than this gets no drift lines for the rest.
_LINES = 12


def page(
    results: Sequence[Result],
    groups: Sequence[Group],
    titled: Sequence[FigureGroup] = (),
    *,
    reference: bool = False,
) -> str:
    """One HTML page: a table to sort and filter, and the charts; tables of figures."""
    from jinja2 import Environment

    source = resources.files("mlxedge.bench").joinpath("report.html.j2").read_text("utf-8")
    template = Environment(autoescape=True).from_string(source)
    return template.render(
        columns=_COLUMNS,
        rows=[_row(number, row) for number, group in enumerate(groups, 1) for row in _rows(group)],
        groups=[tables.about(group) for group in groups],
        differences=[str(difference) for difference in differences(results)],
        charts=[*_charts(groups, reference)],
        titled=[(group, *tables.figures_beside(group)) for group in titled],
        reference=tables.reference(chips()) if reference else None,
        reference_model=REFERENCE_MODEL,
        drift_bound=f"{DRIFT_BOUND:.0%}",
        version=VERSION,
    )


_COLUMNS = (
    ("group", True),
    ("device", False),
    ("test", False),
    ("tokens/s", True),
    ("95 % interval", True),
    ("roofline", True),
    ("tokens/J", True),
    ("drift", True),
    ("model", False),
    ("quantization", False),
    ("bits", True),
    ("engine", False),
)


def _rows(group: Group) -> Iterator[Row]:
    for ranking in group.rankings:
        yield from ranking.rows


def _row(number: int, row: Row) -> dict[str, Any]:
    """Cells as text, and what they are sorted by."""
    record, test = row.result.record, row.test
    energy, drift = test["tokens_per_joule"], test["drift"]
    cells: list[tuple[str, Any]] = [
        (str(number), number),
        (tables.device_name(record["device"]), None),
        (test["name"], None),
        (tables.speed(test), row.mean),
        (tables.span(row.interval), row.interval.low if row.interval else None),
        (tables.share(row.roofline), row.roofline),
        (tables.energy(test), energy),
        (tables.drift(test), drift),
        (str(record["model"]["name"]), None),
        (record["model"]["quantization"] or tables.NOT_AVAILABLE, None),
        (tables.bits(record), record["model"]["bits_per_weight"]),
        (tables.engine_name(record["engine"]), None),
    ]
    return {"cells": cells, "drifted": test["drifted"], "test": test["name"]}


def bars(groups: Sequence[Group]) -> str:
    """The chart of speeds of all groups, as SVG."""
    return charts.stacked(_bars(group) for group in groups)


def _bars(group: Group) -> str:
    sections = [
        (
            ranking.test,
            [
                charts.Bar(
                    tables.device_name(row.result.record["device"]),
                    row.mean,
                    row.interval,
                    "no difference shown" if tied else "",
                )
                for row, tied in zip(ranking.rows, ranking.ties, strict=True)
            ],
        )
        for ranking in group.rankings
    ]
    return charts.bars(tables.about(group), sections, "tokens/s")


def _charts(groups: Sequence[Group], reference: bool) -> Iterator[str]:
    for group in groups:
        yield _bars(group)
        yield from _scatter(group)
        yield from _drift(group)
    if reference:
        points = [charts.Point(str(c), c.bandwidth_gb_s, c.decode) for c in chips()]
        title = f"Published: {REFERENCE_MODEL}, decode against memory bandwidth"
        yield charts.scatter(title, points, REFERENCE_WEIGHT_BYTES)


def _scatter(group: Group) -> Iterator[str]:
    for ranking in group.rankings:
        known = [row for row in ranking.rows if row.roofline is not None]
        if not known:
            continue
        points = [
            charts.Point(
                tables.device_name(row.result.record["device"]),
                row.result.record["device"]["bandwidth_gb_s"],
                row.mean,
            )
            for row in known
        ]
        size = known[0].result.record["model"]["bytes_per_token"]
        title = f"{ranking.test} against memory bandwidth: {tables.about(group)}"
        yield charts.scatter(title, points, size)


def _drift(group: Group) -> Iterator[str]:
    series = [
        charts.Line(f"{ranking.test}, {tables.device_name(row.result.record['device'])}", speeds)
        for ranking in group.rankings
        for row in ranking.rows
        if len(speeds := tuple(row.speeds)) > 1
    ]
    if series:
        title = f"Every run over the first: {tables.about(group)}"
        yield charts.lines(title, series[:_LINES])


def to_png(svg: str) -> bytes:
    """The picture at twice its size, on white, with a font of its own: systems differ, and what
    they lack would be left out without a word. Raises BackendError without what renders it."""
    try:
        import resvg_py

        fonts = resources.files("font_roboto").joinpath("files")
    except ImportError as error:
        raise BackendError("--png needs a renderer: pip install 'mlxedge[png]'") from error
    made = resvg_py.svg_to_bytes(
        svg_string=_plain(svg),
        background="#ffffff",
        zoom=2,
        skip_system_fonts=True,
        font_files=[str(fonts.joinpath(f"Roboto-{name}.ttf")) for name in ("Regular", "Bold")],
        font_family="Roboto",
        sans_serif_family="Roboto",
    )
    return bytes(made)


def _plain(svg: str) -> str:
    """With what a renderer without CSS variables and media queries understands."""
    light = ("#3a6fd8", "#b3561e", "#1e7d4f", "#8a3ab3", "#9a7400", "#0d7f8c")
    style = svg.split("@media", 1)[0]
    rest = svg[len(style) :]
    made = style + rest.partition("}}")[2] if rest else style
    for number, colour in enumerate(light):
        made = made.replace(f'class="dot s{number}"', f'fill="{colour}"')
        made = made.replace(f'class="stroke s{number}"', f'fill="none" stroke="{colour}"')
    return made


def write(path: Path, content: bytes) -> None:
    """A file that replaces an older report, and nothing else. Raises OutputError and its kind."""
    from mlxedge.outputs.staging import check_target, os_errors

    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file")
    if path.exists() and path.suffix not in (".html", ".svg", ".png"):
        raise OutputExistsError(f"{path} exists, and is no report by its name: choose another")
    check_target(path, force=True)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_bytes(content)
        temporary.replace(path)
