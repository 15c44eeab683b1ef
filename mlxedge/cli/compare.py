"""``mlxedge compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlxedge.bench.compare import Group
    from mlxedge.bench.compare_figures import Cell, FigureGroup
    from mlxedge.bench.regression import Change
    from mlxedge.bench.results import Result


class _Percent(click.ParamType):
    """``5%`` or ``5``."""

    name = "PERCENT"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if isinstance(value, float):
            return value
        try:
            found = float(str(value).removesuffix("%")) / 100
        except ValueError:
            self.fail(f"{value!r} is not a percentage such as 5%", param, ctx)
        if not 0 <= found < 1:
            self.fail("a slowdown is between 0% and 100%", param, ctx)
        return found


@click.command()
@click.argument("places", nargs=-1, required=True, metavar="RESULTS...")
@click.option("--baseline", metavar="RESULTS",
              help="Compare every test and figure with that of these earlier results.")  # fmt: skip
@click.option("--fail-below", type=_Percent(), metavar="PERCENT",
              help="With --baseline: exit with 1 if a test is slower, or a figure worse, than "
              "before by more than this, and the runs support that it is.")  # fmt: skip
@click.option("--reference", is_flag=True,
              help="Show the published results of M1 to M5 beside them.")  # fmt: skip
@click.option("--force", is_flag=True,
              help="Rank what differs in more than the device, with a warning.")  # fmt: skip
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE",
              help="Write a page of tables and charts, which needs no network.")  # fmt: skip
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the chart of speeds.")  # fmt: skip
@click.option("--png", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the chart of speeds (needs mlxedge[png]).")  # fmt: skip
@click.option("--json", "form", flag_value="json", help="Print the comparison as JSON.")
@click.option("--md", "form", flag_value="md", help="Print the tables as Markdown.")
@click.option("--csv", "form", flag_value="csv", help="Print every run as a line of CSV.")
def command(
    places: tuple[str, ...],
    baseline: str | None,
    fail_below: float | None,
    reference: bool,
    force: bool,
    html: Path | None,
    svg: Path | None,
    png: Path | None,
    form: str | None,
) -> None:
    """Compare results by device: files, folders, addresses of files, datasets on the Hub.

    RESULTS are records that bench wrote, llama-bench's or LocalScore's JSON, or what
    mlx_lm.benchmark printed. Ranked are only those that agree in model hash, quantization, test and
    the engine with its build; what differs in one of these stands apart, and the difference is
    named. Records of figures (bench --kernels, the project's benchmarks) stand beside each other by
    title. Intervals are those of 95 %; where they overlap no difference is shown.
    """
    from mlxedge.bench import tables
    from mlxedge.bench.compare import compare, differences
    from mlxedge.bench.compare_figures import compare_figures
    from mlxedge.bench.record import FIGURES
    from mlxedge.bench.results import read_results
    from mlxedge.cli import ui

    if fail_below is not None and baseline is None:
        raise click.UsageError("--fail-below needs --baseline.")
    if baseline is not None and (html or svg or png or reference or form == "csv"):
        raise click.UsageError("--baseline makes its own table: only --json and --md go with it.")
    results = read_results(places)
    if baseline is not None:
        _against(read_results([baseline]), results, fail_below, force, form)
        return
    models = [result for result in results if result.record["kind"] != FIGURES]
    titled = compare_figures([result for result in results if result.record["kind"] == FIGURES])
    if titled and form == "csv" and models:
        raise click.UsageError("--csv is one table: give results of models or figures, not both.")
    if not models and (svg or png):
        raise click.UsageError("--svg and --png draw results of models, and there is none.")
    groups = compare(models, force=force)
    found = differences(models)
    _write(models, groups, titled, html, svg, png, reference)
    if form == "json":
        ui.print_json(_as_json(groups, titled, [str(d) for d in found]))
        return
    if form == "csv":
        records = [result.record for result in results]
        click.echo(tables.figures_csv(records) if titled else tables.to_csv(records), nl=False)
        return
    _show(groups, form)
    _show_figures(titled, form, after=bool(groups))
    if found and force:
        for difference in found:
            ui.warn(f"ranked by force, though they differ in {difference}")
    elif len(groups) > 1:
        for difference in found:
            ui.note(f"not ranked together, since they differ in {difference}")
    if reference:
        _reference(form)


def _write(
    results: Sequence[Result],
    groups: Sequence[Group],
    titled: Sequence[FigureGroup],
    html: Path | None,
    svg: Path | None,
    png: Path | None,
    reference: bool,
) -> None:
    from mlxedge.bench import report
    from mlxedge.cli import ui

    for path, make in (
        (html, lambda: report.page(results, groups, titled, reference=reference).encode()),
        (svg, lambda: report.bars(groups).encode()),
        (png, lambda: report.to_png(report.bars(groups))),
    ):
        if path is not None:
            report.write(path, make())
            ui.note(f"written: {path}")


def _show(groups: Sequence[Group], form: str | None) -> None:
    from mlxedge.bench import tables
    from mlxedge.cli import ui

    for number, group in enumerate(groups):
        headers, rows = tables.ranked(group)
        if form == "md":
            click.echo(f"**{tables.about(group)}**\n")
            click.echo(tables.to_markdown((headers, rows)))
            continue
        if number:
            click.echo()
        click.echo(ui.printable(tables.about(group)))
        ui.table(headers, [[ui.printable(cell) for cell in row] for row in rows])


def _show_figures(titled: Sequence[FigureGroup], form: str | None, *, after: bool) -> None:
    from mlxedge.bench import tables
    from mlxedge.cli import ui

    for number, group in enumerate(titled):
        headers, rows = tables.figures_beside(group)
        if form == "md":
            click.echo(f"**{group.title}**\n")
            click.echo(tables.to_markdown((headers, rows)))
        else:
            if number or after:
                click.echo()
            click.echo(ui.printable(group.title))
            ui.table(
                [ui.printable(header) for header in headers],
                [[ui.printable(cell) for cell in row] for row in rows],
            )
        for difference in group.differences:
            ui.note(f"figures of {ui.printable(group.title)} differ in {difference}")


def _reference(form: str | None) -> None:
    from mlxedge.bench import chips, tables
    from mlxedge.cli import ui

    table = tables.reference(chips.chips())
    title = f"published results of {chips.REFERENCE_MODEL}: not of these builds, so not ranked"
    click.echo()
    if form == "md":
        click.echo(f"**{title}**\n")
        click.echo(tables.to_markdown(table), nl=False)
        return
    click.echo(title)
    ui.table(*table)


def _against(
    baseline: Sequence[Result],
    results: Sequence[Result],
    bound: float | None,
    force: bool,
    form: str | None,
) -> None:
    from mlxedge.bench import tables
    from mlxedge.bench.regression import against
    from mlxedge.cli import ui

    changes = against(baseline, results, force=force)
    table = tables.changes(changes)
    if form == "json":
        ui.print_json([_change(change, bound or 0.0) for change in changes])
    elif form == "md":
        click.echo(tables.to_markdown(table), nl=False)
    else:
        ui.table(table[0], [[ui.printable(cell) for cell in row] for row in table[1]])
    worse = [change for change in changes if bound is not None and change.worse_by(bound)]
    for change in worse:
        ui.note(
            f"{tables.verdict(change)}: {ui.printable(change.test)} of {ui.printable(change.name)} "
            f"is at {change.ratio:.1%} of what it was"
        )
    if worse:
        raise SystemExit(1)


def _change(change: Change, bound: float) -> dict[str, Any]:
    interval = change.interval
    return {
        "name": change.name,
        "test": change.test,
        "unit": change.unit,
        "better": change.better,
        "before": change.before,
        "now": change.now,
        "ratio": change.ratio,
        "interval": None if interval is None else [interval.low, interval.high],
        "worse": change.worse_by(bound),
    }


def _as_json(
    groups: Sequence[Group], titled: Sequence[FigureGroup], differing: list[str]
) -> dict[str, Any]:
    return {
        "differences": differing,
        "figures": [_figures_as_json(group) for group in titled],
        "groups": [
            {
                "about": group.about,
                "results": [{"name": r.name, **r.record} for r in group.results],
                "rankings": [
                    {
                        "test": ranking.test,
                        "rows": [
                            {
                                "result": row.result.name,
                                "tokens_per_second": row.mean,
                                "interval": (
                                    [row.interval.low, row.interval.high] if row.interval else None
                                ),
                                "ratio": row.mean / ranking.rows[0].mean,
                                "no_difference_shown": tied,
                                "roofline": row.roofline,
                            }
                            for row, tied in zip(ranking.rows, ranking.ties, strict=True)
                        ],
                    }
                    for ranking in group.rankings
                ],
            }
            for group in groups
        ],
    }


def _figures_as_json(group: FigureGroup) -> dict[str, Any]:
    return {
        "title": group.title,
        "differences": [str(difference) for difference in group.differences],
        "results": [{"name": r.name, **r.record} for r in group.results],
        "rows": [
            {
                "figure": row.name,
                "of": row.side,
                "unit": row.unit,
                "better": row.better,
                "values": [None if cell is None else _cell(cell) for cell in row.cells],
            }
            for row in group.rows
        ],
    }


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "mean": cell.mean,
        "interval": [cell.interval.low, cell.interval.high] if cell.interval else None,
        "ratio": cell.ratio,
        "no_difference_shown": cell.tied,
    }
