"""What a conversion does when its calibration fails on the way, and what it leaves then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.tiny import write_tiny_llama
from safetensors.numpy import load_file, save_file

import mlxedge
from mlxedge.calibration import collect
from mlxedge.calibration.run import calibrate_to_file
from mlxedge.calibration.store import hessian_folder
from mlxedge.errors import BadWeightsError, OutputExistsError, UsageError
from mlxedge.guidance import Guidance, Guide
from mlxedge.recipes.overrides import parse_overrides
from mlxedge.report import Report
from mlxedge.sources import open_source


def qualities(report: Report) -> dict[str, str]:
    path = report.outputs[0].record
    assert path is not None
    return {t["name"]: t["quality"] for t in json.loads(path.read_text())["tensors"]}


def changed(folder: Path, part: str, change: Any) -> Path:
    """A tiny model whose matrices with ``part`` in their names ``change`` has altered."""
    write_tiny_llama(folder)
    tensors = {k: v.copy() for k, v in load_file(folder / "model.safetensors").items()}
    for name, values in tensors.items():
        if part in name:
            change(values)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def spoil(values: np.ndarray) -> None:
    values[3, 5] = np.nan


def enlarge(values: np.ndarray) -> None:
    values *= np.float32(1e30)


def test_the_model_runs_on_all_threads_whatever_encodes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    real = Guidance.guide

    def spy(self: Guidance, checkpoint: Any, threads: int, *others: Any) -> Guide:
        given.append(threads)
        return real(self, checkpoint, threads, *others)

    monkeypatch.setattr(Guidance, "guide", spy)
    report = mlxedge.convert(tiny, "mlx:8bit", tmp_path / "m", backend="mlx", threads=3)
    assert (report.threads, given) == (1, [3])


class Stopped(Exception):
    pass


def test_a_resumed_run_computes_no_hessian_that_nobody_asks_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = collect.collect_layer

    def spy(*arguments: Any) -> list[collect.Collected]:
        found = real(*arguments)
        made.extend(one.names[0] for one in found if one.hessians is not None)
        return found

    monkeypatch.setattr(collect, "collect_layer", spy)

    def stop(done: int, total: int, name: str) -> None:
        if name == "model.layers.1.self_attn.o_proj.weight":
            raise Stopped

    # What stays plain needs none either.
    kept = parse_overrides(["1.mlp.down_proj=bf16"])
    to = {"quality": "best", "overrides": kept, "threads": 1}
    mlxedge.convert(tiny, "mlx:4bit", tmp_path / "whole", **to)  # type: ignore[arg-type]
    assert len(made) == 2 * 4 - 1
    with pytest.raises(Stopped):
        mlxedge.convert(tiny, "mlx:4bit", tmp_path / "m", progress=stop, **to)  # type: ignore[arg-type]
    made.clear()
    report = mlxedge.convert(tiny, "mlx:4bit", tmp_path / "m", **to)  # type: ignore[arg-type]
    assert report.outputs[0].resumed
    assert made == ["model.layers.1.mlp.gate_proj.weight"]
    name = "model.safetensors"
    assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_nan_that_is_allowed_ends_error_feedback_where_it_is(tmp_path: Path) -> None:
    source = changed(tmp_path / "model", "1.mlp.up_proj", spoil)
    report = mlxedge.convert(source, "mlx:4bit", tmp_path / "m", quality="best", allow_nan=True)
    assert report.nonfinite == ["model.layers.1.mlp.up_proj.weight"]
    found = qualities(report)
    assert found["model.layers.0.mlp.down_proj.weight"] == "best"
    assert found["model.layers.1.mlp.down_proj.weight"] == "reference"


@pytest.mark.parametrize("quality", ["fast", "best"])
@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("gguf:iq2_xs", "gguf:iq2_xs needs a calibration: get a good copy, give an imatrix"),
        ("gguf:q4_k_m", r"gguf:q4_k_m takes an imatrix file \(--calibrate\) then, or --no-cal"),
    ],
)
def test_nan_that_is_allowed_leaves_no_false_claim(
    tmp_path: Path, target: str, advice: str, quality: Any
) -> None:
    source = changed(tmp_path / "model", "1.mlp.up_proj", spoil)
    out = tmp_path / "m.gguf"
    with pytest.raises(BadWeightsError, match=f"activations of layer 1 are not fin.*; {advice}"):
        mlxedge.convert(source, target, out, quality=quality, allow_nan=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with open_source(write_tiny_llama(tmp_path / "good")) as checkpoint:
        calibrate_to_file(checkpoint, tmp_path / "imatrix.gguf", tokens=64)
    report = mlxedge.convert(
        source, target, out, calibrate=tmp_path / "imatrix.gguf", allow_nan=True
    )
    assert report.nonfinite == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("quality", ["fast", "best"])
def test_a_model_that_overflows_can_still_be_converted(tmp_path: Path, quality: Any) -> None:
    source = changed(tmp_path / "model", "up_proj", enlarge)
    out = tmp_path / "m"
    with pytest.raises(BadWeightsError, match=r"not finite.*--no-calibrate with"):
        mlxedge.convert(source, "mlx:4bit", out, quality=quality)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert mlxedge.convert(source, "mlx:4bit", out, calibrate=False).nonfinite == []


def test_what_is_copied_was_not_searched(tiny: Path, tmp_path: Path) -> None:
    mlxedge.convert(tiny, "gguf:q4_0", tmp_path / "a.gguf", quality="reference")
    report = mlxedge.convert(tmp_path / "a.gguf", ["gguf:q4_0"], tmp_path / "b.gguf")
    assert {t.how for t in report.outputs[0].tensors} == {"copy"}
    assert set(qualities(report).values()) == {"reference"}


def test_hessians_of_another_model_leave_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    imatrix = tmp_path / "imatrix.gguf"
    with open_source(tiny) as checkpoint:
        calibrate_to_file(checkpoint, imatrix, tokens=64, hessians=True)
    other = write_tiny_llama(tmp_path / "other", seed=5)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UsageError, match="of another model"):
        mlxedge.convert(
            other, ["mlx:4bit", "gguf:q4_k_m"], folder, quality="best", calibrate=imatrix
        )
    assert list(folder.iterdir()) == []


def test_hessians_go_with_the_file_that_they_belong_to(tiny: Path, tmp_path: Path) -> None:
    imatrix = tmp_path / "imatrix.gguf"
    with open_source(tiny) as checkpoint:
        calibrate_to_file(checkpoint, imatrix, tokens=64, hessians=True)
    imatrix.unlink()
    with open_source(tiny) as checkpoint, pytest.raises(OutputExistsError, match="hessians"):
        calibrate_to_file(checkpoint, imatrix, tokens=128)
    assert hessian_folder(imatrix).is_dir()
    with open_source(tiny) as checkpoint:
        calibrate_to_file(checkpoint, imatrix, tokens=128, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix.gguf"]
    with pytest.raises(UsageError, match=r"there is no .*hessians"):
        mlxedge.convert(tiny, "mlx:4bit", tmp_path / "m", quality="best", calibrate=imatrix)
