"""Architectures whose files hold tensors fused or transposed: older files, adapters, quantized
sources, statistics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.checkpoints import write_checkpoint
from oracles.llama_cpp import LlamaCpp
from oracles.llama_quantize import Options, quantize
from oracles.quantized_folder import awq_layer
from safetensors.torch import load_file, save_file

import mlxedge
from mlxedge.calibration.collect import calibrate
from mlxedge.calibration.imatrix import read_imatrix, write_imatrix
from mlxedge.calibration.texts import Sample
from mlxedge.models import baichuan
from mlxedge.prepare import prepare
from mlxedge.sources import open_source
from mlxedge.sources.gguf import read_gguf

TOKENS = [int(t) for t in np.random.default_rng(1).integers(3, 512, 96)]
IDS = np.random.default_rng(0).integers(3, 512, (3, 160))
#: By architecture, the modules of its layers that hold matrices.
LINEAR = {
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": (
        *("attention.query_key_value", "attention.dense"),
        *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
}


def old_names(folder: Path) -> None:
    """As GPT-2 is on the Hub: not in a ``transformer``, and with the masks of attention."""
    path = folder / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
    layers = {n.split(".")[1] for n in tensors if n.startswith("h.")}
    for layer in layers:
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path, metadata={"format": "pt"})


def logits(path: Path) -> np.ndarray:
    with mlxedge.load(path, engine="numpy") as model:
        return model.logits(TOKENS)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_bigcode"])
def test_files_without_a_prefix(model_type: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", model_type)
    truth = logits(folder)
    old_names(folder)
    np.testing.assert_array_equal(logits(folder), truth)
    mlxedge.convert(folder, "hf:f32", tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert "transformer.h.1.attn.c_attn.weight" in made
    assert "transformer.h.1.attn.bias" not in made


def test_slopes_of_mpt_as_the_config_has_them(tmp_path: Path) -> None:
    """transformers takes ALiBi's largest bias for 8 whatever the config says (5.24); llama.cpp and
    the model's own remote code do not."""
    settings = {"clip_qkv": 6.0, "alibi_bias_max": 16}  # MPT 7B StoryWriter
    folder = write_checkpoint(tmp_path / "source", "mpt", attn_config=settings)
    mlxedge.convert(folder, "gguf:f32", tmp_path / "made.gguf")
    with LlamaCpp(tmp_path / "made.gguf", cache="f32") as model:
        truth = model.logits(TOKENS)
    assert np.abs(logits(folder) - truth).max() < 1e-3 * np.abs(truth).max()
    mlxedge.convert(tmp_path / "made.gguf", "hf:f32", tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text("utf-8"))
    assert settings.items() <= config["attn_config"].items()


def test_baichuan_of_forty_layers(tmp_path: Path) -> None:
    """It tells positions by ALiBi."""
    folder = write_checkpoint(tmp_path / "source", "baichuan", num_hidden_layers=40)
    mlxedge.convert(folder, "gguf:f32", tmp_path / "made.gguf")
    with LlamaCpp(tmp_path / "made.gguf", cache="f32") as model:
        truth = model.logits(TOKENS)
    for source in (folder, tmp_path / "made.gguf"):
        assert np.abs(logits(source) - truth).max() < 1e-4 * np.abs(truth).max()


def test_the_head_of_baichuan_2_has_rows_of_length_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baichuan, "_VOCAB_OF_2", 512)
    folder = write_checkpoint(tmp_path / "source", "baichuan", num_hidden_layers=32)
    found = logits(folder)
    mlxedge.convert(folder, ["gguf:f32", "hf:f32"], tmp_path)
    with LlamaCpp(tmp_path / "source-F32.gguf", cache="f32") as model:
        by_llama_cpp = model.logits(TOKENS)
    again = logits(tmp_path / "source-hf-f32")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = torch.nn.functional.normalize(tensors["lm_head.weight"])
    save_file(tensors, path, metadata={"format": "pt"})
    monkeypatch.undo()
    truth = logits(folder)
    for one in (found, by_llama_cpp, again):
        assert np.abs(one - truth).max() < 1e-5 * np.abs(truth).max()


def adapted_logits(base: Path, folder: Path, modules: list[str]) -> np.ndarray:
    """Saves a random adapter; PEFT's logits with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=12, target_modules=modules))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(folder)
        found: np.ndarray = adapted(torch.tensor([TOKENS])).logits[0].numpy()
    return found


@pytest.mark.parametrize("kind", ["source", "mlx", "gguf"])
@pytest.mark.parametrize("model_type", LINEAR)
def test_adapters(model_type: str, kind: str, tmp_path: Path) -> None:
    """On matrices that hold several, transposed or not; where the files are of another kind, on
    those that are there as they were."""
    base = write_checkpoint(tmp_path / "base", model_type)
    fused, *others = LINEAR[model_type]
    modules = others if kind != "source" else [fused, *others]
    truth = adapted_logits(base, tmp_path / "lora", [m.rpartition(".")[2] for m in modules])
    before = logits(base)
    assert np.abs(before - truth).max() > 1e-2 * np.abs(truth).max()
    if model_type == "gpt2":
        old_names(base)
    source = base
    if kind != "source":
        source = tmp_path / ("made.gguf" if kind == "gguf" else "made")
        mlxedge.convert(base, f"{kind}:f32", source)
    if model_type == "gpt2" and kind != "source":
        with pytest.raises(mlxedge.MlxedgeError, match="merge it into the model"):
            mlxedge.convert(source, "hf:f32", tmp_path / "out", adapter=tmp_path / "lora")
        return
    mlxedge.convert(source, "hf:f32", tmp_path / "out", adapter=tmp_path / "lora")
    assert np.abs(logits(tmp_path / "out") - truth).max() < 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize("model_type", LINEAR)
def test_quantized_sources(model_type: str, tmp_path: Path) -> None:
    """Of quantized layers the rows are outputs, also where transformers transposes floats; codes
    stay in an MLX folder, where only rows move."""
    whole = write_checkpoint(tmp_path / "whole", model_type)
    made = tmp_path / "awq"
    shutil.copytree(whole, made)
    tensors = load_file(whole / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if not stem.endswith(LINEAR[model_type]):
            stored[name] = tensor
            continue
        turned = model_type == "gpt2"
        rows, cols = tensor.shape[::-1] if turned else tensor.shape
        _, arrays, weights = awq_layer(stem, 32, rows, cols, scale=2.0**-5)
        own = torch.from_numpy(weights)
        tensors[name] = own.T.contiguous() if turned else own
        stored |= {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in arrays.items()}
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, made / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((made / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (made / "config.json").write_text(json.dumps(config), "utf-8")
    truth = logits(whole)
    report = mlxedge.convert(made, ["gguf:f32", "mlx:4bit-g32"], tmp_path / "out")
    by_format = {output.plan.target.format: output for output in report.outputs}
    kept = {t.name: t.kept for t in by_format["mlx"].plan.tensors}
    joined = LINEAR[model_type][0]
    assert {how for name, how in kept.items() if name.endswith(f"{joined}.weight")} == {"exact"}
    for output in report.outputs:
        path = Path(output.plan.path)
        error = np.abs(logits(path) - truth).max() / np.abs(truth).max()
        assert error < (1e-5 if output.plan.target.format == "gguf" else 0.2)


def test_an_imatrix_has_the_entries_of_llama_imatrix(tmp_path: Path) -> None:
    """And the weights that it is for are encoded as llama-quantize does with it."""
    folder = write_checkpoint(
        tmp_path / "source", "gpt_neox", hidden_size=256, intermediate_size=1024
    )
    source, path = tmp_path / "source-F32.gguf", tmp_path / "imatrix.gguf"
    mlxedge.convert(folder, "gguf:f32", source)
    with open_source(folder) as opened:
        spec, checkpoint = prepare(opened)
        made = calibrate(checkpoint, Sample(IDS, "random", "", IDS.size, False))
    write_imatrix(path, made, spec)
    entries = {t.name.removesuffix(".in_sum2") for t in read_gguf(path).tensors}
    matrices = {
        f"blk.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    }
    assert {n for n in entries if not n.endswith(".counts")} == matrices | {"output.weight"}
    read = read_imatrix(path, spec)
    assert set(read.tensors) == set(made.tensors)
    importances: dict[str, Any] = {}
    for part in "qkv":
        name = f"model.layers.1.self_attn.{part}_proj.weight"
        np.testing.assert_allclose(read.tensors[name].sums, made.tensors[name].sums, rtol=1e-6)
    for name, statistics in read.tensors.items():
        for own in spec.input_in_gguf(name):
            importances[own] = statistics.sums / statistics.counts[:, None]
    for recipe, number in {"q4_k_m": 15, "iq3_xxs": 23}.items():
        ours, theirs = tmp_path / f"ours-{recipe}.gguf", tmp_path / f"theirs-{recipe}.gguf"
        mlxedge.convert(source, f"gguf:{recipe}", ours, quality="reference", calibrate=path)
        quantize(source, theirs, number, options=Options(imatrix=importances))
        one, other = read_gguf(ours), read_gguf(theirs)
        expected = {t.name: t for t in other.tensors}
        assert set(expected) == {t.name for t in one.tensors}
        for tensor in one.tensors:
            twin = expected[tensor.name]
            assert tensor.encoding == twin.encoding, tensor.name
            assert data_of(ours, tensor) == data_of(theirs, twin), tensor.name


def data_of(path: Path, tensor: Any) -> bytes:
    with path.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.nbytes)
