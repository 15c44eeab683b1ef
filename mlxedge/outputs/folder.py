"""What an MLX folder and a Hugging Face folder share: config, tokenizer, model card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mlxedge.errors import TokenizerError
from mlxedge.models.wiring import NAMES

if TYPE_CHECKING:
    from mlxedge.models.spec import ModelSpec
    from mlxedge.sources.checkpoint import Checkpoint

TORCH_DTYPE = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
#: Config keys that describe the source's storage and not the model.
_STORAGE_KEYS = (
    "_name_or_path",
    "quantization",
    "quantization_config",
    "compression_config",
    "vision_config",
)


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=4, sort_keys=True, ensure_ascii=False) + "\n").encode()


def clean_config(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """``config`` without the keys that describe how the source was stored; with ``dtype``."""
    made = {k: v for k, v in config.items() if k not in _STORAGE_KEYS}
    # Both names: transformers 5 writes "dtype", everything older reads "torch_dtype".
    return made | {"dtype": TORCH_DTYPE[dtype], "torch_dtype": TORCH_DTYPE[dtype]}


def window_notes(spec: ModelSpec, config: dict[str, Any], runtime: str) -> list[str]:
    """What to say of the model in a ``runtime`` ("gguf", "mlx"), as of a sliding window that it
    does not have."""
    notes = spec.notes(config, runtime)
    if (window := spec.window(config, runtime)) is None:
        return notes
    name = NAMES[runtime]
    return [
        *notes,
        f"exact for contexts up to {window} tokens, which is what the file declares: {name} has "
        "no sliding window for this architecture",
    ]


def common_files(checkpoint: Checkpoint) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer's files and generation_config.json; and what to say of them."""
    from mlxedge.tokenizer.saved import saved_files

    files: dict[str, bytes] = {}
    notes = []
    if checkpoint.tokenizer:
        try:
            files = saved_files(checkpoint.tokenizer)
        except TokenizerError as error:
            files = dict(checkpoint.tokenizer.files)
            notes.append(f"the tokenizer's files are copied as they are: {error}")
    if checkpoint.generation_config:
        files["generation_config.json"] = json_bytes(checkpoint.generation_config)
    return files, notes


def model_card(checkpoint: Checkpoint, library: str, what: str, recipe: str) -> bytes:
    """README.md with the front matter that the Hub and its tools read."""
    base = checkpoint.origin.repo or checkpoint.base_model
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if library == "mlx":
        lines += ["tags:", "- mlx"]
    if checkpoint.license:
        lines.append(f"license: {checkpoint.license}")
    if base:
        lines.append(f"base_model: {base}")
    adapter = checkpoint.adapter or {}
    source = checkpoint.origin.repo or checkpoint.name.removesuffix(f"-{adapter.get('name')}")
    if checkpoint.origin.revision:
        source += f" at revision {checkpoint.origin.revision}"
    if adapter:
        source += f" with the adapter {adapter.get('repo') or adapter['name']}"
        if adapter.get("revision"):
            source += f" at revision {adapter['revision']}"
    lines += [
        "---",
        "",
        f"# {checkpoint.name}, {recipe}",
        "",
        f"{what} made from {source} by [mlxedge](https://github.com/mlxedge/mlxedge).",
        "",
    ]
    return "\n".join(lines).encode()


def type_note(config: dict[str, Any], written: dict[str, Any], reader: str) -> list[str]:
    """A note where a config is written as that of another architecture."""
    own, other = config["model_type"], written["model_type"]
    return (
        [] if own == other else [f"{reader} gets this {own} as a {other}, which computes the same"]
    )
