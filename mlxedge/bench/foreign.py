"""What other benchmark programs write, as records: llama-bench, LocalScore, mlx_lm.benchmark; and
records as llama-bench's JSON.

Sources: tools/llama-bench/llama-bench.cpp of llama.cpp as vendored by llama-cpp-python 0.3.36,
localscore/printer.cpp of llamafile, ``mlx_lm/benchmark.py`` 0.32.2. None of them tells a hash of
the model, so their records compare with nothing but by force.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mlxedge.bench.measure import LETTERS, Kind
from mlxedge.bench.record import KIND, SCHEMA, Record, check_record, describe_speeds
from mlxedge.bench.statistics import DRIFT_BOUND
from mlxedge.errors import CorruptFileError

_NANO = 1e9
_UNKNOWN = {"power_source": None, "temperature_c": None, "thermal_state": None}
_DEVICE = dict.fromkeys(
    (
        *("os", "machine", "cpu", "model", "cores", "performance_cores", "usable_processors"),
        *("gpu", "gpu_cores", "memory_bytes", "bandwidth_gb_s", "low_power_mode"),
    )
)
_MODEL = dict.fromkeys(
    (
        *("file", "repo", "revision", "format", "architecture", "sha256", "source_sha256"),
        *("bytes", "weight_bytes", "bytes_per_token", "parameters", "bits_per_weight"),
        "quantization",
    )
)


def _record(
    created: str,
    device: Mapping[str, Any],
    model: Mapping[str, Any],
    engine: Mapping[str, Any],
    tests: Sequence[Record],
    *,
    warmups: int | None = None,
) -> Record:
    def most(kind: str) -> int:
        return max((t["tokens"] for t in tests if t["kind"] == kind), default=0)

    return {
        "kind": KIND,
        "schema": SCHEMA,
        "created": created,
        "mlxedge": None,
        "device": {**_DEVICE, **device},
        "model": {**_MODEL, **model},
        "engine": {
            **{"build": None, "processor": None, "threads": None, "versions": {}},
            **{"neural_accelerators": None, **engine},
        },
        "settings": {
            "prompt_tokens": most("prefill"),
            "generated_tokens": most("decode"),
            "depths": sorted({t["depth"] for t in tests}),
            "repeats": max((len(t["runs"]) for t in tests), default=1) or 1,
            "warmups": warmups,
            "cooldown_seconds": None,
            "drift_bound": DRIFT_BOUND,
        },
        "conditions": {"before": _UNKNOWN, "after": _UNKNOWN},
        "load_seconds": None,
        "peak_memory_bytes": None,
        "peak_gpu_memory_bytes": None,
        "energy_source": None,
        "tests": list(tests),
    }


def _test(kind: Kind, tokens: int, depth: int, seconds: Sequence[float]) -> Record:
    """A test of which every run's time is known."""
    name = f"{LETTERS[kind]}{tokens}" + (f" @ d{depth}" if depth else "")
    runs: list[Record] = [
        {
            "seconds": s,
            "started": None,
            "tokens_per_second": round(tokens / s, 4),
            "joules": None,
            "token_seconds": [],
        }
        for s in seconds
    ]
    return {
        **{"name": name, "kind": kind, "tokens": tokens, "depth": depth, "runs": runs},
        **describe_speeds(kind, [tokens / s for s in seconds], list(seconds)),
    }


def _told(
    kind: Kind, tokens: int, depth: int, mean: float, stddev: float | None, joules: float | None
) -> Record:
    """A test of which only the mean is told."""
    speed = {"mean": mean, "stddev": stddev, "median": mean, "low": None, "high": None}
    return {
        **_test(kind, tokens, depth, [tokens / mean]),
        "runs": [],
        "tokens_per_second": speed,
        "ttft_seconds": None,
        "joules": joules,
        "tokens_per_joule": tokens / joules if joules else None,
        "drift": None,
        "drifted": False,
    }


def from_llama_bench(value: Any) -> list[Record]:
    """Of ``llama-bench -o json`` (a list of tests): a record for each model, build and device.

    Tests of prompt and generation together are left out: they are neither.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in value:
        keys = ("model_filename", "build_commit", "cpu_info", "gpu_info", "n_threads", "backends")
        groups.setdefault(tuple(str(row.get(key)) for key in keys), []).append(row)
    return [_llama_bench(rows) for rows in groups.values()]


def _llama_bench(rows: Sequence[Mapping[str, Any]]) -> Record:
    first = rows[0]
    tests = []
    for row in rows:
        prompt, generated, depth = (int(row.get(k) or 0) for k in ("n_prompt", "n_gen", "n_depth"))
        if bool(prompt) == bool(generated):
            continue
        kind: Kind = "prefill" if prompt else "decode"
        samples = [int(n) / _NANO for n in row["samples_ns"]]
        tests.append(_test(kind, prompt or generated, depth, samples))
    file = Path(str(first["model_filename"]).replace("\\", "/")).name
    size, parameters = first.get("model_size"), first.get("model_n_params")
    return _record(
        str(first.get("test_time") or ""),
        {"cpu": first.get("cpu_info") or None, "gpu": first.get("gpu_info") or None},
        {
            "name": file.removesuffix(".gguf"),
            "file": file,
            "format": "gguf",
            "weight_bytes": size,
            "parameters": parameters,
            "bits_per_weight": round(8 * size / parameters, 4) if size and parameters else None,
            "quantization": _quantization(str(first.get("model_type") or "")),
        },
        {
            "name": "llama-bench",
            "build": f"{first.get('build_commit')} ({first.get('build_number')})",
            "processor": "gpu" if first.get("gpu_info") else "cpu",
            "threads": first.get("n_threads"),
        },
        tests,
        warmups=1,
    )


def _quantization(model_type: str) -> str | None:
    """ "llama 1B Q4_K - Medium" → "Q4_K_M"."""
    found = re.search(r"\b((?:I?Q|TQ|F|BF)\d\S*)(?: - (\w)\w*)?$", model_type)
    if found is None:
        return None
    return found[1] + (f"_{found[2]}" if found[2] else "")


def to_llama_bench(records: Iterable[Record]) -> list[Record]:
    """Rows with llama-bench's keys, for programs that read its JSON; what a record does not know is
    left out. Tests without single runs are, too."""
    rows = []
    for record in records:
        engine, model, device = record["engine"], record["model"], record["device"]
        shared = {
            "build_commit": engine["build"] or "",
            "build_number": 0,
            "cpu_info": device["cpu"] or "",
            "gpu_info": device["gpu"] or "",
            "backends": engine["name"],
            "model_filename": model["file"] or model["name"],
            "model_type": f"{model['architecture'] or ''} {model['quantization'] or ''}".strip(),
            "model_size": model["weight_bytes"] or 0,
            "model_n_params": model["parameters"] or 0,
            "n_threads": engine["threads"] or 0,
            "test_time": record["created"],
        }
        for test in record["tests"]:
            if not test["runs"]:
                continue
            seconds = [run["seconds"] for run in test["runs"]]
            speeds = [run["tokens_per_second"] for run in test["runs"]]
            prefill = test["kind"] == "prefill"
            rows.append(
                {
                    **shared,
                    "n_prompt": test["tokens"] if prefill else 0,
                    "n_gen": 0 if prefill else test["tokens"],
                    "n_depth": test["depth"],
                    "avg_ns": round(sum(seconds) / len(seconds) * _NANO),
                    "stddev_ns": round(_spread(seconds) * _NANO),
                    "avg_ts": test["tokens_per_second"]["mean"],
                    "stddev_ts": test["tokens_per_second"]["stddev"] or 0.0,
                    "samples_ns": [round(s * _NANO) for s in seconds],
                    "samples_ts": speeds,
                }
            )
    return rows


def _spread(values: Sequence[float]) -> float:
    import statistics

    return statistics.stdev(values) if len(values) > 1 else 0.0


def from_localscore(value: Mapping[str, Any]) -> list[Record]:
    """Of LocalScore: its tests run a prompt and then generate, so a decode test has the prompt as
    its depth. Readings of power that are 0 were not available."""
    system, accelerator = value["system_info"], value["accelerator_info"]
    runtime, results = value["runtime_info"], value["results"]
    tests: list[Record] = []
    for row in results:
        prompt, generated = int(row["n_prompt"]), int(row["n_gen"])
        ttft = float(row.get("ttft_ms") or 0.0)
        watts = float(row.get("power_watts") or 0.0)
        for kind, tokens, depth, key in (
            ("prefill", prompt, 0, "prompt_tps"),
            ("decode", generated, prompt, "gen_tps"),
        ):
            speed = float(row[key])
            if tokens <= 0 or speed <= 0:
                continue
            spread = row.get(f"{key}_stddev")
            joules = watts * tokens / speed if watts > 0 else None
            spread = float(spread) if spread is not None else None
            test = _told(cast("Kind", kind), tokens, depth, speed, spread, joules)
            if kind == "prefill" and ttft > 0:
                test["ttft_seconds"] = {"median": ttft / 1e3, "p95": ttft / 1e3}
            # It repeats prompts of a length with other generations: the first stands for them.
            if all((t["kind"], t["tokens"], t["depth"]) != (kind, tokens, depth) for t in tests):
                tests.append(test)
    first = results[0]
    gpu = accelerator.get("type") == "GPU"
    record = _record(
        str(first.get("test_time") or ""),
        {
            "os": f"{system.get('kernel_type', '')} {system.get('kernel_release', '')}".strip(),
            "machine": system.get("cpu_arch"),
            "cpu": system.get("cpu_name"),
            "gpu": accelerator.get("name") if gpu else None,
            "memory_bytes": round(float(system["ram_gb"]) * 2**30) if "ram_gb" in system else None,
        },
        {
            "name": str(first.get("model_name") or first.get("model_filename")),
            "file": Path(str(first["model_filename"])).name if "model_filename" in first else None,
            "format": "gguf",
            "weight_bytes": first.get("model_size"),
            "parameters": first.get("model_n_params"),
            "quantization": first.get("model_quant_str"),
        },
        {
            "name": "LocalScore",
            "build": f"{runtime.get('name')} {runtime.get('version')} ({runtime.get('commit')})",
            "processor": "gpu" if gpu else "cpu",
        },
        tests,
        warmups=1,
    )
    if any(test["joules"] is not None for test in tests):
        record["energy_source"] = "LocalScore's mean power"
    return [record]


_TIMING = re.compile(
    r"Timing with prompt_tokens=(\d+), generation_tokens=(\d+), batch_size=(\d+)\."
)
_TRIAL = re.compile(
    r"^Trial \d+:\s+prompt_tps=([\d.]+), generation_tps=([\d.]+), peak_memory=([\d.]+)",
    re.MULTILINE,
)


def from_mlx_benchmark(text: str) -> list[Record]:
    """Of what mlx_lm.benchmark prints, which does not say what it ran on. A trial runs a prompt and
    then generates; only batches of one sequence are read."""
    timing = _TIMING.search(text)
    trials = _TRIAL.findall(text)
    if timing is None or not trials or timing[3] != "1":
        raise ValueError("no trials of one sequence")
    prompt, generated = int(timing[1]), int(timing[2])
    tests = [
        _test("prefill", prompt, 0, [prompt / float(trial[0]) for trial in trials]),
        _test("decode", generated, prompt, [generated / float(trial[1]) for trial in trials]),
    ]
    record = _record("", {}, {"name": "mlx_lm.benchmark"}, {"name": "mlx"}, tests, warmups=1)
    record["peak_gpu_memory_bytes"] = round(max(float(trial[2]) for trial in trials) * 1e9)
    return [record]


def _is_llama_bench(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and "samples_ns" in row and "n_gen" in row for row in value)
        and all("model_filename" in row for row in value)
    )


def _is_localscore(value: Any) -> bool:
    return isinstance(value, dict) and {"accelerator_info", "results"} <= set(value)


def _is_mlx_benchmark(value: Any) -> bool:
    return isinstance(value, str) and _TIMING.search(value) is not None


#: What tells a program's output, and what reads it.
READERS: tuple[tuple[str, Callable[[Any], bool], Callable[[Any], list[Record]]], ...] = (
    ("llama-bench", _is_llama_bench, from_llama_bench),
    ("LocalScore", _is_localscore, from_localscore),
    ("mlx_lm.benchmark", _is_mlx_benchmark, from_mlx_benchmark),
)


def read_foreign(where: str | Path, value: Any) -> list[Record] | None:
    """Records of another program's JSON, or of the text that mlx_lm.benchmark prints; ``None`` if
    it is none of these. Raises CorruptFileError if it makes no sense as what it seems to be."""
    for name, is_one, read in READERS:
        if is_one(value):
            return _read(where, name, read, value)
    return None


def _read(
    where: str | Path, name: str, read: Callable[[Any], list[Record]], value: Any
) -> list[Record]:
    try:
        found = [record for record in read(value) if record["tests"]]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise CorruptFileError(where, f"not what {name} writes: {error!r}"[:300]) from error
    if not found:
        raise CorruptFileError(where, f"there is no prefill or decode test of {name} in it")
    return [check_record(where, record) for record in found]
