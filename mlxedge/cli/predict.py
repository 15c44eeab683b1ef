"""``mlxedge predict``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlxedge.bench.predict import Prediction


_CONTEXT = 4096


class _Memory(click.ParamType):
    """``16GB``; a Mac's gigabytes are of 2^30 bytes, and so are these."""

    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+)\s*(?:GB|GiB|G)?", str(value).strip(), re.IGNORECASE)
        if found is None or not 0 < int(found[1]) < 1 << 20:
            self.fail(f"{value!r} is not a size of memory in whole GB such as 16GB", param, ctx)
        return int(found[1]) << 30


@click.command()
@click.argument("model")
@click.option("--to", "targets", multiple=True, metavar="TARGET",
              help="As convert would write it; may be given several times.  "
              "[default: the model as it is]")  # fmt: skip
@click.option("--chip", metavar="NAME",
              help='The chip, such as "M2" or "M4 Max".  [default: this Mac\'s]')  # fmt: skip
@click.option("--gpu-cores", type=click.IntRange(min=1), metavar="N",
              help="Its GPU cores, where it comes with several numbers of them.")  # fmt: skip
@click.option("--memory", type=_Memory(), help="The Mac's memory.  [default: this Mac's]")
@click.option("-c", "--context", type=click.IntRange(min=1), metavar="N",
              help="Tokens of context.  "
              "[default: 4096, or the model's if that is shorter]")  # fmt: skip
@click.option("--revision", help="Branch, tag or commit of a Hub repository.")
@click.option("--json", "as_json", is_flag=True, help="Print the predictions as JSON.")
def command(
    model: str,
    targets: tuple[str, ...],
    chip: str | None,
    gpu_cores: int | None,
    memory: int | None,
    context: int | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Predict whether MODEL runs on a Mac, and how fast.

    MODEL is whatever inspect takes; of a Hub repository only the heads of its files are read.
    Memory is weights, keys and values at the context, and 0.5 GB beside them. The range of decode
    speeds is memory bandwidth over what a token reads, times the share of it that published results
    of chips of the same kind reach; docs/predict.md has the error of that.
    """
    from mlxedge.bench.device import describe
    from mlxedge.bench.predict import predict, works
    from mlxedge.cli import ui
    from mlxedge.errors import UnsupportedModelError
    from mlxedge.inspect import inspect
    from mlxedge.targets import parse_target

    if chip is None:
        chip, gpu_cores, memory = _this_mac(describe(), gpu_cores, memory)
    wanted = [parse_target(target) for target in targets]
    with ui.file_progress() as downloads:
        found = inspect(model, revision=revision, progress=downloads, warn=ui.warn)
    if found.reopen is None:
        raise UnsupportedModelError(
            f"{model} is no model of a known architecture: mlxedge inspect shows what it is"
        )
    with found.reopen() as checkpoint:
        made = [
            predict(
                work,
                context or min(_CONTEXT, work.longest_context),
                chip=chip,
                gpu_cores=gpu_cores,
                memory_bytes=memory,
            )
            for work in works(checkpoint, wanted)
        ]
    if as_json:
        ui.print_json([_as_json(one) for one in made])
    else:
        _show(made)


def _this_mac(
    device: dict[str, Any], gpu_cores: int | None, memory: int | None
) -> tuple[str | None, int | None, int | None]:
    """Chip, GPU cores and memory where nobody named a chip: those of this device, as far as they
    are known."""
    from mlxedge.bench.chips import find_chips
    from mlxedge.cli import ui

    name = str(device["cpu"] or "")
    if not name.startswith("Apple "):
        return None, gpu_cores, memory
    memory = memory or device["memory_bytes"]
    cores = gpu_cores or device["gpu_cores"]
    if find_chips(name, cores):
        return name, cores, memory
    if gpu_cores is None and find_chips(name):
        return name, None, memory
    ui.note(f"no published results of {name}: what fits is told, and not how fast it is")
    return None, None, memory


def _show(made: list[Prediction]) -> None:
    from mlxedge.bench.predict import SMALL_BYTES
    from mlxedge.cli import ui

    ui.table(
        ["form", "bits", "weights", "cache", "in all", "fits", "tokens/s"],
        [
            [
                one.work.name,
                f"{one.work.bits_per_weight:.2f}",
                ui.size(one.work.weight_bytes),
                "not known" if one.cache_bytes is None else ui.size(one.cache_bytes),
                ui.size(one.total_bytes),
                _FITS[one.fits],
                "-" if one.low is None else f"{_speed(one.low)} to {_speed(one.high or 0.0)}",
            ]
            for one in made
        ],
    )
    first = made[0]
    available = first.available_bytes
    click.echo(f"at {first.context} tokens of context; {first.basis}")
    if available is not None:
        click.echo(f"of the memory macOS lets the GPU have about {ui.size(available)}")
    if any(one.work.bytes_per_token < SMALL_BYTES for one in made) and first.low is not None:
        click.echo(
            "models that read less than 1 GB a token stay below the range: what a step costs "
            "beside reading shows"
        )


_FITS = {None: "-", True: "yes", False: "no"}


def _speed(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _as_json(one: Prediction) -> dict[str, Any]:
    return {
        "form": one.work.name,
        "bits_per_weight": round(one.work.bits_per_weight, 4),
        "weight_bytes": one.work.weight_bytes,
        "bytes_per_token": one.work.bytes_per_token,
        "context": one.context,
        "cache_bytes": one.cache_bytes,
        "total_bytes": one.total_bytes,
        "available_bytes": one.available_bytes,
        "fits": one.fits,
        "decode_tokens_per_second": None if one.low is None else [one.low, one.high],
        "basis": one.basis,
    }
