"""What each number format *is*: block sizes, stored parts, bytes. No arithmetic on weights.

An :class:`Encoding` describes how a matrix of weights is laid out in memory and in files. The
bytes themselves are defined by ``mlxedge.fallback`` and computed by an ``Ops`` (``mlxedge.ops``).

This package imports neither NumPy nor a backend, so that listing the formats is instant.
"""

from mlxedge.encodings.base import Encoding, Part
from mlxedge.encodings.ggml import GGML, GGML_BY_ID, GgmlBlock
from mlxedge.encodings.mlx import MLX_FLOAT, Affine, MlxFloat
from mlxedge.encodings.plain import BF16, F16, F32, PLAIN, Plain

__all__ = [
    "BF16",
    "F16",
    "F32",
    "GGML",
    "GGML_BY_ID",
    "MLX_FLOAT",
    "PLAIN",
    "Affine",
    "Encoding",
    "GgmlBlock",
    "MlxFloat",
    "Part",
    "Plain",
]
