"""``mlxedge convert``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from mlxedge.targets import known_targets, parse_target

if TYPE_CHECKING:
    from mlxedge.ops import Quality
    from mlxedge.plan import OutputPlan, Plan
    from mlxedge.report import Report

_EPILOG = "Targets: " + " ".join(known_targets()) + "; MLX groups of 32 or 128: mlx:4bit-g32."


@click.command(epilog=_EPILOG)
@click.argument("source")
@click.option(
    "--to", "to", multiple=True, required=True, metavar="FORMAT:RECIPE",
    help="What to write; may be given several times. The source is read once for all.",
)  # fmt: skip
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True,
    help="With one --to the .gguf file or the folder to write, else (or if it is an existing "
    "folder) the folder to write into.",
)  # fmt: skip
@click.option(
    "--quality", type=click.Choice(["reference", "fast", "best"]), default="fast",
    show_default=True,
    help="How scales and codes are chosen: by the rule of llama.cpp or MLX, by a search, or by a "
    "search and error feedback (GPTQ).",
)  # fmt: skip
@click.option(
    "--calibrate", type=click.Path(path_type=Path, exists=True), metavar="FILE",
    help="What shows which weights matter: a text (UTF-8), an imatrix file, or what mlxedge "
    "calibrate wrote.  [default: some of Python's documentation]",
)  # fmt: skip
@click.option("--no-calibrate", is_flag=True,
              help="Do not run the model; encode by the plain rules.")  # fmt: skip
@click.option(
    "--tensor", "tensors", multiple=True, metavar="REGEX=TYPE",
    help="Another type for the tensors whose name matches: GGUF names and types (ffn_down=q6_k) "
    "for gguf targets, Hugging Face names and MLX types (down_proj=6bit) for mlx. Repeatable.",
)  # fmt: skip
@click.option("--output-type", metavar="TYPE", help="The type of the output head.")
@click.option("--embedding-type", metavar="TYPE", help="The type of the token embedding.")
@click.option("--pure", is_flag=True, help="The recipe's main type for all matrices, no mix.")
@click.option("--revision", help="Branch, tag or commit of a Hub repository.")
@click.option("--stream", is_flag=True,
              help="Read a Hub repository's weights as they are wanted, and keep none: takes disk "
              "for the outputs, and for a few layers on their way.")  # fmt: skip
@click.option(
    "--adapter", metavar="ADAPTER",
    help="A LoRA adapter (PEFT, safetensors) to merge into the weights on the way: a folder, or a "
    "Hub id (org/name, or org/name@revision).",
)  # fmt: skip
@click.option("--dtype", type=click.Choice(["f32", "f16", "bf16"]),
              help="Of scales and unquantized MLX tensors.  [default: the source's]")  # fmt: skip
@click.option("--pre", help="Name of the GGUF pre-tokenizer, where it is not recognised.")
@click.option("--backend", type=click.Choice(["numpy", "mlx"]),
              help="What computes.  [default: mlx on Apple silicon, else numpy]")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="[default: all processors]")
@click.option("--force", is_flag=True, help="Replace outputs that exist.")
@click.option("--allow-nan", is_flag=True, help="Convert weights that are NaN or infinite too.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print plan and result as JSON.")
def command(
    source: str,
    to: tuple[str, ...],
    out: Path,
    quality: Quality,
    calibrate: Path | None,
    no_calibrate: bool,
    tensors: tuple[str, ...],
    output_type: str | None,
    embedding_type: str | None,
    pure: bool,
    revision: str | None,
    stream: bool,
    adapter: str | None,
    dtype: str | None,
    pre: str | None,
    backend: str | None,
    threads: int | None,
    force: bool,
    allow_nan: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert SOURCE to MLX and GGUF.

    SOURCE is a Hub id (org/name, or org/name@revision), a Hugging Face or MLX folder, or a GGUF
    file. The plan is shown first; nothing appears under its final name before it is complete, and
    a run that was interrupted goes on where it stopped when it is started again.
    """
    from mlxedge.cli import ui
    from mlxedge.conversion import plan_conversion
    from mlxedge.errors import UsageError
    from mlxedge.pipeline import run_plan, worker_count
    from mlxedge.recipes.overrides import parse_overrides
    from mlxedge.sources import open_source
    from mlxedge.sources.adapter import find_adapter, with_adapter

    targets = [parse_target(t) for t in to]
    if no_calibrate and calibrate is not None:
        raise UsageError("--calibrate and --no-calibrate: give one of them")
    overrides = parse_overrides(tensors, output=output_type, embedding=embedding_type, pure=pure)
    with contextlib.ExitStack() as stack:
        downloads = stack.enter_context(ui.file_progress())
        opened = stack.enter_context(
            open_source(source, revision=revision, progress=downloads, warn=ui.warn, stream=stream)
        )
        if adapter is not None:
            found = find_adapter(adapter, progress=downloads, warn=ui.warn)
            opened = stack.enter_context(with_adapter(opened, found))
        plan, checkpoint = plan_conversion(
            opened,
            targets,
            out,
            backend=backend,
            dtype=dtype,
            force=force,
            allow_nan=allow_nan,
            pre=pre,
            quality=quality,
            calibrate=False if no_calibrate else calibrate,
            overrides=overrides,
        )
        workers = worker_count(threads)
        if not as_json:
            _show_plan(plan, workers)
        if dry_run:
            if as_json:
                ui.print_json({"plan": plan_json(plan, workers)})
            return
        with ui.progress_beside("converting", "weights", "calibrating") as (progress, calibrating):
            report = run_plan(
                plan,
                checkpoint,
                backend=backend,
                force=force,
                allow_nan=allow_nan,
                threads=threads,
                progress=progress,
                calibrating=calibrating,
            )
    if as_json:
        ui.print_json({"plan": plan_json(plan, workers), "result": report_json(report)})
    else:
        show_report(report)
    for name in report.nonfinite:
        ui.warn(f"{name} holds NaN or infinite weights")


def plan_json(plan: Plan, threads: int) -> dict[str, Any]:
    """The plan for programs."""
    return {
        "name": plan.name,
        "source": plan.source,
        "disk_bytes": plan.disk_bytes,
        "memory_bytes": plan.memory_bytes(threads),
        "quality": plan.guidance.quality,
        "calibration": plan.guidance.described,
        "outputs": [
            {
                "target": o.target.spec,
                "path": str(o.path),
                "bytes": o.nbytes,
                "bits_per_weight": round(o.bits_per_weight, 4),
                "weights": o.weights,
                "exceptions": [
                    {"encoding": encoding, "reason": reason, "tensors": [t.name for t in tensors]}
                    for (encoding, reason), tensors in o.exceptions().items()
                ],
                "kept": _kept(o),
                "notes": o.notes,
            }
            for o in plan.outputs
        ],
    }


def report_json(report: Report) -> dict[str, Any]:
    """The result for programs."""
    from mlxedge.record import finite

    return {
        "backend": report.backend,
        "threads": report.threads,
        "seconds": round(report.seconds, 3),
        "calibration_seconds": round(report.calibration_seconds, 3),
        "nonfinite_tensors": report.nonfinite,
        "kept": [str(path) for path in report.kept],
        "outputs": [
            {
                "target": r.plan.target.spec,
                "path": str(r.plan.path),
                "record": str(r.record),
                "bytes": r.plan.nbytes,
                "bits_per_weight": round(r.plan.bits_per_weight, 4),
                "relative_error": finite(r.error),
                "output_error": finite(r.output_error),
                "seconds": round(r.seconds, 3),
                "resumed_tensors": r.resumed,
            }
            for r in report.outputs
        ],
    }


def _show_plan(plan: Plan, threads: int) -> None:
    from mlxedge.cli import ui

    adapter = plan.source.get("adapter")
    merged = ""
    if adapter:
        name = adapter.get("repo") or adapter["name"]
        merged = f", with {name} merged into {adapter['tensors']} tensors"
    click.echo(f"{plan.name} ({plan.source['kind']}, {_place(plan)}{merged})")
    ui.table(
        ["output", "size", "bits/weight", "tensors"],
        [
            [str(o.path), ui.size(o.nbytes), f"{o.bits_per_weight:.2f}", _mix(o)]
            for o in plan.outputs
        ],
    )
    for output in plan.outputs:
        for (encoding, reason), tensors in output.exceptions().items():
            names = tensors[0].name if len(tensors) == 1 else f"{len(tensors)} tensors"
            click.echo(f"  {output.target.spec}: {names} as {encoding}: {reason}")
        if kept := _kept(output):
            what = ", ".join(f"{len(names)} {kind}" for kind, names in kept.items())
            click.echo(f"  {output.target.spec}: of the tensors that are quantized already: {what}")
        for note in output.notes:
            ui.warn(f"{output.target.spec}: {note}")
    click.echo(plan.guidance.sentence())
    on_the_way = f", {ui.size(plan.cache_bytes)} of it on the way," if plan.cache_bytes else ""
    click.echo(
        f"needs {ui.size(plan.disk_bytes)} of disk{on_the_way} and about "
        f"{ui.size(plan.memory_bytes(threads))} of memory"
    )


def _place(plan: Plan) -> str:
    source = plan.source
    if plan.cache_bytes:
        return f"{source['repo']} at {source['revision'][:12]}, streamed"
    return str(source["path"])


def _kept(output: OutputPlan) -> dict[str, list[str]]:
    """The tensors whose source is quantized already, by what becomes of it."""
    from mlxedge.plan import Kept

    found: dict[str, list[str]] = {kind: [] for kind in get_args(Kept)}
    for tensor in output.tensors:
        if tensor.kept:
            found[tensor.kept].append(tensor.name)
    return {kind: names for kind, names in found.items() if names}


def _mix(output: OutputPlan) -> str:
    counts: dict[str, int] = {}
    for tensor in output.tensors:
        counts[tensor.encoding.name] = counts.get(tensor.encoding.name, 0) + 1
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda i: -i[1]))


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %" if error else "exact"


def show_report(report: Report) -> None:
    """The closing table."""
    from mlxedge.cli import ui

    rows = [
        [
            str(r.plan.path),
            ui.size(r.plan.nbytes),
            f"{r.plan.bits_per_weight:.2f}",
            _percent(r.error),
            "-" if r.output_error is None else _percent(r.output_error),
            f"{r.seconds:.1f}",
        ]
        for r in report.outputs
    ]
    ui.table(["written", "size", "bits/weight", "error", "of outputs", "seconds"], rows)
    resumed = sum(r.resumed for r in report.outputs)
    spent = report.calibration_seconds
    tail = f", {spent:.1f} s of them for the calibration" if report.plan.guidance.calibrates else ""
    tail += f", {resumed} tensors kept from an interrupted run" if resumed else ""
    for path in report.kept:
        click.echo(f"kept {path}, which the interrupted run had finished")
    click.echo(f"{report.seconds:.1f} s in all on {report.backend}, {report.threads} threads{tail}")
