"""``mlxedge demo``: the commands a user would type, on the model that ships with the package."""

from __future__ import annotations

import contextlib
import importlib
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

TARGETS = ("mlx:4bit", "gguf:q8_0", "gguf:q4_k_m")
SAMPLING = ("--temp", "0.7", "--top-p", "0.9", "--seed", "7", "-n", "60")


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="Keep what is written in this folder.  [default: a temporary one]")  # fmt: skip
@click.option("--prompt", help="What the models continue.")
@click.option("--threads", type=click.IntRange(min=1), help="[default: all processors]")
@click.option("--force", is_flag=True, help="Replace outputs that exist.")
def command(out: Path | None, prompt: str | None, threads: int | None, force: bool) -> None:
    """Convert, run and measure the model that ships with mlxedge.

    It needs no network. Each step is a command that works the same on a model of yours; it is
    printed before it runs.
    """
    from mlxedge.demo import PROMPT, model_path
    from mlxedge.targets import parse_target

    model = model_path()
    limit = [] if threads is None else ["--threads", str(threads)]
    with _folder(out) as folder:
        to = [word for target in TARGETS for word in ("--to", target)]
        replace = ["--force"] if force else []
        _step("convert", str(model), *to, "-o", str(folder), *limit, *replace)
        made = [str(folder / parse_target(t).default_name(model.name)) for t in TARGETS]
        for path in made:
            _step("generate", path, prompt or PROMPT, "--raw", *SAMPLING, *limit)
        _step("bench", *made, "-p", "128", "-n", "64", "-r", "3", *limit)


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="mlxedge-demo-") as made:
        yield Path(made)


def _step(name: str, *arguments: str) -> None:
    click.secho(f"$ mlxedge {shlex.join([name, *arguments])}", bold=True)
    module = importlib.import_module(f"mlxedge.cli.{name}")
    module.command.main(list(arguments), prog_name=f"mlxedge {name}", standalone_mode=False)
    click.echo()
