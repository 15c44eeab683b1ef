"""Of a model that sees, the language model: transformers computes with the whole one on text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import architectures_dense
from oracles.architectures_gemma import OWN, SAVED
from oracles.checkpoints import SIZES
from oracles.llama_cpp import LlamaCpp
from oracles.tiny import write_tokenizer
from safetensors.numpy import load_file, save_file

import mlxedge

TOKENS = [int(t) for t in np.random.default_rng(1).integers(3, 500, 60)]
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 40,
    },
    "mistral3": {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "mistral3 of ministral3": {
        "model_type": "ministral3",
        "head_dim": 32,
        "rope_parameters": architectures_dense.TEMPERED,
    },
    "smolvlm": {"model_type": "llama", "head_dim": 32},
    "qwen2_vl": {
        "model_type": "qwen2_vl_text",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [4, 6, 6]},
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl_text",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [4, 6, 6]},
    },
    "glm4v": {
        "model_type": "glm4v_text",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e5,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 3, 3],
        },
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl_text",
        "head_dim": 48,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e5,
            "mrope_section": [8, 8, 8],
            "mrope_interleaved": True,
        },
    },
    "gemma4": OWN["gemma4_text"] | SAVED["gemma4_text"],
}
#: What their encoders of images call their sizes.
ENCODERS: dict[str, dict[str, Any]] = {
    "mistral3": {"head_dim": 16},
    "gemma4": {"head_dim": 16, "num_key_value_heads": 2},
    "smolvlm": {"image_size": 56},
    "qwen2_vl": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 128},
    "qwen2_5_vl": {"depth": 1, "num_heads": 2, "out_hidden_size": 128},
    "glm4v": {"depth": 1, "num_heads": 2, "out_hidden_size": 128},
    "qwen3_vl": {
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 128,
        "deepstack_visual_indexes": [0],
    },
}
#: What mlx-lm has for it, where that is of another type.
IN_MLX = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "glm4v_text": "glm4",
}
#: What the file holds and transformers does not keep: of layers that share keys and values.
UNUSED = {"gemma4": ("layers.6.self_attn.k_proj.weight", (64, 128))}
#: How files on the Hub call the tensors of a language model within a larger one.
PREFIXES = {"new": "model.language_model.", "old": "language_model.model."}


def write_model(folder: Path, kind: str, names: str) -> np.ndarray:
    """A model, and its logits on ``TOKENS``; ``kind`` begins with its type."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    whole = kind.split()[0]
    vision = VISION | ENCODERS.get(whole, {})
    if kind == "gemma4":
        vision = {k: v for k, v in vision.items() if k not in ("image_size", "patch_size")}
    config = AutoConfig.for_model(
        whole,
        text_config=SIZES | TEXT[kind],
        vision_config=vision,
        **{"image_token_id" if kind == "gemma4" else "image_token_index": 511},
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("q_norm.weight") and kind == "gemma4":
                parameter.mul_(parameter.numel() ** -0.5)
        logits: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    model.save_pretrained(folder)
    write_tokenizer(folder, SIZES["vocab_size"])
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        prefix = next((p for p in PREFIXES.values() if name.startswith(p)), "")
        weights[(PREFIXES[names] if prefix else "") + name.removeprefix(prefix)] = tensor
    if kind in UNUSED:
        name, shape = UNUSED[kind]
        weights[PREFIXES[names] + name] = np.ones(shape, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return logits


def by_transformers(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("names", PREFIXES)
@pytest.mark.parametrize("kind", TEXT)
def test_logits(kind: str, names: str, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm import load

    truth = write_model(tmp_path / "source", kind, names)
    report = mlxedge.convert(tmp_path / "source", ["gguf:f32", "mlx:f32"], tmp_path)
    for output in report.plan.outputs:
        assert any(
            f"the language model of this {kind.split()[0]} alone" in note for note in output.notes
        )
    written = json.loads((tmp_path / "source-mlx-f32/config.json").read_text("utf-8"))
    model_type = TEXT[kind]["model_type"]
    assert written["model_type"] == IN_MLX.get(model_type, model_type)
    assert "vision_config" not in written
    mlx_lm = load(str(tmp_path / "source-mlx-f32"))[0]
    found = [np.array(mlx_lm(mx.array([TOKENS]))[0].astype(mx.float32))]
    with LlamaCpp(tmp_path / "source-F32.gguf", cache="f32") as model:
        found.append(model.logits(TOKENS))
    with mlxedge.load(tmp_path / "source", engine="numpy") as ours:
        found.append(ours.logits(TOKENS))
    mlxedge.convert(tmp_path / "source-F32.gguf", "hf:f32", tmp_path / "back")
    found.append(by_transformers(tmp_path / "back"))
    for logits in found:
        # llama.cpp looks gemma's GELU up in a table of f16.
        assert np.abs(logits - truth).max() <= 1e-3 * np.abs(truth).max()


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_configs_that_are_not_nested(kind: str, tmp_path: Path) -> None:
    """As those on the Hub, which are older."""
    truth = write_model(tmp_path, kind, "new")
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(text | config), "utf-8")
    weights = load_file(tmp_path / "model.safetensors")
    weights = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in weights.items()
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with mlxedge.load(tmp_path, engine="numpy") as ours:
        assert np.abs(ours.logits(TOKENS) - truth).max() <= 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize("key", ["llm_config", "language_config"])
def test_configs_of_remote_code(key: str, tmp_path: Path) -> None:
    truth = write_model(tmp_path, "mistral3", "old")
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config |= {"model_type": "some_chat", key: config.pop("text_config")}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with mlxedge.load(tmp_path, engine="numpy") as ours:
        assert np.abs(ours.logits(TOKENS) - truth).max() <= 1e-4 * np.abs(truth).max()
