"""``mlxedge inspect``."""

from __future__ import annotations

import fnmatch
import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlxedge.inspect import Inspection

_LONGEST = 100


@click.command()
@click.argument("source")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub repository.")
@click.option("--tensors/--no-tensors", default=True, show_default=True,
              help="List every tensor.")  # fmt: skip
@click.option("--metadata", "pattern", metavar="KEY-GLOB", default="*", show_default=True,
              help="Show only metadata whose key matches, such as 'tokenizer.*'.")  # fmt: skip
@click.option("--full", is_flag=True, help="Show long arrays and texts whole.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    source: str, revision: str | None, tensors: bool, pattern: str, full: bool, as_json: bool
) -> None:
    """Show what SOURCE holds, without loading its weights.

    SOURCE is a Hugging Face or MLX folder, a GGUF file, a safetensors file, or a Hub id (org/name,
    org/name@revision, org/name/file.gguf). Its architecture need not be one that mlxedge knows.
    """
    from mlxedge.cli import ui
    from mlxedge.inspect import inspect, obstacles

    with ui.file_progress() as progress:
        found = inspect(source, revision=revision, progress=progress, warn=ui.warn)
    reasons = obstacles(found)
    metadata = {k: v for k, v in found.metadata.items() if fnmatch.fnmatchcase(k, pattern)}
    if as_json:
        ui.print_json(_as_json(found, reasons, metadata, tensors, full))
        return
    ui.fields(_summary(found, reasons))
    click.echo()
    _show_types(found)
    if metadata:
        click.echo()
        ui.fields([(ui.printable(k), _shown(v, full)) for k, v in metadata.items()])
    if tensors and found.tensors:
        click.echo()
        ui.table(
            ["tensor", "shape", "encoding", "bytes"],
            [
                [ui.printable(t.name), _shape(t.shape), t.encoding, str(t.nbytes)]
                for t in found.tensors
            ],
        )


def _summary(found: Inspection, reasons: dict[str, str | None]) -> list[tuple[str, str]]:
    from mlxedge.cli import ui

    bits = found.bits_per_weight
    files = f"{len(found.files)} {'file' if len(found.files) == 1 else 'files'}"
    origin = f"{found.repo} at {found.revision}" if found.repo else str(found.path)
    tokenizer = "yes" if found.has_tokenizer else "none"
    if found.has_tokenizer:
        tokenizer += ", with a chat template" if found.has_chat_template else ", no chat template"
    rows = [
        ("name", found.name),
        ("source", origin),
        ("format", _FORMATS[found.kind]),
        ("architecture", found.architecture),
        ("quantization", found.quantization),
        ("parameters", f"{ui.count(found.parameters)} ({found.parameters})"),
        ("bits per weight", f"{bits:.2f}" if bits is not None else None),
        ("size", f"{ui.size(found.disk_bytes)} in {files}"),
        ("context", _text(found.context_length)),
        ("vocabulary", _text(found.vocab_size)),
        ("tokenizer", tokenizer),
        ("licence", found.license),
        ("base model", found.base_model),
    ]
    rows += [
        (f"convert to {kind}", "possible" if why is None else f"not possible: {why}")
        for kind, why in reasons.items()
    ]
    return [(name, ui.printable(value or "not said")) for name, value in rows]


_FORMATS = {
    "hf": "Hugging Face folder",
    "mlx": "MLX folder",
    "gguf": "GGUF file",
    "safetensors": "safetensors file",
}


def _show_types(found: Inspection) -> None:
    from mlxedge.cli import ui

    ui.table(
        ["encoding", "tensors", "weights", "size", "bits/weight"],
        [
            [
                name,
                str(c.tensors),
                ui.count(c.weights),
                ui.size(c.nbytes),
                f"{8 * c.nbytes / c.weights:.2f}" if c.weights else "-",
            ]
            for name, c in found.types().items()
        ],
    )


def _shown(value: Any, full: bool) -> str:
    from mlxedge.cli import ui
    from mlxedge.inspect import abbreviate

    short = value if full else abbreviate(value)
    if isinstance(short, dict) and set(short) == {"length", "first"}:
        items = ", ".join(json.dumps(v, ensure_ascii=False) for v in short["first"])
        return ui.printable(f"[{items}, …] ({short['length']} items)")
    text = short if isinstance(short, str) else json.dumps(short, ensure_ascii=False)
    text = ui.printable(text)
    if full or len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}… ({len(text)} characters)"


def _as_json(
    found: Inspection,
    reasons: dict[str, str | None],
    metadata: dict[str, Any],
    tensors: bool,
    full: bool,
) -> dict[str, Any]:
    from mlxedge.inspect import abbreviate

    bits = found.bits_per_weight
    result = {
        "name": found.name,
        "format": found.kind,
        "path": None if found.path is None else str(found.path),
        "repo": found.repo,
        "revision": found.revision,
        "architecture": found.architecture,
        "quantization": found.quantization,
        "parameters": found.parameters,
        "bits_per_weight": None if bits is None else round(bits, 4),
        "bytes": found.disk_bytes,
        "files": [{"name": name, "bytes": size} for name, size in found.files.items()],
        "context_length": found.context_length,
        "vocab_size": found.vocab_size,
        "has_tokenizer": found.has_tokenizer,
        "has_chat_template": found.has_chat_template,
        "license": found.license,
        "base_model": found.base_model,
        "convertible": {
            kind: {"possible": why is None, "reason": why} for kind, why in reasons.items()
        },
        "types": {
            name: {"tensors": c.tensors, "weights": c.weights, "bytes": c.nbytes}
            for name, c in found.types().items()
        },
        "metadata": metadata if full else abbreviate(metadata),
    }
    if tensors:
        result["tensors"] = [
            {"name": t.name, "shape": list(t.shape), "encoding": t.encoding, "bytes": t.nbytes}
            for t in found.tensors
        ]
    return result


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _text(value: int | None) -> str | None:
    return None if value is None else str(value)
