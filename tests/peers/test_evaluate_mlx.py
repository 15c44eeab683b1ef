"""The same figures from mlx-lm's forward pass and from ours."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from oracles.tiny import SENTENCES

import mlxedge
from mlxedge.cli import main
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
    command = ["evaluate", quantized, "--engine", "mlx", "--context", "64", "--chunks", "1"]
    done = CliRunner().invoke(main, list(map(str, command)))
    assert done.exit_code == 0, done.stderr
    slow = mx.default_device() == mx.cpu
    assert ("MLX has no GPU here" in done.stderr) == slow
    with pytest.raises(UsageError, match="convert it first"):
        evaluate([tmp_path / "tiny-llama-Q8_0.gguf"], text=SENTENCES, context=64, engine="mlx")
