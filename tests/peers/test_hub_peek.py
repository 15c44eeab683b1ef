"""inspect on the Hub reads heads of files, through the real client on a loopback Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracles.gguf_models import write_gguf_model
from oracles.gguf_parts import STEM, split
from oracles.hub_server import HubServer
from oracles.tiny import write_tiny_llama

import mlxedge


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def program(
    hub: HubServer, home: Path, *arguments: str, **extra: str
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-m", "mlxedge", *arguments],
        env=kept | {"HF_HOME": str(home), "HF_ENDPOINT": hub.url} | extra,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def inspected(hub: HubServer, home: Path, source: str, **extra: str) -> dict[str, Any]:
    done = program(hub, home, "inspect", source, "--json", **extra)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


WHERE = ("name", "path", "repo", "revision", "files")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_on_the_hub(hub: HubServer, tmp_path: Path, shards: int) -> None:
    folder = write_tiny_llama(tmp_path / "m", shards=shards, dtype="bf16")
    commit = hub.repo("org/tiny").commit(contents(folder))
    found = inspected(hub, tmp_path / "home", "org/tiny")
    local = inspected(hub, tmp_path / "home", str(folder))
    assert {k: v for k, v in found.items() if k not in WHERE} == {
        k: v for k, v in local.items() if k not in WHERE
    }
    assert (found["name"], found["repo"], found["revision"]) == ("tiny", "org/tiny", commit)
    assert found["path"] is None
    assert sorted(f["name"] for f in found["files"]) == sorted(f["name"] for f in local["files"])
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    weights = [r for r in hub.requests if r.cdn]
    assert len(weights) == shards
    assert all(r.headers.get("Range", r.headers.get("range")) for r in weights)


def test_a_server_without_ranges(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.ignore_ranges = True
    hub.repo("org/tiny").commit(contents(write_tiny_llama(tmp_path / "m")))
    assert inspected(hub, tmp_path / "home", "org/tiny")["parameters"] == 1_312_000


def test_a_gguf_file_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m")
    gguf = tmp_path / "tiny-Q8_0.gguf"
    mlxedge.convert(folder, "gguf:q8_0", gguf)
    hub.repo("org/gguf").commit({gguf.name: gguf.read_bytes()})
    found = inspected(hub, tmp_path / "home", f"org/gguf/{gguf.name}")
    local = inspected(hub, tmp_path / "home", str(gguf))
    assert {k: v for k, v in found.items() if k not in ("path", "repo", "revision")} == {
        k: v for k, v in local.items() if k not in ("path", "repo", "revision")
    }
    assert found["quantization"] == "Q8_0"
    assert not list((tmp_path / "home").rglob("*.gguf"))


def test_what_was_fetched_is_read_from_the_cache(hub: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    commit = hub.repo("org/tiny").commit(contents(write_tiny_llama(tmp_path / "m")))
    fetched = program(hub, home, "fetch", "org/tiny")
    assert fetched.returncode == 0, fetched.stderr
    folder = Path(fetched.stdout.strip())
    assert (folder / "model.safetensors").is_file()
    assert f"commit {commit}, 6 files, " in fetched.stderr
    hub.requests.clear()
    found = inspected(hub, home, "org/tiny")
    assert (found["path"], found["revision"]) == (str(folder), commit)
    assert not [r for r in hub.requests if r.cdn]
    offline = inspected(hub, home, "org/tiny", HF_HUB_OFFLINE="1")
    assert offline == found


def test_fetch_as_json(hub: HubServer, tmp_path: Path) -> None:
    files = contents(write_tiny_llama(tmp_path / "m"))
    commit = hub.repo("org/tiny").commit(files)
    done = program(hub, tmp_path / "home", "fetch", f"org/tiny@{commit}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["commit"] == commit
    assert {f["name"]: f["bytes"] for f in found["files"]} == {n: len(c) for n, c in files.items()}
    assert found["bytes"] == sum(map(len, files.values()))
    assert {p.name for p in Path(found["path"]).iterdir()} == set(files)


def test_fetch_of_a_gguf_file(hub: HubServer, tmp_path: Path) -> None:
    hub.repo("org/gguf").commit({"m-Q4_0.gguf": b"GGUF four", "m-Q8_0.gguf": b"GGUF eight"})
    done = program(hub, tmp_path / "home", "fetch", "org/gguf", "--file", "q8_0", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["path"]).read_bytes() == b"GGUF eight"
    assert found["files"] == [{"name": "m-Q8_0.gguf", "bytes": 10}]


def test_two_revisions_are_refused(hub: HubServer, tmp_path: Path) -> None:
    for command in ("fetch", "inspect"):
        done = program(hub, tmp_path / "home", command, "org/tiny@a", "--revision", "b")
        assert done.returncode == 2
        assert "two revisions" in done.stderr


@pytest.mark.parametrize("source", ["org/none", "org/gated"])
def test_errors_are_those_of_a_download(hub: HubServer, tmp_path: Path, source: str) -> None:
    hub.repo("org/gated", gated=True).commit(contents(write_tiny_llama(tmp_path / "m")))
    kinds = []
    for command in ("inspect", "fetch"):
        done = program(hub, tmp_path / "home", command, source, "--json")
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        kinds.append(json.loads(done.stdout))
    assert kinds[0] == kinds[1]


def test_a_gguf_model_in_several_files(hub: HubServer, tmp_path: Path) -> None:
    write_gguf_model(tmp_path / f"{STEM}.gguf")
    parts = split(tmp_path / f"{STEM}.gguf", tmp_path / "parts", [5, 4, 3])
    hub.repo("org/gguf").commit({p.name: p.read_bytes() for p in parts})
    found = inspected(hub, tmp_path / "home", f"org/gguf/{parts[1].name}")
    local = inspected(hub, tmp_path / "home", str(parts[1]))
    assert found["parameters"] == local["parameters"]
    assert [f["name"] for f in found["files"]] == [p.name for p in parts]
    assert not list((tmp_path / "home").rglob("*.gguf"))
