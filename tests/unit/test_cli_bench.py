"""bench on a small model: what it counts and records, never how fast it is."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlxedge import errors
from mlxedge.bench import apart
from mlxedge.bench.measure import Settings, measure
from mlxedge.cli import main
from mlxedge.engines.numpy_engine import NumpyEngine, NumpyState
from mlxedge.errors import UsageError


def bench(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_what_is_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill in one go, decode token by token, each after its depth with new tokens."""
    calls: list[tuple[int, int]] = []
    tokens_seen: list[tuple[int, ...]] = []
    run = NumpyEngine.run

    def counted(self: NumpyEngine, tokens: Any, state: NumpyState, results: int) -> Any:
        calls.append((state.length, len(tokens)))
        tokens_seen.append(tuple(tokens))
        return run(self, tokens, state, results)

    monkeypatch.setattr(NumpyEngine, "run", counted)
    events: list[tuple[int, int, str]] = []
    found = measure(
        tiny, Settings(9, 4, (0, 6), repeats=2), engine="numpy", threads=1,
        progress=lambda *event: events.append(event),
    )  # fmt: skip
    assert calls[:3] == [(0, 9)] * 3
    assert len(set(tokens_seen[:3])) == 3
    assert calls[3:15] == [(0, 1), (1, 1), (2, 1), (3, 1)] * 3
    # The context is made once for each test, and gone back to.
    assert calls[15:19] == [(0, 6), (6, 9), (6, 9), (6, 9)]
    assert calls[19:] == [(0, 6), *[(6, 1), (7, 1), (8, 1), (9, 1)] * 3]
    assert (found.engine, found.threads, found.processor) == ("numpy", 1, "cpu")
    assert [(t.name, len(t.runs)) for t in found.tests] == [
        ("pp9", 2), ("tg4", 2), ("pp9 @ d6", 2), ("tg4 @ d6", 2),
    ]  # fmt: skip
    assert [len(run.token_seconds) for test in found.tests for run in test.runs] == [0, 0, 4, 4] * 2
    starts = [run.started for test in found.tests for run in test.runs]
    assert starts[0] is not None
    assert starts[0] < 0.0 or starts == sorted(starts)  # type: ignore[type-var]
    assert events[0] == (0, 3, "pp9")
    assert events[-1] == (3, 3, "tg4 @ d6")


def test_a_test_can_be_left_out(tiny: Path) -> None:
    found = measure(tiny, Settings(0, 2, repeats=1), engine="numpy")
    assert [test.kind for test in found.tests] == ["decode"]
    for wrong in (
        {"prompt_tokens": 0, "generated_tokens": 0}, {"depths": ()}, {"depths": (1, 1)},
        {"depths": (-1,)}, {"repeats": 0}, {"warmups": -1},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Settings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["numpy", "mlx"])
def test_a_record(tiny: Path, tmp_path: Path, engine: str) -> None:
    out = tmp_path / "r.json"
    done = bench(tiny, "-p", 8, "-n", 4, "-r", 2, "--engine", engine, "-o", out, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == f"written: {out}\n"
    (record,) = json.loads(done.stdout)
    assert json.loads(out.read_text()) == record
    assert record["engine"]["name"] == engine
    assert record["engine"]["processor"] in ("cpu", "gpu")
    assert (record["engine"]["threads"] is None) == (engine == "mlx")
    assert {"python", "numpy" if engine == "numpy" else "mlx"} <= set(record["engine"]["versions"])
    assert record["engine"]["build"].startswith("mlxedge" if engine == "numpy" else "mlx ")
    assert record["settings"] == {
        "prompt_tokens": 8, "generated_tokens": 4, "depths": [0], "repeats": 2, "warmups": 1,
        "cooldown_seconds": 0.0, "drift_bound": 0.05,
    }  # fmt: skip
    digest = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    line = f"{digest}  model.safetensors\n"
    assert record["model"]["sha256"] == hashlib.sha256(line.encode()).hexdigest()
    assert record["model"]["quantization"] == "bf16"
    assert record["model"]["parameters"] == 1_312_000
    assert record["model"]["bytes_per_token"] == 2 * 1_312_000  # its head is its embedding
    assert [test["tokens"] for test in record["tests"]] == [8, 4]
    for test in record["tests"]:
        assert len(test["runs"]) == 2
        assert all(run["seconds"] > 0 for run in test["runs"])
    assert record["load_seconds"] > 0
    assert record["device"]["os"]


def test_forms_of_output(tiny: Path) -> None:
    arguments = (tiny, "-p", 4, "-n", 2, "-r", 2, "--engine", "numpy")
    csv = bench(*arguments, "--csv").stdout.splitlines()
    assert len(csv) == 1 + 4
    rows = json.loads(bench(*arguments, "--llama-bench-json").stdout)
    assert [(r["n_prompt"], r["n_gen"], len(r["samples_ns"])) for r in rows] == [
        (4, 0, 2),
        (0, 2, 2),
    ]
    markdown = bench(*arguments, "--md").stdout.splitlines()
    assert markdown[1].startswith("| --- |")
    assert len(markdown) == 4
    schema = json.loads(bench("--schema").stdout)
    assert schema["title"] == "mlxedge benchmark record"


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller ones than are worth measuring."""
    from mlxedge.bench import kernels

    monkeypatch.setattr(kernels, "_STREAM_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(kernels, "_MATRIX", (2, 256))
    monkeypatch.setattr(kernels, "SHAPES", ((256, 256),))
    for engine in ("numpy", "mlx"):
        done = bench("--kernels", "--engine", engine, "-r", 3, "--json", "-o", tmp_path / "k")
        assert done.exit_code == 0, done.stderr
        (record,) = json.loads(done.stdout)
        names = {figure["name"]: figure for figure in record["figures"]}
        assert {"memory, read", "encode q4_k, reference", "decode q8_0"} <= set(names)
        assert "matmul 1 × [256, 256] affine-4bit-g64" in names
        for figure in record["figures"]:
            assert len(figure["values"]) == 3
            assert min(figure["values"]) > 0
            assert (figure["roofline"] is None) == figure["name"].startswith("memory")
    assert len(list((tmp_path / "k").iterdir())) == 2
    for wrong in (("--kernels", "model"), ("--kernels", "--engine", "llama.cpp"), ()):
        assert bench(*wrong).exit_code == 2


def test_several_models_into_a_folder(tiny: Path, smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = bench(tiny, smollm2, "-p", 4, "-n", 0, "-r", 1, "--engine", "numpy", "-o", out)
    assert done.exit_code == 0, done.stderr
    files = sorted(p.name for p in out.iterdir())
    assert len(files) == 2
    assert files[0].startswith("SmolLM2-135M-Instruct.Q4_1-numpy-")
    assert "tiny-llama" in done.stdout
    assert done.stdout.count("pp4") == 2
    assert "tg" not in done.stdout
    assert "peak memory" in done.stdout
    compared = CliRunner().invoke(main, ["compare", str(out)])
    assert compared.exit_code == 0
    assert "not ranked together, since they differ in model hash" in compared.stderr


def test_an_existing_file_is_refused_before_the_work(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    out.write_text("mine")
    done = bench(tiny, "-o", out)
    assert done.exit_code == 1
    assert "exists" in done.stderr
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-p", 3000], "has a context of 2048 tokens"),
        (["-p", 0, "-n", 0], "nothing to measure"),
        (["-r", 0], "Invalid value for '-r'"),
        (["-d", "1,x"], "not a list of numbers"),
        (["-d", "2000", "-p", 100], "has a context of 2048 tokens"),
        (["--engine", "llama.cpp"], "is a Hugging Face folder, and llama.cpp runs a GGUF file"),
        (["--engine", "llama-bench", "--engine", "onnxruntime"], "is a Hugging Face folder"),
    ],
)
def test_what_is_refused(tiny: Path, arguments: list[object], problem: str) -> None:
    done = bench(tiny, *arguments)
    assert done.exit_code == 2
    assert problem in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can start the count anew")
def test_peak_memory_is_counted_from_its_start() -> None:
    code = (
        "from mlxedge.bench.memory import PeakMemory\n"
        "def touch(size):\n"
        "    held = bytearray(size)\n"
        "    held[::4096] = bytes(size // 4096)\n"
        "touch(200 << 20)\n"
        "memory = PeakMemory()\n"
        "before = memory.read()\n"
        "touch(40 << 20)\n"
        "print(before, memory.read())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 100 << 20
    assert 39 << 20 < after - before < 50 << 20


def test_what_was_measured_is_kept_if_a_later_model_fails(tiny: Path, tmp_path: Path) -> None:
    """Of the second the engine refuses the context, which shows when it is measured."""
    short = tmp_path / "short"
    shutil.copytree(tiny, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    done = bench(tiny, short, "--engine", "numpy", "-p", 16, "-n", 0, "-r", 1, "-o", tmp_path / "o")
    assert done.exit_code != 0
    assert len(list((tmp_path / "o").glob("*.json"))) == 1
    assert "pp16" in done.stdout


def test_depths_may_be_given_apart(tiny: Path) -> None:
    done = bench(tiny, "--engine", "numpy", "-p", 0, "-n", 2, "-r", 1, "-d", 0, "-d", "4", "--json")
    assert [test["depth"] for test in json.loads(done.stdout)[0]["tests"]] == [0, 4]


@pytest.mark.parametrize(
    "kind", [e for e in vars(errors).values() if isinstance(e, type)], ids=lambda e: e.__name__
)
def test_every_error_comes_back_from_the_child(kind: type) -> None:
    if issubclass(kind, errors.MlxedgeError):
        made = apart._error({"kind": kind.__name__, "message": "what it said"})
        assert type(made) is kind
        assert str(made) == "what it said"


def test_a_child_may_complain_at_length(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONVERBOSE", "1")
    job = apart.Job(str(tiny), "numpy", 1, Settings(4, 0, (0,), repeats=1, warmups=0))
    assert apart.measure_apart(job).tests[0].tokens == 4


def test_the_child_takes_nothing_from_the_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout has a folder of the package's name, which is not what is installed."""
    (tmp_path / "mlxedge").mkdir()
    (tmp_path / "mlxedge" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    job = apart.Job(str(tiny), "numpy", 1, Settings(4, 0, (0,), repeats=1, warmups=0))
    assert apart.measure_apart(job).tests[0].tokens == 4
