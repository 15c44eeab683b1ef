"""``llama-bench`` itself, where it is on PATH: it runs the tests, and its samples are kept."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from mlxedge.bench.measure import Kind, Measurement, Run, Settings, Test
from mlxedge.bench.sensors import Sensors
from mlxedge.errors import BackendError

PROGRAM = "llama-bench"


def find() -> str | None:
    return shutil.which(PROGRAM)


def measure_with_llama_bench(
    path: Path, settings: Settings, *, threads: int | None = None, sensors: Sensors | None = None
) -> Measurement:
    """Run it on a GGUF file. It warms up once, whatever ``settings`` say, tells no time per token,
    and neither its time to load nor its memory.

    Raises BackendError if it is not on PATH, or fails.
    """
    program = find()
    if program is None:
        raise BackendError("engine llama-bench needs llama.cpp's llama-bench on PATH")
    sensors = sensors or Sensors()
    command = [program, "-m", str(path), "-o", "json", "-r", str(settings.repeats)]
    command += ["-p", str(settings.prompt_tokens), "-n", str(settings.generated_tokens)]
    command += ["-d", ",".join(map(str, settings.depths))]
    command += ["-t", str(threads)] if threads else []
    if settings.cooldown_seconds:
        command += ["--delay", str(round(settings.cooldown_seconds))]
    before = sensors.conditions()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        raise BackendError(f"llama-bench ended with status {done.returncode}: {said[0][:300]}")
    try:
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        tests = tuple(_test(row) for row in rows)
        first = rows[0]
        build = f"{first['build_commit']} ({first['build_number']})"
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BackendError(f"this llama-bench's JSON cannot be read: {error!r}") from error
    return Measurement(
        engine=PROGRAM,
        build=build,
        processor="gpu" if first.get("gpu_info") else "cpu",
        threads=first.get("n_threads"),
        settings=Settings(
            settings.prompt_tokens,
            settings.generated_tokens,
            settings.depths,
            settings.repeats,
            1,
            float(round(settings.cooldown_seconds)),
        ),
        load_seconds=None,
        peak_memory_bytes=None,
        peak_gpu_memory_bytes=None,
        energy_source=None,
        before=before,
        after=sensors.conditions(),
        tests=tests,
    )


def _test(row: dict[str, Any]) -> Test:
    prompt, generated = int(row["n_prompt"]), int(row["n_gen"])
    kind: Kind = "prefill" if prompt else "decode"
    runs = tuple(Run(int(ns) / 1e9, None) for ns in row["samples_ns"])
    return Test(kind, prompt or generated, int(row.get("n_depth") or 0), runs)
