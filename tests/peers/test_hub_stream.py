"""convert --stream reads weights by ranges, through the real client, from a Hub on the loopback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracles.hub_program import HubProgram, contents, outputs
from oracles.hub_server import HubServer, sha256
from oracles.tiny import write_tiny_llama

import mlxedge

#: Convert with a cache that holds a layer and little more, blocks much smaller than a layer, and
#: a journal that is kept up to date.
CLIENT = """
import collections, json, shutil, sys
from mlxedge import convert, errors
from mlxedge.calibration import states
from mlxedge.outputs import staging
from mlxedge.sources import hub_ranges, hub_stream

Usage = collections.namedtuple("Usage", "total used free")
hub_ranges.FIRST_DELAY = 0.01
staging.SYNC_BYTES = 1 << 16
states.EVERY_SECONDS = 0.0
repo, targets, out, options = json.loads(sys.argv[1])
cache_bytes = options.pop("cache_bytes", 3 << 19)
if free := options.pop("free", None):
    shutil.disk_usage = lambda path: Usage(free, 0, free)
found = {}
try:
    with hub_stream.open_stream(repo, cache_bytes=cache_bytes, block_bytes=1 << 14) as source:
        convert(source, targets, out, **options)
        found |= {"kept": source.cache.kept_bytes, "fetched": source.cache.fetched_bytes}
except errors.MlxedgeError as error:
    found |= {"error": type(error).__name__, "message": str(error)}
print(json.dumps(found))
"""
WEIGHTS = "model.safetensors"
LAYERS = 6


class Program(HubProgram):
    def command(self, targets: list[str], out: Path, **options: Any) -> list[str]:
        arguments = json.dumps(["org/tiny", targets, str(out), options])
        return [sys.executable, "-c", CLIENT, arguments]

    def convert(self, targets: list[str], out: Path, **options: Any) -> dict[str, Any]:
        done = subprocess.run(
            self.command(targets, out, **options),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def program(hub: HubServer, tmp_path: Path) -> Program:
    return Program(hub, tmp_path / "home")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of 1.2 MB, named like the repository that they are put into."""
    return write_tiny_llama(tmp_path_factory.mktemp("m") / "tiny", layers=LAYERS, dtype="bf16")


@pytest.fixture
def on_hub(hub: HubServer, folder: Path) -> str:
    return hub.repo("org/tiny").commit(contents(folder))


def served(hub: HubServer) -> int:
    return sum(count for name, count in hub.served.items() if name.endswith(".safetensors"))


BOTH = ["mlx:4bit", "gguf:q4_k_m"]


@pytest.mark.parametrize(
    "options",
    [{}, {"quality": "best"}, {"calibrate": False}, {"quality": "reference"}],
    ids=["fast", "best", "uncalibrated", "reference"],
)
def test_streamed_is_what_a_download_gives(
    hub: HubServer, program: Program, on_hub: str, folder: Path, tmp_path: Path,
    options: dict[str, Any],
) -> None:  # fmt: skip
    found = program.convert(BOTH, tmp_path / "streamed", **options)
    assert "error" not in found, found
    size = (folder / WEIGHTS).stat().st_size
    # The beginning is read twice, and the embedding, which is the head too, where a model is run.
    assert size < served(hub) < 1.2 * size
    assert found["fetched"] < 1.2 * size
    assert found["kept"] < 0.3 * size
    assert program.weights_on_disk() == []

    code = "import json, sys, mlxedge; a = json.loads(sys.argv[1]); mlxedge.convert(*a[0], **a[1])"
    arguments = json.dumps([["org/tiny", BOTH, str(tmp_path / "downloaded")], options])
    subprocess.run(
        [sys.executable, "-c", code, arguments], env=program.environment(), check=True, timeout=120
    )
    assert program.weights_on_disk()
    assert outputs(tmp_path / "streamed") == outputs(tmp_path / "downloaded")


def test_from_the_command_line(
    hub: HubServer, program: Program, on_hub: str, folder: Path, tmp_path: Path
) -> None:
    to = ("--to", "gguf:q8_0", "-o", str(tmp_path / "m.gguf"))
    shown = program("convert", "org/tiny", "--stream", *to, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert f"org/tiny at {on_hub[:12]}, streamed" in shown.stdout
    assert "of it on the way" in shown.stdout
    assert served(hub) <= 1 << 18, "a plan takes the head of a file alone"
    done = program("convert", "org/tiny", "--stream", *to)
    assert (done.returncode, done.stderr) == (0, "")
    assert program.weights_on_disk() == []
    record = json.loads((tmp_path / "m.gguf.mlxedge.json").read_text())
    (weights,) = [f for f in record["source"]["files"] if f["name"] == WEIGHTS]
    data = (folder / WEIGHTS).read_bytes()
    assert weights == {
        "name": WEIGHTS, "bytes": len(data), "sha256": sha256(data), "checked": False,
    }  # fmt: skip
    side = [f for f in record["source"]["files"] if f["name"] == "config.json"]
    assert side[0]["sha256"] == sha256((folder / "config.json").read_bytes())
    assert (record["source"]["repo"], record["source"]["revision"]) == ("org/tiny", on_hub)


def test_shards(hub: HubServer, program: Program, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny", tied=False, shards=3)
    hub.repo("org/tiny").commit(contents(folder))
    found = program.convert(["mlx:3bit"], tmp_path / "streamed", cache_bytes=1 << 23)
    assert "error" not in found, found
    assert found["fetched"] == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    mlxedge.convert(folder, "mlx:3bit", tmp_path / "local")
    for name in ("model.safetensors", "tokenizer.json"):
        assert outputs(tmp_path / "streamed")[name] == outputs(tmp_path / "local")[name]


def test_a_gguf_file(hub: HubServer, program: Program, folder: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "tiny-Q8_0.gguf"
    mlxedge.convert(folder, "gguf:q8_0", gguf)
    hub.repo("org/gguf").commit({gguf.name: gguf.read_bytes()})
    out = tmp_path / "out"
    done = program(
        "convert", f"org/gguf/{gguf.name}", "--stream", "--to", "mlx:8bit-g32", "-o", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert program.weights_on_disk() == []
    mlxedge.convert(gguf, "mlx:8bit-g32", tmp_path / "local")
    assert outputs(out)[WEIGHTS] == outputs(tmp_path / "local")[WEIGHTS]


def test_a_cached_copy_is_read_from_disk(
    hub: HubServer, program: Program, on_hub: str, tmp_path: Path
) -> None:
    assert program("fetch", "org/tiny").returncode == 0
    for extra in ({}, {"HF_HUB_OFFLINE": "1"}):
        hub.served.clear()
        out = str(tmp_path / f"m{len(extra)}.gguf")
        done = program("convert", "org/tiny", "--stream", "--to", "gguf:q8_0", "-o", out, **extra)
        assert (done.returncode, done.stderr) == (0, "")
        assert served(hub) == 0


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"ignore_ranges": True}, "does not send parts of files"),
        ({"listed_size": {WEIGHTS: None}}, "does not say the size"),
    ],
)
def test_what_cannot_be_streamed_is_downloaded(
    hub: HubServer, program: Program, on_hub: str, tmp_path: Path, fault: dict[str, Any], why: str
) -> None:
    for name, value in fault.items():
        setattr(hub.faults, name, value)
    out = tmp_path / "m.gguf"
    done = program("convert", "org/tiny", "--stream", "--to", "gguf:q8_0", "-o", str(out))
    assert done.returncode == 0, done.stderr
    (warning,) = done.stderr.splitlines()
    assert why in warning
    assert "downloaded" in warning
    assert out.is_file()


@pytest.mark.parametrize("abruptly", [False, True])
def test_broken_answers_are_asked_for_again(
    hub: HubServer, program: Program, on_hub: str, folder: Path, tmp_path: Path, abruptly: bool
) -> None:
    hub.faults.cut_all, hub.faults.reset = 10_000, abruptly
    hub.faults.answers[WEIGHTS] = [500, 503, 429, 502]
    found = program.convert(["mlx:8bit"], tmp_path / "streamed")
    assert "error" not in found, found
    assert hub.faults.answers[WEIGHTS] == []
    mlxedge.convert(folder, "mlx:8bit", tmp_path / "local")
    assert outputs(tmp_path / "streamed")[WEIGHTS] == outputs(tmp_path / "local")[WEIGHTS]


def test_a_hub_that_stays_away_and_comes_back(
    hub: HubServer, program: Program, on_hub: str, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m"
    # Once the head was served, some blocks come, and then nothing but errors.
    hub.faults.answers[WEIGHTS] = [0] * 100 + [500] * 10_000
    found = program.convert(["mlx:4bit"], out, calibrate=False)
    assert found["error"] == "NetworkError", found
    assert f"org/tiny/{WEIGHTS}" in found["message"]
    assert "500" in found["message"]
    assert "goes on" in found["message"]
    assert not out.exists()
    before = served(hub)
    assert 0 < before < 0.5 * (folder / WEIGHTS).stat().st_size
    hub.faults.answers.clear()
    hub.served.clear()
    found = program.convert(["mlx:4bit"], out, calibrate=False)
    assert "error" not in found, found
    size = (folder / WEIGHTS).stat().st_size
    assert before + served(hub) < 1.2 * size
    record = json.loads((tmp_path / "m.mlxedge.json").read_text())
    assert record["resumed_tensors"] > 0


@pytest.mark.parametrize(
    ("options", "most", "killer"),
    [
        ({"calibrate": False}, 1.2, "SIGKILL"),
        ({}, 1.5, "SIGKILL"),
        ({"quality": "reference", "calibrate": False}, 1.2, "SIGINT"),
    ],
    ids=["uncalibrated", "fast", "interrupted"],
)
def test_a_killed_run_does_not_fetch_twice(
    hub: HubServer, program: Program, on_hub: str, folder: Path, tmp_path: Path,
    options: dict[str, Any], most: float, killer: str,
) -> None:  # fmt: skip
    """Beside what was under way: where the model is run, up to two layers of the six."""
    out, size = tmp_path / "m", (folder / WEIGHTS).stat().st_size
    hub.faults.hold[WEIGHTS] = size * 3 // 4
    command = program.command(["mlx:4bit"], out, **options)
    killed = subprocess.Popen(command, env=program.environment(), stderr=subprocess.DEVNULL)
    assert hub.held.wait(60)
    journal = tmp_path / ".m.partial" / "journal.jsonl"
    while not journal.exists() or journal.read_text().count("\n") < 4 * LAYERS:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(getattr(signal, killer, signal.SIGTERM))
    killed.wait(60)
    assert program.weights_on_disk() == []
    first = served(hub)
    hub.served.clear()
    found = program.convert(["mlx:4bit"], out, **options)
    assert "error" not in found, found
    assert first + served(hub) < most * size
    mlxedge.convert(folder, "mlx:4bit", tmp_path / "local", **options)
    assert outputs(out)[WEIGHTS] == outputs(tmp_path / "local")[WEIGHTS]


def test_disk_that_is_short(
    hub: HubServer, program: Program, on_hub: str, folder: Path, tmp_path: Path
) -> None:
    """Weights on their way take what the outputs leave; for the least of it there must be room."""
    size = mlxedge.convert(folder, "gguf:q8_0", tmp_path / "local.gguf").outputs[0].plan.nbytes
    least = 8 << 14
    found = program.convert(["gguf:q8_0"], tmp_path / "a.gguf", free=size + least // 2)
    assert found["error"] == "DiskFullError"
    assert served(hub) <= 1 << 18
    found = program.convert(["gguf:q8_0"], tmp_path / "b.gguf", free=size + 2 * least)
    assert "error" not in found, found
    assert found["kept"] <= 2 * least


@pytest.mark.parametrize(
    ("repo", "kind"), [("org/gated", "AccessDeniedError"), ("org/none", "SourceNotFoundError")]
)
def test_errors_are_those_of_a_download(
    hub: HubServer, program: Program, folder: Path, tmp_path: Path, repo: str, kind: str
) -> None:
    hub.repo("org/gated", gated=True).commit(contents(folder))
    to = ("--to", "gguf:q8_0", "-o", str(tmp_path / "m.gguf"), "--json")
    found = [program("convert", repo, *to, *stream) for stream in ((), ("--stream",))]
    assert [json.loads(done.stdout)["kind"] for done in found] == [kind, kind]
    assert found[0].stderr == found[1].stderr
    if repo == "org/gated":
        done = program("convert", repo, *to, "--stream", HF_TOKEN=hub.token)
        assert done.returncode == 0, done.stderr
        assert not any("authorization" in r.headers for r in hub.requests if r.cdn)


def test_a_local_source_is_refused(program: Program, folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "m.gguf")
    done = program("convert", str(folder), "--stream", "--to", "gguf:q8_0", "-o", out)
    assert done.returncode == 2
    assert "on this disk" in done.stderr
