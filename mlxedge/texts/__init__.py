"""Text that ships with the package."""

from __future__ import annotations

from pathlib import Path

#: What ``evaluate`` measures with. It must stay out of every calibration and every training.
HELDOUT = Path(__file__).with_name("heldout.txt")
