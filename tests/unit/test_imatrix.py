"""Imatrix files: those of the real llama-imatrix (tests/golden/make_imatrix.py), and our own."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxedge import gguf_values as gv
from mlxedge.calibration.imatrix import check_fits, read_imatrix, write_imatrix
from mlxedge.calibration.statistics import Calibration, Statistics
from mlxedge.encodings import F16, F32, Encoding
from mlxedge.errors import CorruptFileError, MlxedgeError, SourceNotFoundError, UsageError
from mlxedge.models.llama import SPEC
from mlxedge.outputs.gguf import imatrix_keys, plan_gguf
from mlxedge.outputs.gguf_file import header_bytes
from mlxedge.prepare import prepare
from mlxedge.sources import open_source
from mlxedge.sources.gguf import read_gguf
from mlxedge.targets import parse_target

GOLDEN = Path(__file__).parents[1] / "golden" / "imatrix"
FILES = ("dense.gguf", "dense.dat", "experts.gguf", "experts.dat")
METADATA: gv.Metadata = {
    "imatrix.datasets": gv.array("str", ["a.txt"]),
    "imatrix.chunk_count": gv.u32(2),
    "imatrix.chunk_size": gv.u32(512),
}


def statistics(sums: object, counts: Iterable[int]) -> Statistics:
    return Statistics(np.array(sums, np.float32), np.array(list(counts), np.int64))


def calibration(**tensors: Statistics) -> Calibration:
    named = {name.replace("_dot_", "."): found for name, found in tensors.items()}
    return Calibration(named, ("one.txt", "two.txt"), "ab" * 32, 2048, 512)


def make_gguf(
    path: Path, metadata: gv.Metadata, tensors: dict[str, tuple[np.ndarray, Encoding]]
) -> Path:
    infos, body = [], b""
    for name, (values, encoding) in tensors.items():
        infos.append((name, values.shape, encoding, len(body)))
        body += values.tobytes()
        body += bytes(-len(body) % 32)
    path.write_bytes(header_bytes(metadata, infos) + body)
    return path


def test_reads_what_llama_imatrix_wrote() -> None:
    found = read_imatrix(GOLDEN / "dense.gguf", SPEC)
    assert (found.texts, found.context, found.tokens) == (("text.txt",), 64, 832)
    layer = "model.layers.0."
    assert {name: s.sums.shape for name, s in found.tensors.items()} == {
        f"{layer}self_attn.q_proj.weight": (1, 128),
        f"{layer}self_attn.k_proj.weight": (1, 128),
        f"{layer}self_attn.v_proj.weight": (1, 128),
        f"{layer}self_attn.o_proj.weight": (1, 128),
        f"{layer}mlp.gate_proj.weight": (1, 128),
        f"{layer}mlp.up_proj.weight": (1, 128),
        f"{layer}mlp.down_proj.weight": (1, 256),
    }
    assert {s.total for s in found.tensors.values()} == {832}
    query, key = (found.tensors[f"{layer}self_attn.{p}_proj.weight"] for p in "qk")
    assert query.sums.tobytes() == key.sums.tobytes()  # they share an input
    assert query.sums.min() > 0


def test_experts_stay_apart_and_unknown_names_stay_as_they_are() -> None:
    found = read_imatrix(GOLDEN / "experts.gguf", SPEC)
    gate = found.tensors["blk.0.ffn_gate_exps.weight"]
    down = found.tensors["blk.0.ffn_down_exps.weight"]
    assert (gate.sums.shape, down.sums.shape) == ((4, 64), (4, 32))
    assert gate.counts.tolist() == down.counts.tolist()
    router = found.tensors["blk.0.ffn_gate_inp.weight"]
    assert gate.total == 2 * router.total  # two experts for each token


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_both_formats_say_the_same(model: str) -> None:
    """The older one holds means times chunks, rounded once more, and not the counts."""
    new, old = (read_imatrix(GOLDEN / f"{model}.{form}", SPEC) for form in ("gguf", "dat"))
    assert new.texts == old.texts
    assert list(new.tensors) == list(old.tensors)
    for name, found in new.tensors.items():
        assert old.tensors[name].sums.shape == found.sums.shape
        for a, b in zip(found.sums, old.tensors[name].sums, strict=True):
            np.testing.assert_allclose(a / a.sum(), b / b.sum(), rtol=1e-6)


@pytest.mark.parametrize("file", FILES)
def test_writes_the_very_bytes_of_llama_imatrix(file: str, tmp_path: Path) -> None:
    model, _, form = file.partition(".")
    found = read_imatrix(GOLDEN / f"{model}.gguf", SPEC)
    write_imatrix(tmp_path / file, found, SPEC, legacy=form == "dat")
    assert (tmp_path / file).read_bytes() == (GOLDEN / file).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("file", ["dense.dat", "experts.dat"])
def test_means_are_those_that_llama_quantize_takes(file: str) -> None:
    """From the older format: values over chunks, in f32."""
    data, at = (GOLDEN / file).read_bytes(), 4
    found = read_imatrix(GOLDEN / file, SPEC)
    for _ in range(struct.unpack_from("<i", data)[0]):
        (size,) = struct.unpack_from("<i", data, at)
        name = data[at + 4 : at + 4 + size].decode()
        chunks, number = struct.unpack_from("<ii", data, at + 4 + size)
        values = np.frombuffer(data, "<f4", number, at + 12 + size)
        at += 12 + size + 4 * number
        mapped = SPEC.from_gguf(name)
        entry = found.tensors[mapped[0] if mapped else name]
        means = entry.sums / entry.counts[:, None].astype(np.float32)
        assert means.tobytes() == (values / np.float32(chunks)).tobytes()


def test_round_trip(tmp_path: Path) -> None:
    made = calibration(
        model_dot_embed_tokens_dot_weight=statistics([[1.5, 0, 1e30]], [7]),
        blk_dot_3_dot_odd_dot_weight=statistics([[1, 2], [0, 0], [3, 4]], [5, 0, 9]),
    )
    write_imatrix(tmp_path / "new" / "i.gguf", made, SPEC)
    found = read_imatrix(tmp_path / "new" / "i.gguf", SPEC)
    for part in ("texts", "text_sha256", "tokens", "context"):
        assert getattr(found, part) == getattr(made, part)
    assert set(found.tensors) == set(made.tensors)
    for name, entry in made.tensors.items():
        assert found.tensors[name].sums.tobytes() == entry.sums.tobytes()
        assert found.tensors[name].counts.tolist() == entry.counts.tolist()


def test_a_file_of_another_model() -> None:
    found = read_imatrix(GOLDEN / "dense.gguf", SPEC)
    down = "model.layers.0.mlp.down_proj.weight"
    check_fits("i.gguf", found, {down: (128, 256), "model.embed_tokens.weight": (300, 128)})
    with pytest.raises(UsageError, match=r"has \[1, 512\] inputs, there \[1, 256\]"):
        check_fits("i.gguf", found, {down: (128, 512)})
    with pytest.raises(UsageError, match="no matrix of this one"):
        check_fits("i.gguf", found, {"model.embed_tokens.weight": (300, 128)})
    experts = read_imatrix(GOLDEN / "experts.dat", SPEC)
    check_fits("i.dat", experts, {"blk.0.ffn_down_exps.weight": (4, 64, 32)})
    with pytest.raises(UsageError, match=r"has \[8, 16\] inputs, there \[4, 32\]"):
        check_fits("i.dat", experts, {"blk.0.ffn_down_exps.weight": (8, 64, 16)})


def test_a_text_whose_name_is_no_unicode(tmp_path: Path) -> None:
    made = replace(calibration(a=statistics([[1]], [1])), texts=("\udcff.txt",))
    for form in ("gguf", "dat"):
        write_imatrix(tmp_path / f"i.{form}", made, SPEC, legacy=form == "dat")
        assert read_imatrix(tmp_path / f"i.{form}", SPEC).texts == ("?.txt",)


def test_the_head_of_a_tied_model_stands_under_the_embedding(tmp_path: Path) -> None:
    made = calibration(model_dot_embed_tokens_dot_weight=statistics([[1, 2]], [3]))
    write_imatrix(tmp_path / "i.gguf", made, SPEC)
    assert b"token_embd.weight.in_sum2" in (tmp_path / "i.gguf").read_bytes()


def test_the_older_format_without_data(tmp_path: Path) -> None:
    """llama-imatrix leaves out a matrix without data, and counts an expert without any as one."""
    made = calibration(
        a_dot_weight=statistics([[1, 2]], [0]), b_dot_weight=statistics([[4, 6], [9, 9]], [2, 0])
    )
    write_imatrix(tmp_path / "i.dat", made, SPEC, legacy=True)
    found = read_imatrix(tmp_path / "i.dat", SPEC)
    assert list(found.tensors) == ["b.weight"]
    entry = found.tensors["b.weight"]
    assert (entry.sums / entry.counts[:, None]).tolist() == [[2, 3, 1, 1]]
    assert (found.texts, found.tokens) == (("two.txt",), 2048)


def test_files_of_old_have_no_tail(tmp_path: Path) -> None:
    data = struct.pack("<ii1sii2f", 1, 1, b"a", 0, 2, 3.0, 4.0)
    (tmp_path / "i.dat").write_bytes(data)
    found = read_imatrix(tmp_path / "i.dat", SPEC)
    entry = found.tensors["a"]
    assert (found.texts, found.tokens) == ((), 0)
    assert (entry.sums / entry.counts[:, None]).tolist() == [[3, 4]]  # no chunks: as they are


def test_a_gguf_file_tells_of_its_imatrix(tiny: Path, tmp_path: Path) -> None:
    """With the keys and types of llama-quantize, whose texts end at 127 bytes."""
    about = imatrix_keys(file="i.gguf", dataset="é" * 100, entries=56, chunks=13)
    assert about == {
        "quantize.imatrix.file": gv.string("i.gguf"),
        "quantize.imatrix.dataset": gv.string("é" * 63),
        "quantize.imatrix.entries_count": gv.u32(56),
        "quantize.imatrix.chunks_count": gv.u32(13),
    }
    assert imatrix_keys(file="", dataset="", entries=1, chunks=0) == {
        "quantize.imatrix.entries_count": gv.u32(1)
    }
    with open_source(tiny) as source:
        spec, checkpoint = prepare(source)
        target, path = parse_target("gguf:q4_0"), tmp_path / "m.gguf"
        plan = plan_gguf(
            checkpoint, spec, checkpoint.config, target, path, imatrix=True, about_imatrix=about
        )
    path.write_bytes(plan.data[0].header + bytes(plan.nbytes - len(plan.data[0].header)))
    assert about.items() <= read_gguf(path).metadata.items()


ONE = np.ones((2, 4), np.float32)
COUNTS = np.ones((2, 1), np.float32)
BAD: dict[str, tuple[gv.Metadata, dict[str, tuple[np.ndarray, Encoding]], str]] = {
    "no sums": (METADATA, {"a.counts": (COUNTS, F32)}, "no .in_sum2"),
    "no counts": (METADATA, {"a.in_sum2": (ONE, F32)}, "no .counts"),
    "nothing": (METADATA, {"a.weight": (ONE, F32)}, "without importances"),
    "half": (METADATA, {"a.in_sum2": (ONE.astype(np.float16), F16), "a.counts": (COUNTS, F32)},
             "should be f32"),
    "uneven": (METADATA, {"a.in_sum2": (ONE, F32), "a.counts": (np.ones(3, np.float32), F32)},
               "do not divide"),
    "negative": (METADATA, {"a.in_sum2": (-ONE, F32), "a.counts": (COUNTS, F32)}, "negative"),
    "nan": (METADATA, {"a.in_sum2": (ONE * np.nan, F32), "a.counts": (COUNTS, F32)}, "finite"),
    "many": (METADATA, {"a.in_sum2": (ONE, F32), "a.counts": (COUNTS * 1e30, F32)}, "counts"),
    "twice": (
        METADATA,
        {
            f"{name}{part}": (values, F32)
            for name in ("output.weight", "lm_head.weight")
            for part, values in ((".in_sum2", ONE), (".counts", COUNTS))
        },
        "two names",
    ),
    "a model": ({}, {"a.in_sum2": (ONE, F32), "a.counts": (COUNTS, F32)}, "imatrix.datasets"),
    "size": (METADATA | {"imatrix.chunk_size": gv.string("x")},
             {"a.in_sum2": (ONE, F32), "a.counts": (COUNTS, F32)}, "imatrix.chunk_size"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_files_that_contradict_themselves(case: str, tmp_path: Path) -> None:
    metadata, tensors, problem = BAD[case]
    path = make_gguf(tmp_path / "i.gguf", metadata, tensors)
    with pytest.raises(CorruptFileError, match=problem):
        read_imatrix(path, SPEC)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        b"hello, this is a text and no imatrix",
        struct.pack("<i", 0),
        struct.pack("<ii", 1, -1),
        struct.pack("<iiIii", 1, 4, 0, 1, 1),  # a name of zeros
        struct.pack("<ii1sii", 1, 1, b"\xff", 1, 1),
        struct.pack("<ii1sii", 1, 1, b"a", 1, 0),
        struct.pack("<ii1sii", 1, 1, b"a", 1, (1 << 31) - 1),
        struct.pack("<ii1siif", 1, 1, b"a", 1, 1, float("inf")),
        struct.pack("<ii1siifi", 1, 1, b"a", 1, 1, 3e38, 0),
        struct.pack("<ii1siifii", 1, 1, b"a", 1, 1, 1.0, 1, 99),
    ],
)
def test_older_files_that_contradict_themselves(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(CorruptFileError):
        read_imatrix(tmp_path / "i.dat", SPEC)


def test_no_file_and_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        read_imatrix(tmp_path / "none.gguf", SPEC)
    with pytest.raises(UsageError, match="nothing was calibrated"):
        write_imatrix(tmp_path / "i.gguf", calibration(), SPEC)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", FILES)
def test_truncated_anywhere(file: str, tmp_path: Path) -> None:
    data, path = (GOLDEN / file).read_bytes(), tmp_path / "i"
    # The tail of the older format, the chunks and the text, may be missing.
    tail = len(data) if file.endswith(".gguf") else len(data) - 8 - len("text.txt")
    for size in [*range(0, len(data), 37), *range(max(0, len(data) - 40), len(data))]:
        path.write_bytes(data[:size])
        if file.endswith(".gguf") and size >= len(data) - 28:
            continue  # the padding behind the last tensor
        if size == tail or size == tail + 4:
            read_imatrix(path, SPEC)
            continue
        with pytest.raises(CorruptFileError):
            read_imatrix(path, SPEC)


@settings(max_examples=300, deadline=None)
@given(
    file=st.sampled_from(FILES),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1),
    cut=st.floats(0, 1),
)
def test_hostile_bytes_raise_our_errors_alone(
    file: str,
    edits: list[tuple[float, bytes]],
    cut: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = bytearray((GOLDEN / file).read_bytes())
    for where, new in edits:
        at = int(where * (len(data) - 1) * cut)
        data[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(data)
    with contextlib.suppress(MlxedgeError):
        for entry in read_imatrix(path, SPEC).tensors.values():
            assert np.isfinite(entry.sums).all()
            assert (entry.counts >= 0).all()
            assert len(entry.sums) == len(entry.counts)
