"""What the device says of its state and its energy, without root.

Everything goes through :class:`~mlxedge.bench.device.System` or, on a Mac, the packages ``macmon``
(PyPI: macmon-lib; temperatures) and ``zeus_apple_silicon`` (energy), which the extra ``sensors``
installs. What cannot be read is ``None``, never 0. The Mac's half was not run on a Mac.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mlxedge.bench.device import System, ThisSystem, power_source

#: A thermal zone that reads outside of this (°C) is not believed.
_SANE = (-20.0, 150.0)
#: The parts of Apple's energy model that make up the chip and its memory.
_APPLE_PARTS = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")


@dataclass(frozen=True)
class Conditions:
    """``power_source`` "AC" or "battery"; ``temperature_c`` of the hottest part that is read;
    ``thermal_state`` "nominal", or "limited" where the system holds its processors back."""

    power_source: str | None
    temperature_c: float | None
    thermal_state: str | None


class EnergyMeter(Protocol):
    """Joules since some fixed moment; ``source`` says of what, and how it is known."""

    source: str

    def joules(self) -> float | None:
        """``None`` where reading fails."""


class Sensors:
    """The sensors of a machine. Cheap to ask, but not while something is timed."""

    def __init__(self, system: System | None = None) -> None:
        self.system = system or ThisSystem()
        self.energy = _METERS.get(self.system.name, _no_meter)(self.system)
        self._sampler = _mac_sampler() if self.system.name == "Darwin" else None

    def conditions(self) -> Conditions:
        if self.system.name == "Darwin":
            return Conditions(
                power_source(self.system), self._mac_temperature(), _mac_thermal(self.system)
            )
        if self.system.name == "Linux":
            return Conditions(
                power_source(self.system),
                _linux_temperature(self.system),
                _linux_thermal(self.system),
            )
        return Conditions(None, None, None)

    def _mac_temperature(self) -> float | None:
        if self._sampler is None:
            return None
        try:
            found = self._sampler.metrics().temperature
            return _sane(max(float(found.cpu_average), float(found.gpu_average)))
        except Exception:
            return None


def _sane(celsius: float) -> float | None:
    return round(celsius, 1) if _SANE[0] < celsius < _SANE[1] and celsius != 0 else None


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception:  # also what its native part raises where it cannot load
        return None


def _mac_sampler() -> Any:
    macmon = _optional("macmon")
    try:
        return macmon.Sampler()
    except Exception:
        return None


def _mac_thermal(system: System) -> str | None:
    """pmset says by how much the processor is slowed; 100 is not at all, and a Mac that never was
    has only notes that nothing was recorded."""
    text = system.run(["pmset", "-g", "therm"])
    if text is None:
        return None
    limits = [int(n) for n in re.findall(r"(?:Speed_Limit|Available_CPUs)\s*=\s*(\d+)", text)]
    speeds = [int(n) for n in re.findall(r"Speed_Limit\s*=\s*(\d+)", text)]
    if speeds:
        return "nominal" if min(speeds) >= 100 else "limited"
    return "nominal" if "No thermal warning level" in text and not limits else None


def _linux_temperature(system: System) -> float | None:
    found = []
    for zone in range(32):
        text = system.read(f"/sys/class/thermal/thermal_zone{zone}/temp")
        if text is None:
            break
        if re.fullmatch(r"-?\d+", text.strip()):
            found.append(_sane(int(text) / 1000))
    return max((t for t in found if t is not None), default=None)


def _linux_thermal(system: System) -> str | None:
    """Whether any cooling device of kind "Processor" is at work."""
    states = []
    for number in range(64):
        kind = system.read(f"/sys/class/thermal/cooling_device{number}/type")
        if kind is None:
            break
        state = system.read(f"/sys/class/thermal/cooling_device{number}/cur_state")
        if kind.strip() == "Processor" and state and state.strip().isdigit():
            states.append(int(state))
    if not states:
        return None
    return "limited" if any(states) else "nominal"


class _Rapl:
    """Intel's and AMD's running average power limit: microjoules of each package, which turn over
    at a maximum (Linux, Documentation/power/powercap). Most systems let only root read them."""

    source = "package energy by RAPL"

    def __init__(self, system: System, zones: list[tuple[str, int]]) -> None:
        self._system = system
        self._zones = [zone for zone, _ in zones]
        self._ranges = [largest for _, largest in zones]
        self._last: list[int] = []
        self._total = [0] * len(zones)

    def joules(self) -> float | None:
        now = []
        for zone in self._zones:
            text = self._system.read(f"{zone}/energy_uj")
            if text is None or not text.strip().isdigit():
                return None
            now.append(int(text))
        for i, (value, largest) in enumerate(zip(now, self._ranges, strict=True)):
            if self._last:
                step = value - self._last[i]
                self._total[i] += step if step >= 0 else step + largest
        self._last = now
        return sum(self._total) / 1e6


def _rapl(system: System) -> EnergyMeter | None:
    zones = []
    for number in range(16):
        zone = f"/sys/class/powercap/intel-rapl:{number}"
        largest = system.read(f"{zone}/max_energy_range_uj")
        if largest is None:
            break
        name = (system.read(f"{zone}/name") or "").strip()
        if name.startswith("package") and largest.strip().isdigit():
            zones.append((zone, int(largest)))
    if not zones:
        return None
    meter = _Rapl(system, zones)
    return meter if meter.joules() is not None else None


class _AppleMeter:
    """IOReport's energy model, which estimates; processors, GPU, neural engine and memory."""

    source = "chip and memory energy by IOReport (a model's estimate)"

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def joules(self) -> float | None:
        try:
            found = self._monitor.get_cumulative_energy()
        except Exception:
            return None
        parts = [getattr(found, part, None) for part in _APPLE_PARTS]
        known = [part for part in parts if part is not None]
        return sum(known) / 1e3 if known else None


def _apple_meter(system: System) -> EnergyMeter | None:
    zeus = _optional("zeus_apple_silicon")
    try:
        return _AppleMeter(zeus.AppleEnergyMonitor())
    except Exception:
        return None


def _no_meter(system: System) -> EnergyMeter | None:
    return None


_METERS: dict[str, Callable[[System], EnergyMeter | None]] = {
    "Linux": _rapl,
    "Darwin": _apple_meter,
}
