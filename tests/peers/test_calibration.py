"""Statistics of activations against transformers, whose hooks show the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.tiny import write_tiny_llama

from mlxedge.calibration.collect import collect
from mlxedge.calibration.texts import Sample
from mlxedge.prepare import prepare
from mlxedge.sources import open_source

IDS = np.random.default_rng(0).integers(3, 512, (3, 160))

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"layers": 3},
    "llama-untied-biases": {"tied": False, "attention_bias": True, "kv_heads": 4},
    "llama-head-dim": {"head_dim": 32, "heads": 4, "kv_heads": 1, "rope": {"rope_theta": 5e5}},
    "mistral-window": {"model_type": "mistral", "tied": False, "sliding_window": 64},
    "qwen2": {"model_type": "qwen2", "rope": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6},
}


def inputs_by_transformers(folder: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What goes into each linear layer: f32 ``[tokens, cols]``, by its weight's name."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def keep(module: Any, given: Any, key: str = f"{name}.weight") -> None:
                seen.setdefault(key, []).append(given[0].reshape(-1, given[0].shape[-1]).numpy())

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        for row in ids:
            model(torch.tensor(row[None]))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_sums_and_hessians(name: str, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny", **CHECKPOINTS[name])
    expected = inputs_by_transformers(folder, IDS)
    if CHECKPOINTS[name].get("tied", True):
        expected["model.embed_tokens.weight"] = expected.pop("lm_head.weight")
    with open_source(folder) as opened:
        sample = Sample(IDS, "random", "", IDS.size, False)
        found = list(collect(prepare(opened)[1], sample, hessians=True))
    assert {n for one in found for n in one.names} == set(expected)
    for one in found:
        for matrix in one.names:
            x = expected[matrix].astype(np.float64)
            assert one.count == len(x)
            np.testing.assert_allclose(one.sums, (x * x).sum(0), rtol=1e-4)
            assert one.hessian is not None
            hessian = x.T @ x / len(x)
            np.testing.assert_array_equal(one.hessian, one.hessian.T)
            # A correlation may be zero: errors count against the columns that it is of.
            size = np.sqrt(np.outer(hessian.diagonal(), hessian.diagonal()))
            assert (np.abs(one.hessian - hessian) / size).max() < 1e-4
