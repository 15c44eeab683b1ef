"""What Qwen3-Next and Qwen3.5 have beside other architectures, held to transformers and llama.cpp:
columns that GGUF has in another order, whole models that see as well, layers that predict ahead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from oracles.architectures_delta import FULL, LINEAR, OWN
from oracles.checkpoints import SAVED, SIZES, write_checkpoint
from oracles.llama_cpp import LlamaCpp
from oracles.llama_quantize import Options, quantize
from oracles.tiny import SENTENCES, write_tokenizer
from peers.test_logits import transformers_logits
from safetensors.numpy import load_file, save_file

import mlxedge
from mlxedge.calibration.imatrix import read_imatrix
from mlxedge.calibration.run import calibrate_to_file
from mlxedge.prepare import prepare
from mlxedge.sources import open_source

TOKENS = [int(t) for t in np.random.default_rng(1).integers(3, 500, 60)]
#: Two heads of keys, and three of values to each of them.
SETTINGS = SAVED["qwen3_5_text-tied-every-third-half"] | {
    "hidden_size": 256,
    "intermediate_size": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
OUT = "model.layers.0.linear_attn.out_proj.weight"


def agree(found: np.ndarray, truth: np.ndarray, bound: float = 1e-4) -> None:
    assert np.abs(found - truth).max() <= bound * np.abs(truth).max()


def ours(path: Path) -> np.ndarray:
    with mlxedge.load(path, engine="numpy") as model:
        logits: np.ndarray = model.logits(TOKENS)
    return logits


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its F32 GGUF and an imatrix file."""
    home = tmp_path_factory.mktemp("delta")
    folder = write_checkpoint(home / "source", **SETTINGS)
    mlxedge.convert(folder, "gguf:f32", home)
    with open_source(folder) as opened:
        calibrate_to_file(opened, home / "imatrix.gguf", text=SENTENCES, context=64)
    return home


def importances(path: Path) -> dict[str, np.ndarray]:
    """The mean square of each column, by GGUF name, as the file has them."""
    tensors = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    return {
        name.removesuffix(".in_sum2"): (sums / tensors[name[:-7] + "counts"][..., :1]).ravel()
        for name, sums in tensors.items()
        if name.endswith(".in_sum2")
    }


def test_imatrix_files_have_columns_where_gguf_has_them(calibrated: Path) -> None:
    found = importances(calibrated / "imatrix.gguf")["blk.0.ssm_out.weight"]
    with open_source(calibrated / "source") as opened:
        spec, checkpoint = prepare(opened)
        own = read_imatrix(calibrated / "imatrix.gguf", spec, checkpoint.config)
        # Of a GGUF file as well, whose columns the reader put back.
        with open_source(calibrated / "source-F32.gguf") as other:
            calibrate_to_file(other, calibrated / "other.gguf", text=SENTENCES, context=64)
    importance = own.importance(OUT)
    assert importance is not None
    grouped = importance.reshape(2, 3, 128)
    np.testing.assert_allclose(found, grouped.swapaxes(0, 1).ravel(), rtol=1e-6)
    assert np.abs(found - importance).max() > 0.1 * importance.max()
    again = importances(calibrated / "other.gguf")["blk.0.ssm_out.weight"]
    np.testing.assert_allclose(again, found, rtol=1e-3)


def test_files_are_llama_quantizes_with_that_imatrix(calibrated: Path) -> None:
    made, truth = calibrated / "ours.gguf", calibrated / "theirs.gguf"
    mlxedge.convert(
        calibrated / "source", "gguf:q4_k_m", made,
        quality="reference", calibrate=calibrated / "imatrix.gguf",
    )  # fmt: skip
    options = Options(imatrix=importances(calibrated / "imatrix.gguf"))
    quantize(calibrated / "source-F32.gguf", truth, 15, options=options)
    expected = {t.name: t for t in gguf.GGUFReader(truth).tensors}
    found = {t.name: t for t in gguf.GGUFReader(made).tensors}
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.tensor_type == expected[name].tensor_type, name
        np.testing.assert_array_equal(tensor.data, expected[name].data, err_msg=name)


def test_error_feedback_follows_the_columns(calibrated: Path) -> None:
    """The output of a layer of linear attention, against that of the float weights."""
    mlxedge.convert(calibrated / "source", "gguf:q4_0", calibrated / "fast.gguf", quality="fast")
    mlxedge.convert(calibrated / "source", "gguf:q4_0", calibrated / "best.gguf", quality="best")
    with open_source(calibrated / "source") as opened:
        from mlxedge.calibration.collect import collect
        from mlxedge.calibration.texts import sample

        checkpoint = prepare(opened)[1]
        taken = sample(checkpoint, SENTENCES, context=64)
        hessian = next(
            one.hessians[0]
            for one in collect(checkpoint, taken, hessians=True)
            if OUT in one.names and one.hessians is not None
        )
        weight = checkpoint.tensors[OUT].read()["weight"]
    errors = {}
    for name in ("fast", "best"):
        mlxedge.convert(calibrated / f"{name}.gguf", "hf:f32", calibrated / name)
        wrong = load_file(calibrated / name / "model.safetensors")[OUT] - weight
        errors[name] = float(np.einsum("ij,jk,ik->", wrong, hessian, wrong))
    assert errors["best"] < 0.9 * errors["fast"]


WHOLE = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 128,
    "patch_size": 4,
    "num_position_embeddings": 16,
}


@pytest.mark.parametrize("kind", WHOLE)
def test_the_language_model_of_one_that_sees(kind: str, tmp_path: Path) -> None:
    """As the Hub has it: experts in one stack, layers that predict ahead beside the model."""
    import mlx.core as mx
    import torch
    from mlx_lm import load
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = SIZES | OWN[WHOLE[kind]] | {"num_hidden_layers": 4, "model_type": WHOLE[kind]}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=VISION)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter) * spread)
        truth: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    source = tmp_path / "source"
    model.save_pretrained(source)
    write_tokenizer(source, SIZES["vocab_size"])
    weights = {n: p.detach().numpy() for n, p in model.named_parameters()}
    assert any("visual" in name for name in weights)
    assert any("experts.gate_up_proj" in name for name in weights) == kind.endswith("_moe")
    weights["mtp.fc.weight"] = np.zeros((128, 256), np.float32)
    weights["mtp.layers.0.self_attn.q_proj.weight"] = np.zeros((256, 128), np.float32)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})

    report = mlxedge.convert(source, ["gguf:f32", "mlx:f32", "mlx:4bit", "hf:f32"], tmp_path)
    for output in report.plan.outputs:
        assert any("the language model of this" in note for note in output.notes)
    agree(ours(source), truth)
    agree(ours(tmp_path / "source-F32.gguf"), truth)
    agree(ours(tmp_path / "source-mlx-f32"), truth)
    agree(ours(tmp_path / "source-hf-f32"), truth)
    with LlamaCpp(tmp_path / "source-F32.gguf", cache="f32") as other:
        agree(other.logits(TOKENS), truth)
    folder = tmp_path / "source-mlx-f32"
    agree(np.array(load(str(folder))[0](mx.array([TOKENS]))[0].astype(mx.float32)), truth)
    # Quantized modules are found under the names that mlx-lm has, and ours again.
    quantized = json.loads((tmp_path / "source-mlx-4bit/config.json").read_text("utf-8"))
    assert quantized["model_type"] == kind
    assert quantized["text_config"]["model_type"] == WHOLE[kind]
    made = load(str(tmp_path / "source-mlx-4bit"))[0]
    found = np.array(made(mx.array([TOKENS]))[0].astype(mx.float32))
    agree(ours(tmp_path / "source-mlx-4bit"), found, 0.02)
    for folder in (source, tmp_path / "source-mlx-f32", tmp_path / "source-hf-f32"):
        with mlxedge.load(folder, engine="mlx") as model:
            agree(model.logits(TOKENS), truth)


def test_layers_that_predict_ahead_are_left_out(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", **SAVED["qwen3_next"])
    truth = ours(folder)
    weights = load_file(folder / "model.safetensors")
    weights["mtp.fc.weight"] = np.zeros((128, 256), np.float32)
    weights["mtp.norm.weight"] = np.zeros(128, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report = mlxedge.convert(folder, "gguf:f32", tmp_path)
    notes = report.plan.outputs[0].notes
    assert any("2 tensors of layers that predict further tokens" in note for note in notes)
    agree(ours(tmp_path / "source-F32.gguf"), truth)


def rewritten(source: Path, target: Path, change: Any) -> None:
    """A GGUF file with the metadata and tensors that ``change`` makes of those of another."""
    reader = gguf.GGUFReader(source)
    fields = {
        name: field
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    metadata = {name: (field.contents(), field.types) for name, field in fields.items()}
    tensors = {t.name: t.data for t in reader.tensors}
    change(metadata, tensors)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, (value, types) in metadata.items():
        writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files_with_layers_that_predict_ahead(tmp_path: Path) -> None:
    """llama.cpp's converter counts these with the others."""
    folder = write_checkpoint(tmp_path / "source", **SAVED["qwen3_5_text"])
    mlxedge.convert(folder, "gguf:f32", tmp_path)

    def change(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        count, types = metadata["qwen35.block_count"]
        metadata["qwen35.block_count"] = (count + 1, types)
        metadata["qwen35.nextn_predict_layers"] = (1, types)
        kinds, types = metadata.pop("qwen35.attention.recurrent_layers")
        assert kinds == [True, True, True, False]
        for name in [n for n in tensors if n.startswith("blk.3.")]:
            tensors[name.replace("blk.3.", "blk.4.")] = tensors[name]
        tensors["blk.4.nextn.eh_proj.weight"] = np.zeros((128, 256), np.float32)

    rewritten(tmp_path / "source-F32.gguf", tmp_path / "ahead.gguf", change)
    np.testing.assert_array_equal(ours(tmp_path / "ahead.gguf"), ours(tmp_path / "source-F32.gguf"))
    report = mlxedge.convert(tmp_path / "ahead.gguf", "mlx:4bit", tmp_path / "mlx")
    assert any("12 tensors of layers" in note for note in report.plan.outputs[0].notes)


def test_older_files_of_qwen3_next(tmp_path: Path) -> None:
    """With q, k, v and z in one matrix, as transformers has it."""
    folder = write_checkpoint(tmp_path / "source", **SAVED["qwen3_next"])
    mlxedge.convert(folder, "gguf:f32", tmp_path)
    weights = load_file(folder / "model.safetensors")

    def change(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for layer in range(3):
            del tensors[f"blk.{layer}.attn_qkv.weight"], tensors[f"blk.{layer}.attn_gate.weight"]
            name = f"model.layers.{layer}.linear_attn.in_proj_qkvz.weight"
            tensors[f"blk.{layer}.ssm_in.weight"] = weights[name]

    rewritten(tmp_path / "source-F32.gguf", tmp_path / "older.gguf", change)
    agree(ours(tmp_path / "older.gguf"), ours(folder))
    mlxedge.convert(tmp_path / "older.gguf", "gguf:f32", tmp_path / "newer.gguf")
    names = {t.name for t in gguf.GGUFReader(tmp_path / "newer.gguf").tensors}
    assert "blk.0.attn_qkv.weight" in names
    assert not any("ssm_in" in name for name in names)


def test_published_configs_say_less(tmp_path: Path) -> None:
    """Qwen3-Next's has rope_theta and full_attention_interval where transformers 5 writes
    rope_parameters and layer_types."""
    folder = write_checkpoint(
        tmp_path / "source", "qwen3_next", num_hidden_layers=4,
        layer_types=[LINEAR, FULL] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    truth = ours(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    for key in ("layer_types", "rope_parameters", "norm_topk_prob", "mlp_only_layers"):
        del config[key]
    older = {"rope_theta": 1e7, "rope_scaling": None, "full_attention_interval": 2}
    path.write_text(json.dumps(config | older | {"norm_topk_prob": True}), "utf-8")
    np.testing.assert_array_equal(ours(folder), truth)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"linear_num_value_heads": 3}, "linear_num_value_heads .3. is not a multiple"),
        ({"linear_key_head_dim": "32"}, "linear_key_head_dim .'32'."),
        ({"full_attention_interval": 0}, "full_attention_interval is '0'"),
        ({"layer_types": ["sliding_attention"] * 4}, "layers of type sliding_attention"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": ["a"]}}, "mrope_section is"),
    ],
)
def test_configs_that_make_no_sense(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", **SAVED["qwen3_5_text"])
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changed), "utf-8")
    with pytest.raises(mlxedge.errors.UnsupportedModelError, match=says):
        mlxedge.convert(folder, "mlx:4bit", tmp_path / "out")


@pytest.mark.parametrize("still", [False, True], ids=["rotates", "does not rotate"])
def test_olmo_hybrid_both_ways(still: bool, tmp_path: Path) -> None:
    """By way of MLX, whose runtime alone has it, and quantized there; and as the Hub has it, with
    convolutions of the sizes of q, k and v, where transformers cuts them in three equal parts."""
    import mlx.core as mx
    from mlx_lm import load

    rope = {"rope_type": "default", "rope_theta": None if still else 5e5}
    source = write_checkpoint(
        tmp_path / "source", "olmo_hybrid", num_hidden_layers=4, rope_parameters=rope
    )
    truth = ours(source)
    mlxedge.convert(source, ["mlx:f32", "mlx:4bit", "hf:f32"], tmp_path)
    mlxedge.convert(tmp_path / "source-mlx-f32", "hf:f32", tmp_path / "back")
    for name in ("source-mlx-f32", "source-hf-f32", "back"):
        np.testing.assert_array_equal(ours(tmp_path / name), truth)
    agree(transformers_logits(tmp_path / "back"), transformers_logits(source), 1e-6)
    weights = load_file(tmp_path / "back" / "model.safetensors")
    sizes = [weights[f"model.layers.0.linear_attn.{p}_conv1d.weight"].shape for p in "qkv"]
    assert sizes == [(96, 1, 4), (96, 1, 4), (192, 1, 4)]
    made = load(str(tmp_path / "source-mlx-4bit"))[0]
    found = np.array(made(mx.array([TOKENS]))[0].astype(mx.float32))
    agree(ours(tmp_path / "source-mlx-4bit"), found, 0.02)
    assert np.corrcoef(found.ravel(), truth.ravel())[0, 1] > 0.5


def test_published_configs_of_kimi_linear(tmp_path: Path) -> None:
    """Its layers and sizes of linear attention stand in a part of their own, and dense layers as
    how many there are; convolutions of GGUF files have more axes."""
    folder = write_checkpoint(tmp_path / "source", "kimi_linear", num_hidden_layers=5)
    truth = ours(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    assert config.pop("layer_types")[3:] == [LINEAR, FULL]
    for key in ("linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim", "qk_head_dim"):
        del config[key]
    del config["mlp_layer_types"]
    older = {
        "first_k_dense_replace": 1,
        "head_dim": 72,
        "linear_attn_config": {
            "full_attn_layers": [5],
            "kda_layers": [1, 2, 3, 4],
            "head_dim": 32,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        "mla_use_nope": True,
        "moe_router_activation_func": "sigmoid",
        "moe_layer_freq": 1,
        "rope_theta": 10000.0,
        "use_grouped_topk": True,
    }
    path.write_text(json.dumps(config | older), "utf-8")
    weights = load_file(folder / "model.safetensors")
    renamed = {
        n.replace("layers.0.block_sparse_moe", "layers.0.mlp"): w for n, w in weights.items()
    }
    assert set(renamed) != set(weights)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(ours(folder), truth)

    mlxedge.convert(folder, "gguf:f32", tmp_path)

    def change(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for name, values in tensors.items():
            if "conv1d" in name:
                tensors[name] = values.reshape(1, 128, 1, 4)
            if name.endswith("ssm_a"):
                tensors[name] = values.reshape(1, 1, 4, 1)

    rewritten(tmp_path / "source-F32.gguf", tmp_path / "other.gguf", change)
    agree(ours(tmp_path / "other.gguf"), truth)
    path.write_text(json.dumps(config | older | {"num_expert_group": 2}), "utf-8")
    with pytest.raises(mlxedge.errors.UnsupportedModelError, match="n_group '2' is not supported"):
        ours(folder)
