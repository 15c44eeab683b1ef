"""Logits against those of transformers, and a note of how far they are off."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np


def check(
    name: str, folder: Path, program: str, found: np.ndarray, truth: np.ndarray, bound: float
) -> None:
    """Assert that logits are within ``bound`` of the largest one of transformers; and note how far
    they are off where docs/make_architectures.py asks for it."""
    assert found.shape == truth.shape
    error = float(np.abs(found - truth).max() / np.abs(truth).max())
    if notes := os.environ.get("MLXEDGE_LOGITS"):
        kind = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
        with Path(notes).open("a", encoding="utf-8") as file:
            line = {"model_type": kind, "checkpoint": name, "program": program, "error": error}
            file.write(json.dumps(line) + "\n")
    assert error <= bound
