"""Importance matrices as llama.cpp keeps them: what llama-imatrix writes and llama-quantize reads.

Both formats of tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp (llama.cpp as vendored by
llama-cpp-python 0.3.36): GGUF, with the sums of squares ``NAME.in_sum2`` ``[experts, cols]`` and
the tokens ``NAME.counts`` ``[experts, 1]``, and the older .dat, with means of squares times a
number of chunks.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mlxedge import gguf_values as gv
from mlxedge.calibration.statistics import Calibration, Statistics
from mlxedge.encodings import F32, Encoding
from mlxedge.errors import CorruptFileError, UsageError
from mlxedge.models.spec import ModelSpec
from mlxedge.outputs.gguf_file import ALIGNMENT, header_bytes
from mlxedge.outputs.staging import os_errors
from mlxedge.sources.files import RandomAccessFile, shown
from mlxedge.sources.gguf import MAGIC, GgufFile, GgufTensor, read_gguf

DATASETS = "imatrix.datasets"
CHUNK_COUNT = "imatrix.chunk_count"
CHUNK_SIZE = "imatrix.chunk_size"
TEXT_SHA256 = "mlxedge.calibration.text_sha256"
_SUMS, _COUNTS = ".in_sum2", ".counts"
#: What llama-imatrix runs at once unless told otherwise; the older format does not say.
_LEGACY_CHUNK = 512
#: Beyond this a count is no whole number in the f64 that it goes through.
_MOST_TOKENS = 1 << 53

# A matrix under its GGUF name.
_Entries = dict[str, Statistics]


def read_imatrix(
    path: str | Path, spec: ModelSpec, config: dict[str, Any] | None = None
) -> Calibration:
    """Read an imatrix file of either format; ``config`` is the model's, for architectures whose
    columns stand in another order in GGUF.

    Matrices get their canonical names; those that ``spec`` does not know keep the names of the
    file. ``Statistics.sums / counts`` is what llama-quantize takes for the importance of a column.
    The older format counts chunks, here of 512 tokens.

    Raises UsageError for a model, and CorruptFileError, with the byte offset where there is one,
    for anything else.
    """
    path = Path(path)
    file = RandomAccessFile(path)
    try:
        if file.size >= 4 and file.read(4, 0) == MAGIC:
            head = read_gguf(path)
            if DATASETS not in head.metadata and "general.architecture" in head.metadata:
                raise UsageError(
                    f"{path} is a model, not an imatrix file: give what mlxedge calibrate or "
                    "llama-imatrix wrote, or a text"
                )
            entries = _gguf_entries(file, head)
            texts, count, size = _metadata(head)
            digest = head.metadata.get(TEXT_SHA256)
            sha256 = digest.value if digest is not None and digest.kind == "str" else None
        else:
            legacy = _Legacy(file)
            entries = _unstacked(legacy.entries())
            texts, count = legacy.tail()
            size, sha256 = _LEGACY_CHUNK, None
    finally:
        file.close()
    if not entries:
        raise CorruptFileError(path, "an imatrix file without importances")
    tensors: dict[str, Statistics] = {}
    for name, statistics in entries.items():
        for canonical in spec.inputs_of(name) or (name,):
            if canonical in tensors:
                raise CorruptFileError(path, f"{shown(name)} stands here under two names")
            tensors[canonical] = _moved(statistics, spec, canonical, config, back=True)
    return Calibration(tensors, texts, sha256, count * size, size)


def write_imatrix(
    path: str | Path,
    calibration: Calibration,
    spec: ModelSpec,
    legacy: bool = False,
    config: dict[str, Any] | None = None,
) -> None:
    """Write a calibration as llama-imatrix does, in the older .dat format if ``legacy``; ``config``
    is the model's, for architectures of which GGUF stacks what is one matrix here.

    The head of a tied model stands under the name of the embedding, which is where llama-quantize
    looks. Replaces ``path``. Raises OutputError or DiskFullError where that cannot be done, and
    UsageError for a calibration that holds nothing.
    """
    path = Path(path)
    if not calibration.tensors:
        raise UsageError(f"{path}: nothing was calibrated that an imatrix file could hold")
    entries: _Entries = {}
    for canonical, statistics in calibration.tensors.items():
        for name in spec.input_in_gguf(canonical) or (canonical,):
            moved = _moved(statistics, spec, canonical, config)
            count = spec.stacked_in_gguf(name, config) if config else 1
            entries[name] = _repeated(moved, count)
    made = _legacy_bytes(calibration, entries) if legacy else _gguf_bytes(calibration, entries)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(made)
        part.replace(path)


def _moved(
    statistics: Statistics,
    spec: ModelSpec,
    name: str,
    config: dict[str, Any] | None,
    back: bool = False,
) -> Statistics:
    """With the columns where GGUF has them, or ``back`` where they are in the canonical matrix."""
    columns = spec.columns_in_gguf(name, config, statistics.sums.shape[1]) if config else None
    if columns is None or len(columns) != statistics.sums.shape[1]:
        return statistics
    order = np.argsort(columns) if back else columns
    return Statistics(np.ascontiguousarray(statistics.sums[:, order]), statistics.counts)


def _repeated(statistics: Statistics, count: int) -> Statistics:
    """For each of ``count`` matrices that have the input of one."""
    if count == 1:
        return statistics
    return Statistics(
        np.repeat(statistics.sums, count, axis=0), np.repeat(statistics.counts, count)
    )


def unstacked(
    calibration: Calibration, spec: ModelSpec, config: dict[str, Any], path: str | Path
) -> Calibration:
    """With the sums over all matrices of a stack that is one in the canonical model.

    Raises UsageError where the file has another number of inputs.
    """
    found = dict(calibration.tensors)
    for name, one in calibration.tensors.items():
        made = spec.input_in_gguf(name)
        count = max((spec.stacked_in_gguf(own, config) for own in made), default=1)
        if count == 1:
            continue
        if one.sums.size % count:
            raise UsageError(
                f"{path} is of another model: {shown(name)} has {one.sums.size} inputs there, "
                f"which are not those of {count} heads"
            )
        # llama-imatrix counts the tokens of a stack once, not for each of its matrices.
        counts = one.counts.sum() * (count // one.experts)
        sums = one.sums.reshape(count, -1).sum(0, keepdims=True)
        found[name] = Statistics(sums, counts.reshape(1))
    return replace(calibration, tensors=found)


def check_fits(
    path: str | Path, calibration: Calibration, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise UsageError unless ``calibration``, read from ``path``, can be of the model whose
    matrices have ``shapes`` ``[..., cols]``, by canonical name."""
    known = [name for name in shapes if name in calibration.tensors]
    if not known:
        raise UsageError(
            f"{path} is of another model: it knows {shown(next(iter(calibration.tensors)))} and no "
            "matrix of this one"
        )
    for name in known:
        *stack, _, cols = shapes[name]
        wanted = (stack[-1] if stack else 1, cols)
        if calibration.tensors[name].sums.shape != wanted:
            raise UsageError(
                f"{path} is of another model: {shown(name)} has {list(wanted)} inputs, there "
                f"{list(calibration.tensors[name].sums.shape)}"
            )


def _gguf_entries(file: RandomAccessFile, head: GgufFile) -> _Entries:
    found: dict[str, dict[str, GgufTensor]] = {}
    for tensor in head.tensors:
        for suffix in (_SUMS, _COUNTS):
            if tensor.name.endswith(suffix):
                found.setdefault(tensor.name.removesuffix(suffix), {})[suffix] = tensor
    entries = {}
    for name, parts in sorted(found.items()):
        if len(parts) != 2:
            have, lacks = (_SUMS, _COUNTS) if _SUMS in parts else (_COUNTS, _SUMS)
            raise CorruptFileError(file.path, f"{shown(name)} has {have} and no {lacks}")
        sums, counts = (_floats(file, parts[suffix]) for suffix in (_SUMS, _COUNTS))
        if sums.size % counts.size:
            raise CorruptFileError(
                file.path,
                f"{shown(name)} has {sums.size} sums, which {counts.size} counts do not divide",
                parts[_SUMS].offset,
            )
        entries[name] = Statistics(
            _checked(file.path, name, sums.reshape(counts.size, -1), parts[_SUMS].offset),
            _whole(file.path, name, counts, parts[_COUNTS].offset),
        )
    return entries


def _floats(file: RandomAccessFile, tensor: GgufTensor) -> np.ndarray:
    if tensor.encoding != F32:
        raise CorruptFileError(
            file.path, f"{shown(tensor.name)} is {tensor.encoding} and should be f32", tensor.offset
        )
    return np.frombuffer(file.read(tensor.nbytes, tensor.offset), "<f4").astype(np.float32)


def _metadata(head: GgufFile) -> tuple[tuple[str, ...], int, int]:
    """The texts, the number of chunks, and the tokens in each; llama-quantize wants all three."""
    texts = head.metadata.get(DATASETS)
    if texts is None or (texts.kind, texts.item) != ("array", "str"):
        raise CorruptFileError(head.path, f"not an imatrix file: no list of texts in {DATASETS}")
    numbers = []
    for key in (CHUNK_COUNT, CHUNK_SIZE):
        value = head.metadata.get(key)
        if value is None or value.kind != "u32":
            raise CorruptFileError(head.path, f"not an imatrix file: no u32 {key}")
        numbers.append(int(value.value))
    return tuple(texts.value), numbers[0], numbers[1]


def _checked(path: Path, name: str, sums: np.ndarray, offset: int) -> np.ndarray:
    if not (np.isfinite(sums).all() and (sums >= 0).all()):
        raise CorruptFileError(
            path, f"{shown(name)} has sums of squares that are negative or not finite", offset
        )
    return sums


def _whole(path: Path, name: str, counts: np.ndarray, offset: int) -> np.ndarray:
    if not ((counts >= 0) & (counts < _MOST_TOKENS)).all():
        raise CorruptFileError(path, f"{shown(name)} has impossible counts of tokens", offset)
    return np.floor(counts.astype(np.float64) + 0.5).astype(np.int64)  # as lround


class _Legacy:
    """A .dat file; ``at`` is the next byte to look at."""

    def __init__(self, file: RandomAccessFile) -> None:
        self.file = file
        self.at = 0

    def fail(self, problem: str, offset: int | None = None) -> NoReturn:
        raise CorruptFileError(self.file.path, problem, self.at if offset is None else offset)

    def take(self, size: int, what: str) -> bytes:
        left = self.file.size - self.at
        if size > left:
            self.fail(f"not an imatrix file, or a truncated one: {what} takes {size} of {left}")
        data = self.file.read(size, self.at)
        self.at += size
        return data

    def i32(self, what: str, least: int, most: int = (1 << 31) - 1) -> int:
        value: int = struct.unpack("<i", self.take(4, what))[0]
        if not least <= value <= most:
            self.fail(f"not an imatrix file: {what} is {value}", self.at - 4)
        return value

    def text(self, what: str, least: int) -> str:
        raw = self.take(self.i32(f"the length of {what}", least), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8", self.at - len(raw) + error.start)

    def entries(self) -> _Entries:
        # Names, numbers and one value of each take 17 bytes at least.
        number = self.i32("the number of matrices", 1, max(1, self.file.size // 17))
        found: _Entries = {}
        for i in range(number):
            start = self.at
            name = self.text(f"the name of matrix {i + 1}", 1)
            if name in found or "\0" in name:
                self.fail(f"{shown(name)} stands here twice, or is no name", start)
            chunks = self.i32(f"the chunks of {shown(name)}", -(1 << 31))
            size = 4 * self.i32(f"the number of values of {shown(name)}", 1)
            values = np.frombuffer(self.take(size, shown(name)), "<f4").astype(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                sums = values[None] * np.float32(_LEGACY_CHUNK)
            sums = _checked(self.file.path, name, sums, self.at - size)
            found[name] = Statistics(sums, np.array([max(1, chunks) * _LEGACY_CHUNK], np.int64))
        return found

    def tail(self) -> tuple[tuple[str, ...], int]:
        """The text and the number of chunks, which files of old lack."""
        if self.at == self.file.size:
            return (), 0
        chunks = self.i32("the number of chunks", -1)
        text = self.text("the name of the text", 0) if self.at < self.file.size else ""
        return ((text,) if text else ()), max(0, chunks)


def _unstacked(entries: _Entries) -> _Entries:
    """Experts apart: the older format does not say how many a matrix has, but their router takes
    the same input as their first matrices."""
    return {name: _experts(name, found, entries) for name, found in entries.items()}


def _experts(name: str, found: Statistics, entries: _Entries) -> Statistics:
    match = re.fullmatch(r"(blk\.\d+\.)ffn_(?:up|gate|gate_up|down)_exps\.weight", name)
    if match is None:
        return found
    router = entries.get(f"{match[1]}ffn_gate_inp.weight")
    into = (entries.get(f"{match[1]}ffn_{part}_exps.weight") for part in ("up", "gate", "gate_up"))
    first = next((e for e in into if e is not None), None)
    if router is None or first is None or first.sums.size % router.sums.size:
        return found
    experts = first.sums.size // router.sums.size
    if found.sums.size % experts:
        return found
    return Statistics(found.sums.reshape(experts, -1), np.repeat(found.counts, experts))


def _utf8(text: str) -> bytes:
    """A text is named by its file, and names of files may be no Unicode."""
    return text.encode("utf-8", "replace")


def _chunks(calibration: Calibration) -> int:
    return calibration.tokens // calibration.context if calibration.context else 0


def _gguf_bytes(calibration: Calibration, entries: _Entries) -> bytes:
    metadata: gv.Metadata = {
        "general.type": gv.string("imatrix"),
        DATASETS: gv.array("str", [_utf8(text).decode() for text in calibration.texts]),
        CHUNK_COUNT: gv.u32(_chunks(calibration)),
        CHUNK_SIZE: gv.u32(calibration.context),
    }
    if calibration.text_sha256:
        metadata[TEXT_SHA256] = gv.string(calibration.text_sha256)
    infos: list[tuple[str, tuple[int, ...], Encoding, int]] = []
    body = bytearray()
    for name, values in _tensors(entries):
        # ggml counts no dimension of one but the first.
        shape = values.shape if len(values) > 1 else values.shape[1:]
        infos.append((name, shape, F32, len(body)))
        body += values.astype("<f4").tobytes()
        body += bytes(-len(body) % ALIGNMENT)
    return header_bytes(metadata, infos) + bytes(body)


def _tensors(entries: _Entries) -> Iterator[tuple[str, np.ndarray]]:
    for name, found in sorted(entries.items()):
        yield name + _SUMS, found.sums
        yield name + _COUNTS, found.counts[:, None]


def _legacy_bytes(calibration: Calibration, entries: _Entries) -> bytes:
    """Means times chunks; an expert without data counts as one in every column, and a matrix
    without any is left out."""
    chunk = calibration.context or _LEGACY_CHUNK
    kept = {name: found for name, found in sorted(entries.items()) if found.total}
    out = bytearray(struct.pack("<i", len(kept)))
    for name, found in kept.items():
        raw = name.encode()
        chunks = -(-int(found.counts.max()) // chunk)
        counts = found.counts[:, None].astype(np.float32)
        means = np.where(counts > 0, found.sums / np.maximum(counts, 1), np.float32(1))
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", chunks, means.size)
        out += (means.astype(np.float32) * np.float32(chunks)).astype("<f4").tobytes()
    text = _utf8(calibration.texts[-1] if calibration.texts else "")
    return bytes(out + struct.pack("<ii", _chunks(calibration), len(text)) + text)
