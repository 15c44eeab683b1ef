"""The record beside an output: where it came from, how it was made, how far it is from the source.

A JSON file ``OUTPUT.mlxedge.json``. Schema 1: ``mlxedge`` (version), ``created`` (UTC), ``source``
(kind, repository, revision, files with bytes and SHA-256; ``checked`` is false where that is what
the Hub lists and the file was read in parts), ``output`` (target, files with bytes and
SHA-256, bits per weight, relative error, that of outputs), ``quality``, ``calibration``,
``backend``, ``threads``, ``seconds``, ``calibration_seconds`` (of those), ``versions``, ``tensors``
(name, encoding, quality, relative errors, how it was made, reason; where the source is quantized
already, how that was ``kept``: exactly, rounded once or requantized).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mlxedge.outputs.staging import Staging, os_errors
from mlxedge.version import VERSION

if TYPE_CHECKING:
    from mlxedge.report import OutputResult, Report
    from mlxedge.sources.checkpoint import Checkpoint, Origin

SCHEMA = 1
_VERSIONS = ("numpy", "numba", "ml-dtypes", "mlx", "tokenizers", "safetensors", "huggingface-hub")


class SourceHashes:
    """SHA-256 of the source's files, computed beside the conversion.

    The converter and this thread read the same file at about the same time, so the disk is read
    once. A file of the Hub's cache is named by its hash already and is not read again.
    """

    def __init__(self, origin: Origin) -> None:
        self._files = [path for path in origin.files if path not in origin.listed]
        self._found = {path: f.sha256 for path, f in origin.listed.items() if f.sha256}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlxedge-sha256", daemon=True)

    def __enter__(self) -> SourceHashes:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        for path in self._files:
            try:
                self._found[path] = known_sha256(path) or sha256_file(path, self._stop)
            except OSError:
                return

    def result(self) -> dict[Path, str]:
        """Wait for the hashes; a file that could not be read is missing."""
        self._thread.join()
        return self._found


def known_sha256(path: Path) -> str | None:
    """The hash that the Hub's cache tells by the name of the blob behind ``path``."""
    name = Path(os.path.realpath(path)).name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def sha256_file(path: Path, stop: threading.Event | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        view = memoryview(buffer)
        while (size := file.readinto(buffer)) and not (stop and stop.is_set()):
            digest.update(view[:size])
    return digest.hexdigest()


def record_path(output: Path) -> Path:
    return output.with_name(output.name + ".mlxedge.json")


def recorded_fingerprint(output: Path) -> str | None:
    """The plan's fingerprint in the record beside an output, or ``None``."""
    try:
        record = json.loads(record_path(output).read_text(encoding="utf-8"))
        found = record["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def source_files(output: Path) -> list[tuple[str, str]]:
    """Names and SHA-256 of the files that an output was made of, by the record beside it; none
    where there is no record, or not all of them are known."""
    try:
        record = json.loads(record_path(output).read_text(encoding="utf-8"))
        found = [(entry["name"], entry["sha256"]) for entry in record["source"]["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    sound = all(isinstance(n, str) and re.fullmatch(r"[0-9a-f]{64}", str(h)) for n, h in found)
    return found if sound else []


def write_record(
    report: Report,
    result: OutputResult,
    checkpoint: Checkpoint,
    hashes: SourceHashes,
    stage: Staging,
) -> Path:
    """Write the record of one output that is about to get its name, and return its path."""
    plan = result.plan
    made = stage.complete()
    described = dict(report.plan.source)
    found = hashes.result()
    described["files"] = [
        {**entry, "sha256": found.get(path)}
        for path, entry in zip(checkpoint.origin.files, described["files"], strict=True)
    ]
    planned = {t.name: t for t in plan.tensors}
    record = {
        "schema": SCHEMA,
        "mlxedge": VERSION,
        "fingerprint": stage.fingerprint,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": described,
        "output": {
            "target": plan.target.spec,
            "name": plan.path.name,
            "files": _files(made, plan.path.name),
            "bytes": plan.nbytes,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "relative_error": finite(result.error),
            "output_error": finite(result.output_error),
        },
        "quality": report.plan.guidance.quality,
        "calibration": report.plan.guidance.described,
        "backend": report.backend,
        "threads": report.threads,
        "seconds": round(report.seconds, 3),
        "calibration_seconds": round(report.calibration_seconds, 3),
        "resumed_tensors": result.resumed,
        "nonfinite_tensors": report.nonfinite,
        "platform": platform.platform(),
        "versions": {name: v for name in _VERSIONS if (v := _version(name))},
        "notes": plan.notes,
        "tensors": [
            {
                "name": t.name,
                "source": planned[t.name].source,
                "encoding": t.encoding,
                "how": t.how,
                "kept": t.kept(planned[t.name]),
                "reason": planned[t.name].reason,
                "quality": t.quality,
                "relative_error": finite(t.error),
                "output_error": finite(t.output_error),
            }
            for t in result.tensors
        ],
    }
    path = record_path(plan.path)
    temporary = path.with_name(f".{path.name}.partial")
    with os_errors(path):
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    return path


def _files(path: Path, name: str) -> list[dict[str, Any]]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [
        {
            "name": name if file == path else file.relative_to(path).as_posix(),
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
        }
        for file in files
    ]


def finite(value: float | None) -> float | None:
    """Six digits of ``value`` for JSON, which has no NaN and no infinity."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
