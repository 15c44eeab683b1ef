"""What --stream makes of repositories of every kind is what a download makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oracles.adapters import write_adapter
from oracles.gguf_parts import split
from oracles.hub_program import HubProgram, contents, outputs
from oracles.hub_server import HubServer
from oracles.quantized_models import write_quantized_model
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.sources.gguf import read_gguf

#: Stream a repository, with blocks far smaller than a layer and a cache that does not hold the
#: model; then see what of it is on the disk, download it and convert it again.
CLIENT = """
import json, sys
from pathlib import Path
from huggingface_hub import constants
from mlxedge import convert
from mlxedge.sources import hub_stream
from mlxedge.sources.hub import parse_spec

repo, targets, out, options = json.loads(sys.argv[1])
hub = parse_spec(repo)
with hub_stream.open_stream(
    hub.repo, gguf=hub.file, cache_bytes=3 << 19, block_bytes=1 << 14
) as source:
    convert(source, targets, Path(out) / "streamed", **options)
    found = {"fetched": source.cache.fetched_bytes}
there = [p.resolve() for p in Path(constants.HF_HUB_CACHE).rglob("*") if p.is_file()]
found["weights"] = [str(p) for p in there if p.stat().st_size > 1 << 18]
convert(repo, targets, Path(out) / "downloaded", **options)
print(json.dumps(found))
"""
BOTH = ["mlx:4bit", "gguf:q4_k_m"]
LAYERS = 3


def mlx(target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        whole = write_tiny_llama(folder / "whole", layers=LAYERS, dtype="bf16")
        mlxedge.convert(whole, target, folder / "mlx", calibrate=False, quality="reference")
        return folder / "mlx"

    return make


def quantized(kind: str, **settings: Any) -> Callable[[Path], Path]:
    return lambda folder: write_quantized_model(folder / kind, kind, layers=LAYERS, **settings)


def split_gguf(folder: Path) -> Path:
    whole = write_tiny_llama(folder / "whole", layers=LAYERS, dtype="bf16")
    mlxedge.convert(whole, "gguf:q8_0", folder / "whole.gguf")
    count = len(read_gguf(folder / "whole.gguf").tensors)
    return split(folder / "whole.gguf", folder / "parts", [4, 9, count - 13])[0].parent


def many_shards(folder: Path) -> Path:
    return write_tiny_llama(folder / "shards", layers=LAYERS, dtype="bf16", shards=12, tied=False)


#: What a repository holds, by a name; how it is made.
SOURCES: dict[str, Callable[[Path], Path]] = {
    "gptq": quantized("gptq"),
    "gptq-in-shards": quantized("gptq", shards=5),
    "gptq-8bit": quantized("gptq-8bit"),
    "compressed-tensors": quantized("compressed-tensors"),
    "fp8": quantized("fp8", tied=False),
    "mlx-4bit": mlx("mlx:4bit-g32"),
    "mlx-mxfp4": mlx("mlx:mxfp4"),
    "split-gguf": split_gguf,
    "shards": many_shards,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    found: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in found:
            found[name] = SOURCES[name](tmp_path_factory.mktemp(name))
        return found[name]

    return make


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def both(
    hub: HubServer, folder: Path, tmp_path: Path, targets: list[str], **options: Any
) -> dict[str, Any]:
    hub.repo("org/model").commit(contents(folder))
    parts = sorted(p.name for p in folder.glob("*.gguf"))
    repo = f"org/model/{parts[0]}" if parts else "org/model"
    arguments = json.dumps([repo, targets, str(tmp_path), options])
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, arguments],
        env=HubProgram(hub, tmp_path / "home").environment(),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["weights"] == []
    streamed, downloaded = (outputs(tmp_path / name) for name in ("streamed", "downloaded"))
    assert streamed.keys() == downloaded.keys()
    assert [name for name in streamed if streamed[name] != downloaded[name]] == []
    assert len(streamed) > 1
    return found


def size(folder: Path) -> int:
    files = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf")]
    return sum(p.stat().st_size for p in files)


@pytest.mark.parametrize("name", SOURCES)
def test_streamed_is_what_a_download_gives(
    hub: HubServer, made: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = made(name)
    found = both(hub, folder, tmp_path, BOTH)
    assert found["fetched"] < 1.6 * size(folder), "a tied embedding comes twice, and little else"


@pytest.mark.parametrize("name", ["shards", "gptq-in-shards", "mlx-4bit", "split-gguf"])
def test_with_an_adapter(
    hub: HubServer, made: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = made(name)
    base = next(iter(sorted(folder.glob("*.gguf"))), folder)
    adapter = write_adapter(tmp_path / "lora", base, "v_proj", "down_proj")
    hub.repo("org/lora").commit(contents(adapter))
    both(hub, folder, tmp_path, BOTH, adapter="org/lora")
    plain = tmp_path / "plain"
    mlxedge.convert(base, BOTH, plain)
    (weights,) = (n for n in outputs(plain) if n.endswith(".gguf"))
    assert len(outputs(plain)[weights]) > size(folder) // 8
    (streamed,) = (tmp_path / "streamed").glob("*.gguf")
    assert streamed.read_bytes() != outputs(plain)[weights]


@pytest.mark.parametrize("name", ["gptq", "mlx-4bit"])
def test_codes_that_are_kept(
    hub: HubServer, made: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Whether they can be, the scales tell, which a plan reads."""
    folder = made(name)
    found = both(hub, folder, tmp_path, ["mlx:4bit-g32", "gguf:q4_1"], quality="reference")
    assert found["fetched"] <= size(folder)
