"""The seam between what mlxedge does and what computes it.

A backend is an object, not a global, so that two can be compared in one process. It deals in
whole operations over blocks; arrays at the seam are NumPy's (bf16 as ``ml_dtypes.bfloat16``).
:func:`load_ops` is the only place that names a backend.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from mlxedge.encodings import Encoding
from mlxedge.errors import BackendError, UsageError

if TYPE_CHECKING:
    import numpy as np

#: The stored arrays of an encoded tensor, by part name ("weight", "scales", "biases").
Parts = dict[str, "np.ndarray"]

BACKENDS = {"numpy": "mlxedge.fallback", "mlx": "mlxedge.accel"}

#: How an encoder chooses scales and codes. "reference": by the rule of the runtime that the format
#: belongs to, bit for bit. "fast": by a search for the least weighted error. "best": by that search
#: and then by error feedback, which lets later columns make up for the errors of earlier ones.
Quality = Literal["reference", "fast", "best"]
QUALITIES: tuple[Quality, ...] = get_args(Quality)


#: What becomes of weights that are quantized already: kept to the last bit; their codes kept, and
#: scales that the target cannot hold rounded once to what it can.
Fidelity = Literal["exact", "rounded once"]


@dataclass(frozen=True, eq=False)
class Feedback:
    """What error feedback knows of a layer's input; made by ``ReferenceOps.feedback``.

    ``order`` int32 ``[cols]``: the columns as they take their turn. In that order, f32
    ``[cols, cols]``: ``hessian``, the mean of x·xᵀ over inputs x, damped and scaled, and
    ``factor``, the upper triangular V with V·Vᵀ = ``hessian`` (its inverse is the Cholesky factor
    of the inverse). Read-only, shared by all matrices with this input.
    """

    order: np.ndarray
    hessian: np.ndarray
    factor: np.ndarray


class Ops(Protocol):
    """Encode and decode blocks. Both backends give the same bytes, which ``fallback`` defines."""

    name: str
    #: Whether several threads may call at once.
    parallel: bool

    def encode(
        self,
        weights: np.ndarray,
        encoding: Encoding,
        importance: np.ndarray | None = None,
        *,
        quality: Quality = "reference",
        feedback: Feedback | None = None,
    ) -> Parts:
        """Encode ``weights`` ``[rows, cols]`` (f32, f16 or bf16) row by row.

        ``importance``, f32 ``[cols]``, finite and not negative: how much errors in each column
        count; without it all count alike. Rules of "reference" that have no use for it ignore it.
        ``feedback`` is used by "best" alone, which without it is "fast"; so it is for encodings
        whose codes are not chosen weight by weight.

        Raises UnsupportedEncodingError if this backend has no such encoder: the fallback then may.
        ``cols`` must be a multiple of ``encoding.block``. Rows are independent: encoding a slice of
        rows gives the same slice.
        """

    def decode(self, parts: Parts, encoding: Encoding) -> np.ndarray:
        """Decode to f32 ``[rows, cols]``."""


class ReferenceOps(Ops, Protocol):
    """The fallback, which also does what needs no speed and must be exact."""

    def can_transcode(self, source: Encoding, target: Encoding) -> bool:
        """Whether codes of ``source`` can be kept in ``target``, if only of some blocks."""

    def fidelity(
        self, source: Encoding, target: Encoding, scales: Parts | None = None
    ) -> Fidelity | None:
        """How ``transcode`` keeps ordinary blocks, ``None`` if it cannot. Of affine groups their
        ``scales`` (the parts but for the codes) decide; without them it is the worst that may be.
        """

    def transcode(
        self, parts: Parts, source: Encoding, target: Encoding, *, rounded: bool = False
    ) -> Parts:
        """The same codes in ``target``; decoding gives equal f32 values or, if ``rounded`` allows
        it, those of scales that were rounded once."""

    def feedback(self, hessian: np.ndarray) -> Feedback:
        """From the mean of x·xᵀ over a layer's inputs x, f32 ``[cols, cols]``.

        Raises UsageError unless it is square, finite and has no negative diagonal.
        """

    def first_nonfinite(self, weights: np.ndarray) -> int | None:
        """The flat index of the first NaN or infinity in f32, f16 or bf16 ``weights``."""


def check_importance(importance: np.ndarray, cols: int) -> None:
    """Raise UsageError unless ``importance`` is f32 ``[cols]``, finite and not negative."""
    if str(importance.dtype) != "float32" or importance.shape != (cols,):
        raise UsageError(
            f"importance is {importance.dtype} {list(importance.shape)}: "
            f"encode takes f32, one for each of the {cols} columns"
        )
    if importance.size and not 0.0 <= importance.min() <= importance.max() < float("inf"):
        raise UsageError("importance must be finite and not negative")


def default_backend() -> str:
    """ "mlx" on Apple silicon where it is installed, else "numpy"."""
    on_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    if on_apple_silicon and importlib.util.find_spec("mlx") is not None:
        return "mlx"
    return "numpy"


def load_ops(name: str | None = None) -> Ops:
    """The backend called ``name``, or this machine's default."""
    name = name or default_backend()
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}: choose from {', '.join(BACKENDS)}")
    if name == "mlx" and importlib.util.find_spec("mlx") is None:
        raise BackendError(
            "backend mlx needs MLX: pip install 'mlxedge[mlx]', or use --backend numpy"
        )
    module = importlib.import_module(BACKENDS[name])
    ops: Ops = module.OPS
    return ops


def load_reference() -> ReferenceOps:
    """The fallback, whatever backend computes."""
    ops: ReferenceOps = importlib.import_module(BACKENDS["numpy"]).OPS
    return ops


def load_forward() -> Any:
    """What a forward pass off MLX is made of: the module ``fallback.forward`` (Tape, Matrix,
    Product, Runner, Cache, Team). It computes with encoded matrices as they are stored."""
    return importlib.import_module("mlxedge.fallback.forward")
