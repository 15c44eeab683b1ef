"""The safetensors format, read row by row.

Layout (the format's specification in the safetensors repository): u64 header length, a JSON header
that names every tensor's dtype, shape and byte range, then the bytes. Everything in the header is
checked before a tensor is handed out.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.encodings import PLAIN, Plain
from mlxedge.encodings.base import ITEM_SIZE
from mlxedge.errors import CorruptFileError, UnsupportedEncodingError
from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.files import Opener, RandomAccessFile, check_rows, numpy_dtype, shown

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.ops import Parts

MAX_HEADER = 100_000_000

#: The format's dtypes as part dtypes. Those without a NumPy dtype can be listed, but not read.
DTYPES = {
    "BOOL": "bool",
    "U8": "u8",
    "I8": "i8",
    "U16": "u16",
    "I16": "i16",
    "U32": "u32",
    "I32": "i32",
    "U64": "u64",
    "I64": "i64",
    "F16": "f16",
    "BF16": "bf16",
    "F32": "f32",
    "F64": "f64",
    "C64": "c64",
    "F8_E4M3": "f8_e4m3",
    "F8_E5M2": "f8_e5m2",
    "F8_E8M0": "f8_e8m0",
    "F8_E4M3FNUZ": "f8_e4m3fnuz",
    "F8_E5M2FNUZ": "f8_e5m2fnuz",
}
_LISTED_ONLY = {"c64"}


@dataclass(frozen=True)
class Entry:
    """A tensor in the file. ``dtype`` is a part dtype ("bf16"), ``offset`` counts from the start
    of the file, ``nbytes`` is its size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open safetensors file.

    ``entries`` holds its tensors by name, in file order; ``metadata`` the header's
    ``__metadata__``. Raises CorruptFileError if the header contradicts itself or the file.
    """

    def __init__(self, path: Path, open_file: Opener = RandomAccessFile) -> None:
        self.path = path
        self._file = open_file(path)
        try:
            self.metadata, self.entries = _parse_header(self._file)
        except BaseException:
            self._file.close()
            raise

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start:stop`` of tensor ``name`` seen as ``[rows, cols]``, in its own dtype."""
        entry = self.entries[name]
        if entry.dtype in _LISTED_ONLY:
            raise UnsupportedEncodingError(
                f"{self.path}: tensor {shown(name)} is {entry.dtype}, which mlxedge does not read"
            )
        rows = math.prod(entry.shape[:-1])
        check_rows(name, rows, start, stop)
        raw = self._file.read_rows(entry.offset, entry.nbytes // max(rows, 1), start, stop)
        return raw.view(numpy_dtype(entry.dtype))

    def read_columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Columns ``start:stop`` of tensor ``name`` seen as ``[rows, cols]``, in its own dtype."""
        entry = self.entries[name]
        item = ITEM_SIZE[entry.dtype]
        rows, cols = math.prod(entry.shape[:-1]), entry.shape[-1]
        raw = self._file.read_columns(entry.offset, cols * item, rows, start * item, stop * item)
        return raw.view(numpy_dtype(entry.dtype))

    def read_elements(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements ``start:stop`` of tensor ``name`` in C order, in its own dtype."""
        raw = self.read_bytes(
            name, *(n * ITEM_SIZE[self.entries[name].dtype] for n in (start, stop))
        )
        return raw.view(numpy_dtype(self.entries[name].dtype))

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes ``start:stop`` of tensor ``name``: u8 ``[stop - start]``."""
        return self._file.read_rows(self.entries[name].offset, 1, start, stop)[:, 0]

    def source_tensor(self, name: str) -> SourceTensor:
        """Tensor ``name`` as weights.

        Any dtype can be listed; reading one that is not f32, f16 or bf16 raises
        UnsupportedEncodingError.
        """
        entry = self.entries[name]

        def read_rows(start: int, stop: int) -> Parts:
            if entry.dtype not in PLAIN:
                raise UnsupportedEncodingError(
                    f"{self.path}: tensor {shown(name)} is {entry.dtype}; weights must be "
                    f"{', '.join(PLAIN)}"
                )
            return {"weight": self.read_rows(name, start, stop)}

        return SourceTensor(name, entry.shape, Plain(entry.dtype), read_rows)

    def close(self) -> None:
        self._file.close()


def _parse_header(file: RandomAccessFile) -> tuple[dict[str, str], dict[str, Entry]]:
    path = file.path
    if file.size < 8:
        raise CorruptFileError(path, f"a safetensors file cannot be {file.size} bytes long", 0)
    length = int.from_bytes(file.read(8, 0), "little")
    if length > min(MAX_HEADER, file.size - 8):
        raise CorruptFileError(
            path,
            f"its header claims {length} bytes, of a {file.size}-byte file "
            f"(at most {MAX_HEADER} are allowed)",
            0,
        )
    header = _load_json(path, file.read(length, 8))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptFileError(path, "__metadata__ is not a map of strings", 8)
    data = 8 + length
    entries = [_entry(path, name, value, data) for name, value in header.items()]
    entries.sort(key=lambda e: (e.offset, e.nbytes))
    end = data
    for entry in entries:
        if entry.offset != end:
            problem = "overlaps the one before" if entry.offset < end else "leaves a hole before it"
            raise CorruptFileError(path, f"tensor {shown(entry.name)} {problem}", entry.offset)
        end += entry.nbytes
    if end != file.size:
        state = "truncated" if end > file.size else "longer than its tensors"
        raise CorruptFileError(
            path, f"the file is {state}: {file.size} bytes, its header describes {end}", file.size
        )
    return metadata, {e.name: e for e in entries}


def _load_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise CorruptFileError(path, f"its header names {shown(name)!r} twice", 8)
            result[name] = value
        return result

    def no_constant(name: str) -> Any:
        raise CorruptFileError(path, f"its header holds {name}", 8)

    try:
        header = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except CorruptFileError:
        raise
    except UnicodeDecodeError as error:
        raise CorruptFileError(path, "its header is not UTF-8", 8 + error.start) from error
    except json.JSONDecodeError as error:
        at = 8 + len(error.doc[: error.pos].encode())
        raise CorruptFileError(path, f"its header is not JSON: {error.msg}", at) from error
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(path, f"its header is not sane JSON: {error}", 8) from error
    if not isinstance(header, dict):
        raise CorruptFileError(path, "its header is not a JSON object", 8)
    return header


def _entry(path: Path, name: str, value: Any, data: int) -> Entry:
    def bad(problem: str) -> CorruptFileError:
        return CorruptFileError(path, f"tensor {shown(name)}: {problem}", 8)

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad("its entry must hold dtype, shape and data_offsets")
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        raise bad(f"unknown dtype {str(value['dtype'])[:40]!r}")
    dtype = DTYPES[value["dtype"]]
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_counts(shape):
        raise bad(f"shape {str(shape)[:80]} is not a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"data_offsets {str(offsets)[:80]} are not a byte range")
    begin, end = offsets
    nbytes = math.prod(shape) * ITEM_SIZE[dtype]
    if end - begin != nbytes:
        raise bad(f"{dtype} {shape} takes {nbytes} bytes, its range holds {end - begin}")
    return Entry(name, dtype, tuple(shape), data + begin, nbytes)


def _are_counts(values: Any) -> bool:
    """A short list of ints in 0 … 2⁶³ - 1 (``True`` is not an int here)."""
    return (
        isinstance(values, list)
        and len(values) <= 32
        and all(type(v) is int and 0 <= v < 1 << 63 for v in values)
    )
