"""What goes wrong gives one line that says what to do, a status, and nothing at the final path.

Everything runs ``mlxedge`` as a user does: a process of its own.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from oracles.tiny import write_tiny_llama
from safetensors.numpy import load_file, save_file

from mlxedge.outputs.staging import partial_dir


def mlxedge(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlxedge", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        **options,  # type: ignore[call-overload]
    )


def fails(
    run: subprocess.CompletedProcess[str], *words: str, status: int = 1, out: Path | None = None
) -> None:
    """One error line with all of ``words``, the exit status, and nothing at ``out``."""
    errors = run.stderr.strip().splitlines()
    assert run.returncode == status, run
    assert len(errors) == 1, run.stderr
    assert errors[0].startswith("error: ")
    for word in words:
        assert word in errors[0]
    if out is not None:
        assert not out.exists()


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_existing_target(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_bytes(b"precious")
    run = mlxedge("convert", model, "--to", "gguf:q8_0", "-o", out)
    fails(run, "exists", "--force")
    assert out.read_bytes() == b"precious"
    assert mlxedge("convert", model, "--to", "gguf:q8_0", "-o", out, "--force").returncode == 0
    assert out.read_bytes().startswith(b"GGUF")


@pytest.mark.parametrize("target", ["gguf:q4_k_m", "mlx:4bit", "hf:f32"])
@pytest.mark.parametrize(
    ("value", "name"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")], ids=str
)
def test_weights_that_are_no_numbers(
    model: Path, tmp_path: Path, target: str, value: float, name: str
) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    damaged = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    damaged[17, 33] = value
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": damaged}, file)
    out = tmp_path / ("m.gguf" if target.startswith("gguf") else "m")
    run = mlxedge("convert", model, "--to", target, "-o", out)
    where = "model.layers.1.mlp.up_proj.weight", "row 17", "column 33"
    fails(run, *where, name, "--allow-nan", out=out)


def test_nan_can_be_allowed(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].copy()
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, file)
    run = mlxedge(
        "convert", model, "--to", "hf:bf16", "-o", tmp_path / "m", "--allow-nan", "--json"
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["result"]["nonfinite_tensors"] == ["model.norm.weight"]
    assert "model.norm.weight" in run.stderr
    made = load_file(tmp_path / "m" / "model.safetensors")
    assert np.isnan(made["model.norm.weight"].astype(np.float32)).sum() == 1


def test_truncated_and_lying_safetensors(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    good = file.read_bytes()
    out = tmp_path / "m.gguf"
    run_on = ("convert", model, "--to", "gguf:q8_0", "-o", out)
    file.write_bytes(good[: len(good) // 2])
    fails(mlxedge(*run_on), "model.safetensors", out=out)
    file.write_bytes((1 << 40).to_bytes(8, "little") + good[8:])
    fails(mlxedge(*run_on), "model.safetensors", "byte", out=out)
    header = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    header["model.norm.weight"]["data_offsets"][1] += 2
    text = json.dumps(header).encode()
    size = int.from_bytes(good[:8], "little")
    file.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + size :])
    fails(mlxedge(*run_on), "model.safetensors", out=out)


def test_missing_shard_and_index_outside_the_folder(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", shards=3)
    out = tmp_path / "m.gguf"
    run_on = ("convert", model, "--to", "gguf:q8_0", "-o", out)
    index = model / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = next(iter(good["weight_map"]))
    for path in ("../secret.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], name: path}}))
        fails(mlxedge(*run_on), "outside", out=out)
    index.write_text(json.dumps(good))
    (model / "model-00002-of-00003.safetensors").unlink()
    fails(mlxedge(*run_on), "model-00002-of-00003.safetensors", out=out)


def test_pickles_are_refused(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    run = mlxedge("convert", model, "--to", "gguf:q8_0", "-o", tmp_path / "m.gguf")
    fails(run, "pickle", "safetensors", out=tmp_path / "m.gguf")


def test_unknown_architecture_and_remote_code(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "brontosaurus", "auto_map": {"AutoModel": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text("raise SystemExit('remote code was run')")
    run = mlxedge("convert", model, "--to", "mlx:4bit", "-o", tmp_path / "m")
    fails(run, "brontosaurus", "llama", "never run", out=tmp_path / "m")


def test_wrong_usage(model: Path, tmp_path: Path) -> None:
    run = mlxedge("convert", model, "--to", "mlx:7bit", "-o", tmp_path / "m")
    fails(run, "2, 3, 4, 5, 6, 8", status=2, out=tmp_path / "m")
    run = mlxedge("convert", tmp_path / "nowhere", "--to", "mlx:4bit", "-o", tmp_path / "m")
    fails(run, "nowhere", out=tmp_path / "m")


def test_read_only_target(model: Path, tmp_path: Path) -> None:
    """Root may write where it likes, so the read-only place is one that is so for root too."""
    out = Path("/proc/mlxedge/m.gguf")
    if not Path("/proc").exists():
        out = tmp_path / "locked" / "m.gguf"
        out.parent.mkdir(mode=0o500)
    fails(mlxedge("convert", model, "--to", "gguf:q8_0", "-o", out), str(out.parent.parent))


def _small_files() -> None:
    """No file of this process may grow beyond 64 KiB: as good as a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))


def test_a_file_that_cannot_grow(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    run = mlxedge("convert", model, "--to", "gguf:q8_0", "-o", out, preexec_fn=_small_files)
    fails(run, "m.gguf", out=out)
    assert mlxedge("convert", model, "--to", "gguf:q8_0", "-o", out).returncode == 0


def test_a_full_disk(model: Path, tmp_path: Path) -> None:
    """A real file system of 1 MiB where this user may mount one, else the check of free space."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        huge = write_huge_config(model)
        run = mlxedge("convert", huge, "--to", "hf:f32", "-o", tmp_path / "m")
        fails(run, "free", out=tmp_path / "m")
        return
    try:
        out = small / "m.gguf"
        run = mlxedge("convert", model, "--to", "gguf:f32", "-o", out)
        fails(run, "free", out=out)
        # A disk that something else has filled.
        filler = small / "filler"
        filler.write_bytes(bytes(800_000))
        run = mlxedge("convert", model, "--to", "mlx:2bit", "-o", small / "m")
        fails(run, "free", out=small / "m")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def write_huge_config(model: Path) -> Path:
    """A sparse checkpoint of 64 TiB that takes no space."""
    rows = 1 << 33
    header = {
        "model.embed_tokens.weight": {
            "dtype": "BF16",
            "shape": [rows, 4096],
            "data_offsets": [0, rows * 8192],
        }
    }
    text = json.dumps(header).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rows * 8192)
    return model


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose conversion takes long enough to be killed in the middle of."""
    return write_tiny_llama(
        tmp_path_factory.mktemp("larger") / "larger",
        layers=12,
        hidden=1024,
        intermediate=2048,
        heads=16,
        kv_heads=4,
        dtype="bf16",
    )


TARGETS = ("--to", "gguf:q4_k_m", "--to", "mlx:4bit", "--to", "gguf:q3_k_l")


def test_killed_anywhere(larger: Path, tmp_path: Path) -> None:
    """SIGKILL at many moments: no final path holds anything but a whole output, and the run that
    is started again ends with the bytes of one that was never killed."""
    started = time.monotonic()
    assert mlxedge("convert", larger, *TARGETS, "-o", tmp_path / "whole").returncode == 0
    length = time.monotonic() - started
    command = [sys.executable, "-m", "mlxedge", "convert", str(larger), *TARGETS]
    for moment in np.linspace(0.1, 0.95, 7):
        killed = subprocess.Popen(
            [*command, "-o", str(tmp_path / "killed")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(length * moment)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        for path in (tmp_path / "killed").glob("[!.]*"):
            if not path.name.endswith(".mlxedge.json"):
                assert contents(path) == contents(tmp_path / "whole" / path.name)
    if partial := list((tmp_path / "killed").glob(".*.partial")):
        run = mlxedge("convert", larger, *TARGETS, "-o", tmp_path / "killed", "--json")
        assert run.returncode == 0, (run.stderr, partial)
    for path in (tmp_path / "whole").iterdir():
        if not path.name.endswith(".mlxedge.json"):
            assert contents(tmp_path / "killed" / path.name) == contents(path)
    assert not list((tmp_path / "killed").glob(".*"))


def test_an_interrupted_run_says_so_and_can_be_repeated(larger: Path, tmp_path: Path) -> None:
    """Ctrl-C as a user types it, without --force afterwards."""
    out = tmp_path / "m.gguf"
    command = [sys.executable, "-m", "mlxedge", "convert", str(larger), "--to", "gguf:q4_k_m"]
    run = subprocess.Popen(
        [*command, "-o", str(out), "--threads", "1"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (partial_dir(out) / "journal.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert (run.returncode, errors.strip()) == (130, "interrupted")
    assert not out.exists()
    assert mlxedge("convert", larger, "--to", "gguf:q4_k_m", "-o", out).returncode == 0
    assert not partial_dir(out).exists()


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(f.relative_to(path.parent)): f.read_bytes() for f in files}


def test_bf16_values_survive_the_reader(tmp_path: Path) -> None:
    """Guards the damage in the tests above: an untouched model converts."""
    model = write_tiny_llama(tmp_path / "model", dtype="bf16")
    assert mlxedge("convert", model, "--to", "hf:bf16", "-o", tmp_path / "m").returncode == 0
    before, after = (load_file(p / "model.safetensors") for p in (model, tmp_path / "m"))
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}
    assert before["model.norm.weight"].dtype == ml_dtypes.bfloat16


def test_the_source_is_never_replaced(model: Path, tmp_path: Path) -> None:
    for out in (model, tmp_path):
        run = mlxedge("convert", model, "--to", "hf:f32", "-o", out / "", "--force")
        assert run.returncode in (0, 2), run.stderr
        assert (model / "model.safetensors").exists()
    source = tmp_path / "m.gguf"
    assert mlxedge("convert", model, "--to", "gguf:f16", "-o", source).returncode == 0
    before = source.read_bytes()
    run = mlxedge("convert", source, "--to", "gguf:q8_0", "-o", source, "--force")
    fails(run, "holds the source", status=2)
    assert source.read_bytes() == before


def test_weights_of_another_type(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": np.ones(256, np.int64)}, file)
    run = mlxedge("convert", model, "--to", "mlx:4bit", "-o", tmp_path / "m")
    fails(run, "model.norm.weight", "i64", "bf16", out=tmp_path / "m")
