"""The encoders of ggml's block formats, by the names of ``mlxedge.encodings.GGML``.

They write what ``ggml_quantize_chunk`` (llama.cpp as vendored by llama-cpp-python 0.3.36) writes
without an importance matrix, where the C compiler does not contract multiply and add.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlxedge.encodings import GGML, GgmlBlock
from mlxedge.errors import UsageError
from mlxedge.fallback import ggml_k, ggml_legacy

_KERNELS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "q4_0": ggml_legacy.encode_q4_0,
    "q4_1": ggml_legacy.encode_q4_1,
    "q5_0": ggml_legacy.encode_q5_0,
    "q5_1": ggml_legacy.encode_q5_1,
    "q8_0": ggml_legacy.encode_q8_0,
    "q2_k": ggml_k.encode_q2_k,
    "q3_k": ggml_k.encode_q3_k,
    "q4_k": ggml_k.encode_q4_k,
    "q5_k": ggml_k.encode_q5_k,
    "q6_k": ggml_k.encode_q6_k,
}


def _encoder(
    encoding: GgmlBlock, kernel: Callable[[np.ndarray, np.ndarray], None]
) -> Callable[[np.ndarray, np.ndarray], None]:
    def encode(x: np.ndarray, out: np.ndarray) -> None:
        """Encode ``x``, float32 ``[rows, cols]``, into ``out``, uint8 ``[rows, row bytes]``.

        Both C-contiguous. Rows are independent and the GIL is released, so threads may share the
        rows out. Compiled on the first call. Infinities and NaN give meaningless bytes.
        """
        rows, cols = x.shape
        # A kernel checks nothing: it would write past the end.
        if cols % encoding.block or out.shape != (rows, encoding.nbytes((cols,))):
            raise UsageError(f"{encoding}: {x.shape} weights do not fill {out.shape} bytes")
        if x.dtype != np.float32 or out.dtype != np.uint8:
            raise UsageError(f"{encoding}: cannot encode {x.dtype} to {out.dtype}")
        if not (x.flags.c_contiguous and out.flags.c_contiguous):
            raise UsageError(f"{encoding}: arrays must be C-contiguous")
        weights = x.reshape(-1)
        weights.flags.writeable = False  # one compilation serves read-only maps and arrays alike
        kernel(weights, out.reshape(-1))

    return encode


#: ``(x, out) -> None`` by encoding name; see :func:`_encoder`.
ENCODERS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    name: _encoder(GGML[name], kernel) for name, kernel in _KERNELS.items()
}
