"""The definition of every encoding: NumPy arrays, inner loops compiled by numba.

What this package writes is what mlxedge writes: other backends are held to its bytes. The module
docstrings say which algorithm of ggml or MLX each encoding follows, and to which bit.

Importing this package imports none of that; kernels are loaded and compiled when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlxedge.encodings import Affine, Encoding, GgmlBlock, MlxFloat, Plain
from mlxedge.errors import UnsupportedEncodingError, UsageError
from mlxedge.ops import check_importance

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.ops import Feedback, Fidelity, Parts, Quality

#: The modules with ``encode(weights, encoding)`` and ``decode(parts, encoding)``; that of ggml's
#: blocks takes importance too.
_MODULES: dict[type[Encoding], str] = {
    Plain: "plain",
    GgmlBlock: "ggml",
    Affine: "mlx_affine",
    MlxFloat: "mlx_float",
}


class NumpyOps:
    """Implements ``mlxedge.ops.ReferenceOps``. Stateless; threads may share it (no GIL is held)."""

    name = "numpy"
    parallel = True

    def encode(
        self,
        weights: np.ndarray,
        encoding: Encoding,
        importance: np.ndarray | None = None,
        *,
        quality: Quality = "reference",
        feedback: Feedback | None = None,
    ) -> Parts:
        """Encode ``weights`` ``[rows, cols]`` (f32, f16 or bf16, any strides) row by row.

        ``importance``: f32 ``[cols]``; see ``mlxedge.ops.Ops``, also for the others.

        Raises UnsupportedEncodingError if ``cols`` is not a multiple of ``encoding.block`` or the
        encoding can only be read, UsageError for other dtypes, ranks and importance.
        """
        module = _module(encoding)
        if weights.ndim != 2:
            raise UsageError(f"weights have shape {weights.shape}: encode takes [rows, cols]")
        if str(weights.dtype) not in ("float32", "float16", "bfloat16"):
            raise UsageError(f"weights are {weights.dtype}: encode takes f32, f16 or bf16")
        if not encoding.fits(weights.shape):
            raise UnsupportedEncodingError(
                f"rows of {weights.shape[1]} weights cannot be {encoding}: "
                f"they must be a multiple of {encoding.block}"
            )
        if importance is not None:
            check_importance(importance, weights.shape[1])
        import numpy as np

        weights = np.ascontiguousarray(weights)
        made: Parts
        if quality != "reference":
            use = feedback if quality == "best" else None
            made = _load("search").encode(weights, encoding, importance, use)
            return made
        if isinstance(encoding, GgmlBlock):
            made = module.encode(weights, encoding, importance)
        else:
            made = module.encode(weights, encoding)
        return made

    def decode(self, parts: Parts, encoding: Encoding) -> np.ndarray:
        """Decode to f32 ``[rows, cols]``; other leading dimensions are kept.

        Raises UsageError if the parts are not those of ``encoding``.
        """
        module = _module(encoding)
        _check_parts(parts, encoding)
        weights: np.ndarray = module.decode(parts, encoding)
        return weights

    def can_transcode(self, source: Encoding, target: Encoding) -> bool:
        """Whether ``transcode`` can keep codes of ``source``, if only of some blocks."""
        answer: bool = _load("transcode").can_transcode(source, target)
        return answer

    def fidelity(
        self, source: Encoding, target: Encoding, scales: Parts | None = None
    ) -> Fidelity | None:
        """How ``transcode`` will keep ordinary blocks, or ``None``; see ``mlxedge.ops``."""
        found: Fidelity | None = _load("transcode").fidelity(source, target, scales)
        return found

    def transcode(
        self, parts: Parts, source: Encoding, target: Encoding, *, rounded: bool = False
    ) -> Parts:
        """The same codes in ``target``: decoding gives equal f32 numbers or, if ``rounded`` allows
        it, those of scales that were rounded once.

        Raises UnsupportedEncodingError if ``target`` cannot hold them so: an unknown pair, scales
        too large for f16, a bias where the target has none.
        """
        _check_parts(parts, source)
        made: tuple[Parts, Fidelity] | None = _load("transcode").transcode(parts, source, target)
        if made is None or not (rounded or made[1] == "exact"):
            raise UnsupportedEncodingError(
                f"{source} blocks cannot be kept {'' if rounded else 'exactly '}in {target}: "
                "take f32 scales, or decode and encode again"
            )
        return made[0]

    def feedback(self, hessian: np.ndarray) -> Feedback:
        """What "best" needs, from the mean of x·xᵀ over a layer's inputs, f32 ``[cols, cols]``."""
        made: Feedback = _load("feedback").prepare(hessian)
        return made

    def first_nonfinite(self, weights: np.ndarray) -> int | None:
        """The flat index of the first NaN or infinity in f32, f16 or bf16 ``weights``."""
        index: int | None = _load("plain").first_nonfinite(weights)
        return index


def _load(name: str) -> Any:
    return importlib.import_module(f"mlxedge.fallback.{name}")


def _module(encoding: Encoding) -> Any:
    name = _MODULES.get(type(encoding))
    if name is None:
        raise UnsupportedEncodingError(f"{encoding} is not known to this backend")
    return _load(name)


def _check_parts(parts: Parts, encoding: Encoding) -> None:
    """Names, dtypes and shapes must fit each other; kernels do not look."""
    dtypes = _load("bits").DTYPES
    weight = parts.get("weight")
    if weight is None or weight.ndim == 0:
        raise UsageError(f"{encoding}: the part 'weight' is missing")
    per_block = encoding.parts((encoding.block,))["weight"].shape[-1]
    blocks, rest = divmod(weight.shape[-1], per_block)
    expected = encoding.parts((*weight.shape[:-1], blocks * encoding.block))
    for name, part in expected.items():
        given = parts.get(name)
        if given is None or given.shape != part.shape or given.dtype != dtypes[part.dtype] or rest:
            found = "missing" if given is None else f"{given.dtype} {given.shape}"
            raise UsageError(
                f"{encoding}: the part {name!r} is {found}, not {part.dtype} {part.shape}"
            )


OPS = NumpyOps()
