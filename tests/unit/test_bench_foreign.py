"""What llama-bench, LocalScore and mlx_lm.benchmark write, as records."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from oracles.bench_records import record

from mlxedge.bench.foreign import from_mlx_benchmark, read_foreign, to_llama_bench
from mlxedge.bench.results import read_results
from mlxedge.errors import CorruptFileError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bench"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text("utf-8"))


def read(path: Path) -> list[dict[str, Any]]:
    return [result.record for result in read_results([str(path)])]


def test_llama_bench() -> None:
    """As llama-bench of llama.cpp, as vendored by llama-cpp-python 0.3.36, wrote it."""
    (made,) = read(GOLDEN / "llama-bench.json")
    rows = golden("llama-bench.json")
    assert [t["name"] for t in made["tests"]] == ["pp64", "tg16", "pp64 @ d32", "tg16 @ d32"]
    for test, row in zip(made["tests"], rows, strict=True):
        assert [round(r["seconds"] * 1e9) for r in test["runs"]] == row["samples_ns"]
        assert test["tokens_per_second"]["mean"] == pytest.approx(row["avg_ts"], rel=1e-4)
        assert test["tokens_per_second"]["stddev"] == pytest.approx(row["stddev_ts"], rel=1e-3)
    assert made["engine"]["name"] == "llama-bench"
    assert made["model"]["sha256"] is None
    assert made["model"]["parameters"] == rows[0]["model_n_params"]
    assert made["model"]["quantization"] == "Q4_K_M"
    assert "/" not in made["model"]["file"]


def test_back_to_llama_bench() -> None:
    """What it wrote comes back with its keys and its numbers."""
    (made,) = read(GOLDEN / "llama-bench.json")
    for row, theirs in zip(to_llama_bench([made]), golden("llama-bench.json"), strict=True):
        assert set(row) <= set(theirs)
        for key in ("n_prompt", "n_gen", "n_depth", "samples_ns", "n_threads", "model_size"):
            assert row[key] == theirs[key], key
        for key in ("avg_ns", "stddev_ns", "avg_ts", "stddev_ts"):
            assert row[key] == pytest.approx(theirs[key], rel=1e-3), key
    (again,) = read_foreign("here", to_llama_bench([record()])) or []
    assert [t["runs"][0]["seconds"] for t in again["tests"]] == [0.5, 2.0]


LOCALSCORE = {
    "runtime_info": {"name": "llamafile", "version": "0.9.2", "commit": "abc"},
    "system_info": {
        "cpu_name": "Apple M4 Max", "cpu_arch": "arm64", "ram_gb": 64.0,
        "kernel_type": "Darwin", "kernel_release": "24.5.0", "version": "v",
    },
    "accelerator_info": {
        "name": "Apple M4 Max", "manufacturer": "Apple", "memory_gb": 48.0, "type": "GPU",
    },
    "results": [
        {
            "build_commit": "x", "build_number": 1, "model_name": "Llama 3.2 1B",
            "model_quant_str": "Q4_K - Medium", "model_params_str": "1B",
            "model_filename": "/models/llama.gguf", "model_type": "llama 1B", "model_size": 1000,
            "model_n_params": 2000, "n_prompt": 1024, "n_gen": 16,
            "test_time": "2026-01-01T00:00:00Z", "avg_time_ms": 900, "stddev_time_ms": 1,
            "prompt_tps": 2048.0, "prompt_tps_watt": 51.2, "prompt_tps_stddev": 3.0,
            "gen_tps": 100.0, "gen_tps_watt": 2.5, "gen_tps_stddev": 1.0, "name": "pp1024+tg16",
            "power_watts": 40.0, "ttft_ms": 510, "main_gpu": 0, "samples_ns": [1, 2],
        },
        {
            "model_name": "Llama 3.2 1B", "n_prompt": 64, "n_gen": 32, "prompt_tps": 1000.0,
            "gen_tps": 110.0, "power_watts": 0.0, "ttft_ms": 70,
        },
    ],
}  # fmt: skip


def test_localscore() -> None:
    """The keys are those that localscore/printer.cpp of llamafile writes."""
    (made,) = read_foreign("here", LOCALSCORE) or []
    names = [(t["name"], t["tokens_per_second"]["mean"]) for t in made["tests"]]
    assert names == [
        ("pp1024", 2048.0), ("tg16 @ d1024", 100.0), ("pp64", 1000.0), ("tg32 @ d64", 110.0),
    ]  # fmt: skip
    first, second, third, _ = made["tests"]
    assert first["runs"] == []  # it tells means only
    assert first["tokens_per_second"]["stddev"] == 3.0
    assert first["ttft_seconds"]["median"] == 0.51
    assert (first["joules"], second["tokens_per_joule"]) == (20.0, 2.5)
    assert third["joules"] is None  # no watts is no reading
    assert made["device"]["cpu"] == "Apple M4 Max"
    assert made["device"]["memory_bytes"] == 64 << 30


MLX = """Running warmup..
Timing with prompt_tokens=512, generation_tokens=128, batch_size=1.
Trial 1:  prompt_tps=1024.000, generation_tps=64.000, peak_memory=1.500, total_time=2.500
Trial 2:  prompt_tps=512.000, generation_tps=32.000, peak_memory=1.600, total_time=5.000
Averages: prompt_tps=768.000, generation_tps=48.000, peak_memory=1.550
"""


def test_mlx_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "mlx.txt"
    path.write_text(MLX)
    (made,) = read(path)
    prefill, decode = made["tests"]
    assert (prefill["name"], decode["name"]) == ("pp512", "tg128 @ d512")
    assert [run["tokens_per_second"] for run in prefill["runs"]] == [1024.0, 512.0]
    assert decode["drift"] == -0.5
    assert made["peak_gpu_memory_bytes"] == 1_600_000_000
    with pytest.raises(ValueError, match="one sequence"):
        from_mlx_benchmark(MLX.replace("batch_size=1", "batch_size=4"))


def test_texts_in_a_folder_of_results_may_be_anything(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("bought a fan")
    (tmp_path / "mlx.txt").write_text(MLX)
    assert len(read(tmp_path)) == 1
    with pytest.raises(CorruptFileError, match="neither JSON"):
        read(tmp_path / "notes.txt")


def damage(rows: Any, **changes: Any) -> Any:
    made = copy.deepcopy(rows)
    made[0] |= changes
    return made


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (lambda: damage(golden("llama-bench.json"), samples_ns=["x"]), "not what llama-bench"),
        (lambda: damage(golden("llama-bench.json"), samples_ns=[0]), "not what llama-bench"),
        (lambda: damage(golden("llama-bench.json"), samples_ns=[]), "not what llama-bench"),
        (lambda: damage(golden("llama-bench.json"), n_prompt="x"), "not what llama-bench"),
        (
            lambda: [r | {"n_gen": 5, "n_prompt": 5} for r in golden("llama-bench.json")],
            "no prefill or decode test",
        ),
        (lambda: LOCALSCORE | {"results": []}, "not what LocalScore"),
        (lambda: LOCALSCORE | {"system_info": 3}, "not what LocalScore"),
        (lambda: LOCALSCORE | {"results": [{"n_prompt": 1}]}, "not what LocalScore"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, value: Any, problem: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(value()))
    with pytest.raises(CorruptFileError, match=problem):
        read(path)
