"""A benchmark's record: what was measured, on what, with what.

A JSON object with ``"kind": "mlxedge-bench"`` and ``"schema": 1``:

- ``created`` (UTC), ``mlxedge`` (version)
- ``device``: ``mlxedge.bench.device.describe``
- ``model``: name, file, repo and revision (on the Hub), format, architecture, sha256, bytes,
  weight_bytes, parameters, bits_per_weight, quantization. The hash of a folder is that of the list
  of its weight files, one line ``sha256  name`` each, sorted by name.
- ``engine``: name, processor ("cpu" or "gpu"), threads, versions
- ``settings``: prompt_tokens, generated_tokens, repeats, warmups
- ``load_seconds``, ``peak_memory_bytes``
- ``prefill``, ``decode``: ``null`` if not measured, else tokens, seconds (every single run),
  tokens_per_second (every single run), mean, stddev (``null`` for one run), median, drift (last run
  over first, less one)

What could not be found out is ``null``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.errors import (
    CorruptFileError,
    OutputExistsError,
    SourceNotFoundError,
    UsageError,
)
from mlxedge.version import VERSION

if TYPE_CHECKING:
    from mlxedge.bench.measure import Measurement, Series
    from mlxedge.inspect import Inspection

KIND = "mlxedge-bench"
SCHEMA = 1
#: The packages whose versions can change a speed, by engine.
PACKAGES = {
    "numpy": ("numpy", "numba", "llvmlite"),
    "mlx": ("mlx", "mlx-lm", "mlx-metal", "mlx-cpu"),
}
_LARGEST = 1 << 26


def make_record(
    found: Inspection, measured: Measurement, device: dict[str, Any], sha256: str
) -> dict[str, Any]:
    """The record of one model's run."""
    bits = found.bits_per_weight
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "mlxedge": VERSION,
        "device": device,
        "model": {
            "name": found.name,
            "file": found.path.name if found.path else None,
            "repo": found.repo,
            "revision": found.revision,
            "format": found.kind,
            "architecture": found.architecture,
            "sha256": sha256,
            "bytes": found.disk_bytes,
            "weight_bytes": found.weight_bytes,
            "parameters": found.parameters,
            "bits_per_weight": None if bits is None else round(bits, 4),
            "quantization": found.quantization,
        },
        "engine": {
            "name": measured.engine,
            "processor": measured.processor,
            "threads": measured.threads,
            "versions": versions(measured.engine),
        },
        "settings": {
            "prompt_tokens": measured.prompt_tokens,
            "generated_tokens": measured.generated_tokens,
            "repeats": measured.repeats,
            "warmups": measured.warmups,
        },
        "load_seconds": round(measured.load_seconds, 6),
        "peak_memory_bytes": measured.peak_memory_bytes,
        "prefill": _series(measured.prefill),
        "decode": _series(measured.decode),
    }


def _series(series: Series | None) -> dict[str, Any] | None:
    if series is None:
        return None
    return {
        "tokens": series.tokens,
        "seconds": [round(s, 9) for s in series.seconds],
        "tokens_per_second": [round(s, 4) for s in series.speeds],
        "mean": round(series.mean, 4),
        "stddev": None if series.stddev is None else round(series.stddev, 4),
        "median": round(series.median, 4),
        "drift": round(series.drift, 6),
    }


def versions(engine: str) -> dict[str, str | None]:
    """Python's version and those of what ``engine`` computes with; ``None`` if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES.get(engine, ()):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def model_sha256(path: Path) -> str:
    """The hash of a GGUF file, or of a folder's weight files (see the top of this module)."""
    from mlxedge.record import known_sha256, sha256_file
    from mlxedge.sources.folder import find_shards

    def of(file: Path) -> str:
        return known_sha256(file) or sha256_file(file)

    if path.is_file():
        return of(path)
    files = find_shards(path).files
    lines = "".join(f"{of(f)}  {f.name}\n" for f in sorted(files, key=lambda f: f.name))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_name(record: dict[str, Any]) -> str:
    """``MODEL-ENGINE-YYYYMMDDTHHMMSS.json``."""
    model = record["model"]
    stem = Path(model["file"]).stem if model["format"] == "gguf" else model["name"]
    stamp = "".join(c for c in record["created"][:19] if c.isalnum())
    return f"{stem}-{record['engine']['name']}-{stamp}.json"


def save_records(records: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Write records to ``out``: a new .json file (a list if there are several), or a folder, which
    gets a file of each. Without records it only checks that ``out`` can be written.

    Raises OutputExistsError and OutputError.
    """
    from mlxedge.outputs.staging import check_target, os_errors

    files: list[tuple[Path, Any]]
    if out.suffix != ".json":
        check_target(out / "record.json", force=True)
        files = [(out / file_name(record), record) for record in records]
    else:
        if out.exists():
            raise OutputExistsError(f"{out} exists: records are never replaced; choose another -o")
        check_target(out, force=False)
        files = [(out, records[0] if len(records) == 1 else list(records))] if records else []
    written = []
    for path, content in files:
        path = _unused(path)
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.partial")
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        written.append(path)
    return written


def _unused(path: Path) -> Path:
    """``path``, or with a number where two runs of a model end in the same second."""
    number = 1
    found = path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}-{number}.json")
    return found


def read_records(paths: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Records by the name to show: files of one record or a list of them, and folders of such.

    Raises SourceNotFoundError, CorruptFileError for what is no record, and UsageError for a record
    of another schema.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for path in paths:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise SourceNotFoundError(f"{path}: no .json files in this folder")
        for file in files:
            records = _load(file)
            for i, record in enumerate(records):
                name = file.stem if len(records) == 1 else f"{file.stem}[{i}]"
                found.append((name, record))
    return found


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > _LARGEST:
            raise CorruptFileError(path, "too large for a benchmark record")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise SourceNotFoundError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(path, f"not JSON: {error}") from error
    records = value if isinstance(value, list) else [value]
    if not records:
        raise CorruptFileError(path, "holds no record")
    for record in records:
        _check(path, record)
    return records


_SECTIONS = ("device", "model", "engine", "settings")


def _check(path: Path, record: Any) -> None:
    """Raise unless ``record`` has the shape that this module writes."""
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise CorruptFileError(path, "not a record of mlxedge bench")
    if record.get("schema") != SCHEMA:
        raise UsageError(
            f"{path}: schema {record.get('schema')!r}; this version reads {SCHEMA}: measure again, "
            "or use the version that wrote it"
        )
    for name in _SECTIONS:
        if not isinstance(record.get(name), dict):
            raise CorruptFileError(path, f"the record has no {name}")
    for name in ("prefill", "decode"):
        part = record.get(name)
        if part is not None and not (isinstance(part, dict) and _is_speed(part.get("mean"))):
            raise CorruptFileError(path, f"{name} of the record makes no sense")


def _is_speed(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e12
