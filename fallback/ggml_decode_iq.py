"""ggml's lattice and ternary formats to float32, by the ``gguf`` package.

``gguf.quants`` holds the lattices and decodes these formats to the same bits as ggml. It makes
several arrays of the size of what it is given, so the blocks go through it a few at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

#: Blocks of 256 weights per call.
_BLOCKS = 1024

NAMES = (
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0", "tq2_0",
)  # fmt: skip


def _decode(name: str, blocks: np.ndarray, out: np.ndarray) -> None:
    """u8 ``[n, block_bytes]`` to f32 ``[n, 256]``."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    type_ = GGMLQuantizationType[name.upper()]
    # Infinite scales times zero codes are NaN, in C without a word.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), _BLOCKS):
            piece = slice(start, start + _BLOCKS)
            out[piece] = dequantize(blocks[piece], type_)


KERNELS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    name: functools.partial(_decode, name) for name in NAMES
}
