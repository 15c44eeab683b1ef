"""The forward pass on encoded weights, against transformers on the same weights decoded.

Whatever a format loses, it has lost before: both must give the same logits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.targets import GGUF_RECIPES, parse_target

TARGETS = [
    *(f"gguf:{recipe}" for recipe in GGUF_RECIPES if recipe not in ("q3_k_l", "f32")),
    *(f"mlx:{bits}bit" for bits in (2, 3, 4, 5, 6, 8)),
    "mlx:4bit-g32", "mlx:4bit-g128", "mlx:mxfp4", "mlx:mxfp8", "mlx:nvfp4", "mlx:bf16",
]  # fmt: skip
TOKENS = [int(t) for t in np.random.default_rng(2).integers(3, 512, 40)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("quantized")
    folder = write_tiny_llama(home / "tiny", dtype="f32", tied=False, layers=1)
    mlxedge.convert(folder, TARGETS, home)
    return home


def transformers_logits(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("target", TARGETS)
def test_logits_are_those_of_the_decoded_weights(home: Path, tmp_path: Path, target: str) -> None:
    path = home / parse_target(target).default_name("tiny")
    mlxedge.convert(path, "hf:f32", tmp_path / "decoded")
    truth = transformers_logits(tmp_path / "decoded")
    with mlxedge.load(path, engine="numpy", threads=2) as model:
        together = model.logits(TOKENS)
        session = model.session()
        single = np.array([session.feed([token]) for token in TOKENS])
    assert np.abs(together - truth).max() <= 1e-4 * np.abs(truth).max()
    assert np.abs(single - truth).max() <= 1e-4 * np.abs(truth).max()
