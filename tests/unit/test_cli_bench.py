"""bench on a small model: what it counts and records, never how fast it is."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlxedge.bench.measure import measure
from mlxedge.cli import main
from mlxedge.engines.numpy_engine import NumpyEngine, NumpyState
from mlxedge.errors import UsageError


def bench(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_what_is_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill in one go, decode token by token, each from an empty context with new tokens."""
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
        tiny, prompt_tokens=9, generated_tokens=4, repeats=2, engine="numpy", threads=1,
        progress=lambda *event: events.append(event),
    )  # fmt: skip
    assert calls[:3] == [(0, 9)] * 3
    assert len(set(tokens_seen[:3])) == 3
    assert calls[3:] == [(0, 1), (1, 1), (2, 1), (3, 1)] * 3
    assert (found.engine, found.threads, found.warmups) == ("numpy", 1, 1)
    assert found.prefill is not None
    assert found.decode is not None
    assert (found.prefill.tokens, len(found.prefill.seconds)) == (9, 2)
    assert (found.decode.tokens, len(found.decode.seconds)) == (4, 2)
    assert events[0] == (0, 3, "prefill")
    assert events[-1] == (3, 3, "decode")


def test_a_test_can_be_left_out(tiny: Path) -> None:
    found = measure(tiny, prompt_tokens=0, generated_tokens=2, repeats=1, engine="numpy")
    assert found.prefill is None
    assert found.decode is not None
    with pytest.raises(UsageError, match="nothing to measure"):
        measure(tiny, prompt_tokens=0, generated_tokens=0)


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
    assert record["settings"] == {
        "prompt_tokens": 8, "generated_tokens": 4, "repeats": 2, "warmups": 1,
    }  # fmt: skip
    digest = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    line = f"{digest}  model.safetensors\n"
    assert record["model"]["sha256"] == hashlib.sha256(line.encode()).hexdigest()
    assert record["model"]["quantization"] == "bf16"
    assert record["model"]["parameters"] == 1_312_000
    for part, tokens in (("prefill", 8), ("decode", 4)):
        series = record[part]
        assert series["tokens"] == tokens
        assert len(series["seconds"]) == len(series["tokens_per_second"]) == 2
        assert all(s > 0 for s in series["seconds"])
    assert record["load_seconds"] > 0
    assert record["device"]["os"]


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
    assert compared.exit_code == 2
    assert "model hash" in compared.stderr


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
