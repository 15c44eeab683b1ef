"""What GLM-4.5 has beside other mixtures: a correction in f32, layers that predict ahead."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from oracles.checkpoints import write_checkpoint
from safetensors.numpy import load_file, save_file

import mlxedge
from mlxedge.conversion import plan_conversion
from mlxedge.errors import UnsupportedModelError
from mlxedge.sources import open_source
from mlxedge.targets import parse_target

LAYERS = 3
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glm4_moe") / "model"
    return write_checkpoint(
        folder, "glm4_moe", num_hidden_layers=LAYERS, num_nextn_predict_layers=0
    )


@pytest.mark.parametrize("target", ["hf:bf16", "mlx:bf16", "mlx:4bit"])
def test_the_correction_of_the_choice_stays_exact(model: Path, tmp_path: Path, target: str) -> None:
    mlxedge.convert(model, target, tmp_path / "out")
    made = mlxedge.load(tmp_path / "out")
    bias = load_file(model / "model.safetensors")[BIAS]
    assert np.abs(bias).max() > 0
    assert (
        load_file(next((tmp_path / "out").glob("*.safetensors")))[BIAS].tobytes() == bias.tobytes()
    )
    made.close()


def ahead(model: Path, folder: Path, count: int) -> Path:
    """The model with a layer past the last, and a config that says ``count`` of them."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    last = f"model.layers.{LAYERS - 1}."
    further = {
        name.replace(last, f"model.layers.{LAYERS}."): values
        for name, values in weights.items()
        if name.startswith(last)
    }
    further[f"model.layers.{LAYERS}.eh_proj.weight"] = np.zeros((128, 256), np.float32)
    save_file(weights | further, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("num_mtp_layers", None)
    (folder / "config.json").write_text(
        json.dumps(config | {"num_nextn_predict_layers": count}), "utf-8"
    )
    return folder


def test_layers_that_predict_further_tokens_are_left_out(model: Path, tmp_path: Path) -> None:
    folder = ahead(model, tmp_path / "model", 1)
    with open_source(folder) as source:
        plan, _ = plan_conversion(source, [parse_target("mlx:f32")], tmp_path / "planned")
    assert any("predict further tokens are left out" in note for note in plan.outputs[0].notes)
    mlxedge.convert(folder, "mlx:f32", tmp_path / "out")
    mlxedge.convert(model, "mlx:f32", tmp_path / "plain")
    made, plain = (load_file(tmp_path / f"{n}/model.safetensors") for n in ("out", "plain"))
    assert made.keys() == plain.keys()
    config = json.loads((tmp_path / "out/config.json").read_text("utf-8"))
    assert config["num_nextn_predict_layers"] == 0


def test_layers_that_the_config_knows_nothing_of_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="not part of it"):
        mlxedge.convert(ahead(model, tmp_path / "model", 0), "mlx:f32", tmp_path / "out")
