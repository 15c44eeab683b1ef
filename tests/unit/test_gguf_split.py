"""Models in several GGUF files are read as one; parts that do not belong together are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.gguf_models import write_gguf_model
from oracles.gguf_parts import STEM, split, write_part
from oracles.llama_cpp import LlamaCpp

from mlxedge import gguf_values as gv
from mlxedge.conversion import convert
from mlxedge.errors import CorruptFileError, MlxedgeError, SourceNotFoundError, UsageError
from mlxedge.inspect import inspect
from mlxedge.sources import open_source
from mlxedge.sources.gguf import read_gguf
from mlxedge.sources.gguf_names import first_parts, part_names
from mlxedge.sources.gguf_split import read_model


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / f"{STEM}.gguf"
    write_gguf_model(path)
    return path


SIZES = [(5, 4, 3), (0, 12), (1,) * 12]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_part_opens_the_model(whole: Path, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    parts = split(whole, tmp_path / "parts", sizes)
    with open_source(whole) as expected:
        weights = {n: t.read()["weight"] for n, t in expected.tensors.items()}
        for part in parts:
            with open_source(part) as found:
                assert found.name == expected.name == "tiny"
                assert found.config == expected.config
                assert repr(found.tokenizer) == repr(expected.tokenizer)
                assert found.origin.files == tuple(parts)
                assert set(found.tensors) == set(weights)
                for name, tensor in found.tensors.items():
                    np.testing.assert_array_equal(tensor.read()["weight"], weights[name])
    assert repr(read_model(parts[-1]).metadata) == repr(read_gguf(whole).metadata)
    found = inspect(parts[0])
    assert list(found.files) == [p.name for p in parts]
    assert found.parameters == inspect(whole).parameters


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_llama_cpp_reads_the_same_parts(
    whole: Path, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    parts = split(whole, tmp_path / "parts", sizes)
    tokens = [1, 70, 280, 299, 5]
    with LlamaCpp(parts[0]) as peer:
        expected = peer.logits(tokens)
    report = convert(parts[1], "gguf:f32", tmp_path / "joined.gguf", quality="reference")
    with LlamaCpp(report.outputs[0].plan.path) as ours:
        np.testing.assert_array_equal(ours.logits(tokens), expected)


def test_a_model_in_one_part(whole: Path, tmp_path: Path) -> None:
    (part,) = split(whole, tmp_path / "parts", [12])
    with open_source(part) as found:
        assert len(found.tensors) == 12
        assert found.name == "tiny"


def test_no_output_replaces_a_part(whole: Path, tmp_path: Path) -> None:
    parts = split(whole, tmp_path / "parts", SIZES[0])
    with pytest.raises(UsageError, match="holds the source"):
        convert(parts[0], "gguf:f16", parts[2], quality="reference", force=True)


def rewrite(number: int, tensors: slice = slice(5, 9), **keys: Any) -> Callable[[list[Path]], None]:
    """Another part in place of part ``number`` (from 0)."""

    def change(parts: list[Path]) -> None:
        source = parts[0].parent.parent / f"{STEM}.gguf"
        all_of = read_gguf(source).tensors
        values = {k.replace("_", "."): v for k, v in keys.items()}
        write_part(parts[number], source, all_of[tensors], number, 3, len(all_of), **values)

    return change


def swap(parts: list[Path]) -> None:
    """The first two parts under each other's name."""
    away = parts[0].replace(parts[0].with_name("away"))
    parts[1].replace(parts[0])
    away.replace(parts[1])


def two_of_them(parts: list[Path]) -> None:
    shutil.copy(parts[2], parts[1])


U16 = "u16"
BAD: dict[str, tuple[Callable[[list[Path]], None], int, type[MlxedgeError], str]] = {
    "missing": (lambda p: p[1].unlink(), 0, SourceNotFoundError, f"{STEM}-00002-of-00003.gguf"),
    "first": (lambda p: p[0].unlink(), 2, SourceNotFoundError, "all 3 parts of tiny-F32"),
    "twice": (two_of_them, 0, CorruptFileError, "split.no is 2, and should be 1"),
    "other-number": (swap, 0, CorruptFileError, "split.no is 1, and should be 0"),
    "other-count": (
        rewrite(1, split_count=gv.GgufValue(U16, 4)),
        0,
        CorruptFileError,
        "split.count is 4, and should be 3",
    ),
    "count-of-first": (
        rewrite(0, slice(0, 5), split_count=gv.GgufValue(U16, 4)),
        0,
        CorruptFileError,
        "one of 4 parts",
    ),
    "no-number": (
        rewrite(1, split_no=gv.string("one")),
        0,
        CorruptFileError,
        "split.no must be a whole number",
    ),
    "repeated": (rewrite(1, slice(4, 9)), 0, CorruptFileError, f"is also in {STEM}-00001"),
    "fewer": (rewrite(1, slice(5, 8)), 0, CorruptFileError, "hold 11 tensors"),
    "cut": (lambda p: p[2].write_bytes(p[2].read_bytes()[:-8]), 0, CorruptFileError, "truncated"),
    "not-gguf": (lambda p: p[2].write_bytes(b"no"), 0, CorruptFileError, "00003-of-00003"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parts_are_refused(whole: Path, tmp_path: Path, case: str) -> None:
    change, named, error, words = BAD[case]
    parts = split(whole, tmp_path / "parts", SIZES[0])
    change(parts)
    path = parts[named] if parts[named].exists() else parts[0]
    with pytest.raises(error) as caught:
        open_source(path)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_renamed_part_is_told_how_to_be_called(whole: Path, tmp_path: Path) -> None:
    parts = split(whole, tmp_path / "parts", SIZES[0])
    other = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CorruptFileError, match=r"NAME-00001-of-00003\.gguf"):
        open_source(other)
    shutil.copy(whole, tmp_path / "alone-00001-of-00002.gguf")
    with pytest.raises(CorruptFileError, match="one of 1 parts"):
        open_source(tmp_path / "alone-00001-of-00002.gguf")


def test_names() -> None:
    assert part_names("a-00002-of-00003.gguf") == [f"a-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for alone in ("a.gguf", "a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-1-of-3.gguf"):
        assert part_names(alone) == [alone]
    names = ["b.gguf", *part_names("q/a-00002-of-00003.gguf")]
    assert first_parts(names) == ["b.gguf", "q/a-00001-of-00003.gguf"]
