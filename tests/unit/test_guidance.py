"""How a conversion comes to what it knows of inputs, and what it makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from oracles.tiny import SENTENCES, write_tiny_llama
from safetensors.numpy import load_file, save_file

import mlxedge
from mlxedge.cli import main
from mlxedge.errors import BadWeightsError, CorruptFileError, UsageError
from mlxedge.report import Report
from mlxedge.sources import open_source
from mlxedge.texts import HELDOUT

BOTH = ["mlx:3bit", "gguf:q4_k_m"]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(".mlxedge.json")
    }


def record(report: Report, index: int = 0) -> dict[str, Any]:
    path = report.outputs[index].record
    assert path is not None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def output_errors(report: Report) -> list[float]:
    found = [output.output_error for output in report.outputs]
    assert all(error is not None for error in found)
    return [error for error in found if error is not None]


@pytest.fixture(scope="module")
def imatrix(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What calibrate writes, with its Hessians beside it."""
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    done = CliRunner().invoke(
        main, ["calibrate", str(tiny), "-o", str(path), "--hessians", "--tokens", "512"]
    )
    assert done.exit_code == 0, done.stderr
    return path


def test_each_quality_has_less_error_where_it_counts(
    tiny: Path, imatrix: Path, tmp_path: Path
) -> None:
    """The error of outputs, estimated by the importance of columns: "best" gives some of it up,
    since errors then cancel each other, so it is held by what reaches the logits."""
    reports = {}
    for quality in ("reference", "fast", "best"):
        reports[quality] = mlxedge.convert(
            tiny, BOTH, tmp_path / quality, quality=quality, calibrate=imatrix
        )
    assert all(
        fast < plain
        for fast, plain in zip(
            output_errors(reports["fast"]), output_errors(reports["reference"]), strict=True
        )
    )
    sizes = [[o.plan.nbytes for o in r.outputs] for r in reports.values()]
    assert sizes[0] == sizes[1] == sizes[2]
    tokens = mlxedge.load(tiny, engine="numpy").tokenizer.encode(SENTENCES)[:200]
    with mlxedge.load(tiny, engine="numpy") as model:
        truth = model.logits(tokens)
    off = {}
    for quality in reports:
        with mlxedge.load(tmp_path / quality / "tiny-llama-mlx-3bit", engine="numpy") as model:
            off[quality] = float(np.square(model.logits(tokens) - truth).mean())
    assert off["best"] < off["fast"] < off["reference"]


def test_the_default_calibrates_and_says_so(tiny: Path, tmp_path: Path) -> None:
    report = mlxedge.convert(tiny, BOTH, tmp_path / "m")
    made = record(report)
    assert made["quality"] == "fast"
    assert made["calibration"]["texts"] == ["pydoc_data.topics"]
    assert made["calibration"]["tokens"] == 2048
    by_name = {t["name"]: t for t in made["tensors"]}
    assert by_name["model.layers.0.mlp.down_proj.weight"]["quality"] == "fast"
    assert by_name["model.norm.weight"]["quality"] == "reference"
    with open_source(tmp_path / "m" / "tiny-llama-Q4_K_M.gguf") as _:
        from mlxedge.sources.gguf import read_gguf

        keys = read_gguf(tmp_path / "m" / "tiny-llama-Q4_K_M.gguf").metadata
    assert keys["quantize.imatrix.dataset"].value == "pydoc_data.topics"
    assert keys["quantize.imatrix.chunks_count"].value == 4


def test_without_a_calibration_it_is_the_plain_rule(tiny: Path, tmp_path: Path) -> None:
    mlxedge.convert(tiny, BOTH, tmp_path / "plain", quality="reference")
    report = mlxedge.convert(tiny, BOTH, tmp_path / "none", calibrate=False)
    assert files(tmp_path / "none") == files(tmp_path / "plain")
    assert record(report)["quality"] == "reference"
    assert record(report)["calibration"] is None


def test_eight_bits_are_searched_without_a_calibration(tiny: Path, tmp_path: Path) -> None:
    report = mlxedge.convert(tiny, ["mlx:8bit", "gguf:q8_0"], tmp_path / "m")
    plain = mlxedge.convert(tiny, ["mlx:8bit", "gguf:q8_0"], tmp_path / "p", quality="reference")
    assert record(report)["calibration"] is None
    for ours, rule in zip(report.outputs, plain.outputs, strict=True):
        assert ours.error < 0.9 * rule.error


def test_a_model_without_a_tokenizer_sees_random_tokens(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    report = mlxedge.convert(folder, "mlx:4bit", tmp_path / "out")
    assert record(report)["calibration"]["texts"] == ["random tokens"]
    again = mlxedge.convert(folder, "mlx:4bit", tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")
    assert again.outputs[0].output_error == report.outputs[0].output_error


@pytest.mark.parametrize("quality", ["fast", "best"])
def test_threads_change_nothing(tiny: Path, tmp_path: Path, quality: Any) -> None:
    for threads in (1, 3):
        mlxedge.convert(tiny, BOTH, tmp_path / str(threads), quality=quality, threads=threads)
    assert files(tmp_path / "1") == files(tmp_path / "3")


@pytest.mark.parametrize(("quality", "sequences"), [("fast", 4), ("best", 16)])
def test_a_calibration_has_a_progress_of_its_own(
    tiny: Path, tmp_path: Path, quality: Any, sequences: int
) -> None:
    weights: list[tuple[int, int, str]] = []
    layers: list[tuple[int, int, str]] = []
    report = mlxedge.convert(
        tiny,
        "mlx:4bit",
        tmp_path / "m",
        quality=quality,
        threads=1,
        progress=lambda *step: weights.append(step),
        calibrating=lambda *step: layers.append(step),
    )
    assert {name for _, _, name in weights} == {t["source"] for t in record(report)["tensors"]}
    total = 2 * sequences
    assert layers[:total] == [(i, total, f"layer {i // sequences}") for i in range(total)]
    assert 0 < report.calibration_seconds < report.seconds
    assert record(report)["calibration_seconds"] == round(report.calibration_seconds, 3)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("quality", ["fast", "best"])
def test_a_stopped_run_goes_on_and_ends_the_same(tiny: Path, tmp_path: Path, quality: Any) -> None:
    mlxedge.convert(tiny, BOTH, tmp_path / "whole", quality=quality)
    seen: set[str] = set()

    def stop(done: int, total: int, name: str) -> None:
        seen.add(name)
        if len(seen) > 9:
            raise Stopped

    with pytest.raises(Stopped):
        mlxedge.convert(tiny, BOTH, tmp_path / "m", quality=quality, progress=stop, threads=1)
    report = mlxedge.convert(tiny, BOTH, tmp_path / "m", quality=quality)
    assert all(o.resumed for o in report.outputs)
    assert files(tmp_path / "m") == files(tmp_path / "whole")


def test_hessians_of_a_file_are_those_of_a_run(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    done = CliRunner().invoke(main, ["calibrate", str(tiny), "-o", str(path), "--hessians"])
    assert done.exit_code == 0, done.stderr
    mlxedge.convert(tiny, BOTH, tmp_path / "file", quality="best", calibrate=path)
    mlxedge.convert(tiny, "mlx:3bit", tmp_path / "run", quality="best")
    made = files(tmp_path / "file" / "tiny-llama-mlx-3bit")
    assert made == files(tmp_path / "run")


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for quality in ("fast", "best"):
        with pytest.raises(BadWeightsError, match=r"up_proj.weight has a weight that is nan at"):
            mlxedge.convert(folder, "mlx:4bit", tmp_path / "out", quality=quality)
    report = mlxedge.convert(folder, "mlx:4bit", tmp_path / "out", allow_nan=True)
    assert report.nonfinite == [name]


def test_what_is_refused(tiny: Path, imatrix: Path, tmp_path: Path) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "imatrix.dat"
    short.write_text("A few words.")
    binary.write_bytes(b"\1\0\0\0\4\0\0\0abc")
    nul, model = tmp_path / "nul.txt", tmp_path / "model.gguf"
    nul.write_text("x" * 5000 + "\0")
    mlxedge.convert(tiny, "gguf:q8_0", model, calibrate=False)
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(imatrix.read_bytes())
    other = write_tiny_llama(tmp_path / "other", hidden=128, intermediate=256)
    for settings, error, problem in (
        (
            {"calibrate": short},
            UsageError,
            r"short.txt: \d+ tokens, and 512 are asked for: give a longer text$",
        ),
        ({"calibrate": HELDOUT}, UsageError, "calibrate on another one"),
        ({"calibrate": tmp_path}, UsageError, "is a folder: give a text"),
        ({"calibrate": tmp_path / "none"}, UsageError, "cannot be read"),
        ({"calibrate": model}, UsageError, "model.gguf is a model, not an imatrix file: give what"),
        ({"calibrate": nul}, UsageError, "nul.txt is no text: character 5000 is NUL"),
        (
            {"calibrate": binary},
            CorruptFileError,
            r"imatrix.dat: neither a text \(UTF-8 without NUL\) nor",
        ),
        ({"calibrate": alone, "quality": "best"}, UsageError, "quality best needs Hessians"),
        ({"calibrate": False, "quality": "best"}, UsageError, "needs a calibration"),
        ({"quality": "good"}, UsageError, "unknown quality 'good'"),
    ):
        with pytest.raises(error, match=problem):
            mlxedge.convert(tiny, "mlx:4bit", tmp_path / "out", **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="of another model"):
        mlxedge.convert(other, "mlx:4bit", tmp_path / "out", calibrate=imatrix)
    assert not (tmp_path / "out").exists()


def test_hessians_of_another_run_are_refused(tiny: Path, imatrix: Path, tmp_path: Path) -> None:
    other = tmp_path / "imatrix.gguf"
    done = CliRunner().invoke(main, ["calibrate", str(tiny), "-o", str(other), "--tokens", "256"])
    assert done.exit_code == 0, done.stderr
    (tmp_path / "imatrix.gguf.hessians").symlink_to(f"{imatrix}.hessians")
    with pytest.raises(UsageError, match="is of another run"):
        mlxedge.convert(tiny, "mlx:4bit", tmp_path / "out", quality="best", calibrate=other)


def test_what_is_copied_claims_no_imatrix(tiny: Path, tmp_path: Path) -> None:
    from mlxedge.sources.gguf import read_gguf

    mlxedge.convert(tiny, "gguf:q4_0", tmp_path / "a.gguf")
    mlxedge.convert(tmp_path / "a.gguf", "gguf:q4_0", tmp_path / "b.gguf")
    found = [
        any(key.startswith("quantize.imatrix") for key in read_gguf(tmp_path / name).metadata)
        for name in ("a.gguf", "b.gguf")
    ]
    assert found == [True, False]


def test_a_recipe_that_needs_an_imatrix_gets_one(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="iq2_xxs"):
        mlxedge.convert(tiny, "gguf:iq2_xxs", tmp_path / "m.gguf", calibrate=False)
    report = mlxedge.convert(tiny, "gguf:iq2_xxs", tmp_path / "m.gguf")
    assert "iq2_xxs" in {t["encoding"] for t in record(report)["tensors"]}


def test_the_command(tiny: Path, imatrix: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(main, ["convert", str(tiny), *map(str, arguments)])

    out = tmp_path / "m"
    done = run("--to", "mlx:4bit", "-o", out, "--calibrate", imatrix, "--tensor", "down_proj=6bit")
    assert done.exit_code == 0, done.stderr
    assert "quality fast, calibrated on imatrix.gguf" in done.stdout
    assert re.search(r"s in all on numpy, \d+ threads, [\d.]+ s of them for the cal", done.stdout)
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 4
    plain = ["-o", out, "--calibrate", imatrix, "--quality", "reference", "--dry-run", "--force"]
    for target, said in (("mlx:4bit", True), ("gguf:q4_k_m", False)):
        told = run("--to", target, *plain)
        assert "quality reference, calibrated on imatrix.gguf" in told.stdout
        assert ("MLX's rule takes no notice of that" in told.stdout) == said
    both = run("--to", "mlx:4bit", "-o", out, "--calibrate", imatrix, "--no-calibrate")
    assert both.exit_code == 2
    assert "give one of them" in both.stderr
    dry = run("--to", "gguf:q4_k_m", "-o", out, "--dry-run", "--json")
    plan = json.loads(dry.stdout)["plan"]
    assert plan["quality"] == "fast"
    assert plan["calibration"]["tokens"] == 2048
