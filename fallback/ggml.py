"""ggml's block formats: the encoders and decoders behind ``encode`` and ``decode``."""

from __future__ import annotations

import numpy as np

from mlxedge.encodings import GgmlBlock
from mlxedge.errors import UnsupportedEncodingError
from mlxedge.fallback.ggml_decode import DECODERS
from mlxedge.fallback.plain import cast
from mlxedge.ops import Parts

#: Weights converted to f32 at a time, where the source is f16 or bf16.
_CHUNK = 1 << 18


def encode(weights: np.ndarray, encoding: GgmlBlock, importance: np.ndarray | None = None) -> Parts:
    """Encode ``weights`` ``[rows, cols]`` (f32, f16 or bf16, C order).

    ``importance``: how much errors in each column count, f32 ``[cols]``.
    """
    from mlxedge.fallback.ggml_encode import ENCODERS

    encoder = ENCODERS.get(encoding.name)
    if encoder is None:
        raise UnsupportedEncodingError(
            f"{encoding.name} can be read but not written: choose {', '.join(sorted(ENCODERS))}"
        )
    part = encoding.parts(weights.shape)["weight"]
    out = np.empty(part.shape, np.uint8)
    rows = weights.shape[0]
    step = rows if weights.dtype == np.float32 else max(1, _CHUNK // max(1, weights.shape[1]))
    for start in range(0, rows, step or 1):
        piece = slice(start, start + step)
        encoder(cast(weights[piece], "f32"), out[piece], importance)
    return {"weight": out}


def decode(parts: Parts, encoding: GgmlBlock) -> np.ndarray:
    """Decode to f32 ``[rows, cols]``."""
    stored = parts["weight"]
    width = stored.shape[-1] // encoding.block_bytes * encoding.block_size
    out = np.empty((*stored.shape[:-1], width), np.float32)
    DECODERS[encoding.name](stored, out)
    return out
