"""``mlxedge calibrate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click


class Tokens(click.ParamType):
    """A number of tokens, or "all"."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "all":
            return value
        if not str(value).lstrip("-").isdecimal():
            self.fail(f"{value!r} is neither a number of tokens nor all", param, ctx)
        return click.IntRange(min=1).convert(value, param, ctx)


@click.command()
@click.argument("source")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FILE",
    help="The imatrix file to write (GGUF; the older format if its name ends in .dat).",
)  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              metavar="FILE",
              help="Run this text (UTF-8).  [default: Python's documentation]")  # fmt: skip
@click.option("--tokens", type=Tokens(),
              help="How much of the text, or all.  [default: 2048, with --hessians 8192 of four "
              "texts; fewer for models beyond 1e9 weights]")  # fmt: skip
@click.option("--context", type=click.IntRange(min=1), metavar="N",
              help="Tokens of a chunk.  [default: 512]")  # fmt: skip
@click.option("--hessians", is_flag=True,
              help="Keep what --quality best needs, too, in the folder FILE.hessians: about 0.2 GB "
              "for a model of 135 M weights, 16 GB for one of 8 B.")  # fmt: skip
@click.option("--revision", help="Branch, tag or commit of a Hub repository.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N",
              help="Processors to use.  [default: all]")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace outputs that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    source: str,
    out: Path,
    text: Path | None,
    tokens: int | Literal["all"] | None,
    context: int | None,
    hessians: bool,
    revision: str | None,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Find out which weights of SOURCE matter, and write it as an imatrix file.

    SOURCE is whatever convert takes. A text is run through the model layer by layer from disk, so
    that it may be larger than memory; how large the inputs of each matrix are tells which columns
    matter. convert --calibrate FILE uses the result, and so does llama-quantize --imatrix FILE. A
    run that was interrupted goes on after the last finished layer when it is started again.
    """
    from mlxedge.calibration.run import calibrate_to_file
    from mlxedge.calibration.texts import read_text
    from mlxedge.cli import ui
    from mlxedge.sources import open_source

    passage = None if text is None else read_text(text)
    with ui.file_progress() as downloads:
        opened = open_source(source, revision=revision, progress=downloads, warn=ui.warn)
    with opened as checkpoint, ui.progress("calibrate") as progress:
        report = calibrate_to_file(
            checkpoint,
            out,
            text=passage,
            text_name=str(text.name) if text else "text",
            tokens=tokens,
            context=context,
            hessians=hessians,
            threads=threads,
            force=force,
            progress=progress,
        )
    if as_json:
        ui.print_json({k: str(v) if isinstance(v, Path) else v for k, v in asdict(report).items()})
        return
    rows = [("imatrix", str(report.path))]
    if report.hessians:
        rows.append(("Hessians", str(report.hessians)))
    rows.append(("size", ui.size(report.nbytes)))
    bos = ", each begun with BOS" if report.bos else ""
    chunks = report.tokens // report.context
    rows.append(
        ("calibrated on",
         f"{report.tokens} tokens of {report.text} in {chunks} chunks of {report.context}{bos}")
    )  # fmt: skip
    ui.fields([(name, ui.printable(value)) for name, value in rows])
    if report.resumed:
        ui.note(f"{report.resumed} of {report.layers} layers were finished by an earlier run")
