"""``mlxedge evaluate``."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlxedge.evaluate import Estimate, Evaluation, Score


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--against", metavar="SOURCE",
              help="Compare with this model: the one that the others were made of.")  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Measure on this file (UTF-8).  "
              "[default: a text that ships with mlxedge]")  # fmt: skip
@click.option("--context", type=click.IntRange(min=8), default=512, metavar="N", show_default=True,
              help="Tokens of a chunk; the second half of each counts.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), metavar="N",
              help="Use only the first chunks of the text.  [default: all]")  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["numpy", "mlx"]), default="numpy", show_default=True,
    help="What runs all models: mlxedge's own forward pass, or mlx-lm (folders only).",
)  # fmt: skip
@click.option(
    "--by-layer/--whole", "by_layer", default=None,
    help="Hold one layer of one model at a time, or all models.  "
    "[default: by layer if they would fill the memory]",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), metavar="N",
              help="Processors to use.  [default: all]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    models: tuple[str, ...],
    against: str | None,
    text: Path | None,
    context: int,
    chunks: int | None,
    engine: str,
    by_layer: bool | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure how well each MODEL predicts a text, and what it lost.

    MODEL is a GGUF file, an MLX or Hugging Face folder, or a Hub id. By the definitions of
    llama-perplexity: perplexity ± standard error and, with --against, the KL divergence of the
    model's predictions from those of SOURCE in nats, and how often both hold the same token for the
    likeliest. Models that exceed the memory are run one layer at a time.
    """
    from contextlib import ExitStack

    from mlxedge.calibration.texts import read_text
    from mlxedge.cli import ui
    from mlxedge.engines import mlx_lm_engine
    from mlxedge.evaluate import evaluate
    from mlxedge.sources import open_source

    passage = None if text is None else read_text(text)
    if engine == "mlx" and mlx_lm_engine.on_processor():
        ui.warn("MLX has no GPU here, where mlx-lm is very slow: --engine numpy takes less time")
    with ExitStack() as stack:
        with ui.file_progress() as downloads:
            opened = [
                stack.enter_context(open_source(m, progress=downloads, warn=ui.warn))
                for m in (*models, *([] if against is None else [against]))
            ]
        with ui.progress("evaluate") as progress:
            found = evaluate(
                opened[: len(models)],
                against=None if against is None else opened[-1],
                text=passage,
                context=context,
                chunks=chunks,
                engine=engine,
                by_layer=by_layer,
                threads=threads,
                progress=progress,
            )
    if as_json:
        ui.print_json({"text": None if text is None else str(text), **_plain(asdict(found))})
    else:
        _show(found)


def _plain(value: Any) -> Any:
    """``value`` with paths as text, and what is not finite, which JSON cannot say, as null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _show(found: Evaluation) -> None:
    from mlxedge.cli import ui

    headers = ["model", "weights", "perplexity"]
    if found.reference:
        headers += ["KL divergence", "median", "99 %", "most", "same top"]
    scores = ([found.reference] if found.reference else []) + list(found.models)
    names = [score.path.name if score.path.is_file() else score.name for score in scores]
    # Outputs of one model have one name, wherever they are.
    names = [
        name if names.count(name) == 1 else str(score.path)
        for name, score in zip(names, scores, strict=True)
    ]
    rows = [_row(name, score, len(headers)) for name, score in zip(names, scores, strict=True)]
    ui.table(headers, rows)
    bos = ", each begun with BOS" if found.bos else ""
    ui.note(f"{found.scored} tokens scored in {found.chunks} chunks of {found.context}{bos}")
    if found.reference:
        ui.note(f"compared with {found.reference.path}")


def _row(name: str, score: Score, columns: int) -> list[str]:
    from mlxedge.cli import ui

    row = [ui.printable(name), ui.size(score.nbytes), _estimate(score.perplexity, 4)]
    if (d := score.divergence) is None:
        return row + ["-"] * (columns - len(row))
    percent = f"{100 * d.same_top.value:.2f} ± {100 * d.same_top.error:.2f} %"
    return [
        *row,
        _estimate(d.mean, 6),
        *(f"{v:.6f}" for v in (d.median, d.p99, d.maximum)),
        percent,
    ]


def _estimate(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"
