"""One checkpoint, four programs: transformers tells the truth, and what mlxedge writes must give
the same logits in llama.cpp, in mlx-lm and in mlxedge's own forward pass.

The checkpoints are random and small; together they draw every option of the architectures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import architectures, architectures_fused, architectures_gemma, checkpoints
from oracles.checkpoints import (
    FULL,
    GRANITE,
    LINEAR,
    LLAMA3,
    SAVED,
    SLIDING,
    YARN,
    write_checkpoint,
)
from oracles.llama_cpp import LlamaCpp
from oracles.logits import check
from oracles.renamed import as_transformers
from oracles.stand_ins import load_config
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.errors import UnsupportedModelError
from mlxedge.models import spec_for
from mlxedge.models.wiring import activation_name

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
#: mlx-lm has GELU itself for these, or its approximation, and the model the other one.
OTHER_GELU = (*architectures.EXACT_GELU, *architectures_fused.OTHER_GELU)
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


def rounds_activations(folder: Path) -> bool:
    """Whether llama.cpp does: it looks GELU up in a table of f16."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    spec = spec_for(config)
    return "gelu" in activation_name(spec.adopt(config), spec.wiring)


def transformers_logits(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    # Other implementations of attention leave the caps of its scores out.
    model = AutoModelForCausalLM.from_pretrained(
        as_transformers(folder),
        config=load_config(folder),
        dtype=torch.float32,
        attn_implementation="eager",
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
    config = json.loads((home / "source/config.json").read_text("utf-8"))
    cached = config["model_type"] in architectures_gemma.CACHED
    cache = model.make_cache() if cached else None
    return np.array(model(mx.array([TOKENS]), cache=cache)[0].astype(mx.float32))


def our_logits(source: str) -> Callable[[Path], np.ndarray]:
    return lambda home: mlxedge.load(home / source).logits(TOKENS)


#: Who computes a checkpoint, from what was made of it.
PROGRAMS: dict[str, Callable[[Path], np.ndarray]] = {
    "llama.cpp": llama_cpp_logits,
    "mlx-lm": mlx_lm_logits,
    "ours": our_logits("source"),
    "ours-gguf": our_logits("source-F32.gguf"),
    "ours-mlx": our_logits("source-mlx-f32"),
    "gguf-to-hf": lambda home: transformers_logits(home / "from-gguf"),
    "mlx-to-hf": lambda home: transformers_logits(home / "from-mlx"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_logits_agree(
    case: tuple[Path, np.ndarray], program: str, request: pytest.FixtureRequest
) -> None:
    home, truth = case
    found = PROGRAMS[program](home)
    coarse = program == "llama.cpp" and rounds_activations(home / "source")
    coarse |= program == "mlx-lm" and home.name.startswith(OTHER_GELU)
    name = request.node.callspec.params["case"]
    bound = architectures_gemma.BOUNDS.get(name, 1e-3) if program == "llama.cpp" else 1e-3
    check(name, home / "source", program, found, truth, bound if coarse else 1e-4)


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
    "gemma-untied": (
        {"model_type": "gemma", "head_dim": 32, "tie_word_embeddings": False},
        {"gguf": "untied embeddings", "mlx": "untied embeddings"},
    ),
    "gemma2-scale": (
        {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 20},
        {"gguf": "query_pre_attn_scalar"},
    ),
    "gemma2-no-caps": (
        {
            "model_type": "gemma2",
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": 30,
        },
        {"gguf": "always caps", "mlx": "always caps"},
    ),
    "gemma3_text-cap": (
        {
            "model_type": "gemma3_text",
            "hidden_size": 256,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 6,
            "final_logit_softcapping": 5.0,
        },
        {"mlx": "does not cap logits"},
    ),
    "gemma3_text-no-period": (
        {
            "model_type": "gemma3_text",
            "hidden_size": 256,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 3,
            "layer_types": [FULL, SLIDING, SLIDING],
            "sliding_window": 20,
        },
        {"mlx": "every so many layers"},
    ),
    "glm4-tied": (
        {"model_type": "glm4", "head_dim": 32, "tie_word_embeddings": True},
        {"mlx": "tied embeddings"},
    ),
    "glm4-linear": (
        {
            "model_type": "glm4",
            "head_dim": 32,
            "rope_parameters": {**LINEAR, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        {"mlx": "no linear rope scaling"},
    ),
    "smollm3-biases": (
        {
            "model_type": "smollm3",
            "num_hidden_layers": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "no_rope_layers": [0, 1, 1, 1],
        },
        {"gguf": "rotates in all layers but every fourth; llama.cpp's smollm3 has no biases"},
    ),
    "granite-head-dim": (
        {"model_type": "granite", "head_dim": 48, **GRANITE},
        {"mlx": "needs heads that add up"},
    ),
    "olmo2-biases": (
        {"model_type": "olmo2", "attention_bias": True},
        {"gguf": "no attention biases"},
    ),
    "olmo2-tied": (
        {"model_type": "olmo2", "tie_word_embeddings": True},
        {"gguf": "tied embeddings"},
    ),
    "cohere-qk-norm-of-two": (
        {"model_type": "cohere", "use_qk_norm": True, "attention_bias": True},
        {"gguf": "from 64 layers on"},
    ),
    "cohere2-no-period": (
        {
            "model_type": "cohere2",
            "num_hidden_layers": 3,
            "layer_types": [FULL, SLIDING, SLIDING],
            "sliding_window": 20,
        },
        {"mlx": "every so many layers"},
    ),
    "mixtral-head-dim": (
        {"model_type": "mixtral", "head_dim": 48},
        {"mlx": "needs heads that add up"},
    ),
}
PARTIAL |= checkpoints.PARTIAL


@pytest.mark.parametrize("name", checkpoints.REFUSED)
def test_what_no_program_of_ours_computes_is_refused(name: str, tmp_path: Path) -> None:
    settings, reason = checkpoints.REFUSED[name]
    folder = write_checkpoint(tmp_path / "source", **settings)
    with pytest.raises(UnsupportedModelError, match=reason):
        mlxedge.convert(folder, "gguf:f32", tmp_path / "out.gguf")
    with pytest.raises(UnsupportedModelError, match=reason):
        mlxedge.load(folder)


@pytest.mark.parametrize("name", PARTIAL)
def test_what_one_runtime_cannot_compute(name: str, tmp_path: Path) -> None:
    """It is refused with the reason, and the other runtime, ours and the way back from that
    runtime's file agree with transformers."""
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
            mlxedge.convert(tmp_path / path, "hf:f32", tmp_path / f"from-{kind}")
            found[f"ours-{kind}"] = our_logits(path)(tmp_path)
            found[f"{kind}-to-hf"] = transformers_logits(tmp_path / f"from-{kind}")
    programs = {"gguf": "llama.cpp", "mlx": "mlx-lm"}
    for kind, logits in found.items():
        coarse = kind == "gguf" and rounds_activations(folder)
        coarse |= kind == "mlx" and name.startswith(OTHER_GELU)
        check(name, folder, programs.get(kind, kind), logits, truth, 1e-3 if coarse else 1e-4)


@pytest.mark.parametrize("original", [64, 512])
def test_longrope(original: int, tmp_path: Path) -> None:
    """Up to the context of the first training and beyond it each by its own factors; llama.cpp goes
    by its context, which is 512 here, mlx-lm knows the long ones only, ours the short ones only."""
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.2] * 3, "long_factor": [1.5, 2.0, 4.0, 7.0] * 3}
    rope = {
        **{"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        **{"original_max_position_embeddings": original, **factors},
    }
    folder = write_checkpoint(
        tmp_path / "source",
        "phi3",
        sliding_window=None,
        rope_parameters=rope,
        max_position_embeddings=1024,
        original_max_position_embeddings=original,
    )
    truth = transformers_logits(folder)
    mlxedge.convert(folder, ["gguf:f32", "mlx:f32"], tmp_path)
    mlxedge.convert(tmp_path / "source-F32.gguf", "hf:f32", tmp_path / "from-gguf")
    mlxedge.convert(tmp_path / "source-mlx-f32", "hf:f32", tmp_path / "from-mlx")
    found = [
        llama_cpp_logits(tmp_path),
        transformers_logits(tmp_path / "from-gguf"),
        transformers_logits(tmp_path / "from-mlx"),
    ]
    if original < len(TOKENS):
        found.append(mlx_lm_logits(tmp_path))
    else:
        found += [our_logits(name)(tmp_path) for name in ("source", "source-F32.gguf")]
        assert np.abs(mlx_lm_logits(tmp_path) - truth).max() > 1e-2 * np.abs(truth).max()
    for logits in found:
        assert np.abs(logits - truth).max() <= 1e-4 * np.abs(truth).max()
