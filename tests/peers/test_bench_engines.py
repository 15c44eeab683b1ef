"""The engines that bench runs are the real ones: they compute what they should, and are timed."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from oracles.llama_cpp import LlamaCpp
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.bench.measure import Settings, measure
from mlxedge.cli import main
from mlxedge.engines.onnx_engine import OnnxEngine, read_folder
from mlxedge.errors import BackendError, CorruptFileError, UsageError
from mlxedge.sampling import Sampling

TOKENS = [int(t) for t in np.random.default_rng(3).integers(3, 512, 40)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as GGUF, as an MLX folder, and as onnxruntime-genai's own builder makes it (it
    takes every matrix with as many rows as the vocabulary for the head, so none has)."""
    home = tmp_path_factory.mktemp("engines")
    tiny = write_tiny_llama(home / "tiny", intermediate=384)
    mlxedge.convert(tiny, ["gguf:f32", "mlx:f32"], home)
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    subprocess.run(
        [*builder, "-i", tiny, "-o", home / "onnx", "-c", home / "cache"],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return home


@pytest.fixture(scope="module")
def gguf(home: Path) -> Path:
    return next(home.glob("*.gguf"))


def bench(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_llama_cpp_computes_what_it_should(gguf: Path) -> None:
    with LlamaCpp(gguf) as llama, mlxedge.load(gguf, engine="llama.cpp") as model:
        truth = llama.logits(TOKENS)
        np.testing.assert_allclose(model.logits(TOKENS), truth, atol=1e-4)
        # In pieces, after going back, and one token at a time.
        state = model.runner.state()
        model.runner.run(TOKENS[:30], state, 0)
        model.runner.truncate(state, 10)
        assert state.length == 10
        found = model.runner.run(TOKENS[10:39], state, 2)
        np.testing.assert_allclose(found, truth[37:39], atol=2e-2)
        found = model.runner.run(TOKENS[39:], state, 1)
        np.testing.assert_allclose(found, truth[39:], atol=2e-2)
        greedy = llama.greedy(TOKENS[:5], 8)
    with mlxedge.load(gguf, engine="llama.cpp") as model:
        made = list(model.runner.generate(TOKENS[:5], model.runner.state(), Sampling(), 8))
    assert made == greedy


def test_llama_cpp_has_one_sequence(gguf: Path, tiny: Path) -> None:
    with mlxedge.load(gguf, engine="llama.cpp", context=64) as model:
        first = model.runner.state()
        model.runner.run(TOKENS, first, 1)
        second = model.runner.state()
        with pytest.raises(UsageError, match="one sequence at a time"):
            model.runner.run([1], first, 1)
        with pytest.raises(UsageError, match="do not fit"):
            model.runner.run(TOKENS * 2, second, 1)
    with pytest.raises(UsageError, match="runs GGUF files"):
        mlxedge.load(tiny, engine="llama.cpp")


def test_llama_cpp_says_why_it_does_not_load(gguf: Path, tmp_path: Path) -> None:
    from mlxedge.engines.llama_cpp_engine import LlamaCppEngine

    broken = tmp_path / gguf.name
    broken.write_bytes(gguf.read_bytes())
    with mlxedge.open_source(broken) as checkpoint:
        broken.write_bytes(gguf.read_bytes()[:-40_000])
        with pytest.raises(BackendError, match="cannot load"):
            LlamaCppEngine(checkpoint, 64, 1)


def test_generate_with_llama_cpp(gguf: Path) -> None:
    done = CliRunner().invoke(
        main, ["generate", str(gguf), "hello", "-n", "4", "--engine", "llama.cpp", "--raw"]
    )
    assert done.exit_code == 0, done.stderr


def test_onnxruntime_computes_what_it_should(home: Path) -> None:
    engine = OnnxEngine(read_folder(home / "onnx"), 1, 128)
    with mlxedge.load(home / "tiny", engine="numpy") as model:
        truth = model.logits(TOKENS)
        state = engine.state()
        engine.run(TOKENS[:20], state, 0)
        np.testing.assert_allclose(engine.run(TOKENS[20:], state, 1)[0], truth[-1], atol=2e-3)
        engine.truncate(state, 10)
        found = engine.run(TOKENS[10:15], state, 1)[0]
        np.testing.assert_allclose(found, truth[14], atol=2e-3)
        ours = list(model.runner.generate(TOKENS, model.runner.state(), Sampling(), 6))
    made = list(engine.generate(TOKENS, engine.state(), Sampling(), 6))
    assert made == ours
    assert engine.about().processor == "cpu"
    engine.close()


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"decoder": {"filename": "../x"}}}', "[3]"])
def test_an_onnx_folder_that_is_none(home: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(CorruptFileError):
        read_folder(tmp_path)
    done = bench(tmp_path)
    assert done.exit_code == 1
    assert len(done.stderr.strip().splitlines()) == 1


def test_onnxruntime_says_why_it_does_not_load(home: Path, tmp_path: Path) -> None:
    for file in (home / "onnx").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    done = bench(tmp_path, "-p", 2, "-n", 2)
    assert done.exit_code == 1
    assert "onnxruntime-genai cannot load" in done.stderr


def test_all_engines_side_by_side(home: Path, gguf: Path, tmp_path: Path) -> None:
    """Each runs what it can, in a process of its own; all give the same record."""
    folder = next(path for path in home.iterdir() if path.name.endswith("-mlx-f32"))
    engines = ["mlx", "llama.cpp", "onnxruntime", "numpy"]
    options = [part for engine in engines for part in ("--engine", engine)]
    done = bench(
        gguf, folder, home / "onnx", "-p", 8, "-n", 4, "-d", "0,16", "-r", 3, *options, "--json"
    )
    assert done.exit_code == 0, done.stderr
    records = json.loads(done.stdout)
    ran = [(r["model"]["format"], r["engine"]["name"]) for r in records]
    assert ran == [
        ("gguf", "llama.cpp"), ("gguf", "numpy"), ("mlx", "mlx"), ("mlx", "numpy"),
        ("onnx", "onnxruntime"),
    ]  # fmt: skip
    for record in records:
        assert [t["name"] for t in record["tests"]] == ["pp8", "tg4", "pp8 @ d16", "tg4 @ d16"]
        assert all(len(t["runs"]) == 3 for t in record["tests"])
        assert record["load_seconds"] > 0
        assert record["peak_memory_bytes"] > 1 << 20
        assert record["engine"]["build"]
    # The GGUF file and the MLX folder are of one source.
    sources = {r["model"]["source_sha256"] for r in records if r["model"]["format"] != "onnx"}
    assert len(sources) == 1
    assert None not in sources


def test_the_default_for_gguf_is_llama_cpp(gguf: Path) -> None:
    done = bench(gguf, "-p", 4, "-n", 0, "-r", 1, "--json")
    (record,) = json.loads(done.stdout)
    assert record["engine"]["name"] == "llama.cpp"
    assert record["engine"]["build"].startswith("xllamacpp 20")


def test_llama_bench_on_path(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on PATH under its name is called as it wants to be, and its samples are kept. The
    output is that of the real one (tests/golden/bench)."""
    golden = Path(__file__).resolve().parents[1] / "golden" / "bench" / "llama-bench.json"
    program = tmp_path / "llama-bench"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\ncat {golden}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = bench(
        gguf, "-p", 64, "-n", 16, "-d", "0,32", "-r", 3, "--engine", "llama-bench", "--json"
    )
    assert done.exit_code == 0, done.stderr
    (record,) = json.loads(done.stdout)
    called = (tmp_path / "called").read_text()
    assert called == f"-m {gguf} -o json -r 3 -p 64 -n 16 -d 0,32\n"
    theirs = json.loads(golden.read_text())
    for test, row in zip(record["tests"], theirs, strict=True):
        assert [round(r["seconds"] * 1e9) for r in test["runs"]] == row["samples_ns"]
    assert record["model"]["sha256"]
    program.write_text("#!/bin/sh\necho 'error: failed to load model' >&2\nexit 1\n")
    failed = bench(gguf, "--engine", "llama-bench")
    assert failed.exit_code == 1
    assert "llama-bench ended with status 1: error: failed to load model" in failed.stderr
    program.write_text("#!/bin/sh\necho hello\n")
    assert "JSON cannot be read" in bench(gguf, "--engine", "llama-bench").stderr
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = bench(gguf, "--engine", "llama-bench")
    assert missing.exit_code == 1
    assert "needs llama.cpp's llama-bench on PATH" in missing.stderr


def test_a_child_that_dies_is_told(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxedge.bench import apart

    job = apart.Job(str(gguf), "numpy", 1, Settings(4, 0, repeats=1))
    monkeypatch.setattr(apart.sys, "executable", "/bin/false")
    with pytest.raises(BackendError, match="ended with status 1 while it was measured"):
        apart.measure_apart(job)


def test_errors_come_through_as_what_they_are(tiny: Path) -> None:
    from mlxedge.bench.apart import Job, measure_apart

    with pytest.raises(UsageError, match="has a context of 2048"):
        measure_apart(Job(str(tiny), "numpy", 1, Settings(5000, 0)))
    with pytest.raises(UsageError, match="has a context of 2048"):
        measure(tiny, Settings(5000, 0), engine="numpy")


def test_mlx_lm_benchmark_is_read(home: Path, tmp_path: Path) -> None:
    """As it prints it itself."""
    folder = next(path for path in home.iterdir() if path.name.endswith("-mlx-f32"))
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "benchmark", "--model", folder, "-p", "8", "-g", "4",
         "-n", "3"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (tmp_path / "mlx.txt").write_text(done.stdout)
    compared = CliRunner().invoke(main, ["compare", str(tmp_path), "--json"])
    assert compared.exit_code == 0, compared.stderr
    (group,) = json.loads(compared.stdout)["groups"]
    (result,) = group["results"]
    assert [(t["name"], len(t["runs"])) for t in result["tests"]] == [("pp8", 3), ("tg4 @ d8", 3)]
