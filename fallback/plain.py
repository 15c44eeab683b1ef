"""Unquantized floats: casts between f32, f16 and bf16, and the search for non-finite weights.

Every cast rounds to nearest, ties to even, through f32 (which holds f16 and bf16 exactly), and
passes infinities and NaN on. These are kernels and not ``astype`` because NumPy holds the GIL while
it casts bf16, converts f16 several times slower, and warns when f16 overflows.
"""

from __future__ import annotations

import numpy as np

from mlxedge.encodings import Plain
from mlxedge.errors import UsageError
from mlxedge.fallback.bits import (
    BF16,
    DTYPES,
    F16,
    F32,
    brain,
    flat_bits,
    half,
    load,
    to_brain,
    to_half,
)
from mlxedge.fallback.jit import kernel
from mlxedge.ops import Parts

#: Weights per step of the search: small enough to stay in the first-level cache.
_CHUNK = 8192

#: The exponent bits, all set in infinities and NaN, by kind.
_EXPONENT = {F32: 0x7F800000, F16: 0x7C00, BF16: 0x7F80}


def encode(weights: np.ndarray, encoding: Plain) -> Parts:
    return {"weight": cast(weights, encoding.dtype)}


def decode(parts: Parts, encoding: Plain) -> np.ndarray:
    return cast(parts["weight"], "f32")


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """``array`` (f32, f16 or bf16, any shape) as ``dtype`` ("f32", "f16" or "bf16"), in C order.

    Returns ``array`` itself if it is that already. f32 to f16 overflows to infinity as IEEE
    says; :func:`first_nonfinite` finds it.
    """
    if dtype not in ("f32", "f16", "bf16"):
        raise UsageError(f"cannot cast to {dtype}: choose f32, f16 or bf16")
    if array.dtype == DTYPES[dtype]:
        return np.asarray(array, order="C")
    source, kind = flat_bits(array)
    out = np.empty(array.shape, DTYPES[dtype])
    if dtype == "f32":
        load(source, kind, out.reshape(-1))
    elif dtype == "bf16":
        _to_brain(source, kind, out.reshape(-1).view(np.uint16))
    else:
        _to_half(source, kind, out.reshape(-1).view(np.uint16))
    return out


def first_nonfinite(array: np.ndarray) -> int | None:
    """Flat index (C order) of the first NaN or infinity in an f32, f16 or bf16 array, or None."""
    source, kind = flat_bits(array)
    bits = source.view(np.uint32) if kind == F32 else source
    index = int(_first_with(bits, bits.dtype.type(_EXPONENT[kind])))
    return None if index < 0 else index


@kernel
def _to_brain(source: np.ndarray, kind: int, out: np.ndarray) -> None:
    if kind == F32:
        for j in range(out.size):
            out[j] = to_brain(source[j])
    else:
        for j in range(out.size):
            out[j] = to_brain(half(source[j]))


@kernel
def _to_half(source: np.ndarray, kind: int, out: np.ndarray) -> None:
    if kind == F32:
        for j in range(out.size):
            out[j] = to_half(source[j])
    else:
        for j in range(out.size):
            out[j] = to_half(brain(source[j]))


@kernel
def _first_with(bits: np.ndarray, mask: int) -> int:
    """Index of the first element with every bit of ``mask`` set, or -1."""
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        found = False
        for j in range(chunk.size):
            found |= (chunk[j] & mask) == mask
        if found:
            for j in range(chunk.size):
                if (chunk[j] & mask) == mask:
                    return start + j
    return -1
