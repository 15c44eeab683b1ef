"""Text that ships with the package."""

from __future__ import annotations

from pathlib import Path

#: What ``evaluate`` measures with. It must stay out of every calibration and every training.
HELDOUT = Path(__file__).with_name("heldout.txt")

#: What models are calibrated on for error feedback, beside Python's documentation: a novel of talk,
#: one of long sentences, and source code.
CALIBRATION = tuple(
    Path(__file__).with_name("calibration") / f"{name}.txt" for name in ("austen", "proust", "code")
)
