"""LoRA adapters are merged as PEFT merges them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from oracles.checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

from mlxedge.cli import main
from mlxedge.conversion import convert
from mlxedge.errors import (
    CorruptFileError,
    MlxedgeError,
    SourceNotFoundError,
    UnsafeFileError,
    UnsupportedModelError,
)
from mlxedge.fallback import OPS
from mlxedge.sources import open_source
from mlxedge.sources.adapter import with_adapter

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "base"
    return write_checkpoint(folder, "llama", attention_bias=True, tie_word_embeddings=False)


def train(base: Path, folder: Path, dtype: torch.dtype, **settings: Any) -> dict[str, np.ndarray]:
    """Save an adapter whose every parameter is random; what PEFT makes of the model with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": ATTENTION} | settings)
    adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
                if "lora_" in name:
                    parameter.data = parameter.data.to(dtype)
    adapted.save_pretrained(folder)
    merged = adapted.merge_and_unload()
    return {n: t.to(torch.float32).numpy() for n, t in merged.state_dict().items()}


def merge(base: Path, folder: Path) -> dict[str, np.ndarray]:
    found = {}
    with open_source(base) as checkpoint, with_adapter(checkpoint, folder) as merged:
        for name, tensor in merged.tensors.items():
            whole = OPS.decode(tensor.read(), tensor.encoding)
            for step in (1, 7):
                starts = range(0, tensor.rows, step)
                pieces = [tensor.read_rows(i, min(i + step, tensor.rows)) for i in starts]
                decoded = [OPS.decode(piece, tensor.encoding) for piece in pieces]
                np.testing.assert_allclose(np.concatenate(decoded), whole, rtol=1e-6, atol=1e-7)
            found[name] = whole.reshape(tensor.shape)
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {},
    "every-layer": {"target_modules": "all-linear", "r": 3},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 4, r"layers\.1.*v_proj": 16},
        "alpha_pattern": {r"layers\.0.*q_proj": 5, "v_proj": 40},
        "use_rslora": True,
    },
    "some-layers": {"layers_to_transform": [1]},
    "embeddings": {"target_modules": ["embed_tokens", "down_proj"], "r": 5},
    "head": {"modules_to_save": ["lm_head", "norm"]},
    "biases": {"bias": "all"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", SETTINGS)
def test_merged_as_peft_does(base: Path, tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    expected = train(base, tmp_path, dtype, **SETTINGS[case])
    got = merge(base, tmp_path)
    assert set(got) == set(expected)
    before = load_file(base / "model.safetensors")
    changed = 0
    for name, weights in expected.items():
        # PEFT rounds a product of 16-bit factors to 16 bits before it adds it.
        scale = np.abs(weights).max()
        bound = 1e-6 * scale if dtype is torch.float32 else 2.0**-8 * scale
        assert np.abs(got[name] - weights).max() <= bound, name
        changed += not np.array_equal(weights, before[name].numpy())
    assert changed >= 3


def test_a_tied_head_that_was_trained_is_the_models_own(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True)
    train(base, tmp_path / "lora", torch.float32)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    head = torch.randn(512, 128)
    save_file(load_file(file) | {"base_model.model.lm_head.weight": head}, file)
    out = tmp_path / "out.gguf"
    convert(base, "gguf:f32", out, adapter=tmp_path / "lora")
    with open_source(out) as found:
        assert found.config["tie_word_embeddings"] is False
        np.testing.assert_array_equal(found.tensors["lm_head.weight"].read()["weight"], head)


def test_converted_with_an_adapter(base: Path, tmp_path: Path) -> None:
    """From the command line, with what was merged in the plan and in the record."""
    expected = train(base, tmp_path / "lora", torch.float32, target_modules="all-linear")
    out = tmp_path / "out.gguf"
    command = ["convert", str(base), "--to", "gguf:f32", "-o", str(out)]
    command += ["--adapter", str(tmp_path / "lora")]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "with lora merged into 14 tensors" in done.output
    with open_source(out) as found:
        for name, tensor in found.tensors.items():
            got = tensor.read()["weight"].reshape(tensor.shape)
            assert np.abs(got - expected[name]).max() <= 1e-6 * np.abs(expected[name]).max()
    record = json.loads(Path(f"{out}.mlxedge.json").read_text())
    about = {"name": "lora", "rank": 8, "alpha": 12, "rank_stabilised": False, "tensors": 14}
    assert record["source"]["adapter"] == about
    files = {f["name"]: f["sha256"] for f in record["source"]["files"]}
    assert files["adapter_model.safetensors"]


@pytest.mark.parametrize("target", ["gguf:q8_0", "mlx:8bit"])
def test_into_a_quantized_model(base: Path, tmp_path: Path, target: str) -> None:
    """Its weights are decoded and merged; rows of Q and K are in their order."""
    train(base, tmp_path / "lora", torch.float32)
    quantized = tmp_path / ("base.gguf" if "gguf" in target else "base")
    convert(base, target, quantized, quality="reference", calibrate=False)
    whole = merge(base, tmp_path / "lora")
    got = merge(quantized, tmp_path / "lora")
    for name in whole:
        assert np.abs(got[name] - whole[name]).max() < 0.01 * np.abs(whole[name]).max()
    report = convert(
        quantized, target, tmp_path / ("a.gguf" if "gguf" in target else "a"),
        quality="reference", adapter=tmp_path / "lora",
    )  # fmt: skip
    kept = {t.source: t.kept for t in report.outputs[0].plan.tensors}
    assert kept["model.layers.0.self_attn.q_proj.weight"] == "requantized"
    assert kept["model.layers.0.mlp.up_proj.weight"] == "exact"


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]
Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
BAD: dict[str, tuple[Change, type[MlxedgeError], str]] = {
    "kind": (lambda c, t: c.update(peft_type="IA3"), UnsupportedModelError, "peft_type IA3"),
    "dora": (lambda c, t: c.update(use_dora=True), UnsupportedModelError, "use_dora"),
    "pissa": (
        lambda c, t: c.update(init_lora_weights="pissa"),
        UnsupportedModelError,
        "init_lora_weights pissa",
    ),
    "alpha": (lambda c, t: c.update(lora_alpha="x"), CorruptFileError, "lora_alpha"),
    "no-b": (lambda c, t: t.pop(B), CorruptFileError, "cannot be multiplied"),
    "no-a": (lambda c, t: t.pop(A), CorruptFileError, "has no lora_A.weight"),
    "rank": (lambda c, t: t.update({A: torch.ones(7, 128)}), CorruptFileError, "multiplied"),
    "shape": (lambda c, t: t.update({A: torch.ones(8, 64)}), CorruptFileError, "[128, 64]"),
    "dtype": (
        lambda c, t: t.update({A: torch.ones(8, 128, dtype=torch.int32)}),
        CorruptFileError,
        "is i32",
    ),
    "nan": (
        lambda c, t: t.update({A: torch.full((8, 128), float("nan"))}),
        CorruptFileError,
        "NaN",
    ),
    "other-model": (
        lambda c, t: t.update({n.replace("layers.0", "layers.7"): t.pop(n) for n in (A, B)}),
        UnsupportedModelError,
        "layers.7",
    ),
    "unknown": (
        lambda c, t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(128)}),
        UnsupportedModelError,
        "neither a factor",
    ),
    "more-tokens": (
        lambda c, t: t.update({"base_model.model.lm_head.weight": torch.ones(513, 128)}),
        UnsupportedModelError,
        "more tokens",
    ),
    "empty": (lambda c, t: t.clear(), CorruptFileError, "no tensors"),
}


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    train(base, folder, torch.float32)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_are_refused(base: Path, adapter: Path, tmp_path: Path, case: str) -> None:
    change, error, words = BAD[case]
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(error) as caught:
        merge(base, tmp_path)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="save_pretrained"):
        merge(base, base)
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(SourceNotFoundError, match=r"no adapter_model\.safetensors"):
        merge(base, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(UnsafeFileError, match="pickle"):
        merge(base, tmp_path)
