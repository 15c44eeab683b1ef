"""``mlxedge bench``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlxedge.bench.measure import Settings
    from mlxedge.bench.models import Found

#: Where records go that could not be published.
_UNPUBLISHED = "mlxedge-results"
_ENGINES = ["mlx", "llama.cpp", "llama-bench", "onnxruntime", "numpy"]


class _Depths(click.ParamType):
    """Numbers with commas between them."""

    name = "N,…"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0,4096", param, ctx)
        if min(found) < 0 or len(set(found)) < len(found):
            self.fail("depths are different numbers, 0 or more", param, ctx)
        return found


@click.command()
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--engine", "engines", multiple=True, type=click.Choice(_ENGINES),
              help="What runs the model; may be given several times, and each MODEL runs on those "
              "that can.  [default: mlx for folders on Apple silicon, llama.cpp for GGUF files "
              "where it is installed, else numpy]")  # fmt: skip
@click.option("-p", "--prompt-tokens", type=click.IntRange(min=0), default=512, metavar="N",
              show_default=True, help="Tokens of the prefill test; 0 leaves it out.")  # fmt: skip
@click.option("-n", "--gen-tokens", type=click.IntRange(min=0), default=128, metavar="N",
              show_default=True, help="Tokens of the decode test; 0 leaves it out.")  # fmt: skip
@click.option("-d", "--depth", "depths", type=_Depths(), multiple=True, default=("0",),
              show_default="0",
              help="Tokens of context before the tests; several make a test each.")  # fmt: skip
@click.option("-r", "--repeats", type=click.IntRange(min=1), default=5, metavar="N",
              show_default=True, help="Runs of each test that count.")  # fmt: skip
@click.option("--warmup", type=click.IntRange(min=0), default=1, metavar="N", show_default=True,
              help="Runs before them that do not.")  # fmt: skip
@click.option("--cooldown", type=click.FloatRange(min=0, max=3600), default=0.0, metavar="S",
              show_default=True, help="Seconds to wait before every run.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), metavar="N",
              help="Processors for engines that compute on them.  [default: all]")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="Write the records to this new .json file, or into this folder.")  # fmt: skip
@click.option("--publish", metavar="hf://datasets/ORG/NAME",
              help="Add the records to this dataset on the Hub.")  # fmt: skip
@click.option("--pr", "pull_request", is_flag=True,
              help="With --publish: as a pull request, where you may not write.")  # fmt: skip
@click.option("--json", "form", flag_value="json", help="Print the records as JSON.")
@click.option("--csv", "form", flag_value="csv", help="Print every run as a line of CSV.")
@click.option("--md", "form", flag_value="md", help="Print the table as Markdown.")
@click.option("--llama-bench-json", "form", flag_value="llama-bench",
              help="Print what programs read that know llama-bench's JSON.")  # fmt: skip
@click.option("--kernels", is_flag=True,
              help="Measure kernels and memory bandwidth of engine numpy or mlx, "
              "and no MODEL.")  # fmt: skip
@click.option("--schema", is_flag=True, help="Print the JSON schema of a record, and stop.")
def command(
    models: tuple[str, ...],
    engines: tuple[str, ...],
    prompt_tokens: int,
    gen_tokens: int,
    depths: tuple[tuple[int, ...], ...],
    repeats: int,
    warmup: int,
    cooldown: float,
    threads: int | None,
    out: Path | None,
    publish: str | None,
    pull_request: bool,
    form: str | None,
    kernels: bool,
    schema: bool,
) -> None:
    """Measure how fast each MODEL runs on this machine.

    MODEL is a GGUF file, an MLX, Hugging Face or ONNX (onnxruntime-genai) folder, or a Hub id. By
    the definitions of llama-bench: prefill runs the prompt tokens in one go, decode runs tokens one
    by one, and tokenization and sampling do not count. Each engine measures in a process of its
    own. Every run is kept in the record, which names no host, user or folder.
    """
    from mlxedge.bench import hub
    from mlxedge.bench import record as records_of
    from mlxedge.bench.measure import Settings
    from mlxedge.cli import ui
    from mlxedge.errors import MlxedgeError

    if schema:
        ui.print_json(records_of.schema())
        return
    if bool(models) == kernels:
        raise click.UsageError(
            "--kernels takes no MODEL." if models else "Missing argument 'MODEL...'."
        )
    if kernels and form == "llama-bench":
        raise click.UsageError("llama-bench's JSON has no place for kernels.")
    if pull_request and publish is None:
        raise click.UsageError("--pr needs --publish.")
    depth = tuple(dict.fromkeys(depth for several in depths for depth in several))
    settings = Settings(prompt_tokens, gen_tokens, depth, repeats, warmup, cooldown)
    # Before the work, not after it.
    if out is not None:
        records_of.save_records([], out)
    if publish is not None:
        hub.parse(publish)
    measured: Iterator[dict[str, Any]] = (
        _kernels(engines, repeats, threads)
        if kernels
        else _measure(models, engines, settings, threads)
    )
    found: list[dict[str, Any]] = []
    try:
        for record in measured:
            found.append(record)
    finally:
        # What was measured is kept and shown, whatever became of the rest.
        if found:
            written = [] if out is None else records_of.save_records(found, out)
            (_show_figures if kernels else _show)(found, form)
            for path in written:
                ui.note(f"written: {path}")
    if publish is not None:
        try:
            ui.note(f"published: {hub.publish(found, publish, pull_request=pull_request)}")
        except MlxedgeError:
            if out is None:  # what took so long is not lost
                for path in records_of.save_records(found, Path(_UNPUBLISHED)):
                    ui.note(f"not published, but written: {path}")
            raise


def _measure(
    models: tuple[str, ...], engines: tuple[str, ...], settings: Settings, threads: int | None
) -> Iterator[dict[str, Any]]:
    from mlxedge.bench.device import describe
    from mlxedge.bench.models import choose_engines
    from mlxedge.bench.record import make_record

    device = describe()
    jobs = [
        (found, engine) for found in map(_find, models) for engine in choose_engines(found, engines)
    ]
    for found, engine in jobs:
        yield make_record(found.about, _run(found, engine, settings, threads), device)


def _kernels(
    engines: tuple[str, ...], repeats: int, threads: int | None
) -> Iterator[dict[str, Any]]:
    from mlxedge.bench.figures import figures_record
    from mlxedge.bench.kernels import measure_kernels
    from mlxedge.bench.record import versions
    from mlxedge.bench.sensors import Sensors
    from mlxedge.cli import ui
    from mlxedge.ops import BACKENDS, default_backend, load_forward, load_ops

    other = [engine for engine in engines if engine not in BACKENDS]
    if other:
        raise click.UsageError(f"--kernels measures {' and '.join(BACKENDS)}, not {other[0]}.")
    sensors = Sensors()
    for engine in engines or (default_backend(),):
        load_ops(engine)
        before = sensors.conditions()
        with ui.progress(f"kernels, {engine}") as progress:
            figures = measure_kernels(
                engine,
                repeats,
                threads=threads or load_forward().available_threads(),
                progress=progress,
            )
        yield figures_record(f"kernels, {engine}", figures, versions(engine), before, sensors)


def _show_figures(records: list[dict[str, Any]], form: str | None) -> None:
    from mlxedge.bench import tables
    from mlxedge.cli import ui

    if form == "json":
        ui.print_json(records)
        return
    table = tables.figures(records)
    if form == "md":
        click.echo(tables.to_markdown(table), nl=False)
    elif form == "csv":
        click.echo(tables.figures_csv(records), nl=False)
    else:
        ui.table(*table)


def _find(model: str) -> Found:
    from mlxedge.bench.models import describe_checkpoint, describe_onnx
    from mlxedge.cli import ui
    from mlxedge.engines.onnx_engine import is_onnx_folder
    from mlxedge.inspect import inspect
    from mlxedge.sources import open_source

    if is_onnx_folder(Path(model)):
        return describe_onnx(Path(model))
    with ui.file_progress() as downloads:
        checkpoint = open_source(model, progress=downloads, warn=ui.warn)
    with checkpoint:
        return describe_checkpoint(checkpoint, inspect(checkpoint.origin.path))


def _run(found: Found, engine: str, settings: Settings, threads: int | None) -> Any:
    from mlxedge.bench.apart import Job, measure_apart
    from mlxedge.bench.llama_bench import PROGRAM, measure_with_llama_bench
    from mlxedge.cli import ui

    if engine == PROGRAM:
        return measure_with_llama_bench(found.path, settings, threads=threads)
    with ui.progress(f"{found.name}, {engine}") as progress:
        return measure_apart(Job(str(found.path), engine, threads, settings), progress)


def _show(records: list[dict[str, Any]], form: str | None) -> None:
    from mlxedge.bench import tables
    from mlxedge.bench.foreign import to_llama_bench
    from mlxedge.cli import ui

    if form == "json":
        ui.print_json(records)
    elif form == "csv":
        click.echo(tables.to_csv(records), nl=False)
    elif form == "md":
        click.echo(tables.to_markdown(tables.measured(records)), nl=False)
    elif form == "llama-bench":
        ui.print_json(to_llama_bench(records))
    else:
        headers, rows = tables.measured(records)
        ui.table(headers, [[ui.printable(cell) for cell in row] for row in rows])
        for record in records:
            click.echo(_tail(record))
        if any(test["drifted"] for record in records for test in record["tests"]):
            click.echo("! the last run is more than 5 % off the first: see the single runs (--csv)")


def _tail(record: dict[str, Any]) -> str:
    from mlxedge.cli import ui

    memory, seconds = record["peak_memory_bytes"], record["load_seconds"]
    loaded = "load time not available" if seconds is None else f"loaded in {seconds:.2f} s"
    model, engine = record["model"], record["engine"]
    size = "" if model["bytes"] is None else f" {ui.size(model['bytes'])},"
    return (
        f"{model['file'] or model['name']} on {engine['name']} ({engine['build']}):{size} "
        f"{loaded}, peak memory {'not available' if memory is None else ui.size(memory)}"
    )
