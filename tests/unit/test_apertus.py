"""Numbers that Apertus trains are tensors in Hugging Face's files and metadata in GGUF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracles.checkpoints import write_checkpoint
from safetensors.numpy import load_file

import mlxedge
from mlxedge.errors import CorruptFileError
from mlxedge.sources.gguf import read_gguf

PARTS = ("alpha_p", "alpha_n", "beta", "eps")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apertus")
    write_checkpoint(folder / "source", "apertus", num_hidden_layers=3)
    mlxedge.convert(folder / "source", "gguf:q8_0", folder / "made.gguf")
    return folder


def test_metadata_holds_the_numbers_of_all_layers(home: Path) -> None:
    weights = load_file(home / "source" / "model.safetensors")
    file = read_gguf(home / "made.gguf")
    assert not [t.name for t in file.tensors if "xielu" in t.name or "act_fn" in t.name]
    for part in PARTS:
        value = file.metadata[f"xielu.{part}"]
        names = [f"model.layers.{i}.mlp.act_fn.{part}" for i in range(3)]
        np.testing.assert_array_equal(value.value, [weights[name].item() for name in names])


def test_they_come_back_as_tensors(home: Path, tmp_path: Path) -> None:
    mlxedge.convert(home / "made.gguf", "hf:f32", tmp_path / "back")
    before = load_file(home / "source" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: t.shape for name, t in after.items()} == {n: t.shape for n, t in before.items()}
    for name in before:
        if ".act_fn." in name:
            np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.parametrize("part", PARTS)
def test_a_file_without_them_is_refused(home: Path, tmp_path: Path, part: str) -> None:
    whole = (home / "made.gguf").read_bytes()
    key = f"xielu.{part}".encode()
    assert whole.count(key) == 1
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(whole.replace(key, key.replace(b"xielu", b"other")))
    with pytest.raises(CorruptFileError, match=f"has no numbers xielu.{part}"):
        mlxedge.convert(damaged, "mlx:4bit", tmp_path / "out")
