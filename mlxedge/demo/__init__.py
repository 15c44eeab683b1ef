"""The small language model that ships with the package."""

from __future__ import annotations

from pathlib import Path

PROMPT = "In the beginning"


def model_path() -> Path:
    """The folder of the bundled model: Hugging Face format, bf16. Its README tells what it is."""
    return Path(__file__).parent / "mlxedge-demo"
