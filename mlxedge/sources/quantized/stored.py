"""The arrays of a quantized checkpoint: checked by their headers, read in part, taken once."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlxedge.encodings import F32
from mlxedge.errors import CorruptFileError
from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.files import check_rows, numpy_dtype, shown

if TYPE_CHECKING:
    from mlxedge.sources.folder import Weights
    from mlxedge.sources.safetensors import Entry, SafetensorsFile

FLOATS = ("f32", "f16", "bf16")
FP8 = ("f8_e4m3", "f8_e5m2", "f8_e4m3fnuz", "f8_e5m2fnuz")
#: E2M1 by code, the sign in bit 3 (OCP Microscaling Formats, version 1.0).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
#: A scale of one byte that is a power of two, by byte.
E8M0 = np.arange(256, dtype=np.uint8).view(numpy_dtype("f8_e8m0")).astype(np.float32)
#: Arrays that lie across the rows of a tensor are read in slabs of columns of about this many
#: bytes, and so many of these are kept: the rows of a tensor are asked for in order.
_SLAB_BYTES = 1 << 24
_SLABS = 4


class Stored:
    """The stored arrays of a folder, by name. What a scheme has asked for is taken: what
    :meth:`others` gives are the rest."""

    def __init__(self, folder: Path, weights: Weights) -> None:
        self.folder = folder
        self.names = list(weights.home)
        self._home = weights.home
        self._taken: set[str] = set()
        self._slabs: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def file(self, name: str) -> SafetensorsFile:
        return self._home[name]

    def path(self, name: str) -> Path:
        return self._home[name].path

    def entry(self, name: str) -> Entry:
        return self._home[name].entries[name]

    def others(self) -> Iterator[str]:
        return (name for name in self.names if name not in self._taken)

    def ending(self, *suffixes: str) -> Iterator[tuple[str, str]]:
        """(stem, suffix) of every name that ends so and has a stem."""
        for name in self.names:
            for suffix in suffixes:
                if name.endswith(suffix) and len(name) > len(suffix):
                    yield name.removesuffix(suffix), suffix

    def drop(self, *names: str) -> None:
        """Take what says nothing about weights: scales of activations and of the KV cache."""
        self._taken.update(names)

    def take(
        self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int | None, ...], of: str = ""
    ) -> Entry:
        """The entry of ``name``, which must have one of ``dtypes`` and, if any are given, one of
        ``shapes`` (``None`` is any size). ``of`` names what it belongs to."""
        if name not in self._home:
            raise CorruptFileError(
                self.path(of) if of in self else self.folder,
                f"{shown(of)} has no {shown(name.rpartition('.')[2])} ({shown(name)}): the "
                "checkpoint is not whole; download it again",
            )
        entry = self.entry(name)
        if entry.dtype not in dtypes:
            raise self.corrupt(name, f"is {entry.dtype}, and should be {' or '.join(dtypes)}")
        if shapes and not any(_matches(entry.shape, shape) for shape in shapes):
            wanted = " or ".join(
                f"[{', '.join('any' if n is None else str(n) for n in shape)}]" for shape in shapes
            )
            raise self.corrupt(name, f"is {list(entry.shape)}, and should be {wanted}")
        self._taken.add(name)
        return entry

    def corrupt(self, name: str, problem: str) -> CorruptFileError:
        return CorruptFileError(
            self.path(name), f"{shown(name)} {problem}", self.entry(name).offset
        )

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start:stop`` of ``name`` seen as ``[rows, cols]``, in its own dtype."""
        return self.file(name).read_rows(name, start, stop)

    def columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Columns ``start:stop``, for arrays that lie across the rows that they belong to."""
        entry = self.entry(name)
        cols = entry.shape[-1]
        width = min(cols, max(1, _SLAB_BYTES * cols // max(entry.nbytes, 1)))
        pieces = []
        for index in range(start // width, -(-stop // width)):
            first = index * width
            slab = self._slab(name, index, first, min(first + width, cols))
            pieces.append(slab[:, max(start - first, 0) : stop - first])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)

    def _slab(self, name: str, index: int, first: int, last: int) -> np.ndarray:
        with self._lock:
            slab = self._slabs.pop((name, index), None)
            if slab is None:
                slab = self.file(name).read_columns(name, first, last)
                while len(self._slabs) >= _SLABS:
                    self._slabs.popitem(last=False)
            self._slabs[name, index] = slab
            return slab

    def array(self, name: str) -> np.ndarray:
        """All of a small array, in its own shape."""
        shape = self.entry(name).shape
        return self.rows(name, 0, math.prod(shape[:-1])).reshape(shape)

    def scales(self, name: str, found: np.ndarray) -> np.ndarray:
        """``found``, a piece of ``name``, as f32, all finite."""
        values = as_f32(found)
        if not np.isfinite(values).all():
            raise self.corrupt(
                name, "holds a scale that is NaN or infinite: damaged; get a good copy"
            )
        return values


def _matches(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        want is None or have == want for have, want in zip(shape, wanted)
    )


def as_f32(values: np.ndarray) -> np.ndarray:
    """Floats of any size as f32; bytes (u8) are E8M0 exponents."""
    if values.dtype == np.float32:
        return values
    if values.dtype == np.uint8:
        return E8M0[values]
    if values.dtype.itemsize == 1:
        table = np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float32)
        return table[values.view(np.uint8)]
    return values.astype(np.float32)


def decoded(
    name: str, shape: tuple[int, ...], read: Callable[[int, int], np.ndarray]
) -> SourceTensor:
    """A tensor that is decoded to f32 when read; ``read(start, stop)`` gives its rows."""
    rows = math.prod(shape[:-1])

    def read_rows(start: int, stop: int) -> dict[str, np.ndarray]:
        check_rows(name, rows, start, stop)
        return {"weight": np.ascontiguousarray(read(start, stop), np.float32)}

    return SourceTensor(name, shape, F32, read_rows, decoded=True)
