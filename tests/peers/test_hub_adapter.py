"""convert --adapter takes a repository on the Hub, through the real client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from oracles.adapters import write_adapter
from oracles.hub_program import HubProgram, contents
from oracles.hub_server import HubServer, sha256
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.sources.gguf import read_gguf

TO = ("--to", "gguf:f32")
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("m") / "tiny", dtype="bf16")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("a") / "lora", base, "q_proj", "down_proj")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def program(hub: HubServer, tmp_path: Path) -> HubProgram:
    return HubProgram(hub, tmp_path / "home")


def test_an_adapter_is_downloaded_and_merged(
    hub: HubServer, program: HubProgram, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Two files of it, at the revision asked for, which the record names; the same bytes as with a
    folder; and once more from the cache when there is no network."""
    files = contents(adapter)
    extra = {"config.json": b"{}", "optimizer.pt": b"no", "tokenizer.json": b"{}"}
    commit = hub.repo("org/lora").commit(files | extra, "v1")
    hub.repo("org/lora").commit({"README.md": b"moved"}, "main")
    out = tmp_path / "hub.gguf"
    source = ("convert", str(base), "--adapter", "org/lora@v1")
    done = program(*source, *TO, "-o", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert "with org/lora merged into 4 tensors" in done.stdout
    names = {r.path.rpartition(":")[2].rpartition(f"{commit}/")[2] for r in hub.downloads()}
    assert names == set(files)
    mlxedge.convert(base, "gguf:f32", tmp_path / "folder.gguf", adapter=adapter)
    assert out.read_bytes() == (tmp_path / "folder.gguf").read_bytes()
    record = json.loads((tmp_path / "hub.gguf.mlxedge.json").read_text())["source"]
    assert record["adapter"] == {
        "name": "lora", "rank": 4, "alpha": 8, "rank_stabilised": False, "tensors": 4,
        "repo": "org/lora", "revision": commit,
    }  # fmt: skip
    assert "repo" not in record
    assert read_gguf(out).metadata["general.name"].value == "tiny lora"
    hashes = {f["name"]: f["sha256"] for f in record["files"]}
    weights = "adapter_model.safetensors"
    assert hashes[weights] == sha256(files[weights])

    card = program(*source, "--to", "mlx:4bit", "-o", str(tmp_path / "mlx"), "--no-calibrate")
    assert card.returncode == 0, card.stderr
    text = (tmp_path / "mlx" / "README.md").read_text()
    assert f"made from tiny with the adapter org/lora at revision {commit}" in text

    hub.requests.clear()
    done = program(*source, *TO, "-o", str(tmp_path / "again.gguf"), HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.requests == []
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


#: The files of a repository, how it is named, and what is said.
BAD: dict[str, tuple[Callable[[Files], Files] | None, str, str]] = {
    "unknown": (None, "org/lora", "org/lora: no such repository"),
    "unknown revision": (lambda f: f, "org/lora@v2", "no revision 'v2'"),
    "model": (lambda f: {"config.json": b"{}"}, "org/lora", "give it as SOURCE"),
    "other files": (lambda f: {"README.md": b""}, "org/lora", "org/lora: no adapter_config.json"),
    "no weights": (
        lambda f: {"adapter_config.json": f["adapter_config.json"]},
        "org/lora",
        "org/lora: no adapter_model.safetensors",
    ),
    "pickle": (
        lambda f: {"adapter_config.json": b"{}", "adapter_model.bin": b""},
        "org/lora",
        "org/lora/adapter_model.bin: a pickle",
    ),
    "no name": (lambda f: f, "some/folder/lora", "no such folder, and not a Hub id"),
    "a file": (lambda f: f, "org/lora/x.gguf", "no such folder, and not a Hub id"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_adapter_is_refused(
    hub: HubServer, program: HubProgram, base: Path, adapter: Path, tmp_path: Path, case: str
) -> None:
    change, name, words = BAD[case]
    if change is not None:
        hub.repo("org/lora").commit(change(contents(adapter)))
    out = tmp_path / "m.gguf"
    done = program("convert", str(base), "--adapter", name, *TO, "-o", str(out))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert words in line
    assert hub.downloads() == []
    assert not out.exists()


def test_without_a_network(program: HubProgram, base: Path, tmp_path: Path) -> None:
    command = ("convert", str(base), "--adapter", "org/lora", *TO, "-o", str(tmp_path / "m.gguf"))
    for extra in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = program(*command, **extra)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert "no file or folder org/lora here" in line


def test_an_adapter_given_as_the_model(
    hub: HubServer, program: HubProgram, adapter: Path, tmp_path: Path
) -> None:
    hub.repo("org/lora").commit(contents(adapter))
    for source in ("org/lora", str(adapter)):
        done = program("convert", source, *TO, "-o", str(tmp_path / "m.gguf"))
        assert (done.returncode, done.stdout) == (1, "")
        assert "is an adapter, no model" in done.stderr
        assert "--adapter" in done.stderr
