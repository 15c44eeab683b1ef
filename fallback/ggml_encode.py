"""The encoders of ggml's block formats, by the names of ``mlxedge.encodings.GGML``.

They write what ``ggml_quantize_chunk`` (llama.cpp as vendored by llama-cpp-python 0.3.36) writes,
with and without an importance matrix, where the C compiler does not contract multiply and add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from mlxedge.encodings import GGML, GgmlBlock
from mlxedge.errors import UnsupportedEncodingError, UsageError
from mlxedge.fallback import (
    ggml_importance,
    ggml_iq1,
    ggml_iq2,
    ggml_iq3,
    ggml_iq4,
    ggml_k,
    ggml_legacy,
    ggml_small,
)
from mlxedge.fallback.ggml_importance import SPARE

#: Kernels that weigh all columns alike: (x, out).
_PLAIN: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
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
    "mxfp4": ggml_small.encode_mxfp4,
    "tq1_0": ggml_small.encode_tq1_0,
    "tq2_0": ggml_small.encode_tq2_0,
}

#: Kernels that weigh columns: (x, importance, cols, out).
_WEIGHTED: dict[str, Callable[[np.ndarray, np.ndarray, int, np.ndarray], None]] = {
    "q4_0": ggml_importance.encode_q4_0,
    "q4_1": ggml_importance.encode_q4_1,
    "q5_0": ggml_importance.encode_q5_0,
    "q5_1": ggml_importance.encode_q5_1,
    "q2_k": ggml_importance.encode_q2_k,
    "q3_k": ggml_importance.encode_q3_k,
    "q4_k": ggml_importance.encode_q4_k,
    "q5_k": ggml_importance.encode_q5_k,
    "q6_k": ggml_importance.encode_q6_k,
    "iq4_nl": ggml_iq4.encode_iq4_nl,
    "iq4_xs": ggml_iq4.encode_iq4_xs,
    "iq3_s": ggml_iq3.encode_iq3_s,
    "iq3_xxs": ggml_iq3.encode_iq3_xxs,
    "iq2_s": ggml_iq2.encode_iq2_s,
    "iq2_xs": ggml_iq2.encode_iq2_xs,
    "iq2_xxs": ggml_iq2.encode_iq2_xxs,
    "iq1_s": ggml_iq1.encode_iq1_s,
    "iq1_m": ggml_iq1.encode_iq1_m,
}

#: Types that ggml encodes with an importance matrix or not at all
#: (``ggml_quantize_requires_imatrix``).
NEEDS_IMPORTANCE = frozenset({"iq2_xs", "iq2_xxs", "iq1_s"})

#: To kernels of ``_WEIGHTED`` that have no other: there is no importance.
_NONE = np.empty(0, np.float32)
_NONE.flags.writeable = False


class Encoder(Protocol):
    def __call__(
        self, x: np.ndarray, out: np.ndarray, importance: np.ndarray | None = None
    ) -> None: ...


def _encoder(encoding: GgmlBlock) -> Encoder:
    plain, weighted = _PLAIN.get(encoding.name), _WEIGHTED.get(encoding.name)

    def encode(x: np.ndarray, out: np.ndarray, importance: np.ndarray | None = None) -> None:
        """Encode ``x``, float32 ``[rows, cols]``, into ``out``, uint8 ``[rows, row bytes]``.

        Both C-contiguous. ``importance``, float32 ``[cols]``: how much the errors of a column
        count; types without a use for it ignore it. Rows are independent and the GIL is released,
        so threads may share the rows out. Compiled on the first call. Infinities and NaN give
        meaningless bytes. Types of ``NEEDS_IMPORTANCE`` raise UnsupportedEncodingError without.
        """
        rows, cols = x.shape
        # A kernel checks nothing: it would write past the end.
        if cols % encoding.block or out.shape != (rows, encoding.nbytes((cols,))):
            raise UsageError(f"{encoding}: {x.shape} weights do not fill {out.shape} bytes")
        if x.dtype != np.float32 or out.dtype != np.uint8:
            raise UsageError(f"{encoding}: cannot encode {x.dtype} to {out.dtype}")
        if not (x.flags.c_contiguous and out.flags.c_contiguous):
            raise UsageError(f"{encoding}: arrays must be C-contiguous")
        if importance is not None and (
            importance.dtype != np.float32 or importance.shape != (cols,)
        ):
            raise UsageError(
                f"{encoding}: importance is {importance.dtype} {importance.shape}, "
                f"not float32 ({cols},)"
            )
        if importance is None and encoding.name in NEEDS_IMPORTANCE:
            raise UnsupportedEncodingError(
                f"{encoding} needs the importance of columns: calibrate, or give an importance "
                'matrix, or take quality "fast"'
            )
        weights = x.reshape(-1)
        weights.flags.writeable = False  # one compilation serves read-only maps and arrays alike
        if weighted is not None and (importance is not None or plain is None):
            columns = _NONE if importance is None else _repeated(importance)
            weighted(weights, columns, cols, out.reshape(-1))
        elif plain is not None:
            plain(weights, out.reshape(-1))

    return encode


def _repeated(importance: np.ndarray) -> np.ndarray:
    """``importance`` and ``SPARE`` more, from the start again."""
    repeated = np.resize(importance, importance.size + SPARE)
    repeated.flags.writeable = False
    return repeated


#: By encoding name; see :func:`_encoder`.
ENCODERS: dict[str, Encoder] = {name: _encoder(GGML[name]) for name in {**_PLAIN, **_WEIGHTED}}
