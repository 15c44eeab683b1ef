"""What a device says of itself, from recorded answers of the systems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from mlxedge.bench.chips import chip_of, chips, find_chips
from mlxedge.bench.device import ThisSystem, describe, neural_accelerators, power_source
from mlxedge.bench.sensors import Conditions, Sensors

GPU = json.dumps(
    {
        "SPDisplaysDataType": [
            {
                "_name": "Apple M2 Max",
                "sppci_bus": "spdisplays_builtin",
                "sppci_cores": "30",
                "sppci_model": "Apple M2 Max",
            }
        ]
    }
)
MAC = {
    "sysctl -n machdep.cpu.brand_string": "Apple M2 Max\n",
    "sysctl -n hw.model": "Mac14,6\n",
    "sysctl -n hw.physicalcpu": "12\n",
    "sysctl -n hw.perflevel0.physicalcpu": "8\n",
    "sysctl -n hw.memsize": "34359738368\n",
    "system_profiler SPDisplaysDataType -json": GPU,
    "pmset -g batt": "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t80%; ...\n",
    "pmset -g": "System-wide power settings:\nCurrently in use:\n lowpowermode         1\n",
}
CPUINFO = """\
processor\t: 0
model name\t: AMD EPYC 7763 64-Core Processor
physical id\t: 0
core id\t\t: 0

processor\t: 1
model name\t: AMD EPYC 7763 64-Core Processor
physical id\t: 0
core id\t\t: 0

processor\t: 2
model name\t: AMD EPYC 7763 64-Core Processor
physical id\t: 0
core id\t\t: 1
"""
LINUX = {
    "/proc/cpuinfo": CPUINFO,
    "/proc/meminfo": "MemTotal:       24684096 kB\nMemFree:   1 kB\n",
}


@dataclass
class Recorded:
    """A system that answers from a table, and knows nothing else."""

    name: str
    answers: Mapping[str, str] = field(default_factory=dict)
    release: str = "1.0"
    machine: str = "arm64"

    def run(self, command: Sequence[str]) -> str | None:
        return self.answers.get(" ".join(command))

    def read(self, path: str) -> str | None:
        return self.answers.get(path)

    def processors(self) -> int | None:
        return 4


def test_a_mac() -> None:
    assert describe(Recorded("Darwin", MAC, release="15.5")) == {
        "os": "macOS 15.5",
        "machine": "arm64",
        "cpu": "Apple M2 Max",
        "model": "Mac14,6",
        "cores": 12,
        "performance_cores": 8,
        "usable_processors": 4,
        "gpu": "Apple M2 Max",
        "gpu_cores": 30,
        "memory_bytes": 32 << 30,
        "bandwidth_gb_s": 400.0,
        "low_power_mode": True,
    }
    assert power_source(Recorded("Darwin", MAC)) == "battery"


def test_a_mac_on_its_charger() -> None:
    plugged = {**MAC, "pmset -g batt": "Now drawing from 'AC Power'\n", "pmset -g": " sleep 1\n"}
    system = Recorded("Darwin", plugged)
    assert (power_source(system), describe(system)["low_power_mode"]) == ("AC", None)


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"SPDisplaysDataType": [3]}'])
def test_a_mac_whose_gpu_is_not_told(text: str) -> None:
    answers = {**MAC, "system_profiler SPDisplaysDataType -json": text}
    found = describe(Recorded("Darwin", answers))
    assert (found["gpu"], found["gpu_cores"]) == (None, None)


def test_linux() -> None:
    found = describe(Recorded("Linux", LINUX, release="6.8", machine="x86_64"))
    known = {key: value for key, value in found.items() if value is not None}
    assert known == {
        "os": "Linux 6.8",
        "machine": "x86_64",
        "cpu": "AMD EPYC 7763 64-Core Processor",
        "cores": 2,
        "usable_processors": 4,
        "memory_bytes": 24684096 * 1024,
    }


@pytest.mark.parametrize("name", ["Darwin", "Linux", "Windows", "FreeBSD"])
def test_what_is_not_told_is_none(name: str) -> None:
    found = describe(Recorded(name))
    told = {"os", "machine", "usable_processors"}
    assert {key for key, value in found.items() if value is not None} == told
    assert set(found) == set(describe(Recorded("Darwin", MAC)))


def test_this_machine_answers() -> None:
    system = ThisSystem()
    assert system.run(["no-such-program-anywhere"]) is None
    assert system.read("/no/such/file") is None
    found = describe(system)
    assert found["os"]
    assert found["usable_processors"] >= 1
    json.dumps(found)


def test_chips_by_name_and_cores() -> None:
    assert [c.gpu_cores for c in find_chips("apple m2 max")] == [30, 38]
    assert [c.decode for c in find_chips("M2 Max", 38)] == [66.0]
    assert find_chips("M99") == []
    assert len({(c.name, c.gpu_cores) for c in chips()}) == len(chips())
    assert all(0 < c.decode < c.bandwidth_gb_s for c in chips())
    # One name, two bandwidths: only the cores tell.
    assert chip_of({"cpu": "Apple M3 Max", "gpu_cores": None}) is None
    found = chip_of({"cpu": "Apple M3 Max", "gpu_cores": 30})
    assert found is not None
    assert found.bandwidth_gb_s == 300.0
    assert chip_of({"cpu": "AMD EPYC", "gpu_cores": None}) is None
    assert chip_of({"cpu": None}) is None


@pytest.mark.parametrize(
    ("cpu", "os", "mlx", "active"),
    [
        ("Apple M5", "macOS 26.2", "0.30.1", True),
        ("Apple M5 Max", "macOS 27.0", "1.0", True),
        ("Apple M5", "macOS 26.1", "0.32.4", False),
        ("Apple M5", "macOS 26.2", "0.29.4", False),
        ("Apple M4 Max", "macOS 26.2", "0.32.4", False),
        ("Apple M5", "macOS 26.2", None, False),
        ("Apple M5", "macOS", "0.32.4", None),
        ("AMD EPYC", "Linux 6.8", "0.32.4", None),
        (None, "macOS 26.2", "0.32.4", None),
    ],
)
def test_neural_accelerators(cpu: str | None, os: str, mlx: str | None, active: bool) -> None:
    assert neural_accelerators({"cpu": cpu, "os": os}, mlx) is active


THERM = """Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
2026-11-29 10:00:00 +0100 CPU Power notify
\tCPU_Scheduler_Limit \t= 100
\tCPU_Available_CPUs \t= 8
\tCPU_Speed_Limit \t= {}
"""


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (THERM.format(100), "nominal"),
        (THERM.format(63), "limited"),
        (THERM.split("2026")[0], "nominal"),
        ("", None),
        (None, None),
    ],
)
def test_thermal_state_of_a_mac(text: str | None, state: str | None) -> None:
    answers = {} if text is None else {"pmset -g therm": text}
    found = Sensors(Recorded("Darwin", {**MAC, **answers})).conditions()
    assert found == Conditions("battery", None, state)


ZONE = "/sys/class/thermal/thermal_zone{}/temp"
COOLER = "/sys/class/thermal/cooling_device{}/{}"


def test_conditions_on_linux() -> None:
    answers = {
        ZONE.format(0): "27800\n", ZONE.format(1): "61500\n", ZONE.format(2): "-274000\n",
        COOLER.format(0, "type"): "Fan\n", COOLER.format(0, "cur_state"): "3\n",
        COOLER.format(1, "type"): "Processor\n", COOLER.format(1, "cur_state"): "0\n",
        "/sys/class/power_supply/AC/online": "1\n",
    }  # fmt: skip
    assert Sensors(Recorded("Linux", answers)).conditions() == Conditions("AC", 61.5, "nominal")
    slowed = {**answers, COOLER.format(1, "cur_state"): "2\n"}
    slowed["/sys/class/power_supply/AC/online"] = "0"
    found = Sensors(Recorded("Linux", slowed)).conditions()
    assert found == Conditions("battery", 61.5, "limited")


@pytest.mark.parametrize("name", ["Darwin", "Linux", "Windows"])
def test_sensors_that_say_nothing(name: str) -> None:
    sensors = Sensors(Recorded(name))
    assert sensors.conditions() == Conditions(None, None, None)
    assert sensors.energy is None


RAPL = "/sys/class/powercap/intel-rapl:{}/{}"


@dataclass
class Counting(Recorded):
    """RAPL of two packages and a memory zone, read in turn."""

    readings: list[str] = field(default_factory=list)

    def read(self, path: str) -> str | None:
        fixed = {
            RAPL.format(0, "name"): "package-0\n",
            RAPL.format(0, "max_energy_range_uj"): "1000000\n",
            RAPL.format(1, "name"): "psys\n",
            RAPL.format(1, "max_energy_range_uj"): "1000000\n",
        }
        if path == RAPL.format(0, "energy_uj"):
            return self.readings.pop(0) if self.readings else None
        return fixed.get(path)


def test_energy_by_rapl_which_turns_over() -> None:
    meter = Sensors(Counting("Linux", readings=["900000", "950000", "100000", "x"])).energy
    assert meter is not None
    assert meter.joules() == pytest.approx(0.05)
    assert meter.joules() == pytest.approx(0.2)
    assert meter.joules() is None  # never 0
    assert Sensors(Counting("Linux", readings=[])).energy is None


def test_energy_and_temperature_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the packages that read them there, played here; they were not run on a Mac."""
    import sys
    from types import SimpleNamespace

    parts = {"cpu_total_mj": 1500, "gpu_mj": 2500, "dram_mj": None, "ane_mj": 0}
    monitor = SimpleNamespace(get_cumulative_energy=lambda: SimpleNamespace(**parts))
    zeus = SimpleNamespace(AppleEnergyMonitor=lambda: monitor)
    temperature = SimpleNamespace(cpu_average=61.25, gpu_average=48.0)
    sampler = SimpleNamespace(metrics=lambda: SimpleNamespace(temperature=temperature))
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", zeus)
    monkeypatch.setitem(sys.modules, "macmon", SimpleNamespace(Sampler=lambda: sampler))
    sensors = Sensors(Recorded("Darwin", MAC))
    assert sensors.energy is not None
    assert sensors.energy.joules() == 4.0
    assert sensors.conditions().temperature_c == 61.2
    parts.update(dict.fromkeys(parts))
    assert sensors.energy.joules() is None
    temperature.cpu_average = temperature.gpu_average = 0.0
    assert sensors.conditions().temperature_c is None


def test_the_sensors_of_this_machine_answer() -> None:
    sensors = Sensors()
    found = sensors.conditions()
    assert found.power_source in ("AC", "battery", None)
    assert found.thermal_state in ("nominal", "limited", None)
    assert sensors.energy is None or sensors.energy.joules() is not None
