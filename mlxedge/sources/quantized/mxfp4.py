"""MXFP4 experts as gpt_oss stores them.

``X_blocks`` u8 ``[experts, out, in / 32, 16]`` and ``X_scales`` u8 ``[experts, out, in / 32]``
(openai/gpt-oss, ``gpt_oss/torch/weights.py``). The stack is handed out as ``X.weight``
``[experts, out, in]``, each expert as a linear layer has it; the unquantized checkpoints of that
architecture call the transposed one ``X``.
"""

from __future__ import annotations

from typing import Any

from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.quantized import fp4
from mlxedge.sources.quantized.stored import Stored

_CODES, _SCALES = "_blocks", "_scales"


def read(stored: Stored, rules: dict[str, Any]) -> dict[str, SourceTensor]:
    """Every tensor stored as blocks."""
    made = {}
    for stem, _ in stored.ending(_CODES):
        name = f"{stem}.weight"
        made[name] = fp4.mxfp4(stored, name, stem + _CODES, stem + _SCALES)
    return made
