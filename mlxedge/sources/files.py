"""Reading at an offset, from several threads, without mapping files into memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlxedge.errors import (
    AccessDeniedError,
    CorruptFileError,
    SourceError,
    SourceNotFoundError,
    UsageError,
)

if TYPE_CHECKING:
    import numpy as np

_HAS_PREADV = hasattr(os, "preadv")
#: Part dtypes of one byte, as ``ml_dtypes`` calls them.
_SMALL_FLOATS = {
    "f8_e4m3": "float8_e4m3fn",
    "f8_e5m2": "float8_e5m2",
    "f8_e8m0": "float8_e8m0fnu",
    "f8_e4m3fnuz": "float8_e4m3fnuz",
    "f8_e5m2fnuz": "float8_e5m2fnuz",
}


class RandomAccessFile:
    """A file open for reading at any offset; safe to share between threads.

    Pages of a memory map would count as the process's own memory, so it reads into buffers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except PermissionError as error:
            raise AccessDeniedError(f"{path}: no permission to read it") from error
        except OSError as error:
            raise SourceNotFoundError(f"{path}: {error.strerror or error}") from error
        self._lock = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; raises CorruptFileError if the file ends before."""
        done = 0
        while done < len(buffer):
            try:
                count = self._read_some(buffer[done:], offset + done)
            except OSError as error:
                raise SourceError(f"{self.path}: cannot read: {error.strerror or error}") from error
            if count == 0:
                raise CorruptFileError(
                    self.path, f"the file ends {len(buffer) - done} bytes early", offset + done
                )
            done += count

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        if _HAS_PREADV:
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(buffer) or 0

    def read(self, size: int, offset: int) -> bytes:
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_rows(self, offset: int, row_bytes: int, start: int, stop: int) -> np.ndarray:
        """Rows ``start:stop`` of an array at ``offset``: fresh u8 ``[stop - start, row_bytes]``."""
        import numpy as np

        out = np.empty((stop - start, row_bytes), np.uint8)
        self.read_into(out.reshape(-1).data, offset + start * row_bytes)
        return out

    def read_columns(
        self, offset: int, row_bytes: int, rows: int, first: int, last: int
    ) -> np.ndarray:
        """Bytes ``first:last`` of each row of an array at ``offset``: fresh u8
        ``[rows, last - first]``."""
        import numpy as np

        if last - first == row_bytes:
            return self.read_rows(offset, row_bytes, 0, rows)
        out = np.empty((rows, last - first), np.uint8)
        for row in range(rows):
            self.read_into(out[row].data, offset + row * row_bytes + first)
        return out

    def close(self) -> None:
        self._file.close()


#: How a reader opens a file. The files of a repository that is only looked at are elsewhere.
Opener = Callable[[Path], RandomAccessFile]


def shown(text: str) -> str:
    """Text from a file as it may stand in a message: one line, no control characters, not long."""
    short = text if len(text) <= 120 else f"{text[:119]}…"
    return short if short.isprintable() else repr(short)


def check_rows(name: str, rows: int, start: int, stop: int) -> None:
    """Raise UsageError unless ``start:stop`` lies within ``rows``."""
    if not 0 <= start <= stop <= rows:
        raise UsageError(f"tensor {shown(name)}: rows {start}:{stop} are outside its {rows} rows")


def numpy_dtype(dtype: str) -> np.dtype:
    """The little-endian NumPy dtype of a part dtype such as "bf16"."""
    import ml_dtypes
    import numpy as np

    if dtype == "bf16":
        return np.dtype(ml_dtypes.bfloat16)
    if dtype == "bool":
        return np.dtype(np.bool_)
    if dtype in _SMALL_FLOATS:
        return np.dtype(getattr(ml_dtypes, _SMALL_FLOATS[dtype]))
    return np.dtype(f"<{dtype[0]}{int(dtype[1:]) // 8}")
