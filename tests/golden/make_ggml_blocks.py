"""Writes ``ggml_blocks.json``: the bytes that ggml itself gives for :func:`weights`.

PYTHONPATH=tests python tests/golden/make_ggml_blocks.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

TYPES = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
PATH = Path(__file__).with_name("ggml_blocks.json")


def weights() -> np.ndarray:
    """Float32 ``[1, 768]``, exact on every machine: integers over powers of two.

    Three super-blocks: mixed signs, all positive, and one that holds zeros and a large outlier.
    """
    i = np.arange(768, dtype=np.int64)
    x = ((i * i * 31 + i * 17) % 4093 - 2046) / 2.0 ** (11 + (i // 48) % 5)
    x[256:512] = np.abs(x[256:512]) + 0.125
    x[544:608] = 0
    x[700] = -37.25
    return x.astype(np.float32).reshape(1, -1)


def main() -> None:
    from oracles import ggml

    if not ggml.EXACT:
        raise SystemExit("this build of ggml may contract multiply and add: use x86-64")
    blocks = {name: ggml.quantize(name, weights()).tobytes().hex() for name in TYPES}
    PATH.write_text(json.dumps(blocks, indent=1) + "\n")


if __name__ == "__main__":
    main()
