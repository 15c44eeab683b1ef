"""Which engine measures which model, and what a record says of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.bench import llama_bench
from mlxedge.bench.predict import tokens_read
from mlxedge.bench.record import describe_model, model_sha256, source_sha256
from mlxedge.errors import BackendError, MlxedgeError, UsageError
from mlxedge.ops import default_backend

if TYPE_CHECKING:
    from mlxedge.inspect import Inspection
    from mlxedge.sources.checkpoint import Checkpoint

#: The kinds of model that each engine runs.
ENGINES: dict[str, tuple[str, ...]] = {
    "mlx": ("mlx", "hf"),
    "llama.cpp": ("gguf",),
    "llama-bench": ("gguf",),
    "onnxruntime": ("onnx",),
    "numpy": ("gguf", "mlx", "hf"),
}


@dataclass(frozen=True)
class Found:
    """A model on this disk: its ``path``, what it is ("gguf", "mlx", "hf", "onnx"), and what a
    record says of it."""

    path: Path
    kind: str
    about: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.about["file"] or self.about["name"])


def describe_checkpoint(checkpoint: Checkpoint, found: Inspection) -> Found:
    """Of a model that was opened, and downloaded if it came from the Hub."""
    origin = checkpoint.origin
    found = replace(found, repo=origin.repo, revision=origin.revision)
    about = describe_model(found, model_sha256(origin.path), source_sha256(origin.path))
    about["bytes_per_token"] = bytes_per_token(checkpoint)
    return Found(origin.path, origin.kind, about)


def describe_onnx(path: Path) -> Found:
    """Of a folder with a genai_config.json."""
    from mlxedge.engines.onnx_engine import read_folder

    folder = read_folder(path)
    size = sum(file.stat().st_size for file in folder.files)
    about = {
        "name": folder.name,
        "file": folder.name,
        "repo": None,
        "revision": None,
        "format": "onnx",
        "architecture": folder.architecture or None,
        "sha256": model_sha256(path, folder.files),
        "source_sha256": source_sha256(path),
        "bytes": sum(f.stat().st_size for f in path.iterdir() if f.is_file()),
        "weight_bytes": size,
        "bytes_per_token": None,
        "parameters": None,
        "bits_per_weight": None,
        "quantization": None,
    }
    return Found(path, "onnx", about)


def bytes_per_token(checkpoint: Checkpoint) -> int | None:
    """Bytes of the weights that one decode step reads; ``None`` for a model that is not known."""
    from mlxedge.prepare import prepare

    try:
        spec, checkpoint = prepare(checkpoint)
        sizes = {name: tensor.nbytes for name, tensor in checkpoint.tensors.items()}
        return tokens_read(sizes, spec, checkpoint.config)
    except MlxedgeError:
        return None


def choose_engines(found: Found, asked: Sequence[str]) -> list[str]:
    """The engines that measure a model: of those ``asked`` for all that run its kind, else the one
    that people run it with, if it is here. Raises UsageError if none of ``asked`` does."""
    if asked:
        fitting = [engine for engine in asked if found.kind in ENGINES[engine]]
        if not fitting:
            kinds = {kind for engine in asked for kind in ENGINES[engine]}
            raise UsageError(
                f"{found.path} is {_KINDS[found.kind]}, and {' and '.join(asked)} run"
                f"{'s' if len(asked) == 1 else ''} {' or '.join(_KINDS[k] for k in sorted(kinds))}"
                + _HELP.get(next((k for k in sorted(kinds) if k in _HELP), ""), "")
            )
        return fitting
    return [_DEFAULTS[found.kind]()]


_HELP = {
    "gguf": ": convert it first (mlxedge convert … --to gguf:q4_k_m)",
    "mlx": ": convert it first (mlxedge convert … --to mlx:4bit)",
    "onnx": ": onnxruntime-genai's model builder makes one",
}
_KINDS = {
    "gguf": "a GGUF file",
    "mlx": "an MLX folder",
    "hf": "a Hugging Face folder",
    "onnx": "an ONNX folder",
}


def _for_gguf() -> str:
    from mlxedge.engines import llama_library

    if llama_library.is_installed():
        try:
            llama_library.library()
        except BackendError:
            pass
        else:
            return "llama.cpp"
    return "llama-bench" if llama_bench.find() else "numpy"


_DEFAULTS = {
    "gguf": _for_gguf,
    "mlx": default_backend,
    "hf": default_backend,
    "onnx": lambda: "onnxruntime",
}
