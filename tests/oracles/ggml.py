"""ggml's own block encoders and decoders, through ctypes on the library in the ``xllamacpp`` wheel.

The x86-64 wheels are compiled for plain x86-64, which has no fused multiply-add, so they never
contract a multiply and an add: their bytes equal those of ggml-quants.c (llama.cpp as vendored by
llama-cpp-python 0.3.36) compiled with ``-ffp-contract=off``, and those of the ``libgguf`` wheel.
On other machines a compiler may contract and a few bytes in a thousand differ: there
:data:`EXACT` is false and only the committed golden bytes count.
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.util
import platform
from pathlib import Path

import numpy as np

from mlxedge.encodings import GGML

#: Whether :func:`quantize` gives the uncontracted bytes here.
EXACT = platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def library() -> c.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise OSError("xllamacpp is not installed: pip install 'mlxedge[test]'")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))
    if not found:
        raise OSError(f"no xllamacpp*.so in {spec.submodule_search_locations[0]}")
    lib = c.CDLL(str(found[0]))
    lib.ggml_quantize_chunk.restype = c.c_size_t
    lib.ggml_quantize_chunk.argtypes = (
        c.c_int,
        c.c_void_p,
        c.c_void_p,
        c.c_int64,
        c.c_int64,
        c.c_int64,
        c.c_void_p,
    )
    return lib


def quantize(
    name: str,
    x: np.ndarray,
    out: np.ndarray | None = None,
    importance: np.ndarray | None = None,
) -> np.ndarray:
    """``ggml_quantize_chunk`` of float32 ``[rows, cols]``: uint8 ``[rows, row bytes]``.

    ``out`` may be given to time the encoder alone. ``importance``: an importance matrix, float32
    ``[cols]``, which some types require.
    """
    encoding = GGML[name]
    x = np.ascontiguousarray(x, np.float32)
    rows, cols = x.shape
    shape = (rows, encoding.nbytes((cols,)))
    if out is None:
        out = np.full(shape, 0x5A, np.uint8)
    if out.shape != shape or not out.flags.c_contiguous or out.dtype != np.uint8:
        raise ValueError(f"{name}: out must be contiguous uint8 {shape}")
    weights = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (cols,):
            raise ValueError(f"{name}: importance must be [{cols}]")
        weights = importance.ctypes.data
    written = library().ggml_quantize_chunk(
        encoding.type_id, x.ctypes.data, out.ctypes.data, 0, rows, cols, weights
    )
    if written != out.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {name}, not {out.nbytes}")
    return out


def dequantize(name: str, data: np.ndarray, n: int) -> np.ndarray:
    """``dequantize_row_*`` of the bytes of ``n`` weights, as float32 ``[n]``."""
    encoding = GGML[name]
    data = np.ascontiguousarray(data, np.uint8)
    if data.nbytes != encoding.nbytes((n,)):
        raise ValueError(f"{name}: {data.nbytes} bytes do not hold {n} weights")
    function = getattr(library(), f"dequantize_row_{name.replace('_k', '_K')}")
    function.restype = None
    function.argtypes = (c.c_void_p, c.c_void_p, c.c_int64)
    out = np.empty(n, np.float32)
    function(data.ctypes.data, out.ctypes.data, n)
    return out
