"""A whole conversion, stopped at chosen moments and taken up again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from oracles.tiny import write_tiny_llama
from safetensors.numpy import load_file, save_file

import mlxedge
from mlxedge.errors import BadWeightsError, DiskFullError, OutputExistsError, UsageError
from mlxedge.outputs.staging import Staging, partial_dir

TARGETS = ["gguf:q8_0", "mlx:4bit", "gguf:q4_k_m"]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(".mlxedge.json")
    }


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [3, 11, 19])
def test_a_stopped_run_goes_on_and_ends_the_same(tiny: Path, tmp_path: Path, after: int) -> None:
    mlxedge.convert(tiny, TARGETS, tmp_path / "whole")
    seen: set[str] = set()

    def stop(done: int, total: int, name: str) -> None:
        seen.add(name)
        if len(seen) > after:
            raise Stopped

    with pytest.raises(Stopped):
        mlxedge.convert(tiny, TARGETS, tmp_path / "m", progress=stop, threads=1)
    assert not list((tmp_path / "m").glob("[!.]*"))
    report = mlxedge.convert(tiny, TARGETS, tmp_path / "m")
    assert all(0 < o.resumed <= after + 2 for o in report.outputs)
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")
    clean = mlxedge.convert(tiny, TARGETS, tmp_path / "again")
    assert [o.error for o in report.outputs] == pytest.approx([o.error for o in clean.outputs])


def test_a_run_that_stopped_between_two_outputs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Staging.publish
    published: list[Path] = []

    def once(self: Staging, force: bool) -> None:
        if published:
            raise Stopped
        publish(self, force)
        published.append(self.plan.path)

    monkeypatch.setattr(Staging, "publish", once)
    with pytest.raises(Stopped):
        mlxedge.convert(tiny, TARGETS, tmp_path / "m")
    monkeypatch.undo()
    before = published[0].stat()
    report = mlxedge.convert(tiny, TARGETS, tmp_path / "m")
    assert report.kept == published
    assert published[0].stat().st_ino == before.st_ino
    assert len(report.outputs) == 2
    assert len(list((tmp_path / "m").glob("*.mlxedge.json"))) == 3
    # Complete now, so the same command meets an output that exists.
    with pytest.raises(OutputExistsError):
        mlxedge.convert(tiny, TARGETS, tmp_path / "m")


def test_allowed_nan_is_remembered_and_not_inherited(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][5, 7] = np.nan
    save_file(tensors, file)

    def stop(done: int, total: int, name: str) -> None:
        if done > 0.9 * total:
            raise Stopped

    with pytest.raises(Stopped):
        mlxedge.convert(model, "hf:f32", tmp_path / "m", allow_nan=True, progress=stop)
    with pytest.raises(BadWeightsError, match=r"up_proj.*row 5"):
        mlxedge.convert(model, "hf:f32", tmp_path / "m")
    assert not partial_dir(tmp_path / "m").exists()
    with pytest.raises(Stopped):
        mlxedge.convert(model, "hf:f32", tmp_path / "m", allow_nan=True, progress=stop)
    report = mlxedge.convert(model, "hf:f32", tmp_path / "m", allow_nan=True)
    assert report.outputs[0].resumed
    assert report.nonfinite == ["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("scale", "target", "dtype"),
    [(1e5, "gguf:f16", None), (1e5, "mlx:4bit", "f16"), (1e8, "gguf:q8_0", None)],
)
def test_weights_too_large_for_the_target(
    tmp_path: Path, scale: float, target: str, dtype: str | None
) -> None:
    model = write_tiny_llama(tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] *= np.float32(scale * 100)
    save_file(tensors, file)
    out = tmp_path / ("m.gguf" if target.startswith("gguf") else "m")
    with pytest.raises(BadWeightsError, match=r"down_proj.*does not fit.*bf16"):
        mlxedge.convert(model, target, out, dtype=dtype)
    assert not out.exists()


def test_copied_blocks_are_checked_too(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    mlxedge.convert(tiny, "gguf:q8_0", source)
    from mlxedge.sources.gguf import read_gguf

    tensor = next(t for t in read_gguf(source).tensors if t.encoding.name == "q8_0")
    data = bytearray(source.read_bytes())
    data[tensor.offset : tensor.offset + 2] = b"\x00\x7e"  # the f16 scale of a block: NaN
    source.write_bytes(data)
    with pytest.raises(BadWeightsError, match="nan"):
        mlxedge.convert(source, "gguf:q8_0", tmp_path / "m.gguf")


def test_the_error_does_not_depend_on_other_targets(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    mlxedge.convert(tiny, "gguf:q4_k_m", source)
    alone = mlxedge.convert(source, "gguf:q4_k_s", tmp_path / "alone.gguf")
    beside = mlxedge.convert(source, ["gguf:q4_k_s", "hf:f32"], tmp_path / "beside")
    assert alone.outputs[0].error == beside.outputs[0].error


def test_the_record_tells_source_output_and_tensors(tiny: Path, tmp_path: Path) -> None:
    import hashlib

    mlxedge.convert(tiny, "gguf:q4_k_m", tmp_path / "m.gguf")
    record = json.loads((tmp_path / "m.gguf.mlxedge.json").read_text())
    source = {f["name"]: f["sha256"] for f in record["source"]["files"]}
    weights = (tiny / "model.safetensors").read_bytes()
    assert source["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    (made,) = record["output"]["files"]
    assert made["sha256"] == hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest()
    assert len(record["tensors"]) == 20
    assert 0 < record["output"]["relative_error"] < 0.1


def test_threads_do_not_change_the_bytes(tiny: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        mlxedge.convert(tiny, TARGETS, tmp_path / str(threads), threads=threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_arguments_that_make_no_sense(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="twice"):
        mlxedge.convert(tiny, ["mlx:4bit", "mlx:4bit-g64"], tmp_path / "m")
    for to in ("mlx:4bit", ["gguf:q8_0", "gguf:f16"]):
        with pytest.raises(UsageError, match="one gguf"):
            mlxedge.convert(tiny, to, tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="no target"):
        mlxedge.convert(tiny, [], tmp_path / "m")
    with pytest.raises(UsageError, match="threads"):
        mlxedge.convert(tiny, "mlx:4bit", tmp_path / "m", threads=0)
    assert list(tmp_path.iterdir()) == []


def test_room_is_asked_for_where_the_file_system_tells(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (10**9, 10**9, 10**6))
    with pytest.raises(DiskFullError, match=r"need 0.00\d+ GB and 0.001 GB are free: free some"):
        mlxedge.convert(tiny, "gguf:q8_0", tmp_path / "m.gguf", calibrate=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (0, 0, 0))
    mlxedge.convert(tiny, "gguf:q8_0", tmp_path / "m.gguf", calibrate=False)


@pytest.mark.parametrize("target", ["hf:f32", "mlx:f32", "gguf:f32"])
def test_floats_of_another_type_keep_their_values(tmp_path: Path, target: str) -> None:
    model = write_tiny_llama(tmp_path / "model", dtype="bf16")
    out = tmp_path / ("m.gguf" if "gguf" in target else "m")
    mlxedge.convert(model, target, out)
    with (
        mlxedge.load(model, engine="numpy") as source,
        mlxedge.load(out, engine="numpy") as made,
    ):
        assert (made.logits(range(40)) == source.logits(range(40))).all()
