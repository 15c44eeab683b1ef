"""Products with encoded matrices, straight from their blocks.

A row is decoded sixteen weights at a time into registers and multiplied there by float32
activations, so the only memory read is that of the blocks, and no accuracy is lost on the way: the
result differs from the product with the decoded matrix by the order of a float32 sum alone.

One kernel is compiled per encoding, when a matrix first needs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, types
from numba.extending import overload

from mlxedge.encodings import Affine, Encoding, GgmlBlock, MlxFloat, Plain
from mlxedge.fallback import linear_ggml, linear_mlx
from mlxedge.fallback.lanes import LANES, inline
from mlxedge.fallback.memory import get_i64, load_bf16, load_f16, load_f32, put_f32, store_f32
from mlxedge.fallback.tiles import fma, total, zeros
from mlxedge.ops import Ops, Parts, load_ops

#: Fields of a matrix as kernels see it: int64 each, in this order.
WEIGHT, SCALES, BIASES, COLS, WEIGHT_ROW, SCALES_ROW, KERNEL = (8 * i for i in range(7))
_FIELDS = 7

#: (matrix, first row, stop row, x, out, bytes to out's next row) → None, all int64.
ROWS_SIGNATURE = types.void(*[types.int64] * 6)


def source_stamp(*modules: str) -> str:
    """A hash of modules of this package.

    numba's cache on disk watches only the file of the function that it compiled, so functions that
    are compiled into others carry this stamp as a part of their key.
    """
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in modules:
        digest.update((folder / f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


STAMP = source_stamp("lanes", "memory", "tiles", "linear_ggml", "linear_mlx")


def compile_c(signature: Any, function: Callable[..., Any]) -> Any:
    """A C function that holds no GIL, cached on disk where a cache can be written."""
    try:
        return cfunc(signature, cache=True, error_model="numpy")(function)
    except RuntimeError:
        return cfunc(signature, error_model="numpy")(function)


@dataclass(frozen=True)
class _Layout:
    """How a kernel walks a row: ``block`` weights take ``step`` bytes of the weight part and
    ``scale_step`` of scales and biases, and are decoded ``unit`` at a time by ``function``."""

    function: Any
    unit: int
    block: int
    step: int
    scale_step: int = 0


_LOADS = {"f32": (load_f32, 4), "f16": (load_f16, 2), "bf16": (load_bf16, 2)}
_ITEM = {"f32": 4, "f16": 2, "bf16": 2}


def _plain(dtype: str, unit: int) -> Any:
    load, size = _LOADS[dtype]

    @inline
    def one(w: int, s: int, b: int, j: int) -> Any:
        return (load(w),)

    @inline
    def four(w: int, s: int, b: int, j: int) -> Any:
        step = LANES * size
        return load(w), load(w + step), load(w + 2 * step), load(w + 3 * step)

    return one if unit == LANES else four


@cache
def _layout(kind: str) -> _Layout:
    family, *words = kind.split()
    if family == "plain":
        dtype, unit = words[0], int(words[1])
        return _Layout(_plain(dtype, unit), unit, unit, unit * _ITEM[dtype])
    if family == "affine":
        bits, group, dtype = int(words[0]), int(words[1]), words[2]
        unit = min(group, 64)
        function = linear_mlx.affine(bits, dtype, unit)
        return _Layout(function, unit, group, group * bits // 8, _ITEM[dtype])
    if family == "mlx":
        function, unit = linear_mlx.UNITS[words[0]]
        return _Layout(function, unit, unit, unit * int(words[1]) // 8, 1)
    function, unit = linear_ggml.UNITS[words[0]]
    return _Layout(function, unit, int(words[1]), int(words[2]))


def _kind(encoding: Encoding, cols: int) -> str | None:
    """The name of the kernel for rows of ``cols`` weights, ``None`` if there is none."""
    if isinstance(encoding, Plain) and encoding.dtype in _LOADS:
        return f"plain {encoding.dtype} {64 if cols % 64 == 0 else LANES}"
    if isinstance(encoding, Affine):
        return f"affine {encoding.bits} {encoding.group} {encoding.scale_dtype}"
    if isinstance(encoding, MlxFloat):
        return f"mlx {encoding.mode} {encoding.bits}"
    if isinstance(encoding, GgmlBlock) and encoding.type_name in linear_ggml.UNITS:
        return f"ggml {encoding.type_name} {encoding.block} {encoding.block_bytes}"
    return None


def _unpack(kind: str, w: int, s: int, b: int, j: int) -> Any:
    """Unit ``j`` of a block, by the function of ``kind``."""
    raise NotImplementedError


@overload(_unpack, prefer_literal=True, strict=False)
def _unpack_compiled(kind: Any, w: Any, s: Any, b: Any, j: Any) -> Any:
    if not isinstance(kind, types.Literal):
        return None
    function = _layout(kind.literal_value).function
    return lambda kind, w, s, b, j: function(w, s, b, j)


@cache
def rows_kernel(kind: str) -> Any:
    """The compiled function of ``ROWS_SIGNATURE`` for ``kind``.

    With x it writes the products of rows ``first`` to ``stop`` with the vector x (f32) to
    ``out[row]``; without (0) it decodes the rows to f32, one below the other from ``out``.
    """
    layout = _layout(kind)
    block, step, scale_step = layout.block, layout.step, layout.scale_step
    units, vectors, unit_bytes = block // layout.unit, layout.unit // LANES, 4 * layout.unit
    stamp = STAMP

    def rows(matrix: int, first: int, stop: int, x: int, out: int, out_row: int) -> None:
        len(stamp)
        blocks = get_i64(matrix + COLS) // block
        for row in range(first, stop):
            w = get_i64(matrix + WEIGHT) + row * get_i64(matrix + WEIGHT_ROW)
            s = get_i64(matrix + SCALES) + row * get_i64(matrix + SCALES_ROW)
            b = get_i64(matrix + BIASES) + row * get_i64(matrix + SCALES_ROW)
            if x != 0:
                at = x
                s0, s1, s2, s3 = zeros(), zeros(), zeros(), zeros()
                for _ in range(blocks):
                    for j in range(units):
                        v = _unpack(kind, w, s, b, j)
                        s0 = fma(v[0], load_f32(at), s0)
                        if vectors > 1:
                            s1 = fma(v[1], load_f32(at + 64), s1)
                        if vectors > 2:
                            s2 = fma(v[2], load_f32(at + 128), s2)
                            s3 = fma(v[3], load_f32(at + 192), s3)
                        if vectors > 4:
                            s0 = fma(v[4], load_f32(at + 256), s0)
                            s1 = fma(v[5], load_f32(at + 320), s1)
                            s2 = fma(v[6], load_f32(at + 384), s2)
                            s3 = fma(v[7], load_f32(at + 448), s3)
                        at += unit_bytes
                    w += step
                    s += scale_step
                    b += scale_step
                put_f32(out + 4 * row, total((s0 + s1) + (s2 + s3)))
            else:
                at = out + (row - first) * out_row
                for _ in range(blocks):
                    for j in range(units):
                        v = _unpack(kind, w, s, b, j)
                        for i in range(vectors):
                            store_f32(at, v[i])
                            at += 64
                    w += step
                    s += scale_step
                    b += scale_step

    return compile_c(ROWS_SIGNATURE, rows)


class Matrix:
    """An encoded matrix ``[rows, cols]`` that kernels can multiply by.

    Holds the parts as given (a plain matrix whose columns are not a multiple of 16 is padded with
    zeros to ``stored_cols``). ``compiled`` is false for formats that have a decoder only: their
    products decode a tile of rows at a time.
    """

    def __init__(self, parts: Parts, encoding: Encoding, rows: int, cols: int) -> None:
        self.encoding, self.rows, self.cols = encoding, rows, cols
        self.stored_cols = -(-cols // LANES) * LANES
        self.parts = {
            name: np.ascontiguousarray(part.reshape(rows, -1)) for name, part in parts.items()
        }
        if self.stored_cols != cols:
            extra = self.stored_cols - cols
            self.parts["weight"] = np.pad(self.parts["weight"], ((0, 0), (0, extra)))
        kind = _kind(encoding, self.stored_cols)
        self._kernel = rows_kernel(kind) if kind else None
        self.fields = np.zeros(_FIELDS, np.int64)
        if self._kernel is not None:
            weight, scales = self.parts["weight"], self.parts.get("scales")
            biases = self.parts.get("biases", scales)
            self.fields[:] = (
                weight.ctypes.data,
                0 if scales is None else scales.ctypes.data,
                0 if biases is None else biases.ctypes.data,
                self.stored_cols,
                weight.strides[0],
                0 if scales is None else scales.strides[0],
                self._kernel.address,
            )

    @property
    def compiled(self) -> bool:
        return self._kernel is not None

    @property
    def address(self) -> int:
        """Of the fields, for kernels; the matrix must stay alive."""
        return int(self.fields.ctypes.data)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def decode(self, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``first`` to ``stop`` as f32 ``[stop - first, cols]``."""
        stop = self.rows if stop is None else stop
        if self._kernel is None:
            tile = {name: part[first:stop] for name, part in self.parts.items()}
            return _ops().decode(tile, self.encoding)
        out = np.empty((stop - first, self.stored_cols), np.float32)
        self._kernel.ctypes(self.address, first, stop, 0, out.ctypes.data, out.strides[0])
        return out[:, : self.cols]

    def product(self, x: np.ndarray) -> np.ndarray:
        """``x @ W.T``: f32 ``[n, cols]`` → f32 ``[n, rows]``, on the calling thread."""
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty((len(x), self.rows), np.float32)
        if self._kernel is None or len(x) > 1:
            for first in range(0, self.rows, _TILE):
                stop = min(first + _TILE, self.rows)
                out[:, first:stop] = x @ self.decode(first, stop).T
            return out
        padded = np.zeros(self.stored_cols, np.float32)
        for row, result in zip(x, out, strict=True):
            padded[: self.cols] = row
            self._kernel.ctypes(
                self.address, 0, self.rows, padded.ctypes.data, result.ctypes.data, 0
            )
        return out


#: Rows that a product without a kernel decodes at a time.
_TILE = 256


@cache
def _ops() -> Ops:
    return load_ops("numpy")
