"""Apple silicon: memory bandwidth by chip, and published reference results.

``chips.csv`` holds a row per chip and GPU size: nominal memory bandwidth (GB/s, 1e9 bytes) and the
published speeds of Llama-2-7B Q4_0 in llama.cpp (512 prompt tokens, 128 generated), each with its
build, source and how sure it is ("published", or from copies of it). Results of different builds do
not compare: prefill on M5 differs threefold between two of them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

#: What the published rows ran: Llama-2-7B Q4_0, 3.56 GiB of weights.
REFERENCE_MODEL = "llama-2-7b Q4_0"
REFERENCE_WEIGHT_BYTES = 3_825_065_984


@dataclass(frozen=True)
class Chip:
    """One row. Speeds are tokens per second."""

    name: str
    gpu_cores: int
    bandwidth_gb_s: float
    prefill: float
    decode: float
    build: str
    source: str
    confidence: str

    @property
    def generation(self) -> str:
        """ "M3" of an M3 Max."""
        return self.name.split()[0]

    def __str__(self) -> str:
        return f"{self.name}, {self.gpu_cores} GPU cores"


@cache
def chips() -> tuple[Chip, ...]:
    """All rows, in the order of the table."""
    text = resources.files("mlxedge.bench").joinpath("chips.csv").read_text(encoding="utf-8")
    return tuple(
        Chip(
            row["chip"],
            int(row["gpu_cores"]),
            float(row["bandwidth_gb_s"]),
            float(row["pp512_tok_s"]),
            float(row["tg128_tok_s"]),
            row["engine_build"],
            row["source"],
            row["confidence"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def find_chips(name: str, gpu_cores: int | None = None) -> list[Chip]:
    """The rows of a chip as it is called ("M2 Max", "apple m2 max"), with so many GPU cores if that
    is told; none if it is not known."""
    wanted = re.sub(r"^apple\s+", "", name.strip(), flags=re.IGNORECASE).casefold()
    found = [chip for chip in chips() if chip.name.casefold() == wanted]
    same = [chip for chip in found if chip.gpu_cores == gpu_cores]
    return same if gpu_cores is not None else found


def chip_of(device: Mapping[str, Any]) -> Chip | None:
    """The row of a described device, by its chip and GPU cores; where no row has those cores, only
    if all rows of the chip have one bandwidth."""
    name, cores = device.get("cpu"), device.get("gpu_cores")
    if not isinstance(name, str):
        return None
    found = find_chips(name, cores) if isinstance(cores, int) else []
    found = found or find_chips(name)
    same = len({chip.bandwidth_gb_s for chip in found}) == 1
    return found[0] if found and same else None
