"""The same figures from mlx-lm's forward pass and from ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracles.tiny import SENTENCES

import mlxedge
from mlxedge.errors import UsageError
from mlxedge.evaluate import evaluate


def test_mlx_lm_measures_the_same(tiny: Path, tmp_path: Path) -> None:
    """In f32: of bf16 weights mlx-lm rounds every activation to bf16."""
    mlxedge.convert(tiny, ["mlx:4bit", "hf:f32", "gguf:q8_0"], tmp_path, dtype="f32")
    quantized, wide = tmp_path / "tiny-llama-mlx-4bit", tmp_path / "tiny-llama-hf-f32"
    theirs, ours = (
        evaluate([quantized], against=wide, text=SENTENCES, context=64, chunks=2, engine=engine)
        for engine in ("mlx", "numpy")
    )
    (one,), (other,) = theirs.models, ours.models
    assert one.perplexity.value == pytest.approx(other.perplexity.value, rel=1e-3)
    assert one.divergence is not None
    assert other.divergence is not None
    assert one.divergence.mean.value == pytest.approx(other.divergence.mean.value, rel=1e-3)
    with pytest.raises(UsageError, match="convert it first"):
        evaluate([tmp_path / "tiny-llama-Q8_0.gguf"], text=SENTENCES, context=64, engine="mlx")
