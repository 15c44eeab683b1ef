"""Downloads by the real huggingface_hub client from a Hub on the loopback interface.

The client reads its environment when it is imported, so each case is a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.hub_server import HubServer, sha256
from safetensors.numpy import save

CLIENT = """
import json, sys
from mlxedge import errors, sources
from mlxedge.sources import hub

verb, repo, arguments = json.loads(sys.argv[1])
progress, warnings, out = [], [], {}
if arguments.pop("report", True):
    arguments |= {"progress": lambda *event: progress.append(event), "warn": warnings.append}
try:
    if verb == "fetch":
        out["path"] = str(sources.fetch(repo, **arguments))
    else:
        with sources.open_source(repo, **arguments) as checkpoint:
            out |= {
                "name": checkpoint.name,
                "kind": checkpoint.origin.kind,
                "repo": checkpoint.origin.repo,
                "revision": checkpoint.origin.revision,
                "license": checkpoint.license,
                "config": checkpoint.config,
                "tensors": {k: list(t.shape) for k, t in checkpoint.tensors.items()},
                "files": sorted(checkpoint.tokenizer.files) if checkpoint.tokenizer else None,
                "first": float(next(iter(checkpoint.tensors.values())).read()["weight"].sum()),
            }
except errors.MlxedgeError as error:
    out |= {"error": type(error).__name__, "message": str(error)}
print(json.dumps(out | {"progress": progress, "warnings": warnings}))
"""
#: More than the client's 10 MiB pieces, so that a cut file has a part worth keeping.
BIG = {"model.embed_tokens.weight": np.arange(6_000_000, dtype=np.float32).reshape(1000, 6000)}
SMALL = {"model.norm.weight": np.full(4, 2.0, np.float32)}
CUT = 16 << 20


def model(tensors: dict[str, np.ndarray], **config: Any) -> dict[str, bytes]:
    config = {"model_type": "llama", **config}
    return {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b'{"do_sample": false}',
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b'{"model_max_length": 8}',
        "additional_chat_templates/tool.jinja": b"{{ messages }}",
        "README.md": b"---\ntags: [x]\nlicense: apache-2.0\n---\n# A model\n",
        "model.safetensors": save(tensors),
    }


@dataclass
class Client:
    hub: HubServer
    home: Path

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        return kept | {"HF_HOME": str(self.home), "HF_ENDPOINT": self.hub.url} | extra

    def command(self, verb: str, repo: str, arguments: dict[str, Any]) -> list[str]:
        return [sys.executable, "-c", CLIENT, json.dumps([verb, repo, arguments])]

    def __call__(
        self, verb: str, repo: str, env: dict[str, str] | None = None, **arguments: Any
    ) -> dict[str, Any]:
        done = subprocess.run(
            self.command(verb, repo, arguments),
            env=self.environment(**(env or {})),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def cache(self, repo: str) -> Path:
        return self.home / "hub" / ("models--" + repo.replace("/", "--"))

    def leftovers(self, repo: str) -> list[str]:
        return [p.name for p in self.cache(repo).rglob("*") if "incomplete" in p.name]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


def test_downloads_only_what_is_needed(hub: HubServer, client: Client) -> None:
    extra = ("pytorch_model.bin", "onnx/model.onnx", "m-Q4_0.gguf", "consolidated.safetensors")
    files = model(SMALL) | dict.fromkeys(extra, b"not wanted") | {"modeling_x.py": b"raise"}
    commit = hub.repo("org/tiny").commit(files)
    found = client("open", "org/tiny")
    assert found["name"] == "tiny"
    assert (found["repo"], found["revision"], found["kind"]) == ("org/tiny", commit, "hf")
    assert found["license"] == "apache-2.0"
    assert found["first"] == 8.0
    assert found["files"] == [
        "additional_chat_templates/tool.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    fetched = {r.path.rpartition(":")[2].rpartition(f"{commit}/")[2] for r in hub.downloads()}
    assert fetched == set(model(SMALL))


def test_reports_progress_and_asks_once(hub: HubServer, client: Client) -> None:
    files = model(BIG)
    hub.repo("org/tiny").commit(files)
    size = len(files["model.safetensors"])
    events = [e for e in client("fetch", "org/tiny")["progress"] if e[0] == "model.safetensors"]
    assert events[-1] == ["model.safetensors", size, size]
    assert [e[1] for e in events] == sorted(e[1] for e in events)
    hub.requests.clear()
    assert client("fetch", "org/tiny")["progress"] == []
    about_it = [r.path for r in hub.requests if "org/tiny" in r.path]
    assert about_it == ["/api/models/org/tiny"], "a second run only asks for the commit"


def test_shards_of_an_index(hub: HubServer, client: Client) -> None:
    files = model({})
    del files["model.safetensors"]
    shards = {f"t{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": shards}).encode()
    for i, (tensor, shard) in enumerate(shards.items(), 1):
        files[shard] = save({tensor: np.ones(i, np.float16)})
    files["consolidated.safetensors"] = b"another copy"
    hub.repo("org/sharded").commit(files)
    assert client("open", "org/sharded")["tensors"] == {"t1": [1], "t2": [2]}
    assert not any("consolidated" in r.path for r in hub.requests)


@pytest.mark.parametrize("abruptly", [False, True])
def test_a_cut_connection_is_resumed(hub: HubServer, client: Client, abruptly: bool) -> None:
    files = model(BIG)
    hub.repo("org/tiny").commit(files)
    hub.faults.cut["model.safetensors"] = CUT
    hub.faults.reset = abruptly
    path = Path(client("fetch", "org/tiny")["path"])
    assert (path / "model.safetensors").read_bytes() == files["model.safetensors"]
    gets = [r.headers.get("range") for r in hub.downloads() if r.cdn]
    assert gets[0] is None
    assert [g is not None and g.startswith("bytes=1") for g in gets[1:]] == [True], gets
    assert client.leftovers("org/tiny") == []


def test_a_killed_download_is_resumed_by_the_next_run(hub: HubServer, client: Client) -> None:
    files = model(BIG)
    hub.repo("org/tiny").commit(files)
    hub.faults.hold["model.safetensors"] = CUT
    killed = subprocess.Popen(
        client.command("fetch", "org/tiny", {}),
        env=client.environment(),
        stdout=subprocess.DEVNULL,
    )
    assert hub.held.wait(60)
    partial = client.cache("org/tiny") / "blobs"
    while not any(p.stat().st_size for p in partial.glob("*.incomplete")):
        assert killed.poll() is None
    killed.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    killed.wait()
    assert len(client.leftovers("org/tiny")) == 1

    path = Path(client("fetch", "org/tiny")["path"])
    assert (path / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert [r.headers.get("range") for r in hub.downloads() if r.cdn] == [None, "bytes=10485760-"]
    assert client.leftovers("org/tiny") == []


def test_a_server_without_ranges_starts_over(hub: HubServer, client: Client) -> None:
    files = model(BIG)
    hub.repo("org/tiny").commit(files)
    hub.faults.cut["model.safetensors"] = CUT
    hub.faults.ignore_ranges = True
    path = Path(client("fetch", "org/tiny")["path"])
    assert (path / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_revision_is_pinned(hub: HubServer, client: Client) -> None:
    repo = hub.repo("org/tiny")
    old = repo.commit(model(SMALL, version=1), "v1", "main")
    new = repo.commit(model(SMALL, version=2))
    for spec, arguments, commit, version in (
        ("org/tiny", {}, new, 2),
        ("org/tiny@v1", {}, old, 1),
        ("org/tiny", {"revision": old}, old, 1),
    ):
        found = client("open", spec, **arguments)
        assert (found["revision"], found["config"]["version"]) == (commit, version)
    # A branch that moves during the download does not mix two commits.
    asked = [r.path for r in hub.requests if "/resolve/" in r.path]
    assert all(f"/resolve/{old}/" in path or f"/resolve/{new}/" in path for path in asked)


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("org/missing", "SourceNotFoundError", ["org/missing", "HF_TOKEN"]),
        ("org/tiny@nowhere", "SourceNotFoundError", ["org/tiny", "'nowhere'"]),
        ("org/tiny@../../x", "SourceNotFoundError", ["'../../x'"]),
        ("not-an-id", "SourceNotFoundError", ["not-an-id", "org/name"]),
        ("org/gated", "AccessDeniedError", ["org/gated", "licence", "HF_TOKEN"]),
        ("org/pickles", "UnsafeFileError", ["pytorch_model.bin", "safetensors"]),
        ("org/empty", "SourceNotFoundError", ["org/empty", "no safetensors"]),
        ("org/ggufs", "SourceNotFoundError", ["a-Q4_0.gguf", "a-Q8_0.gguf"]),
        ("org/ggufs/b.gguf", "SourceNotFoundError", ["'b.gguf'", "a-Q4_0.gguf"]),
        ("org/escape", "UnsafeFileError", ["../../secret.safetensors"]),
    ],
)
def test_refusals_say_what_to_do(
    hub: HubServer, client: Client, spec: str, error: str, words: list[str]
) -> None:
    hub.repo("org/tiny").commit(model(SMALL))
    hub.repo("org/gated", gated=True).commit(model(SMALL))
    hub.repo("org/pickles").commit({"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.repo("org/empty").commit({"README.md": b"nothing"})
    hub.repo("org/ggufs").commit({"a-Q4_0.gguf": b"x", "a-Q8_0.gguf": b"x"})
    escape = {"weight_map": {"w": "../../secret.safetensors"}}
    hub.repo("org/escape").commit(
        {
            "config.json": b"{}",
            "model.safetensors.index.json": json.dumps(escape).encode(),
            "x.safetensors": b"",
        }
    )
    found = client("open", spec)
    assert found.get("error") == error, found
    assert "\n" not in found["message"]
    assert all(word in found["message"] for word in words), found["message"]
    assert not any(r.cdn for r in hub.requests), "no weights are downloaded before the refusal"


def test_a_token_opens_a_gated_repository_and_stays_with_the_hub(
    hub: HubServer, client: Client
) -> None:
    hub.repo("org/gated", gated=True).commit(model(SMALL))
    assert client("open", "org/gated", env={"HF_TOKEN": hub.token})["first"] == 8.0
    assert any("authorization" in r.headers for r in hub.requests if not r.cdn)
    assert not any("authorization" in r.headers for r in hub.requests if r.cdn)
    assert client("open", "org/gated", env={"HF_TOKEN": "hf_other"})["first"] == 8.0, "cached"
    hub.repo("org/gated2", gated=True).commit(model(SMALL))
    found = client("open", "org/gated2", env={"HF_TOKEN": "hf_other"})
    assert found["error"] == "AccessDeniedError"


def test_gguf_files_are_selected_by_name(hub: HubServer, client: Client) -> None:
    files = {"a-Q4_0.gguf": b"four", "sub/a-Q8_0.gguf": b"eight"}
    hub.repo("org/ggufs").commit(files)
    assert Path(client("fetch", "org/ggufs", gguf="q8_0")["path"]).read_bytes() == b"eight"
    assert Path(client("fetch", "org/ggufs/a-Q4_0.gguf")["path"]).read_bytes() == b"four"
    offline = client("fetch", "org/ggufs", gguf="q8_0", env={"HF_HUB_OFFLINE": "1"})
    assert Path(offline["path"]).read_bytes() == b"eight"
    assert client("fetch", "org/ggufs", gguf="a-")["error"] == "SourceNotFoundError"


def test_all_parts_of_a_gguf_model_are_fetched(hub: HubServer, client: Client) -> None:
    names = [f"a-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    hub.repo("org/parts").commit({n: n.encode() for n in names} | {"a-Q4_0.gguf": b"four"})
    for wanted in ("q8_0", names[1]):
        for env in ({}, {"HF_HUB_OFFLINE": "1"}):
            found = Path(client("fetch", "org/parts", gguf=wanted, env=env)["path"])
            assert found.name == names[0]
            assert [(found.parent / n).read_bytes() for n in names] == [n.encode() for n in names]
    assert not (found.parent / "a-Q4_0.gguf").exists()
    hub.repo("org/parts").commit({n: n.encode() for n in names[:2]})
    fault = client("fetch", "org/parts", gguf="q8_0")
    assert (fault["error"], names[2] in fault["message"]) == ("SourceNotFoundError", True)


def test_without_network_the_cache_serves(hub: HubServer, client: Client) -> None:
    commit = hub.repo("org/tiny").commit(model(SMALL), "main", "v1")
    assert "error" not in client("open", "org/tiny")
    hub.close()
    found = client("open", "org/tiny")
    assert (found["revision"], found["first"]) == (commit, 8.0)
    assert len(found["warnings"]) == 1
    assert commit[:12] in found["warnings"][0]
    for quiet in ({"env": {"HF_HUB_OFFLINE": "1"}}, {"offline": True}):
        found = client("open", "org/tiny", **quiet)
        assert (found["first"], found["warnings"]) == (8.0, [])
    assert client("open", "org/tiny", revision=commit, offline=True)["first"] == 8.0
    found = client("open", "org/tiny@v1")
    assert found["error"] == "NetworkError", "the tag was never asked for"


def test_without_network_and_cache(hub: HubServer, client: Client) -> None:
    hub.repo("org/tiny").commit(model(SMALL))
    found = client("open", "org/tiny", offline=True)
    assert (found["error"], hub.requests) == ("NetworkError", [])
    hub.close()
    found = client("open", "org/tiny")
    assert found["error"] == "NetworkError"
    assert hub.url in found["message"]


def test_a_broken_hub_is_told_from_a_missing_model(hub: HubServer, client: Client) -> None:
    hub.repo("org/tiny").commit(model(SMALL))
    assert "error" not in client("open", "org/tiny")
    hub.faults.status = 503
    found = client("open", "org/tiny")
    assert found["first"] == 8.0
    assert "503" in found["warnings"][0]
    assert client("open", "org/other")["error"] == "NetworkError"


def test_an_interrupted_copy_is_not_taken_for_whole(hub: HubServer, client: Client) -> None:
    files = model(SMALL)
    commit = hub.repo("org/tiny").commit(files)
    client("fetch", "org/tiny")
    (client.cache("org/tiny") / "snapshots" / commit / "model.safetensors").unlink()
    found = client("open", "org/tiny", offline=True)
    assert found["error"] == "NetworkError"
    assert "incomplete" in found["message"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("symlinks", [True, False])
def test_a_wrong_hash_is_refused_and_removed(
    hub: HubServer, client: Client, name: str, symlinks: bool
) -> None:
    env = {} if symlinks else {"HF_HUB_DISABLE_SYMLINKS": "1"}
    files = model(SMALL)
    hub.repo("org/tiny").commit(files)
    hub.faults.damage.add(name)
    found = client("open", "org/tiny", env=env)
    assert found["error"] == "CorruptFileError"
    assert f"org/tiny/{name}" in found["message"]
    wrong = files[name][:-1] + bytes([files[name][-1] ^ 1])
    kept = [p for p in client.cache("org/tiny").rglob("*") if p.is_file()]
    assert sha256(wrong) not in {sha256(p.read_bytes()) for p in kept}
    hub.faults.damage.clear()
    assert client("open", "org/tiny", env=env)["first"] == 8.0


def test_a_model_that_cannot_fit_is_not_begun(hub: HubServer, client: Client) -> None:
    hub.repo("org/tiny").commit(model(SMALL))
    hub.faults.listed_size["model.safetensors"] = 1 << 55
    found = client("open", "org/tiny")
    assert found["error"] == "DiskFullError"
    assert not any(r.cdn for r in hub.requests)


def test_xet_storage_can_be_turned_off_and_fails_clearly(hub: HubServer, client: Client) -> None:
    hub.repo("org/xet", xet=True).commit(model(SMALL))
    found = client("open", "org/xet")
    assert found["error"] == "NetworkError", found
    assert "org/xet" in found["message"]
    assert not any(r.cdn for r in hub.requests)
    assert client("open", "org/xet", env={"HF_HUB_DISABLE_XET": "1"})["first"] == 8.0


def test_nothing_is_printed(hub: HubServer, client: Client) -> None:
    hub.repo("org/tiny").commit(model(BIG))
    done = subprocess.run(
        client.command("fetch", "org/tiny", {"report": False}),
        env=client.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
