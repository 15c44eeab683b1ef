"""What generate, chat and bench share: options that choose the engine and the sampling, loading a
model with a progress bar, writing text as it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mlxedge.generate import Generation, Model, Sampling, Stats

F = TypeVar("F", bound=Callable[..., Any])

_ENGINE: list[Callable[[Any], Any]] = [
    click.option("--engine", "--backend", "engine",
                 type=click.Choice(["mlx", "numpy", "llama.cpp"]),
                 help="What runs the model: mlx (mlx-lm), numpy (mlxedge's own forward pass), or "
                 "llama.cpp.  "
                 "[default: mlx for folders on Apple silicon, else numpy]"),
    click.option("--threads", type=click.IntRange(min=1), metavar="N",
                 help="Processors for engines numpy and llama.cpp.  [default: all]"),
]  # fmt: skip
_SAMPLING: list[Callable[[Any], Any]] = [
    click.option("-n", "--max-tokens", type=click.IntRange(min=1), default=256, metavar="N",
                 show_default=True, help="The most tokens to generate."),
    click.option("--temp", type=click.FloatRange(min=0), default=0.0, metavar="T",
                 show_default=True, help="Temperature; 0 always takes the likeliest token."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, metavar="P",
                 show_default=True, help="Sample from the likeliest tokens that add up to this."),
    click.option("--top-k", type=click.IntRange(min=0), default=0, metavar="K",
                 show_default=True, help="Sample from this many of the likeliest; 0: from all."),
    click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, metavar="P",
                 show_default=True, help="Drop tokens less likely than this share of the best."),
    click.option("--seed", type=int, metavar="N",
                 help="Makes sampling repeatable.  [default: random]"),
]  # fmt: skip


def engine_options(command: F) -> F:
    return _apply(_ENGINE, command)


def sampling_options(command: F) -> F:
    return _apply(_SAMPLING, command)


def _apply(options: list[Callable[[Any], Any]], command: F) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def load_model(model: str, engine: str | None, threads: int | None) -> Model:
    """Open and load ``model``, downloading it first if it is on the Hub."""
    from mlxedge.cli import ui
    from mlxedge.generate import load
    from mlxedge.sources import open_source

    with ui.file_progress() as progress:
        checkpoint = open_source(model, progress=progress, warn=ui.warn)
    return load(checkpoint, engine=engine, threads=threads)


def sampling_of(temp: float, top_p: float, top_k: int, min_p: float, seed: int | None) -> Sampling:
    from mlxedge.generate import Sampling

    return Sampling(temperature=temp, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)


def write_stream(generation: Generation, said: list[str] | None = None) -> None:
    """Write text to stdout as it comes, and add it to ``said``.

    On a terminal, control characters other than newline and tab are left out: what a model says
    must not steer it.
    """
    terminal = sys.stdout.isatty()
    for chunk in generation:
        if said is not None:
            said.append(chunk.text)
        click.echo(_steady(chunk.text) if terminal else chunk.text, nl=False)


def _steady(text: str) -> str:
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def stats_line(stats: Stats) -> str:
    """``12 prompt tokens at 210.0/s, 40 tokens generated at 35.1/s``."""
    return (
        f"{stats.prompt_tokens} prompt tokens{_speed(stats.prefill_tps)}, "
        f"{stats.generated_tokens} tokens generated{_speed(stats.decode_tps)}"
    )


def _speed(per_second: float | None) -> str:
    return f" at {per_second:.1f}/s" if per_second else ""
