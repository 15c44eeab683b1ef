"""What a device says of itself, from recorded answers of the systems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from mlxedge.bench.device import ThisSystem, describe

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
        "power_source": "battery",
        "low_power_mode": True,
    }


def test_a_mac_on_its_charger() -> None:
    plugged = {**MAC, "pmset -g batt": "Now drawing from 'AC Power'\n", "pmset -g": " sleep 1\n"}
    found = describe(Recorded("Darwin", plugged))
    assert (found["power_source"], found["low_power_mode"]) == ("AC", None)


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
