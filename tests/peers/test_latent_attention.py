"""Models with latent attention as they are published: in blocks of FP8 with a layer that predicts
further tokens, in files of older converters, with factors for each frequency."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.checkpoints import write_checkpoint
from oracles.llama_cpp import LlamaCpp
from oracles.llama_quantize import Options, quantize
from safetensors.torch import load_file, save_file

import mlxedge
from mlxedge import gguf_values as gv
from mlxedge.calibration.run import calibrate_to_file
from mlxedge.encodings import F32, Encoding
from mlxedge.errors import UsageError
from mlxedge.outputs.gguf_file import header_bytes
from mlxedge.recipes.llama_cpp import file_type
from mlxedge.sources import open_source
from mlxedge.sources.gguf import read_gguf

TOKENS = [int(t) for t in np.random.default_rng(1).integers(3, 512, 96)]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}


def true_logits(folder: Path, tokens: list[int] = TOKENS) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([tokens])).logits[0].float().numpy()
    return logits


def llama_cpp_logits(path: Path) -> np.ndarray:
    with LlamaCpp(path, cache="f32") as model:
        return model.logits(TOKENS)


def mlx_lm_logits(folder: Path) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm import load

    model = load(str(folder))[0]
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


def our_logits(path: Path) -> np.ndarray:
    with mlxedge.load(path, engine="numpy") as model:
        logits: np.ndarray = model.logits(TOKENS)
    return logits


def agree(found: np.ndarray, truth: np.ndarray) -> bool:
    return bool(np.abs(found - truth).max() <= 1e-4 * np.abs(truth).max())


def in_blocks(weight: torch.Tensor, size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in FP8 and the scale of each block, as DeepSeek's inference/fp8_cast_bf16.py reads
    them: w = x · scale."""
    rows, cols = weight.shape
    down, across = -(-rows // size), -(-cols // size)
    padded = torch.zeros(down * size, across * size)
    padded[:rows, :cols] = weight
    blocks = padded.reshape(down, size, across, size)
    scales = blocks.abs().amax((1, 3)) / 448.0
    codes = blocks / scales[:, None, :, None]
    codes = codes.reshape(padded.shape)[:rows, :cols].to(torch.float8_e4m3fn)
    return codes.contiguous(), scales.contiguous()


def of_blocks(codes: torch.Tensor, scales: torch.Tensor, size: int = 128) -> torch.Tensor:
    rows, cols = codes.shape
    spread = scales.repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)[:, :cols]
    return codes.float() * spread


def copy(source: Path, target: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """A checkpoint with other tensors and a config that says more."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    path = target / "config.json"
    said = json.loads(path.read_text("utf-8")) | config
    path.write_text(json.dumps({k: v for k, v in said.items() if v is not ...}), "utf-8")
    return target


def test_deepseek_v3_in_blocks_of_fp8(tmp_path: Path) -> None:
    """Matrices of attention and each expert's by their own blocks, which no size here divides; and
    the layer that predicts further tokens is left out, scales and all."""
    made = write_checkpoint(
        tmp_path / "made", "deepseek_v3", hidden_size=192, kv_lora_rank=96, rope_parameters=YARN
    )
    stored: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(made / "model.safetensors").items():
        plain = tensor.dim() != 2 or name.endswith(("embed_tokens.weight", "gate.weight"))
        if plain or name == "lm_head.weight":
            stored[name] = whole[name] = tensor
            continue
        codes, scales = in_blocks(tensor)
        stored |= {name: codes, f"{name}_scale_inv": scales}
        whole[name] = of_blocks(codes, scales)
    last = "model.layers.1."
    ahead = {
        name.replace(last, "model.layers.2."): tensor.clone()
        for name, tensor in stored.items()
        if name.startswith(last)
    }
    codes, scales = in_blocks(torch.randn(192, 384))
    ahead |= {
        "model.layers.2.eh_proj.weight": codes,
        "model.layers.2.eh_proj.weight_scale_inv": scales,
        "model.layers.2.enorm.weight": torch.ones(192),
    }
    rules = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    folder = copy(
        made, tmp_path / "source", stored | ahead,
        quantization_config=rules, num_nextn_predict_layers=1, num_mtp_layers=...,
    )  # fmt: skip
    truth = true_logits(copy(made, tmp_path / "whole", whole))
    assert agree(our_logits(folder), truth)
    mlxedge.convert(folder, ["gguf:f32", "mlx:f32"], tmp_path)
    assert agree(llama_cpp_logits(tmp_path / "source-F32.gguf"), truth)
    assert agree(mlx_lm_logits(tmp_path / "source-mlx-f32"), truth)


def in_four_bits(weight: torch.Tensor, group: int = 32) -> tuple[dict[str, torch.Tensor], Any]:
    """A matrix as compressed-tensors packs integers of groups around zero, and what they are."""
    rows, cols = weight.shape
    groups = weight.reshape(rows, -1, group)
    scales = (groups.abs().amax(-1) / 7.0).to(torch.bfloat16)
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7)
    nibbles = (codes.reshape(rows, -1, 8) + 8).long()
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    packed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    stored = {
        "weight_packed": packed,
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, cols]),
    }
    return stored, (codes * scales.float()[..., None]).reshape(rows, cols)


def test_the_language_model_of_kimi_k2_with_experts_in_integers(tmp_path: Path) -> None:
    """As Kimi K2.5 is published: in a model that sees as well, whose language model's own config
    says how its experts are quantized."""
    made = write_checkpoint(tmp_path / "made", "kimi_k2", rope_parameters=YARN)
    stored: dict[str, torch.Tensor] = {"vision_tower.patch_embed.weight": torch.ones(4, 4)}
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(made / "model.safetensors").items():
        if ".experts." not in name:
            stored[f"language_model.{name}"] = whole[name] = tensor
            continue
        parts, whole[name] = in_four_bits(tensor)
        stem = f"language_model.{name.removesuffix('weight')}"
        stored |= {f"{stem}{part}": values for part, values in parts.items()}
    config = json.loads((made / "config.json").read_text("utf-8"))
    weights = {"type": "int", "num_bits": 4, "group_size": 32, "strategy": "group"}
    config["quantization_config"] = {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights | {"symmetric": True}}
        },
    }
    folder = copy(made, tmp_path / "source", stored, model_type="kimi_k25", text_config=config)
    truth = true_logits(copy(made, tmp_path / "whole", whole, model_type="deepseek_v3"))
    assert agree(our_logits(folder), truth)
    mlxedge.convert(folder, ["gguf:f32", "mlx:f32"], tmp_path)
    assert agree(llama_cpp_logits(tmp_path / "source-F32.gguf"), truth)
    assert agree(mlx_lm_logits(tmp_path / "source-mlx-f32"), truth)


def older(path: Path, source: Path, heads: int) -> Path:
    """A GGUF file as converters wrote it before latents were cached: ``kv_b_proj`` in one, and the
    sizes of heads that are not shared."""
    whole = load_file(source / "model.safetensors")
    file, raw = read_gguf(path), path.read_bytes()
    arch = "deepseek2.attention."
    metadata = dict(file.metadata)
    for part in ("key", "value"):
        metadata[f"{arch}{part}_length"] = metadata.pop(f"{arch}{part}_length_mla")
    metadata[f"{arch}head_count_kv"] = gv.u32(heads)
    del metadata["deepseek2.expert_gating_func"]
    infos: list[tuple[str, tuple[int, ...], Encoding, int]] = []
    data = b""
    for tensor in file.tensors:
        name, shape = tensor.name, tensor.shape
        values = raw[tensor.offset : tensor.offset + tensor.nbytes]
        if name.endswith("attn_k_b.weight"):
            continue
        if name.endswith("attn_v_b.weight"):
            layer = name.split(".")[1]
            joined = whole[f"model.layers.{layer}.self_attn.kv_b_proj.weight"].numpy()
            name, shape, values = f"blk.{layer}.attn_kv_b.weight", joined.shape, joined.tobytes()
        infos.append((name, shape, F32, len(data)))
        data += values + bytes(-len(values) % 32)
    made = path.with_name("older.gguf")
    made.write_bytes(header_bytes(metadata, infos) + data)
    return made


def test_files_of_older_converters(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", "deepseek_v2", rope_parameters=YARN)
    mlxedge.convert(folder, "gguf:f32", tmp_path)
    file = older(tmp_path / "source-F32.gguf", folder, 4)
    truth = true_logits(folder)
    assert agree(llama_cpp_logits(file), truth)
    assert agree(our_logits(file), truth)
    mlxedge.convert(file, "gguf:f32", tmp_path / "newer.gguf")
    newer = {t.name: t.shape for t in read_gguf(tmp_path / "newer.gguf").tensors}
    assert newer["blk.0.attn_k_b.weight"] == (4, 64, 32)
    assert newer["blk.0.attn_v_b.weight"] == (4, 40, 64)
    assert agree(llama_cpp_logits(tmp_path / "newer.gguf"), truth)


def test_mlx_folders_of_older_versions(tmp_path: Path) -> None:
    """They have ``kv_b_proj`` as it is, which mlx-lm takes apart as it loads."""
    folder = write_checkpoint(tmp_path / "source", "deepseek_v3", rope_parameters=YARN)
    mlxedge.convert(folder, "mlx:f32", tmp_path / "mlx")
    weights = next((tmp_path / "mlx").glob("*.safetensors"))
    tensors = load_file(weights)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("kv_b_proj.weight"):
            tensors[name] = tensor
            stem = name.removesuffix("kv_b_proj.weight")
            del tensors[f"{stem}embed_q.weight"], tensors[f"{stem}unembed_out.weight"]
    save_file(tensors, weights, metadata={"format": "mlx"})
    truth = true_logits(folder)
    assert agree(mlx_lm_logits(tmp_path / "mlx"), truth)
    assert agree(our_logits(tmp_path / "mlx"), truth)


def importances(path: Path) -> dict[str, np.ndarray]:
    """What llama-quantize makes of an imatrix file: means of squares, by GGUF name."""
    file, raw = read_gguf(path), path.read_bytes()
    values = {
        t.name: np.frombuffer(raw[t.offset : t.offset + t.nbytes], "<f4") for t in file.tensors
    }
    found = {}
    for name, sums in values.items():
        if name.endswith(".in_sum2"):
            counts = values[name.replace(".in_sum2", ".counts")]
            found[name.removesuffix(".in_sum2")] = sums.reshape(len(counts), -1) / counts[:, None]
    return found


def encoded(path: Path) -> dict[str, bytes]:
    raw = path.read_bytes()
    return {t.name: raw[t.offset : t.offset + t.nbytes] for t in read_gguf(path).tensors}


def test_an_imatrix_serves_llama_quantize_and_ours_alike(tmp_path: Path) -> None:
    """The values of every head have the importance of the latents, in files as llama-imatrix writes
    them too, which counts the tokens of all heads once; the keys have none."""
    folder = write_checkpoint(
        tmp_path / "source", "deepseek_v2", hidden_size=256, intermediate_size=256,
        moe_intermediate_size=256, q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=32,
    )  # fmt: skip
    mlxedge.convert(folder, "gguf:f32", tmp_path)
    source, imatrix = tmp_path / "source-F32.gguf", tmp_path / "i.gguf"
    with open_source(source) as opened:
        calibrate_to_file(opened, imatrix, tokens=512)
    known = importances(imatrix)
    assert known["blk.0.attn_v_b.weight"].shape == (4, 256)
    quantize(source, tmp_path / "theirs.gguf", file_type("iq2_xs"), options=Options(imatrix=known))
    mlxedge.convert(
        source, "gguf:iq2_xs", tmp_path / "ours.gguf", calibrate=imatrix, quality="reference"
    )
    assert encoded(tmp_path / "ours.gguf") == encoded(tmp_path / "theirs.gguf")
    assert not any(name.endswith("attn_k_b.weight") for name in known)

    counted_once = tmp_path / "once.gguf"
    file, raw = read_gguf(imatrix), imatrix.read_bytes()
    infos, data = [], b""
    for tensor in file.tensors:
        values = raw[tensor.offset : tensor.offset + tensor.nbytes]
        once = tensor.name.endswith("attn_v_b.weight.counts")
        infos.append((tensor.name, (1, 1) if once else tensor.shape, F32, len(data)))
        data += (values[:4] if once else values) + bytes(-len(values[:4] if once else values) % 32)
    counted_once.write_bytes(header_bytes(file.metadata, infos) + data)
    mlxedge.convert(
        source, "gguf:iq2_xs", tmp_path / "once-made.gguf", calibrate=counted_once,
        quality="reference",
    )  # fmt: skip
    assert encoded(tmp_path / "once-made.gguf") == encoded(tmp_path / "ours.gguf")


@pytest.mark.parametrize("original", [64, 512])
def test_longrope_of_minicpm3(original: int, tmp_path: Path) -> None:
    """As MiniCPM3-4B has it: see test_logits.test_longrope for who knows which factors."""
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.2] * 2, "long_factor": [1.5, 2.0, 4.0, 7.0] * 2}
    folder = write_checkpoint(
        tmp_path / "source",
        "minicpm3",
        max_position_embeddings=1024,
        rope_parameters={
            **{"rope_type": "longrope", "rope_theta": 1e4, **factors},
            "original_max_position_embeddings": original,
        },
    )
    truth = true_logits(folder)
    mlxedge.convert(folder, ["gguf:f32", "mlx:f32"], tmp_path)
    mlxedge.convert(tmp_path / "source-F32.gguf", "hf:f32", tmp_path / "from-gguf")
    mlxedge.convert(tmp_path / "source-mlx-f32", "hf:f32", tmp_path / "from-mlx")
    assert agree(llama_cpp_logits(tmp_path / "source-F32.gguf"), truth)
    assert agree(true_logits(tmp_path / "from-gguf"), truth)
    assert agree(true_logits(tmp_path / "from-mlx"), truth)
    if original < len(TOKENS):
        assert agree(mlx_lm_logits(tmp_path / "source-mlx-f32"), truth)
    else:
        assert agree(our_logits(folder), truth)
        assert agree(our_logits(tmp_path / "source-F32.gguf"), truth)


def test_pieces_of_any_length(tmp_path: Path) -> None:
    """With heads that fill no vector, from a cache that grows."""
    folder = write_checkpoint(
        tmp_path / "source", "deepseek_v3", hidden_size=96, num_attention_heads=3,
        num_key_value_heads=3, kv_lora_rank=24, q_lora_rank=20, qk_nope_head_dim=10,
        qk_rope_head_dim=6, v_head_dim=12, max_position_embeddings=512,
    )  # fmt: skip
    tokens = [int(t) for t in np.random.default_rng(3).integers(3, 512, 300)]
    truth = true_logits(folder, tokens)
    with mlxedge.load(folder, engine="numpy", threads=2) as model:
        session = model.session()
        start = 0
        for piece in (1, 3, 1, 2, 30, 1, 5, len(tokens)):
            fed = tokens[start : start + piece]
            start += len(fed)
            assert agree(session.feed(fed), truth[start - 1])
        assert start == len(tokens)


def test_an_indexer_that_leaves_positions_out(tmp_path: Path) -> None:
    """The runtimes pick what transformers does; ours runs as far as nothing is left out."""
    folder = write_checkpoint(
        tmp_path / "source", "deepseek_v32", index_topk=40, index_n_heads=32, num_hidden_layers=3
    )
    truth = true_logits(folder)
    mlxedge.convert(folder, ["gguf:f32", "mlx:f32"], tmp_path)
    assert agree(llama_cpp_logits(tmp_path / "source-F32.gguf"), truth)
    assert agree(mlx_lm_logits(tmp_path / "source-mlx-f32"), truth)
    with mlxedge.load(folder, engine="numpy") as model:
        assert agree(model.logits(TOKENS[:40]), truth[:40])
        with pytest.raises(UsageError, match="context of 40"):
            model.logits(TOKENS[:41])


def test_tied_embeddings_of_youtu(tmp_path: Path) -> None:
    """Without a token for padding, whose row transformers would empty."""
    folder = write_checkpoint(
        tmp_path / "source", "youtu", tie_word_embeddings=True, pad_token_id=None
    )
    truth = true_logits(folder)
    mlxedge.convert(folder, ["gguf:f32", "mlx:f32"], tmp_path)
    assert agree(our_logits(folder), truth)
    assert agree(llama_cpp_logits(tmp_path / "source-F32.gguf"), truth)
    assert agree(mlx_lm_logits(tmp_path / "source-mlx-f32"), truth)
