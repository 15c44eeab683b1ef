"""One checkpoint, four programs: transformers tells the truth, and what mlxedge writes must give
the same logits in llama.cpp, in mlx-lm and in mlxedge's own forward pass.

The checkpoints are random and small; together they draw every option of the architectures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.checkpoints import write_checkpoint
from oracles.llama_cpp import LlamaCpp
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.errors import UnsupportedModelError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}

#: Name → arguments of ``write_tiny_llama``.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied-biases": {"tied": False, "attention_bias": True, "kv_heads": 4},
    "llama-head-dim": {"head_dim": 32, "heads": 4, "kv_heads": 1, "rope": {"rope_theta": 5e5}},
    "llama3-old-keys": {"rope": LLAMA3, "tied": False},
    "llama3-new-keys": {"rope": {**LLAMA3, "rope_theta": 5e5}},
    "llama-linear": {"rope": LINEAR},
    "llama-yarn": {"rope": {**YARN, "rope_theta": 1e4}},
    "mistral": {"model_type": "mistral", "tied": False, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "rope": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2-yarn": {"model_type": "qwen2", "tied": False, "rope": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6},
    "qwen3-new-keys": {"model_type": "qwen3", "tied": False, "rope": {"rope_theta": 1e6}},
}
#: Name → model_type and settings of a checkpoint that transformers saves. A new architecture adds
#: its line here.
SAVED: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral"},
    "mixtral-one-of-five": {
        "model_type": "mixtral",
        "num_local_experts": 5,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {"model_type": "qwen2_moe"},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 24},
    "qwen3_moe-all-of-four": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "tie_word_embeddings": True,
    },
    "gemma": {"model_type": "gemma", "head_dim": 48},
}
TOKENS = [int(t) for t in np.random.default_rng(1).integers(3, 512, 96)]


@pytest.fixture(scope="module", params=[*CHECKPOINTS, *SAVED])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray]:
    """A folder with the checkpoint and everything made from it, and the true logits."""
    home = tmp_path_factory.mktemp(request.param)
    if request.param in SAVED:
        folder = write_checkpoint(home / "source", **SAVED[request.param])
    else:
        folder = write_tiny_llama(home / "source", **CHECKPOINTS[request.param])
    mlxedge.convert(folder, ["gguf:f32", "mlx:f32"], home)
    mlxedge.convert(home / "source-F32.gguf", "hf:f32", home / "from-gguf")
    mlxedge.convert(home / "source-mlx-f32", "hf:f32", home / "from-mlx")
    return home, transformers_logits(folder)


def transformers_logits(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    # Other implementations of attention leave the caps of its scores out.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    return logits


def llama_cpp_logits(home: Path) -> np.ndarray:
    with LlamaCpp(home / "source-F32.gguf", cache="f32") as model:
        return model.logits(TOKENS)


def mlx_lm_logits(home: Path) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm import load

    model = load(str(home / "source-mlx-f32"))[0]
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


def our_logits(source: str) -> Callable[[Path], np.ndarray]:
    return lambda home: mlxedge.load(home / source).logits(TOKENS)


@pytest.mark.parametrize(
    "program",
    [
        llama_cpp_logits,
        mlx_lm_logits,
        our_logits("source"),
        our_logits("source-F32.gguf"),
        our_logits("source-mlx-f32"),
        lambda home: transformers_logits(home / "from-gguf"),
        lambda home: transformers_logits(home / "from-mlx"),
    ],
    ids=["llama.cpp", "mlx-lm", "ours", "ours-gguf", "ours-mlx", "gguf-to-hf", "mlx-to-hf"],
)
def test_logits_agree(case: tuple[Path, np.ndarray], program: Callable[[Path], np.ndarray]) -> None:
    home, truth = case
    found = program(home)
    assert found.shape == truth.shape
    # llama.cpp looks GELU up in a table of f16.
    coarse = program is llama_cpp_logits and "gelu" in (home / "source/config.json").read_text()
    assert np.abs(found - truth).max() <= (1e-3 if coarse else 1e-4) * np.abs(truth).max()


#: What transformers computes and one of the runtimes does not: type, settings, and of the runtime
#: that refuses the reason.
PARTIAL: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "qwen3_moe-dense-between": (
        {"model_type": "qwen3_moe", "num_hidden_layers": 4, "decoder_sparse_step": 2},
        {"gguf": "llama.cpp has experts in every layer"},
    ),
    "qwen3_moe-first-dense": (
        {"model_type": "qwen3_moe", "mlp_only_layers": [0], "norm_topk_prob": False},
        {"gguf": "llama.cpp's qwen3moe always normalises scores"},
    ),
    "qwen2_moe-first-dense": (
        {"model_type": "qwen2_moe", "mlp_only_layers": [0], "norm_topk_prob": True},
        {"gguf": "llama.cpp has experts in every layer", "mlx": "mlx-lm has experts in every"},
    ),
    "qwen2_moe-linear": (
        {"model_type": "qwen2_moe", "rope_parameters": {**LINEAR, "rope_theta": 1e4}},
        {"mlx": "mlx-lm's qwen2_moe has no linear rope scaling"},
    ),
    "qwen2_moe-tied": (
        {"model_type": "qwen2_moe", "tie_word_embeddings": True},
        {"gguf": "tied embeddings", "mlx": "tied embeddings"},
    ),
    "mixtral-llama3": (
        {"model_type": "mixtral", "rope_parameters": {**LLAMA3, "rope_theta": 1e5}},
        {"mlx": "mlx-lm's mixtral has no llama3 rope scaling"},
    ),
    "mixtral-head-dim": (
        {"model_type": "mixtral", "head_dim": 48},
        {"mlx": "needs heads that add up"},
    ),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_what_one_runtime_cannot_compute(name: str, tmp_path: Path) -> None:
    """It is refused with the reason, and the other runtime and ours agree with transformers."""
    settings, refused = PARTIAL[name]
    folder = write_checkpoint(tmp_path / "source", **settings)
    truth = transformers_logits(folder)
    found = {"ours": our_logits("source")(tmp_path)}
    for kind, (program, path) in {
        "gguf": (llama_cpp_logits, "source-F32.gguf"),
        "mlx": (mlx_lm_logits, "source-mlx-f32"),
    }.items():
        if kind in refused:
            with pytest.raises(UnsupportedModelError, match=refused[kind]):
                mlxedge.convert(folder, f"{kind}:f32", tmp_path / path)
        else:
            mlxedge.convert(folder, f"{kind}:f32", tmp_path / path)
            found[kind] = program(tmp_path)
    for logits in found.values():
        assert np.abs(logits - truth).max() <= 1e-4 * np.abs(truth).max()
