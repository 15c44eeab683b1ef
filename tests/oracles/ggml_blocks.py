"""Random bytes that are valid blocks: every code may occur, every scale is finite."""

from __future__ import annotations

import numpy as np

from mlxedge.encodings import GGML

#: Where the f16 numbers of a block begin, by type. iq1_m spreads its scale over four bytes.
_F16_AT = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82),
    "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq2_xxs": (0,),
    "iq2_xs": (0,), "iq3_xxs": (0,), "iq1_s": (0,), "iq4_nl": (0,), "iq3_s": (0,), "iq2_s": (0,),
    "iq4_xs": (0,), "iq1_m": (), "tq1_0": (52,), "tq2_0": (64,), "mxfp4": (), "nvfp4": (),
}  # fmt: skip


def random_blocks(name: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """u8 ``[rows, row_bytes]``. Scales are of both signs and all sizes, subnormals included."""
    encoding, rng = GGML[name], np.random.default_rng(seed)
    n = rows * cols // encoding.block_size
    blocks = rng.integers(0, 256, (n, encoding.block_bytes), dtype=np.uint8)
    for at in _F16_AT[name]:
        blocks[:, at + 1] &= 0xBF  # exponent below 16: finite, less than 2
    if name == "iq1_m":
        blocks[:, 55] &= 0xBF  # the high byte of the scale is in the upper halves of bytes 53, 55
    if name == "mxfp4":
        blocks[:, 0] %= 253  # 6 · 2^126 is beyond float32
    if name == "nvfp4":
        blocks[:, :4] %= 127
    return blocks.reshape(rows, -1)
