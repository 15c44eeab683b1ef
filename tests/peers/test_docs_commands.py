"""The commands in the documentation, run as they are printed, against a Hub on the loopback.

The Hub has a random model under the name that the documents use; the real client downloads it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from oracles.adapters import write_adapter
from oracles.hub_program import contents
from oracles.hub_server import HubServer
from oracles.tiny import write_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Records are published to it.
DATASET = "org/speeds"
#: Stand for something of the reader's own.
PLACEHOLDERS = {"SOURCE": REPO, "OUT": "out", "org/name": REPO}
ADAPTER = "org/adapter"
#: Shorter runs of what is printed; the model's context is small.
SHORTER = {
    "mlxedge bench": " -p 32 -n 8 -r 2 --threads 1 --cooldown 0",
    "mlxedge generate": " -n 8",
}


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for of, block in found if of == language]


def commands(document: str) -> list[str]:
    lines = "\n".join(blocks(document, "")).replace("\\\n", " ").splitlines()
    found = [line.split("  #")[0].strip() for line in lines if line.startswith("mlxedge ")]
    assert found, f"{document} shows no command"
    return found


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    scripts = str(Path(sys.executable).parent)
    return kept | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": HubServer.token,
        "PATH": scripts + os.pathsep + kept["PATH"],
    }


@pytest.fixture
def hub(tmp_path: Path, environment: dict[str, str]) -> HubServer:
    folder = write_tiny_llama(tmp_path / "tiny")
    server = HubServer()
    server.repo(REPO).commit(contents(folder), "main")
    adapter = write_adapter(tmp_path / "adapter", folder, "q_proj", "v_proj")
    server.repo(ADAPTER).commit(contents(adapter), "main")
    server.repo(f"datasets/{DATASET}").commit({"README.md": b"# Speeds\n"})
    environment["HF_ENDPOINT"] = server.url
    return server


@pytest.mark.parametrize("document", ["README.md", "docs/conversion.md", "docs/benchmarking.md"])
def test_commands_run(
    document: str, hub: HubServer, environment: dict[str, str], tmp_path: Path
) -> None:
    with hub:
        for line in commands(document):
            for name, value in PLACEHOLDERS.items():
                line = re.sub(rf"(?<![\w/]){re.escape(name)}(?![\w/])", value, line)
            line += next((more for start, more in SHORTER.items() if line.startswith(start)), "")
            done = subprocess.run(
                line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def test_python_runs(hub: HubServer, environment: dict[str, str], tmp_path: Path) -> None:
    with hub:
        for code in blocks("docs/conversion.md", "python"):
            subprocess.run(
                [sys.executable, "-c", code.replace("org/name", REPO)],
                cwd=tmp_path, env=environment, check=True, capture_output=True,
            )  # fmt: skip
    assert list((tmp_path / "out").glob("*.gguf"))
