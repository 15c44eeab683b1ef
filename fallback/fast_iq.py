"""The quality "fast" for ggml's lattice formats: IQ3_S, IQ3_XXS, IQ2_S, IQ2_XS, IQ2_XXS, IQ1_S,
IQ1_M.

ggml's encoders of these search already, and so do these: they are what "fast" writes. Without
importance all columns count alike, also where ggml would weigh by x² or refuse.
"""

from __future__ import annotations

import numpy as np

from mlxedge.encodings import GgmlBlock
from mlxedge.fallback.ggml import encode
from mlxedge.ops import Parts


def search(weights: np.ndarray, encoding: GgmlBlock, importance: np.ndarray | None) -> Parts:
    """Encode ``weights``, f32 ``[rows, cols]``, heeding importance f32 ``[cols]`` or None."""
    if importance is None:
        importance = np.ones(weights.shape[1], np.float32)
    return encode(weights, encoding, importance)
