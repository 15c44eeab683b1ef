"""A Hugging Face folder: config.json, safetensors, tokenizer files. No code in it is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxedge.errors import SourceNotFoundError, UnsupportedEncodingError
from mlxedge.sources import folder as common
from mlxedge.sources.checkpoint import Checkpoint, Origin, Tensors
from mlxedge.sources.files import Opener, RandomAccessFile
from mlxedge.sources.mlx_dir import is_mlx, mlx_tensors


def open_folder(
    folder: Path,
    *,
    repo: str | None = None,
    revision: str | None = None,
    shards: common.Shards | None = None,
    open_file: Opener = RandomAccessFile,
) -> Checkpoint:
    """Open a folder that transformers or mlx-lm would load.

    ``shards`` and ``open_file`` are for weight files that are not in the folder.

    Raises SourceNotFoundError (no config, no weights, a missing shard), UnsafeFileError (only
    pickles, an index that points outside), CorruptFileError and UnsupportedEncodingError (weights
    quantized by a scheme that mlxedge does not read).
    """
    if not (folder / common.CONFIG).is_file():
        shards = common.find_shards(folder)  # its complaint is the better one, if it has any
        raise SourceNotFoundError(f"{folder}: no config.json beside {shards.files[0].name}")
    config = common.read_json(folder / common.CONFIG)
    shards = shards or common.find_shards(folder)
    generation = folder / common.GENERATION_CONFIG
    generation_config = common.read_json(generation) if generation.is_file() else {}
    tokenizer, tokenizer_files = common.read_tokenizer(folder)
    weights = common.Weights(shards, open_file)
    try:
        mlx = is_mlx(config, weights)
        tensors = (
            mlx_tensors(folder, config, weights) if mlx else _hf_tensors(folder, config, weights)
        )
    except BaseException:
        weights.close()
        raise
    side = [folder / common.CONFIG, *([generation] if generation_config else []), *tokenizer_files]
    index = [shards.index] if shards.index else []
    return Checkpoint(
        name=repo.rpartition("/")[2] if repo else common.model_name(folder),
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        generation_config=generation_config,
        origin=Origin(
            kind="mlx" if mlx else "hf",
            path=folder,
            files=(*shards.files, *index, *side),
            repo=repo,
            revision=revision,
        ),
        license=common.read_license(folder),
        base_model=common.read_base_model(folder),
        on_close=weights.close,
    )


def _hf_tensors(folder: Path, config: dict[str, Any], weights: common.Weights) -> Tensors:
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method"):
        raise UnsupportedEncodingError(
            f"{folder}: its weights are quantized with {quantization['quant_method']}; "
            "start from the model's f32, f16 or bf16 weights"
        )
    return Tensors({name: file.source_tensor(name) for name, file in weights.home.items()})
