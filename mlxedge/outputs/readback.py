"""Read back what was written, before it gets its final name."""

from __future__ import annotations

import contextlib
from pathlib import Path

from mlxedge.errors import OutputError
from mlxedge.plan import OutputPlan


def check_output(plan: OutputPlan, folder: Path) -> None:
    """Parse each data file with the project's own readers and compare it with the plan.

    Raises OutputError if a file does not parse, or lacks a tensor, or holds it elsewhere than
    planned.
    """
    check = _check_gguf if plan.target.format == "gguf" else _check_safetensors
    for number, file in enumerate(plan.data):
        found = check(folder / file.name)
        expected = {
            (name, place.offset, place.part.nbytes)
            for tensor in plan.tensors
            for part in tensor.places
            for name, place in tensor.stored(part)
            if place.file == number
        }
        if missing := expected - found:
            raise OutputError(
                f"{plan.path}: reading back {file.name} did not find {min(missing)[0]} where it "
                "was written; the disk or file system is at fault: run again, or change -o"
            )


def _check_gguf(path: Path) -> set[tuple[str, int, int]]:
    from mlxedge.sources.gguf import read_gguf

    file = read_gguf(path)
    return {(t.name, t.offset, t.nbytes) for t in file.tensors}


def _check_safetensors(path: Path) -> set[tuple[str, int, int]]:
    from mlxedge.sources.safetensors import SafetensorsFile

    with contextlib.closing(SafetensorsFile(path)) as file:
        return {(e.name, e.offset, e.nbytes) for e in file.entries.values()}
