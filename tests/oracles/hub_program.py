"""The program as its users run it, against a Hub on the loopback, with a cache of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from oracles.hub_server import HubServer


@dataclass
class HubProgram:
    """``program("convert", "org/tiny", …)`` runs a command; ``home`` holds the client's cache."""

    hub: HubServer
    home: Path

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        return kept | {"HF_HOME": str(self.home), "HF_ENDPOINT": self.hub.url} | extra

    def __call__(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mlxedge", *arguments],
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def weights_on_disk(self, above: int = 1 << 19) -> list[Path]:
        """Files in the cache of more than so many bytes."""
        return [p for p in self.home.rglob("*") if p.is_file() and p.stat().st_size > above]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its name."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def outputs(out: Path) -> dict[str, bytes]:
    """What a conversion wrote, without the records of it."""
    return {n: data for n, data in contents(out).items() if not n.endswith(".mlxedge.json")}
