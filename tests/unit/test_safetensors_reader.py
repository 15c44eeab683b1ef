"""The safetensors reader: real files read right, lying ones refused with an offset."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from mlxedge.encodings import BF16, F16, F32, Plain
from mlxedge.errors import (
    AccessDeniedError,
    CorruptFileError,
    MlxedgeError,
    SourceNotFoundError,
    UnsupportedEncodingError,
    UsageError,
)
from mlxedge.sources import files
from mlxedge.sources.safetensors import SafetensorsFile

ARRAYS = {
    "f32": np.arange(12, dtype=np.float32).reshape(3, 4),
    "f16": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
    "bf16": np.arange(6).reshape(3, 2).astype(ml_dtypes.bfloat16),
    "vector": np.arange(5, dtype=np.float32),
    "scalar": np.array(3.5, dtype=np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "codes": np.arange(8, dtype=np.uint32).reshape(2, 4),
    "ids": np.arange(3, dtype=np.int64),
    "mask": np.array([True, False, True]),
}


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture(params=["preadv", "seek"], ids=["preadv", "seek-and-read"])
def read_method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading at an offset; the second is what Windows has."""
    if request.param == "seek":
        monkeypatch.setattr(files, "_HAS_PREADV", False)


@pytest.mark.usefixtures("read_method")
def test_reads_what_the_safetensors_package_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"}
    assert set(file.entries) == set(ARRAYS)
    for name, array in ARRAYS.items():
        rows = array.reshape(-1, array.shape[-1] if array.shape else 1)
        rows = rows.reshape(1, -1) if array.ndim == 1 else rows
        assert file.entries[name].shape == array.shape
        for start in range(len(rows) + 1):
            for stop in range(start, len(rows) + 1):
                got = file.read_rows(name, start, stop)
                assert got.dtype == array.dtype
                assert got.tobytes() == rows[start:stop].tobytes()
    file.close()


@pytest.mark.usefixtures("read_method")
def test_threads_share_a_file(tmp_path: Path) -> None:
    array = np.arange(64 * 1024, dtype=np.uint32).reshape(64, 1024)
    save_file({"w": array}, tmp_path / "w.safetensors")
    file = SafetensorsFile(tmp_path / "w.safetensors")
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda i: file.read_rows("w", i % 64, i % 64 + 1), range(2000)))
    assert all(np.array_equal(row[0], array[i % 64]) for i, row in enumerate(rows))


def test_weights_are_fresh_and_writable(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path)
    file = SafetensorsFile(path)
    tensor = file.source_tensor("f16")
    assert (tensor.shape, tensor.encoding, tensor.rows, tensor.cols) == ((2, 3, 4), F16, 6, 4)
    parts = tensor.read_rows(1, 3)
    parts["weight"] += 1
    assert np.array_equal(tensor.read_rows(1, 3)["weight"] + 1, parts["weight"])
    assert file.source_tensor("f32").encoding == F32
    assert file.source_tensor("bf16").encoding == BF16
    assert file.source_tensor("vector").read()["weight"].shape == (1, 5)


def test_other_dtypes_are_listed_and_not_taken_for_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        raw({"q": entry("F8_E4M3", [2, 2], 0, 4), "i": entry("I64", [1], 4, 12)}, bytes(12))
    )
    file = SafetensorsFile(path)
    assert file.source_tensor("q").encoding == Plain("f8_e4m3")
    assert file.source_tensor("q").nbytes == 4
    for name in ("q", "i"):
        with pytest.raises(UnsupportedEncodingError, match=f"tensor {name} is"):
            file.source_tensor(name).read()
    assert file.read_rows("i", 0, 1).dtype == np.int64
    assert file.read_rows("q", 0, 1).dtype == ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, 4)])
def test_rows_outside_the_tensor(tmp_path: Path, start: int, stop: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path)
    with pytest.raises(UsageError, match="f32"):
        SafetensorsFile(path).read_rows("f32", start, stop)


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.ones((4, 4), np.float32)}, path)
    file = SafetensorsFile(path)
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size - 20)
    assert file.read_rows("w", 0, 2).shape == (2, 4)
    with pytest.raises(CorruptFileError, match="early") as caught:
        file.read_rows("w", 2, 4)
    assert caught.value.offset == size - 20


BAD: dict[str, tuple[bytes, str, int | None]] = {
    "empty": (b"", "0 bytes", 0),
    "short": (b"1234567", "7 bytes", 0),
    "no-header": (struct.pack("<Q", 10), "claims 10 bytes", 0),
    "huge-header": (struct.pack("<Q", 1 << 60) + b"{}", "claims", 0),
    "not-json": (raw(b'{"a": }'), "not JSON", 14),
    "not-utf8": (raw(b'{"\xff": 1}'), "not UTF-8", 10),
    "not-object": (raw([1]), "not a JSON object", 8),
    "deep": (raw(b"[" * 100_000), "not sane JSON", 8),
    "long-number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "not sane JSON", 8),
    "nan": (raw(b'{"a": NaN}'), "NaN", 8),
    "duplicate": (
        raw(b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": 1}'),
        "'a' twice",
        8,
    ),
    "duplicate-key": (raw(b'{"a": {"dtype":"U8","dtype":"I8"}}'), "'dtype' twice", 8),
    "metadata": (raw({"__metadata__": {"format": 1}}), "map of strings", 8),
    "metadata-list": (raw({"__metadata__": ["pt"]}), "map of strings", 8),
    "entry": (raw({"w": [1]}), "tensor w", 8),
    "missing-key": (raw({"w": {"dtype": "U8", "shape": [0]}}), "tensor w", 8),
    "extra-key": (raw({"w": entry("U8", [0], 0, 0) | {"x": 1}}), "tensor w", 8),
    "dtype": (raw({"w": entry("Q9", [1], 0, 1)}, b"x"), "unknown dtype 'Q9'", 8),
    "dtype-list": (raw({"w": entry(["U8"], [1], 0, 1)}, b"x"), "unknown dtype", 8),
    "negative": (raw({"w": entry("U8", [-1, -1], 0, 1)}, b"x"), "not a list of sizes", 8),
    "fraction": (raw({"w": entry("U8", [1.0], 0, 1)}, b"x"), "not a list of sizes", 8),
    "true": (raw({"w": entry("U8", [True], 0, 1)}, b"x"), "not a list of sizes", 8),
    "overflow": (raw({"w": entry("U8", [1 << 62, 1 << 62], 0, 1)}, b"x"), "takes", 8),
    "too-big": (raw({"w": entry("U8", [1 << 64], 0, 1)}, b"x"), "not a list of sizes", 8),
    "many-dims": (raw({"w": entry("U8", [1] * 40, 0, 1)}, b"x"), "not a list of sizes", 8),
    "name-lines": (raw({"a\nb\x1b[2J": entry("F32", [2], 0, 4)}, b"xxxx"), r"'a\nb\x1b[2J'", 8),
    "size": (raw({"w": entry("F32", [2], 0, 4)}, b"xxxx"), "takes 8 bytes", 8),
    "backwards": (raw({"w": entry("U8", [1], 2, 1)}, b"xx"), "not a byte range", 8),
    "three": (raw({"w": entry("U8", [1], 0, 1) | {"data_offsets": [0, 1, 2]}}, b"x"), "range", 8),
    "overlap": (
        raw({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xxx"),
        "b over",
        0,
    ),
    "hole": (raw({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"xxx"), "a hole", 0),
    "hole-first": (raw({"a": entry("U8", [1], 1, 2)}, b"xx"), "a hole", 0),
    "truncated": (raw({"a": entry("U8", [4], 0, 4)}, b"xxx"), "truncated", None),
    "trailing": (raw({"a": entry("U8", [1], 0, 1)}, b"xx"), "longer", None),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_an_offset(tmp_path: Path, case: str) -> None:
    content, problem, offset = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert problem in message
    assert message.startswith(str(path))
    assert "\n" not in message
    assert caught.value.offset is not None
    if offset:
        assert caught.value.offset == offset


def test_a_lying_header_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw(b"{}", length=90_000_000))
    tracemalloc.start()
    with pytest.raises(CorruptFileError):
        SafetensorsFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_absent_and_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceNotFoundError, match=r"none\.safetensors"):
        SafetensorsFile(tmp_path / "none.safetensors")

    def denied(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(AccessDeniedError, match="permission"):
        SafetensorsFile(tmp_path / "secret.safetensors")


VALID = save({k: v for k, v in ARRAYS.items() if k != "mask"}, metadata={"format": "pt"})
HEADER = 8 + int.from_bytes(VALID[:8], "little")


def _flip(data: bytearray, at: int, value: int) -> bytes:
    data[at % len(data)] = value
    return bytes(data)


def _in_header(data: bytearray, at: int, value: int) -> bytes:
    return _flip(data, at % HEADER, value)


def _cut(data: bytearray, at: int, value: int) -> bytes:
    return bytes(data[: at % len(data)])


def _insert(data: bytearray, at: int, value: int) -> bytes:
    at %= HEADER
    return bytes(data[:at] + bytes([value]) + data[at:])


def _length(data: bytearray, at: int, value: int) -> bytes:
    return struct.pack("<Q", at * (value + 1)) + bytes(data[8:])


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    how=st.lists(
        st.sampled_from([_flip, _in_header, _cut, _insert, _length]), min_size=1, max_size=4
    ),
    at=st.integers(0, 1 << 40),
    value=st.integers(0, 255),
)
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    how: list[Callable[[bytearray, int, int], bytes]],
    at: int,
    value: int,
) -> None:
    data = VALID
    for i, change in enumerate(how):
        data = change(bytearray(data or b"\0"), at + 7 * i, (value + i) % 256)
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
    except MlxedgeError:
        return
    for name, found in file.entries.items():
        rows = file.source_tensor(name).rows
        assert found.offset + found.nbytes <= len(data)
        if rows:
            file.read_rows(name, 0, 1)
    file.close()
