"""Writes ``ggml_blocks.json``, the bytes that ggml itself gives for :func:`weights`, and
``ggml_importance.json``, those it gives for them with :func:`importance`.

PYTHONPATH=tests python tests/golden/make_ggml_blocks.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

#: Types that weigh columns; then those that do not.
WEIGHED = [
    *("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"),
]
TYPES = [*WEIGHED, "q8_0", "mxfp4", "tq1_0", "tq2_0"]
PATH = Path(__file__).with_name("ggml_blocks.json")
IMPORTANCE_PATH = Path(__file__).with_name("ggml_importance.json")


#: Seeds of super-blocks whose K-quant bytes change where a compiler fuses a multiply and an add:
#: Q2_K and Q5_K, Q4_K, Q3_K, Q6_K.
FUSION_SHOWS = (1, 18, 314, 480)


def weights() -> np.ndarray:
    """Float32 ``[1, 1536]``, exact on every machine: integers over powers of two.

    Six super-blocks: ``FUSION_SHOWS``, one all positive, one with zeros and a large outlier.
    """
    i = np.arange(256, dtype=np.int64)
    blocks = [
        ((i * i * (31 + 2 * seed) + i * 17 * (seed + 1)) % 4093 - 2046) / 2.0**11
        for seed in (*FUSION_SHOWS, 0, 2)
    ]
    blocks[4] = np.abs(blocks[4]) + 0.125
    blocks[5] = np.where(i // 64 == 1, 0, blocks[5] / 2.0 ** (i // 48))
    blocks[5][200] = -37.25
    return np.concatenate(blocks).astype(np.float32).reshape(1, -1)


def importance() -> np.ndarray:
    """Float32 ``[1536]``, exact on every machine: every 7th column counts nothing."""
    i = np.arange(weights().size, dtype=np.int64)
    return np.where(i % 7 == 3, 0, (i * 37 % 101 + 1) / 64.0).astype(np.float32)


def main() -> None:
    from oracles import ggml

    if not ggml.EXACT:
        raise SystemExit("this build of ggml may contract multiply and add: use x86-64")
    blocks = {name: ggml.quantize(name, weights()).tobytes().hex() for name in TYPES}
    PATH.write_text(json.dumps(blocks, indent=1) + "\n")
    weighed = {
        name: ggml.quantize(name, weights(), importance=importance()).tobytes().hex()
        for name in WEIGHED
    }
    IMPORTANCE_PATH.write_text(json.dumps(weighed, indent=1) + "\n")


if __name__ == "__main__":
    main()
