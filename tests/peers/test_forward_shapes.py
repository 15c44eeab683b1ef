"""The forward pass against transformers where shapes and lengths are awkward: sliding windows,
heads and layers that fill no vector, prompts longer than a pass and than the first cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.tiny import write_tiny_llama

import mlxedge

LONG = [int(t) for t in np.random.default_rng(3).integers(3, 512, 700)]

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "longer than a pass": ({"layers": 1}, 700),
    "small heads": ({"hidden": 40, "heads": 5, "kv_heads": 1, "intermediate": 56}, 30),
    "one head": ({"hidden": 24, "heads": 1, "kv_heads": 1, "intermediate": 31}, 20),
    "wide heads": ({"head_dim": 96, "heads": 4, "kv_heads": 4, "hidden": 64}, 70),
    "mistral window": ({"model_type": "mistral", "sliding_window": 7, "layers": 3}, 100),
    "qwen2 window": (
        {
            "model_type": "qwen2",
            "sliding_window": 9,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "layers": 3,
        },
        100,
    ),
    "qwen2 window off": (
        {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": False},
        60,
    ),
    "qwen3 layer types": (
        {
            "model_type": "qwen3",
            "sliding_window": 5,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        60,
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[int], np.ndarray]:
    settings, count = CASES[request.param]
    folder = write_tiny_llama(tmp_path / "tiny", **settings)
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        truth = model(torch.tensor([LONG[:count]])).logits[0].numpy()
    return folder, LONG[:count], truth


@pytest.mark.parametrize("threads", [1, 3])
def test_logits(case: tuple[Path, list[int], np.ndarray], threads: int) -> None:
    folder, tokens, truth = case
    with mlxedge.load(folder, engine="numpy", threads=threads) as model:
        found = model.logits(tokens)
    assert found.shape == truth.shape
    assert np.abs(found - truth).max() <= 1e-4 * np.abs(truth).max()


def test_pieces_of_any_length(case: tuple[Path, list[int], np.ndarray]) -> None:
    folder, tokens, truth = case
    with mlxedge.load(folder, engine="numpy") as model:
        session = model.session()
        start = 0
        for piece in (1, 3, 1, 2, 30, 1, 5, len(tokens)):
            fed = tokens[start : start + piece]
            if fed:
                start += len(fed)
                found = session.feed(fed)
                assert np.abs(found - truth[start - 1]).max() <= 1e-4 * np.abs(truth).max()
        assert start == len(tokens)
