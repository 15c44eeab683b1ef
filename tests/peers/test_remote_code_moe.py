"""Mixtures of experts that transformers has no code of, but of others that compute the same: their
weights under other names and in another form are the checkpoint, their logits the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.checkpoints import write_checkpoint
from oracles.llama_cpp import LlamaCpp
from oracles.logits import check
from safetensors.torch import load_file, save_file

import mlxedge
from mlxedge.errors import UnsupportedModelError

TOKENS = [int(t) for t in np.random.default_rng(1).integers(3, 512, 96)]
Tensors = dict[str, torch.Tensor]
#: From a checkpoint's tensors and config those of the model under test.
Make = Callable[[Tensors, dict[str, Any]], tuple[Tensors, dict[str, Any]]]


def rename(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def bailing_moe(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """From glm4_moe's; published configs of Ling-mini-2.0 have these keys."""
    names = {
        "embed_tokens": "word_embeddings",
        "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
        "gate.e_score_correction_bias": "gate.expert_bias",
    }
    made = {rename(n, names): t for n, t in tensors.items() if "_proj" not in n or "attn" not in n}
    made |= {rename(n, names): t for n, t in tensors.items() if "o_proj" in n}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        parts = [tensors[f"{at}self_attn.{part}_proj.weight"] for part in "qkv"]
        made[f"{at}attention.query_key_value.weight"] = torch.cat(parts)
    heads = config["num_attention_heads"]
    head = config["head_dim"]
    rope = config.pop("rope_parameters")
    own = {
        "model_type": "bailing_moe",
        "architectures": ["BailingMoeV2ForCausalLM"],
        "auto_map": {"AutoModel": "modeling_bailing_moe_v2.BailingMoeV2Model"},
        "hidden_size": heads * head,
        "num_experts": config["n_routed_experts"],
        "num_shared_experts": config["n_shared_experts"],
        "moe_shared_expert_intermediate_size": config["moe_intermediate_size"],
        "moe_router_enable_expert_bias": True,
        "score_function": "sigmoid",
        "use_qkv_bias": False,
        "use_bias": False,
        "norm_head": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "rotary_dim": int(head * rope["partial_rotary_factor"]),
    }
    kept = (
        "rms_norm_eps", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings", "moe_intermediate_size",
        "first_k_dense_replace", "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor",
        "n_group", "topk_group", "use_qk_norm", "head_dim", "tie_word_embeddings", "hidden_act",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return made, own | {key: config[key] for key in kept}


def deepseek(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """From qwen2_moe's, without biases, and with gates of the shared expert that are always half
    open."""
    made = {}
    for name, tensor in tensors.items():
        if name.endswith("bias") or "shared_expert_gate" in name:
            continue
        half = 0.5 if "shared_expert.down_proj" in name else 1.0
        made[name.replace("shared_expert.", "shared_experts.")] = tensor * half
    rope = config.pop("rope_parameters")
    width = config["moe_intermediate_size"]
    own = {
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": config["shared_expert_intermediate_size"] // width,
        "first_k_dense_replace": len(config["mlp_only_layers"]),
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
    }
    kept = (
        "rms_norm_eps", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings", "moe_intermediate_size",
        "hidden_size", "num_experts_per_tok", "hidden_act", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return made, own | {key: config[key] for key in kept}


def without_biases(tensors: Tensors) -> Tensors:
    shut = ("bias", "shared_expert_gate.weight")
    return {n: torch.zeros_like(t) if n.endswith(shut) else t for n, t in tensors.items()}


GLM: dict[str, Any] = {
    "model_type": "glm4_moe",
    "head_dim": 32,
    "use_qk_norm": True,
    "num_hidden_layers": 3,
    "n_shared_experts": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 6e5,
        "partial_rotary_factor": 0.5,
    },
}
QWEN: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "mlp_only_layers": [0],
    "num_hidden_layers": 3,
    "norm_topk_prob": False,
    "shared_expert_intermediate_size": 128,
}
#: Whose weights, what is done to them first, and what is made of them.
CASES: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors], Make]] = {
    "bailing_moe": (GLM, dict, bailing_moe),
    "bailing_moe-groups": (
        GLM | {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "norm_topk_prob": False},
        dict,
        bailing_moe,
    ),
    "deepseek": (QWEN, without_biases, deepseek),
}


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray]:
    """A folder with the checkpoint and what is made of it, and the true logits."""
    settings, prepared, make = CASES[request.param]
    home = tmp_path_factory.mktemp(request.param)
    other = write_checkpoint(home / "other", **settings)
    tensors = prepared(load_file(other / "model.safetensors"))
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    made, config = make(tensors, json.loads((other / "config.json").read_text("utf-8")))
    source = home / "source"
    source.mkdir()
    for file in other.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            (source / file.name).write_bytes(file.read_bytes())
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    contiguous = {n: t.contiguous() for n, t in made.items()}
    save_file(contiguous, source / "model.safetensors", metadata={"format": "pt"})
    mlxedge.convert(source, ["gguf:f32", "mlx:f32", "gguf:q4_k_m", "mlx:4bit"], home)
    mlxedge.convert(home / "source-F32.gguf", "hf:f32", home / "from-gguf")
    mlxedge.convert(home / "source-mlx-f32", "hf:f32", home / "from-mlx")
    return home, transformers_logits(other)


def transformers_logits(folder: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return found


def mlx_lm(folder: Path) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm import load

    model = load(str(folder))[0]
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


def test_logits_agree(case: tuple[Path, np.ndarray]) -> None:
    home, truth = case
    with LlamaCpp(home / "source-F32.gguf", cache="f32") as model:
        check(home.name, home / "source", "llama.cpp", model.logits(TOKENS), truth, 1e-4)
    found = mlx_lm(home / "source-mlx-f32")
    check(home.name, home / "source", "mlx-lm", found, truth, 1e-4)
    for name in ("source", "source-F32.gguf", "source-mlx-f32", "from-gguf", "from-mlx"):
        found = mlxedge.load(home / name).logits(TOKENS)
        check(home.name, home / "source", "ours", found, truth, 1e-4)


def test_both_ways_back_lead_to_the_source(case: tuple[Path, np.ndarray]) -> None:
    home, _ = case
    source = load_file(home / "source" / "model.safetensors")
    for name in ("from-gguf", "from-mlx"):
        found = load_file(home / name / "model.safetensors")
        assert found.keys() == source.keys()
        for tensor in source:
            assert torch.equal(found[tensor], source[tensor]), tensor


def test_quantized_models_run(case: tuple[Path, np.ndarray]) -> None:
    """A random model's weights say more in four bits than chance does."""
    home, truth = case
    with LlamaCpp(home / "source-Q4_K_M.gguf") as model:
        found = [model.logits(TOKENS)]
    found.append(mlx_lm(home / "source-mlx-4bit"))
    for logits in found:
        assert np.corrcoef(logits.ravel(), truth.ravel())[0, 1] > 0.5


@pytest.mark.parametrize(
    ("name", "settings", "target", "says"),
    [
        ("bailing_moe", {"norm_head": True}, "mlx:f32", "with norm_head is not supported"),
        ("bailing_moe", {"score_function": "relu"}, "mlx:f32", "score_function 'relu'"),
        (
            "bailing_moe",
            {"moe_shared_expert_intermediate_size": 8},
            "mlx:f32",
            "a width of their own",
        ),
        ("bailing_moe", {"use_qk_norm": False}, "gguf:f32", "needs norms of q and k"),
        ("deepseek", {"moe_layer_freq": 2}, "mlx:f32", "dense layers between"),
        ("deepseek", {"norm_topk_prob": True}, "mlx:f32", "mlx-lm's deepseek does not normalise"),
        ("deepseek", {"norm_topk_prob": True}, "gguf:f32", "llama.cpp's deepseek does not"),
        ("deepseek", {"attention_bias": True}, "gguf:f32", "no attention biases"),
    ],
)
def test_what_is_refused(
    name: str, settings: dict[str, Any], target: str, says: str, tmp_path: Path
) -> None:
    before, _, make = CASES[name]
    other = write_checkpoint(tmp_path / "other", **before)
    tensors = load_file(other / "model.safetensors")
    made, config = make(tensors, json.loads((other / "config.json").read_text("utf-8")))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config | settings), "utf-8")
    contiguous = {n: t.contiguous() for n, t in made.items()}
    save_file(contiguous, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=says):
        mlxedge.convert(source, target, tmp_path / "out")
