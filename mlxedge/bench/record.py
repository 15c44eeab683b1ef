"""A benchmark's record: what was measured, on what, with what.

``record.schema.json`` beside this file is the published schema (JSON Schema 2020-12) and says what
every field means. What could not be found out is ``null``. There is no name of a host, a user or a
folder in a record, so that it can be shared as it is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.bench.device import neural_accelerators
from mlxedge.bench.statistics import DRIFT_BOUND, drift, percentile, summarise
from mlxedge.errors import CorruptFileError, OutputExistsError, UsageError
from mlxedge.version import VERSION

if TYPE_CHECKING:
    from mlxedge.bench.measure import Measurement, Test
    from mlxedge.bench.sensors import Conditions
    from mlxedge.inspect import Inspection

Record = dict[str, Any]

KIND, FIGURES = "mlxedge-bench", "mlxedge-figures"
SCHEMA = 2
#: The packages whose versions can change a speed, by engine.
PACKAGES = {
    "numpy": ("numpy", "numba", "llvmlite"),
    "mlx": ("mlx", "mlx-lm", "mlx-metal", "mlx-cpu"),
    "llama.cpp": ("xllamacpp",),
    "llama-bench": (),
    "onnxruntime": ("onnxruntime-genai", "onnxruntime"),
}


def make_record(
    model: Mapping[str, Any], measured: Measurement, device: Mapping[str, Any]
) -> Record:
    """The record of one model's run; ``model`` is :func:`describe_model`'s."""
    found = versions(measured.engine)
    settings = measured.settings
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "mlxedge": VERSION,
        "device": dict(device),
        "model": dict(model),
        "engine": {
            "name": measured.engine,
            "build": measured.build,
            "processor": measured.processor,
            "threads": measured.threads,
            "versions": found,
            "neural_accelerators": (
                neural_accelerators(dict(device), found.get("mlx"))
                if measured.engine == "mlx"
                else None
            ),
        },
        "settings": {
            "prompt_tokens": settings.prompt_tokens,
            "generated_tokens": settings.generated_tokens,
            "depths": list(settings.depths),
            "repeats": settings.repeats,
            "warmups": settings.warmups,
            "cooldown_seconds": settings.cooldown_seconds,
            "drift_bound": DRIFT_BOUND,
        },
        "conditions": {
            "before": conditions_part(measured.before),
            "after": conditions_part(measured.after),
        },
        "load_seconds": _rounded(measured.load_seconds, 6),
        "peak_memory_bytes": measured.peak_memory_bytes,
        "peak_gpu_memory_bytes": measured.peak_gpu_memory_bytes,
        "energy_source": measured.energy_source,
        "tests": [describe_test(test) for test in measured.tests],
    }


def describe_model(found: Inspection, sha256: str, source: str | None = None) -> dict[str, Any]:
    """The model part of a record; ``source`` is :func:`source_sha256`'s."""
    bits = found.bits_per_weight
    return {
        "name": found.name,
        "file": found.path.name if found.path else None,
        "repo": found.repo,
        "revision": found.revision,
        "format": found.kind,
        "architecture": found.architecture,
        "sha256": sha256,
        "source_sha256": source,
        "bytes": found.disk_bytes,
        "weight_bytes": found.weight_bytes,
        "parameters": found.parameters,
        "bits_per_weight": _rounded(bits, 4),
        "quantization": found.quantization,
    }


def describe_test(test: Test) -> dict[str, Any]:
    """One test with all its runs, and what they come to."""
    joules = [run.joules for run in test.runs]
    known = [j for j in joules if j is not None]
    energy = sum(known) / len(known) if known and len(known) == len(joules) else None
    return {
        "name": test.name,
        "kind": test.kind,
        "tokens": test.tokens,
        "depth": test.depth,
        "runs": [
            {
                "seconds": _rounded(run.seconds, 9),
                "started": _rounded(run.started, 6),
                "tokens_per_second": _rounded(speed, 4),
                "joules": _rounded(run.joules, 6),
                "token_seconds": [_rounded(s, 9) for s in run.token_seconds],
            }
            for run, speed in zip(test.runs, test.speeds, strict=True)
        ],
        **describe_speeds(
            test.kind,
            test.speeds,
            [run.seconds for run in test.runs],
            [s for run in test.runs for s in run.token_seconds[1:]],
        ),
        "joules": _rounded(energy, 6),
        "tokens_per_joule": _rounded(test.tokens / energy, 6) if energy else None,
    }


def describe_speeds(
    kind: str, speeds: Sequence[float], seconds: Sequence[float], between: Sequence[float] = ()
) -> dict[str, Any]:
    """What a test's runs come to: their ``speeds`` (tokens per second), their ``seconds``, and
    those ``between`` tokens, if they are known."""
    moved = drift(speeds)
    return {
        "tokens_per_second": {k: _rounded(v, 4) for k, v in summarise(speeds).items()},
        "ttft_seconds": _latencies(seconds if kind == "prefill" else ()),
        "inter_token_seconds": _latencies(between),
        "joules": None,
        "tokens_per_joule": None,
        "drift": _rounded(moved, 6),
        "drifted": moved is not None and abs(moved) > DRIFT_BOUND,
    }


def _latencies(seconds: Sequence[float]) -> dict[str, float | None] | None:
    if not seconds:
        return None
    return {
        "median": _rounded(percentile(seconds, 0.5), 9),
        "p95": _rounded(percentile(seconds, 0.95), 9),
    }


def conditions_part(found: Conditions) -> dict[str, Any]:
    """As records have it."""
    return {
        "power_source": found.power_source,
        "temperature_c": found.temperature_c,
        "thermal_state": found.thermal_state,
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def versions(engine: str) -> dict[str, str | None]:
    """Python's version and those of what ``engine`` computes with; ``None`` if not installed."""
    return package_versions(PACKAGES.get(engine, ()))


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Python's version and those of packages; ``None`` if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def model_sha256(path: Path, files: Sequence[Path] | None = None) -> str:
    """The hash of a file; of a folder that of the list of its weight files (or of ``files``), one
    line ``sha256  name`` each, sorted by name."""
    from mlxedge.record import known_sha256, sha256_file
    from mlxedge.sources.folder import find_shards

    def of(file: Path) -> str:
        return known_sha256(file) or sha256_file(file)

    if path.is_file():
        return of(path)
    files = find_shards(path).files if files is None else files
    lines = "".join(f"{of(f)}  {f.name}\n" for f in sorted(files, key=lambda f: f.name))
    return hashlib.sha256(lines.encode()).hexdigest()


def source_sha256(path: Path) -> str | None:
    """Of a model that mlxedge converted, what tells its source apart: the hash of the list of the
    source's weight files, one line ``sha256  name`` each, sorted by name; from the conversion's
    record beside it."""
    from mlxedge.record import source_files

    weights = [
        (name, sha256)
        for name, sha256 in source_files(path)
        if name.endswith((".safetensors", ".gguf"))
    ]
    if not weights:
        return None
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(weights))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_name(record: Record) -> str:
    """``MODEL-ENGINE-YYYYMMDDTHHMMSS.json``, or with the title of figures."""
    stamp = "".join(c for c in record["created"][:19] if c.isalnum())
    if record["kind"] == FIGURES:
        words = re.findall(r"[\w.]+", record["title"])
        return f"{'-'.join(words)[:80]}-{stamp}.json"
    model = record["model"]
    file = model.get("file")
    stem = Path(file).stem if model.get("format") == "gguf" and file else model["name"]
    return f"{stem}-{record['engine']['name']}-{stamp}.json"


def save_records(records: Sequence[Record], out: Path) -> list[Path]:
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


@cache
def schema() -> dict[str, Any]:
    """The published schema of a record."""
    text = resources.files("mlxedge.bench").joinpath("record.schema.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


@cache
def _validator(kind: str) -> Any:
    """Of one kind: a complaint about one of two would tell of neither."""
    from jsonschema import Draft202012Validator

    return Draft202012Validator({"$defs": schema()["$defs"], "$ref": f"#/$defs/{kind}"})


def check_record(where: str | Path, record: Any) -> Record:
    """``record``, if it has the shape that this module writes.

    Raises CorruptFileError for what is none, and UsageError for one of another schema.
    """
    if not isinstance(record, dict) or record.get("kind") not in (KIND, FIGURES):
        raise CorruptFileError(
            where,
            "not a record of mlxedge bench, nor what llama-bench (-o json), LocalScore or "
            "mlx_lm.benchmark write",
        )
    if record.get("schema") != SCHEMA:
        raise UsageError(
            f"{where}: schema {str(record.get('schema'))[:20]}; this version reads {SCHEMA}: "
            "measure again, or use the version that wrote it"
        )
    error = next(_validator(record["kind"]).iter_errors(record), None)
    if error is not None:
        place = "/".join(map(str, error.absolute_path)) or "the record"
        raise CorruptFileError(where, f"{place[:80]} makes no sense: {error.message[:160]}")
    return record
