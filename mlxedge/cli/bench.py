"""``mlxedge bench``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlxedge.cli.running import engine_options


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("-p", "--prompt-tokens", type=click.IntRange(min=0), default=512, metavar="N",
              show_default=True, help="Tokens of the prefill test; 0 leaves it out.")  # fmt: skip
@click.option("-n", "--gen-tokens", type=click.IntRange(min=0), default=128, metavar="N",
              show_default=True, help="Tokens of the decode test; 0 leaves it out.")  # fmt: skip
@click.option("-r", "--repeats", type=click.IntRange(min=1), default=5, metavar="N",
              show_default=True, help="Runs of each test, after one to warm up.")  # fmt: skip
@engine_options
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="Write the records to this new .json file, or into this folder.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
def command(
    models: tuple[str, ...],
    prompt_tokens: int,
    gen_tokens: int,
    repeats: int,
    engine: str | None,
    threads: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure how fast each MODEL runs on this machine.

    MODEL is a GGUF file, an MLX or Hugging Face folder, or a Hub id. By the definitions of
    llama-bench: prefill runs the prompt tokens in one go on an empty context, decode runs tokens
    one by one, and tokenization and sampling do not count. Every run is kept in the record.
    """
    from mlxedge.bench.device import describe
    from mlxedge.bench.record import save_records
    from mlxedge.cli import ui
    from mlxedge.cli.compare import show_table

    if out is not None:
        # Before the work, not after it.
        save_records([], out)
    device = describe()
    records = [
        _record(model, device, prompt_tokens, gen_tokens, repeats, engine, threads)
        for model in models
    ]
    written = [] if out is None else save_records(records, out)
    if as_json:
        ui.print_json(records)
    else:
        show_table([(r["model"]["name"], r) for r in records], record_name=False)
        for record in records:
            click.echo(_tail(record))
    for path in written:
        ui.note(f"written: {path}")


def _record(
    model: str,
    device: dict[str, Any],
    prompt_tokens: int,
    gen_tokens: int,
    repeats: int,
    engine: str | None,
    threads: int | None,
) -> dict[str, Any]:
    from mlxedge.bench.measure import measure
    from mlxedge.bench.record import make_record, model_sha256
    from mlxedge.cli import ui
    from mlxedge.inspect import inspect
    from mlxedge.sources import open_source

    with ui.file_progress() as downloads:
        checkpoint = open_source(model, progress=downloads, warn=ui.warn)
    path = checkpoint.origin.path
    with checkpoint:
        origin = checkpoint.origin
        found = replace(inspect(path), repo=origin.repo, revision=origin.revision)
        with ui.progress(found.name) as progress:
            measured = measure(
                checkpoint,
                prompt_tokens=prompt_tokens,
                generated_tokens=gen_tokens,
                repeats=repeats,
                engine=engine,
                threads=threads,
                progress=progress,
            )
    return make_record(found, measured, device, model_sha256(path))


def _tail(record: dict[str, Any]) -> str:
    from mlxedge.cli import ui

    memory = record["peak_memory_bytes"]
    return (
        f"{record['model']['file']}: {ui.size(record['model']['bytes'])}, loaded in "
        f"{record['load_seconds']:.2f} s, peak memory "
        f"{'not available' if memory is None else ui.size(memory)}"
    )
