"""Encoders that search: the qualities "fast" and "best".

Where the rule of a runtime takes its scales from the largest weights of a block, these try many and
keep those with the least error, each column's weighed by its importance. Scales and biases are
compared as they are stored. "best" keeps them and chooses the codes again, column by column
(``feedback``).
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from mlxedge.encodings import Affine, Encoding, MlxFloat, Plain
from mlxedge.errors import UnsupportedEncodingError
from mlxedge.fallback.plain import cast
from mlxedge.ops import Feedback, Parts

#: The modules with ``search(weights, encoding, importance)``, by family or by name. Each takes
#: weights f32 ``[rows, cols]`` in C order and importance f32 ``[cols]`` or None.
_FAMILIES: dict[type[Encoding], str] = {Affine: "fast_affine", MlxFloat: "fast_levels"}
_NAMES = {
    "q4_1": "fast_affine",
    "q5_1": "fast_affine",
    "q4_0": "fast_levels",
    "q5_0": "fast_levels",
    "q8_0": "fast_levels",
    "iq4_nl": "fast_levels",
    "mxfp4": "fast_levels",
    "tq1_0": "fast_levels",
    "tq2_0": "fast_levels",
    "q2_k": "fast_k_affine",
    "q4_k": "fast_k_affine",
    "q5_k": "fast_k_affine",
    "q3_k": "fast_k_signed",
    "q6_k": "fast_k_signed",
    "iq4_xs": "fast_k_signed",
    "iq3_s": "fast_iq",
    "iq3_xxs": "fast_iq",
    "iq2_s": "fast_iq",
    "iq2_xs": "fast_iq",
    "iq2_xxs": "fast_iq",
    "iq1_s": "fast_iq",
    "iq1_m": "fast_iq",
}


def encode(
    weights: np.ndarray,
    encoding: Encoding,
    importance: np.ndarray | None,
    feedback: Feedback | None,
) -> Parts:
    """Encode ``weights`` ``[rows, cols]`` (f32, f16 or bf16, C order)."""
    if isinstance(encoding, Plain):
        exact: Parts = _load("plain").encode(weights, encoding)
        return exact
    name = _FAMILIES.get(type(encoding)) or _NAMES.get(encoding.name)
    if name is None:
        raise UnsupportedEncodingError(f"{encoding} can only be read")
    wide = np.ascontiguousarray(cast(weights, "f32"))
    found: Parts = _load(name).search(wide, encoding, importance)
    if feedback is None:
        return found
    improved: Parts = _load("feedback").encode(wide, found, encoding, feedback)
    return improved


def _load(name: str) -> Any:
    return importlib.import_module(f"mlxedge.fallback.{name}")
