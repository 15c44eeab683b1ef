"""Records in a dataset on the Hub, by the real client and a Hub on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracles.bench_records import record
from oracles.hub_server import HubServer

from mlxedge.bench.hub import path_in_dataset
from mlxedge.bench.record import save_records

DATASET = "org/speeds"
ADDRESS = f"hf://datasets/{DATASET}"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.repo(f"datasets/{DATASET}").commit({"README.md": b"# Speeds\n"})
        yield server


def mlxedge(hub: HubServer, home: Path, *arguments: object, token: str | None = HubServer.token):  # type: ignore[no-untyped-def]
    """The command in a process of its own: the client reads its environment once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if token is not None:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-m", "mlxedge", *map(str, arguments)]
    home.mkdir(exist_ok=True)
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, cwd=home
    )


def bench(hub: HubServer, tiny: Path, home: Path, *more: object, **options: Any) -> Any:
    arguments = ("bench", tiny, "-p", 4, "-n", 2, "-r", 1, "--engine", "numpy")
    return mlxedge(hub, home, *arguments, "--publish", ADDRESS, *more, **options)


def held(hub: HubServer, ref: str = "main") -> dict[str, bytes]:
    repo = hub.repos[f"datasets/{DATASET}"]
    files = repo.commits[repo.refs[ref]]
    return {name: data for name, data in files.items() if name.startswith("records/")}


def test_publish_and_compare(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    for _ in range(2):
        done = bench(hub, tiny, tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"published: {hub.url}" in done.stderr
    assert len(held(hub)) == 2
    for name, data in held(hub).items():
        made = json.loads(data)
        assert made["kind"] == "mlxedge-bench"
        assert name == path_in_dataset(made)
    compared = mlxedge(hub, tmp_path, "compare", ADDRESS, "--json")
    assert compared.returncode == 0, compared.stderr
    (group,) = json.loads(compared.stdout)["groups"]
    assert len(group["results"]) == 2


def test_a_pull_request_where_one_may_not_write(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    hub.repos[f"datasets/{DATASET}"].writable = False
    refused = bench(hub, tiny, tmp_path)
    assert refused.returncode == 1
    kept, problem = refused.stderr.strip().splitlines()
    assert "--pr" in problem
    assert Path(tmp_path / kept.partition("written: ")[2]).is_file()
    done = bench(hub, tiny, tmp_path, "--pr")
    assert done.returncode == 0, done.stderr
    assert "discussions/1" in done.stderr
    assert held(hub) == {}
    assert len(held(hub, "refs/pr/1")) == 1


def test_what_cannot_be_published_is_said_before_the_work(
    hub: HubServer, tiny: Path, tmp_path: Path
) -> None:
    for address in ("hf://models/org/name", "org/name", "https://example.org/x"):
        done = mlxedge(hub, tmp_path, "bench", tiny, "--publish", address)
        assert done.returncode == 2
        assert "hf://datasets/ORG/NAME" in done.stderr
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "place", "problem"),
    [(None, DATASET, "log in"), (HubServer.token, "org/none", "no such repository")],
)
def test_one_clear_line(
    hub: HubServer, tiny: Path, tmp_path: Path, token: str | None, place: str, problem: str
) -> None:
    records = tmp_path / "records.json"
    save_records([record()], records)
    address = f"hf://datasets/{place}"
    done = mlxedge(
        hub, tmp_path, "bench", tiny, "-p", 2, "-n", 0, "-r", 1, "--engine", "numpy",
        "--publish", address, token=token,
    )  # fmt: skip
    assert done.returncode == 1
    assert problem in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    missing = mlxedge(hub, tmp_path, "compare", "hf://datasets/org/none")
    assert missing.returncode == 1
    assert len(missing.stderr.strip().splitlines()) == 1


def test_a_dataset_without_records(hub: HubServer, tmp_path: Path) -> None:
    done = mlxedge(hub, tmp_path, "compare", ADDRESS)
    assert done.returncode == 1
    assert "has no records/*.json" in done.stderr
