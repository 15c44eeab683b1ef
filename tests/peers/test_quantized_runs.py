"""Every architecture quantized, as people convert it: the runtime loads it and computes numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracles.checkpoints import SAVED, write_checkpoint
from oracles.llama_cpp import LlamaCpp

import mlxedge

TOKENS = [int(t) for t in np.random.default_rng(2).integers(3, 512, 40)]


@pytest.mark.parametrize("name", SAVED)
def test_quantized_models_run(name: str, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm import load

    folder = write_checkpoint(tmp_path / "source", **SAVED[name])
    mlxedge.convert(folder, ["gguf:q4_k_m", "mlx:4bit"], tmp_path)
    with mlxedge.load(folder, engine="numpy") as model:
        truth = model.logits(TOKENS)
    with LlamaCpp(tmp_path / "source-Q4_K_M.gguf") as model:
        found = {"llama.cpp": model.logits(TOKENS)}
    mlx_lm = load(str(tmp_path / "source-mlx-4bit"))[0]
    found["mlx-lm"] = np.array(mlx_lm(mx.array([TOKENS]))[0].astype(mx.float32))
    for logits in found.values():
        assert np.isfinite(logits).all()
        # A random model's weights say more in four bits than chance does.
        assert np.corrcoef(logits.ravel(), truth.ravel())[0, 1] > 0.5
