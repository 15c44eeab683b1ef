"""A Hugging Face folder: config.json, safetensors, tokenizer files. No code in it is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxedge.errors import SourceNotFoundError
from mlxedge.sources import folder as common
from mlxedge.sources.checkpoint import Checkpoint, Origin, Tensors
from mlxedge.sources.files import Opener, RandomAccessFile
from mlxedge.sources.mlx_dir import is_mlx, mlx_tensors
from mlxedge.sources.quantized import describe, quantization_rules


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

    Raises SourceNotFoundError (no config, no weights, a missing shard, an adapter), UnsafeFileError
    (only pickles, an index that points outside), CorruptFileError and UnsupportedEncodingError
    (weights quantized by a scheme that mlxedge does not read).
    """
    if not (folder / common.CONFIG).is_file():
        if (folder / common.ADAPTER_CONFIG).is_file():
            raise SourceNotFoundError(common.only_adapter(str(folder)))
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
        rules = None if mlx else quantization_rules(folder, config)
        tensors = (
            mlx_tensors(folder, config, weights) if mlx else _hf_tensors(folder, rules, weights)
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
        quantized=describe(rules) if rules else None,
        on_close=weights.close,
    )


def _hf_tensors(folder: Path, rules: dict[str, Any] | None, weights: common.Weights) -> Tensors:
    if rules is not None:
        from mlxedge.sources.quantized import quantized_tensors

        return quantized_tensors(folder, rules, weights)
    return Tensors({name: file.source_tensor(name) for name, file in weights.home.items()})
