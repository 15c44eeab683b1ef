"""inspect on everything that can be read, and on what cannot be converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from oracles.quantized_folder import awq_model
from oracles.tiny import write_tiny_llama
from safetensors.numpy import load_file, save_file

import mlxedge
from mlxedge.cli import main
from mlxedge.inspect import abbreviate, inspect, obstacles, plain


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def as_json(*arguments: object) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return loaded


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as GGUF and MLX."""
    out = tmp_path_factory.mktemp("made")
    mlxedge.convert(tiny, ["gguf:q4_k_m", "mlx:4bit-g32"], out)
    return out


def test_a_hugging_face_folder(tiny: Path) -> None:
    found = as_json(tiny)
    tensors = found.pop("tensors")
    weights = load_file(tiny / "model.safetensors")
    assert {t["name"]: tuple(t["shape"]) for t in tensors} == {
        name: w.shape for name, w in weights.items()
    }
    assert sum(t["bytes"] for t in tensors) == sum(w.nbytes for w in weights.values())
    parameters = sum(w.size for w in weights.values())
    files = {f.name: f.stat().st_size for f in tiny.iterdir() if f.name != "README.md"}
    assert {f["name"]: f["bytes"] for f in found.pop("files")} == files
    metadata = found.pop("metadata")
    assert metadata["config.hidden_size"] == 256
    assert metadata["generation_config.eos_token_id"] == [0, 2]
    assert metadata["safetensors.format"] == "pt"
    assert found == {
        "name": "tiny-llama",
        "format": "hf",
        "path": str(tiny),
        "repo": None,
        "revision": None,
        "architecture": "llama",
        "quantization": "bf16",
        "parameters": parameters,
        "bits_per_weight": 16.0,
        "bytes": sum(files.values()),
        "context_length": 2048,
        "vocab_size": 512,
        "has_tokenizer": True,
        "has_chat_template": True,
        "license": "apache-2.0",
        "base_model": None,
        "convertible": {f: {"possible": True, "reason": None} for f in ("mlx", "gguf", "hf")},
        "types": {"bf16": {"tensors": 20, "weights": parameters, "bytes": 2 * parameters}},
    }


def test_shards_are_one_model(tmp_path: Path) -> None:
    whole = as_json(write_tiny_llama(tmp_path / "whole"))
    parts = as_json(write_tiny_llama(tmp_path / "parts", shards=3))
    assert parts["types"] == whole["types"]
    assert {t["name"] for t in parts["tensors"]} == {t["name"] for t in whole["tensors"]}
    assert "model.safetensors.index.json" in {f["name"] for f in parts["files"]}


def test_a_gguf_file(made: Path, tiny: Path) -> None:
    (path,) = made.glob("*.gguf")
    found = as_json(path)
    assert (found["format"], found["architecture"], found["quantization"]) == (
        "gguf", "llama", "Q4_K_M",
    )  # fmt: skip
    assert found["parameters"] == as_json(tiny)["parameters"]
    assert found["bytes"] == path.stat().st_size
    assert {"q4_k", "q6_k", "f32"} == set(found["types"])
    names = {t["name"] for t in found["tensors"]}
    assert {"token_embd.weight", "blk.1.ffn_down.weight"} <= names
    metadata = found["metadata"]
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert metadata["tokenizer.ggml.tokens"]["length"] == 512
    assert metadata["tokenizer.ggml.tokens"]["first"][0] == "<|endoftext|>"
    assert all(c["possible"] for c in found["convertible"].values())
    full = as_json(path, "--full", "--metadata", "tokenizer.ggml.t*")
    assert set(full["metadata"]) == {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"}
    assert len(full["metadata"]["tokenizer.ggml.tokens"]) == 512


def test_an_mlx_folder(made: Path, tiny: Path) -> None:
    (path,) = (p for p in made.iterdir() if p.is_dir())
    found = as_json(path)
    assert (found["format"], found["quantization"]) == ("mlx", "4-bit g32")
    assert found["parameters"] == as_json(tiny)["parameters"]
    shapes = {t["name"]: (t["shape"], t["encoding"]) for t in found["tensors"]}
    assert shapes["model.embed_tokens.weight"] == ([512, 256], "affine-4bit-g32")
    assert not [name for name in shapes if name.endswith(".scales")]
    assert 5.0 < found["bits_per_weight"] < 5.1


def test_a_safetensors_file_alone(tiny: Path) -> None:
    found = as_json(tiny / "model.safetensors")
    assert found["format"] == "safetensors"
    assert found["parameters"] == as_json(tiny)["parameters"]
    assert found["architecture"] is None
    assert "config.json" in found["convertible"]["gguf"]["reason"]


def test_an_unknown_architecture_is_listed(tiny: Path, tmp_path: Path) -> None:
    save_file(load_file(tiny / "model.safetensors"), tmp_path / "model.safetensors")
    config = {
        "model_type": "mammoth",
        "text_config": {"vocab_size": 7, "max_position_embeddings": 99},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = as_json(tmp_path)
    assert len(found["tensors"]) == 20
    assert (found["architecture"], found["vocab_size"], found["context_length"]) == (
        "mammoth", 7, 99,
    )  # fmt: skip
    reason = found["convertible"]["mlx"]["reason"]
    assert "'mammoth' is not supported" in reason
    assert "qwen3" in reason
    assert f"convert to mlx   not possible: {reason}" in run(tmp_path)


def test_foreign_quantization_is_listed(tiny: Path, tmp_path: Path) -> None:
    save_file(
        {"model.layers.0.mlp.up_proj.qweight": np.zeros((4, 8), np.int32)},
        tmp_path / "model.safetensors",
    )
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = as_json(tmp_path)
    assert found["quantization"] == "hqq"
    assert found["tensors"] == [
        {"name": "model.layers.0.mlp.up_proj.qweight", "shape": [4, 8], "encoding": "i32",
         "bytes": 128},
    ]  # fmt: skip
    assert "hqq" in found["convertible"]["hf"]["reason"]


def test_quantized_weights_count_as_what_they_stand_for(tmp_path: Path) -> None:
    whole, quantized = awq_model(tmp_path)
    found, expected = as_json(quantized), as_json(whole)
    assert found["quantization"] == "awq"
    assert found["parameters"] == expected["parameters"]
    assert {t["name"]: t["shape"] for t in found["tensors"]} == {
        t["name"]: t["shape"] for t in expected["tensors"]
    }
    layer = next(t for t in found["tensors"] if t["name"].endswith("0.mlp.up_proj.weight"))
    assert layer["encoding"] == "affine-4bit-g32"
    assert layer["bytes"] == 512 * 256 // 2 + 512 * 8 // 2 + 512 * 8 * 2
    assert all(target["possible"] for target in found["convertible"].values())


def test_weights_without_a_config(tiny: Path, tmp_path: Path) -> None:
    save_file(load_file(tiny / "model.safetensors"), tmp_path / "model.safetensors")
    found = as_json(tmp_path)
    assert found["architecture"] is None
    assert "config.json" in found["convertible"]["mlx"]["reason"]


def test_what_a_person_reads(made: Path) -> None:
    (path,) = made.glob("*.gguf")
    text = run(path)
    lines = dict(line.split("  ", 1) for line in text.splitlines() if "  " in line)
    assert lines["format"].strip() == "GGUF file"
    assert lines["quantization"].strip() == "Q4_K_M"
    assert lines["context"].strip() == "2048"
    assert lines["tokenizer"].strip() == "yes, with a chat template"
    assert lines["base model"].strip() == "not said"
    assert "] (512 items)" in lines["tokenizer.ggml.tokens"].replace("…", "").replace(", ]", "]")
    assert lines["tokenizer.chat_template"].endswith("characters)")
    assert lines["blk.0.attn_q.weight"].split() == ["256×256", "q4_k", str(256 * 144)]
    brief = run(path, "--no-tensors", "--metadata", "general.a*")
    assert "blk.0" not in brief
    assert "general.architecture" in brief
    assert "general.name" not in brief
    assert "characters)" not in run(path, "--full")


def test_names_in_a_file_do_not_steer_the_terminal(tmp_path: Path) -> None:
    save_file({"a\x1b[2Jb": np.zeros(2, np.float32)}, tmp_path / "x.safetensors", {"k\n": "\x07"})
    text = run(tmp_path / "x.safetensors")
    assert "a\\x1b[2Jb" in text
    assert "safetensors.k\\n  \\x07" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("m.gguf", b"GGUF\x03\x00\x00\x00", "CorruptFileError"),
        ("m.gguf", b"not a model", "CorruptFileError"),
        ("m.safetensors", b"\xff" * 20, "CorruptFileError"),
        ("m.bin", b"\x80\x04", "UnsafeFileError"),
        ("folder/README.md", b"", "SourceNotFoundError"),
        ("folder/pytorch_model.bin", b"", "UnsafeFileError"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    target = path.parent if "/" in name else path
    done = CliRunner().invoke(main, ["inspect", str(target), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["kind"] == kind
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_source_that_is_nothing() -> None:
    done = CliRunner().invoke(main, ["inspect", "no such thing"])
    assert done.exit_code == 1
    assert "no such file or folder, and not a Hub id" in done.stderr


def test_nothing_is_left_behind(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert set(obstacles(inspect(tiny)).values()) == {None}
    assert list(tmp_path.iterdir()) == []


def test_values_become_json() -> None:
    value = {"a": np.arange(3), "b": float("nan"), "c": (1, [float("-inf")])}
    assert plain(value) == {"a": [0, 1, 2], "b": "nan", "c": [1, ["-inf"]]}
    assert abbreviate({"a": list(range(9)), "b": [1]}) == {
        "a": {"length": 9, "first": list(range(8))},
        "b": [1],
    }


def test_nothing_is_tokenized_to_say_what_can_be_converted(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial is no conversion: it takes no sample of a text to calibrate on."""

    def refuse(*args: object, **settings: object) -> None:
        raise AssertionError

    monkeypatch.setattr("mlxedge.calibration.texts.sample", refuse)
    assert obstacles(inspect(tiny)) == {"mlx": None, "gguf": None, "hf": None}
