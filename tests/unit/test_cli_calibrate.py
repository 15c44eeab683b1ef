"""``mlxedge calibrate``: what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlxedge.calibration.imatrix import read_imatrix
from mlxedge.calibration.store import hessian_folder
from mlxedge.cli import main
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.llama import SPEC
from mlxedge.sources import open_source
from mlxedge.texts import HELDOUT


def calibrate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["calibrate", *map(str, arguments)])


def test_the_default(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "imatrix.gguf"
    done = calibrate(tiny, "-o", out)
    assert done.exit_code == 0, done.output
    assert "2048 tokens of pydoc_data.topics in 4 chunks of 512" in done.stdout
    found = read_imatrix(out, SPEC)
    assert (found.texts, found.tokens, found.context) == (("pydoc_data.topics",), 2048, 512)
    assert found.tensors["model.layers.1.mlp.down_proj.weight"].counts.tolist() == [2048]


@pytest.mark.parametrize(("tokens", "counted"), [("32", 32), ("all", 48)])
def test_a_text_of_ones_own(tiny: Path, tmp_path: Path, tokens: str, counted: int) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "imatrix.dat"
    text.write_text("abcdefgh " * 12, "utf-8")
    options = ["--text", text, "--tokens", tokens, "--context", 16, "--hessians", "--json"]
    done = calibrate(tiny, "-o", out, *options)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["text"] == "text.txt"
    assert report["context"] == 16
    assert report["tokens"] == counted
    assert report["hessians"] == str(hessian_folder(out))
    assert report["nbytes"] == sum(f.stat().st_size for f in [out, *hessian_folder(out).iterdir()])
    assert len(read_imatrix(out, SPEC).tensors) == 15


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--text", HELDOUT], 2, "heldout.txt is the text that mlxedge evaluate measures with"),
        (["--tokens", "0"], 2, "Invalid value for '--tokens'"),
        (["--tokens", "some"], 2, "'--tokens': 'some' is neither a number of tokens nor all"),
        (["--tokens", "10000000"], 2, "give a longer text, or fewer tokens"),
        (["--text", "no such file"], 2, "does not exist"),
    ],
)
def test_refusals_are_one_line(
    tiny: Path, tmp_path: Path, options: list[object], status: int, message: str
) -> None:
    done = calibrate(tiny, "-o", tmp_path / "imatrix.gguf", *options)
    assert done.exit_code == status
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_text_with_nul_is_none_for_any_command(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words\0" * 500, "utf-8")
    for command in (
        ["calibrate", tiny, "-o", tmp_path / "imatrix.gguf", "--text", text],
        ["evaluate", tiny, "--text", text],
    ):
        done = CliRunner().invoke(main, list(map(str, command)))
        assert done.exit_code == 2
        assert done.stderr == f"error: {text} is no text: character 11 is NUL\n"


def test_an_imatrix_is_no_model(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "imatrix.gguf"
    assert calibrate(tiny, "-o", out).exit_code == 0
    with pytest.raises(
        UnsupportedModelError, match=r"an imatrix file, not a model: give it to con"
    ):
        open_source(out)


def test_what_exists_is_kept(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "imatrix.gguf"
    out.write_text("mine")
    done = calibrate(tiny, "-o", out, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["kind"] == "OutputExistsError"
    assert out.read_text() == "mine"
