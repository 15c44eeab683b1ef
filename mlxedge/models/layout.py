"""Row orders that differ between Hugging Face and GGUF.

llama.cpp's llama graph rotates neighbouring pairs, transformers the two halves of a head, so the
converter interleaves the rows of Q and K (``LlamaModel.permute`` in llama.cpp's conversion/llama.py
as vendored by llama-cpp-python 0.3.36). A row order moves whole rows, so it applies to encoded
blocks just as to floats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxedge.errors import UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.models.spec import RowOrder


def rope_row_order(rows: int, heads: int) -> np.ndarray:
    """Index ``[rows]`` such that ``hf = gguf[index]``."""
    import numpy as np

    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()


def rope_row_order_to_gguf(rows: int, heads: int) -> np.ndarray:
    """Index ``[rows]`` such that ``gguf = hf[index]``."""
    import numpy as np

    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def heads_of(order: RowOrder, config: dict[str, Any], rows: int) -> int:
    """How many heads the rows of a Q ("rope_q") or K ("rope_k") matrix form."""
    key = "num_attention_heads" if order == "rope_q" else "num_key_value_heads"
    heads = int(config[key])
    if rows % (2 * heads):
        raise UnsupportedModelError(f"{rows} rows do not divide into {heads} heads of even size")
    return heads
