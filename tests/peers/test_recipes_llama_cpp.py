"""Every GGUF recipe against ``llama_model_quantize``: the same types and the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracles.llama_quantize import quantize
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.recipes.llama_cpp import RECIPES
from mlxedge.sources.gguf import read_gguf

QUANTIZED = [r for r in RECIPES if r not in ("f32", "f16", "bf16")]
#: Layers enough for every third one to differ; 288 columns divide by 32 and not by 256.
MODELS = {
    "llama": {"layers": 9},
    "untied": {"layers": 4, "tied": False, "heads": 8, "kv_heads": 2},
    "narrow": {"layers": 3, "hidden": 288, "intermediate": 544, "heads": 9, "kv_heads": 3},
    "qwen2": {"layers": 4, "model_type": "qwen2"},
    "qwen3": {"layers": 4, "model_type": "qwen3", "head_dim": 128},
}


@pytest.mark.parametrize("model", MODELS)
def test_types_and_bytes_equal_llama_cpps(model: str, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / model, **MODELS[model])  # type: ignore[arg-type]
    mlxedge.convert(folder, ["gguf:f32", *(f"gguf:{r}" for r in QUANTIZED)], tmp_path)
    for recipe in QUANTIZED:
        peer = tmp_path / "peer.gguf"
        quantize(tmp_path / f"{model}-F32.gguf", peer, RECIPES[recipe][1])
        assert tensors(tmp_path / f"{model}-{recipe.upper()}.gguf") == tensors(peer), recipe


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    data = path.read_bytes()
    return {
        t.name: (t.encoding.name, data[t.offset : t.offset + t.nbytes])
        for t in read_gguf(path).tensors
    }
