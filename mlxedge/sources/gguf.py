"""GGUF files: metadata and the list of tensors, versions 2 and 3, little-endian.

Layout: the GGUF specification (docs/gguf.md of ggml); what is refused follows gguf.cpp of
llama.cpp as vendored by llama-cpp-python 0.3.36. Nothing in a file is believed before it has been
compared with the file's size, so a lying header costs neither time nor memory.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mlxedge.encodings import BF16, F16, F32, GGML_BY_ID, Encoding, Plain
from mlxedge.errors import CorruptFileError, UnsupportedEncodingError
from mlxedge.gguf_values import VALUE_TYPES, GgufValue, Metadata
from mlxedge.sources.files import Opener, RandomAccessFile, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_TENSOR_NAME = 63
MAX_KEY = 65_535
#: Ceilings far above any real model, so that a hostile header stays within about a GiB.
MAX_HEADER = 1 << 28
MAX_STRINGS = 1 << 22
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18

#: ggml's type number → encoding, the integer types included so that they can be listed.
ENCODINGS: dict[int, Encoding] = {
    0: F32,
    1: F16,
    24: Plain("i8"),
    25: Plain("i16"),
    26: Plain("i32"),
    27: Plain("i64"),
    28: Plain("f64"),
    30: BF16,
    **GGML_BY_ID,
}
#: Numbers that ggml gave out (GGML_TYPE_COUNT), whether or not they are read here.
_TYPE_COUNT = 43
_KINDS = {number: (kind, code) for kind, (number, code) in VALUE_TYPES.items()}
_FIRST_READ = 1 << 20
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in the file: ``shape`` row-major (the reverse of ggml's ``ne``), ``offset`` from the
    start of the file, ``nbytes`` without padding. ``part`` counts the files of a model."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file's head says. ``data_offset`` is where tensor data begins. ``parts`` are the
    files of a model that lies in several, of which this is the first."""

    path: Path
    version: int
    metadata: Metadata
    tensors: list[GgufTensor]
    alignment: int
    data_offset: int
    parts: tuple[Path, ...] = ()


def read_gguf(path: str | Path, open_file: Opener = RandomAccessFile) -> GgufFile:
    """Read a GGUF file's metadata and tensor list.

    Raises CorruptFileError, with the byte offset, for a file that contradicts itself or its own
    size, and UnsupportedEncodingError for a tensor type that ggml knows and mlxedge does not.
    """
    file = open_file(Path(path))
    try:
        return _parse(_Head(file))
    finally:
        file.close()


class _Head:
    """The head of a file, read in growing pieces; ``at`` is the next byte to look at."""

    def __init__(self, file: RandomAccessFile) -> None:
        self.path = file.path
        self.size = file.size
        self.at = 0
        self.strings_left = MAX_STRINGS
        self._file = file
        self._buffer = b""

    def fail(self, problem: str, offset: int | None = None) -> NoReturn:
        raise CorruptFileError(self.path, problem, self.at if offset is None else offset)

    def need(self, count: int, what: str) -> bytes:
        """The buffer, after making sure that it holds the next ``count`` bytes."""
        end = self.at + count
        if end > len(self._buffer):
            if end > self.size:
                self.fail(f"the file ends inside {what}: {self.size - self.at} of {count} bytes")
            if end > MAX_HEADER:
                self.fail(f"{what}: the metadata is larger than {MAX_HEADER} bytes")
            have = len(self._buffer)
            want = min(self.size, MAX_HEADER, max(end, 2 * have, _FIRST_READ))
            self._buffer += self._file.read(want - have, have)
        return self._buffer

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.need(4, what), self.at)[0]
        self.at += 4
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.need(8, what), self.at)[0]
        self.at += 8
        return value

    def string(self, what: str, longest: int = MAX_HEADER) -> str:
        length = self.u64(f"the length of {what}")
        if length > longest:
            self.fail(f"{what} is {length} bytes long, at most {longest} are allowed", self.at - 8)
        raw = self.need(length, what)[self.at : self.at + length]
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8", self.at + error.start)
        self.at += length
        return text

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize(code)
        (value,) = struct.unpack_from(f"<{code}", self.need(size, what), self.at)
        self.at += size
        return value

    def numbers(self, code: str, count: int, what: str) -> np.ndarray:
        dtype = np.dtype(np.uint8 if code == "?" else f"<{code}")
        size = count * dtype.itemsize
        values = np.frombuffer(self.need(size, what), dtype, count, self.at)
        self.at += size
        return values != 0 if code == "?" else values.copy()

    def strings(self, count: int, what: str) -> list[str]:
        """``count`` strings in one tight loop: a vocabulary has hundreds of thousands."""
        if count > self.strings_left:
            self.fail(f"{what} claims {count} strings, more than the {self.strings_left} allowed")
        if 8 * count > self.size - self.at:
            self.fail(f"{what} claims {count} strings, too many for the rest of the file")
        self.strings_left -= count
        result: list[str] = []
        unpack, append = _U64.unpack_from, result.append
        while len(result) < count:
            # Take what is in the buffer, then let need() fetch more or complain.
            buffer, at = self._buffer, self.at
            have = len(buffer)
            try:
                for _ in range(count - len(result)):
                    begin = at + 8
                    end = begin + unpack(buffer, at)[0]
                    if end > have:
                        break
                    append(buffer[begin:end].decode())
                    at = end
            except struct.error:
                pass  # the buffer ends inside a length
            except UnicodeDecodeError as error:
                self.fail(f"{what}, string {len(result)}, is not UTF-8", begin + error.start)
            self.at = at
            if len(result) < count:
                item = f"{what}, string {len(result)}"
                length = unpack(self.need(8, item), at)[0]
                self.need(8 + length, item)
        return result


def _parse(head: _Head) -> GgufFile:
    if (magic := head.need(4, "the magic")[:4]) != MAGIC:
        head.fail(f"not a GGUF file: it starts with {magic!r}")
    head.at = 4
    version = head.u32("the version")
    if version & 0xFFFF == 0:
        head.fail("a big-endian GGUF file; mlxedge reads little-endian ones", 4)
    if version not in VERSIONS:
        head.fail(f"GGUF version {version}; mlxedge reads {' and '.join(map(str, VERSIONS))}", 4)
    n_tensors = head.u64("the number of tensors")
    n_keys = head.u64("the number of keys")
    if n_tensors > MAX_TENSORS:
        head.fail(f"claims {n_tensors} tensors, at most {MAX_TENSORS} are allowed", 8)
    if n_keys > MAX_KEYS:
        head.fail(f"claims {n_keys} keys, at most {MAX_KEYS} are allowed", 16)
    metadata: Metadata = {}
    alignment = DEFAULT_ALIGNMENT
    for _ in range(n_keys):
        start = head.at
        key = head.string("a key", MAX_KEY)
        if not key:
            head.fail("an empty key", start)
        if key in metadata:
            head.fail(f"the key {key!r} stands here twice", start)
        value_at = head.at
        metadata[key] = _value(head, f"the value of {shown(key)}")
        if key == "general.alignment":
            alignment = _alignment(head, metadata[key], value_at)
    infos = _tensor_infos(head, n_tensors)
    data_offset = -(-head.at // alignment) * alignment
    tensors = [_place(head, info, data_offset, alignment) for info in infos]
    _check_overlaps(head, tensors)
    return GgufFile(head.path, version, metadata, tensors, alignment, data_offset)


def _kind(head: _Head, what: str) -> tuple[str, str | None]:
    number = head.u32(f"the type of {what}")
    if number not in _KINDS:
        head.fail(f"{what} has the unknown type {number}", head.at - 4)
    return _KINDS[number]


def _value(head: _Head, what: str) -> GgufValue:
    kind, code = _kind(head, what)
    if code is not None:
        return GgufValue(kind, head.number(code, what))
    if kind == "str":
        return GgufValue(kind, head.string(what))
    item, code = _kind(head, f"the items of {what}")
    if item == "array":
        head.fail(f"{what} is an array of arrays, which no model uses", head.at - 4)
    count = head.u64(f"the length of {what}")
    if code is None:
        return GgufValue(kind, head.strings(count, what), item)
    return GgufValue(kind, head.numbers(code, count, what), item)


def _alignment(head: _Head, value: GgufValue, at: int) -> int:
    if value.kind != "u32":
        head.fail(f"general.alignment must be a u32, not {value.kind}", at)
    alignment: int = value.value
    if alignment == 0 or alignment & (alignment - 1):
        head.fail(f"general.alignment {alignment} is not a power of two", at)
    return alignment


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    offset: int
    at: int  # where the file says so


def _tensor_infos(head: _Head, count: int) -> list[_Info]:
    infos: dict[str, _Info] = {}
    for _ in range(count):
        start = head.at
        name = head.string("a tensor name", MAX_TENSOR_NAME)
        if not name:
            head.fail("an empty tensor name", start)
        if name in infos:
            head.fail(f"tensor {name!r} stands here twice", start)
        infos[name] = _tensor_info(head, name)
    return list(infos.values())


def _tensor_info(head: _Head, name: str) -> _Info:
    what = f"tensor {name!r}"
    n_dims = head.u32(f"the rank of {what}")
    if not 1 <= n_dims <= MAX_DIMS:
        head.fail(f"{what} has {n_dims} dimensions, not 1 to {MAX_DIMS}", head.at - 4)
    at = head.at
    ne = [head.u64(f"the shape of {what}") for _ in range(n_dims)]
    if 0 in ne or math.prod(ne) >= 1 << 63:
        head.fail(f"{what} has the impossible shape {ne}", at)
    type_at = head.at
    number = head.u32(f"the type of {what}")
    encoding = ENCODINGS.get(number)
    if encoding is None:
        if number >= _TYPE_COUNT:
            head.fail(f"{what} has the unknown ggml type {number}", type_at)
        raise UnsupportedEncodingError(
            f"{head.path}: {what} has ggml type {number}, which mlxedge does not read"
        )
    if ne[0] % encoding.block:
        head.fail(
            f"{what} has rows of {ne[0]} weights; {encoding} takes multiples of {encoding.block}",
            at,
        )
    offset = head.u64(f"the offset of {what}")
    return _Info(name, tuple(reversed(ne)), encoding, offset, head.at - 8)


def _place(head: _Head, info: _Info, data_offset: int, alignment: int) -> GgufTensor:
    if info.offset % alignment:
        head.fail(
            f"tensor {info.name!r} starts at {info.offset}, not a multiple of {alignment}", info.at
        )
    start, nbytes = data_offset + info.offset, info.encoding.nbytes(info.shape)
    if start + nbytes > head.size:
        head.fail(
            f"tensor {info.name!r} ends at byte {start + nbytes}, the file at {head.size}: "
            "truncated, or its header lies",
            info.at,
        )
    return GgufTensor(info.name, info.shape, info.encoding, start, nbytes)


def _check_overlaps(head: _Head, tensors: list[GgufTensor]) -> None:
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if tensor.offset < end:
            head.fail(f"tensor {tensor.name!r} overlaps {before!r}", tensor.offset)
        end, before = tensor.offset + tensor.nbytes, tensor.name
