"""What machine this is: asked of the system through one thin seam, so that it can be tested.

Nothing is guessed: what the system does not say is ``None``, which readers of a record show as "not
available". On macOS ``sysctl``, ``system_profiler`` and ``pmset`` are asked, on Linux ``/proc`` and
``/sys``; elsewhere only what Python knows is told. What macOS prints is known from its manual pages
and published output; this code has not been run on a Mac.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mlxedge.bench.chips import chip_of

_TIMEOUT = 10.0


class System(Protocol):
    """How questions reach the machine. ``name`` is "Darwin", "Linux" or "Windows"."""

    name: str
    release: str
    machine: str

    def run(self, command: Sequence[str]) -> str | None:
        """What ``command`` prints, or ``None`` if it is missing, fails or hangs."""

    def read(self, path: str) -> str | None:
        """The text of a file, or ``None``."""

    def processors(self) -> int | None:
        """How many processors this process may use."""


class ThisSystem:
    """The machine that this runs on."""

    def __init__(self) -> None:
        self.name = platform.system()
        self.release = platform.mac_ver()[0] if self.name == "Darwin" else platform.release()
        self.machine = platform.machine()

    def run(self, command: Sequence[str]) -> str | None:
        try:
            done = subprocess.run(
                list(command), capture_output=True, text=True, timeout=_TIMEOUT, check=True
            )
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return None
        return done.stdout

    def read(self, path: str) -> str | None:
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def processors(self) -> int | None:
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count()


def describe(system: System | None = None) -> dict[str, Any]:
    """The device part of a record.

    ``os``, ``machine``, ``cpu`` (brand), ``model`` (a Mac's, such as "Mac14,6"), ``cores`` and
    ``performance_cores`` (physical), ``usable_processors``, ``gpu``, ``gpu_cores``,
    ``memory_bytes``, ``bandwidth_gb_s`` (nominal, of chips that ``mlxedge.bench.chips`` knows),
    ``low_power_mode``. Unknown is ``None``. There is no name of a machine or a person in it.
    """
    system = system or ThisSystem()
    asked = {"Darwin": _mac, "Linux": _linux}.get(system.name, _nothing)(system)
    found = {
        "os": f"{'macOS' if system.name == 'Darwin' else system.name} {system.release}".strip(),
        "machine": system.machine,
        "cpu": None,
        "model": None,
        "cores": None,
        "performance_cores": None,
        "usable_processors": system.processors(),
        "gpu": None,
        "gpu_cores": None,
        "memory_bytes": None,
        "low_power_mode": None,
        **asked,
    }
    chip = chip_of(found)
    return found | {"bandwidth_gb_s": chip.bandwidth_gb_s if chip else None}


def power_source(system: System) -> str | None:
    """ "AC" or "battery"; ``None`` where the system does not say."""
    if system.name == "Darwin":
        text = system.run(["pmset", "-g", "batt"]) or ""
        source = re.search(r"drawing from '(AC|Battery) Power'", text)
        return {"AC": "AC", "Battery": "battery"}[source[1]] if source else None
    for name in ("AC", "ACAD", "ADP0", "ADP1", "AC0"):
        online = system.read(f"/sys/class/power_supply/{name}/online")
        if online is not None and online.strip() in ("0", "1"):
            return "AC" if online.strip() == "1" else "battery"
    return None


def neural_accelerators(device: dict[str, Any], mlx: str | None) -> bool | None:
    """Whether MLX computes with the GPU's neural accelerators: by what its versions can do, for
    nothing tells what it does. They came with M5, macOS 26.2 and MLX 0.30; ``None`` is not known.
    """
    chip = re.fullmatch(r"Apple M(\d+)(?: \w+)?", device.get("cpu") or "")
    if chip is None or mlx is None:
        return None if chip is None else False
    system = re.match(r"macOS (\d+)(?:\.(\d+))?", device.get("os") or "")
    version = re.match(r"(\d+)\.(\d+)", mlx)
    if system is None or version is None:
        return None
    release = int(system[1]), int(system[2] or 0)
    return (
        int(chip[1]) >= 5 and release >= (26, 2) and (int(version[1]), int(version[2])) >= (0, 30)
    )


def _nothing(system: System) -> dict[str, Any]:
    return {}


def _mac(system: System) -> dict[str, Any]:
    def sysctl(key: str) -> str | None:
        # One key a call: sysctl stops at the first that this Mac does not have.
        text = system.run(["sysctl", "-n", key])
        return text.strip() or None if text else None

    def number(key: str) -> int | None:
        text = sysctl(key)
        return int(text) if text and text.isdigit() else None

    gpu, gpu_cores = _mac_gpu(system.run(["system_profiler", "SPDisplaysDataType", "-json"]))
    saving = re.search(
        r"^\s*lowpowermode\s+([01])", system.run(["pmset", "-g"]) or "", re.MULTILINE
    )
    return {
        "cpu": sysctl("machdep.cpu.brand_string"),
        "model": sysctl("hw.model"),
        "cores": number("hw.physicalcpu"),
        "performance_cores": number("hw.perflevel0.physicalcpu"),
        "gpu": gpu,
        "gpu_cores": gpu_cores,
        "memory_bytes": number("hw.memsize"),
        "low_power_mode": saving[1] == "1" if saving else None,
    }


def _mac_gpu(text: str | None) -> tuple[str | None, int | None]:
    """Name and cores of the first GPU that system_profiler lists with cores."""
    try:
        displays = json.loads(text or "{}").get("SPDisplaysDataType", [])
        for display in displays:
            cores = str(display.get("sppci_cores", ""))
            if cores.isdigit():
                return display.get("sppci_model"), int(cores)
    except (ValueError, AttributeError, TypeError):
        pass
    return None, None


def _linux(system: System) -> dict[str, Any]:
    info = system.read("/proc/cpuinfo") or ""
    brand = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info, re.MULTILINE)
    packages = re.findall(r"^physical id\s*:\s*(\d+)$", info, re.MULTILINE)
    ids = re.findall(r"^core id\s*:\s*(\d+)$", info, re.MULTILINE)
    cores = len(set(zip(packages, ids))) if packages and len(packages) == len(ids) else None
    memory = re.search(r"^MemTotal:\s*(\d+) kB", system.read("/proc/meminfo") or "", re.MULTILINE)
    return {
        "cpu": brand[1].strip() if brand else None,
        "cores": cores,
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
    }
