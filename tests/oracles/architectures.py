"""Settings of random checkpoints for ``write_checkpoint``: those that every program computes, and
those that a runtime refuses, with the reason."""

from __future__ import annotations

from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1e5,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e5,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}
SLIDING, FULL = "sliding_attention", "full_attention"

#: What an architecture needs beside the sizes, or instead of them.
OWN: dict[str, dict[str, Any]] = {
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 4},
}
SAVED: dict[str, dict[str, Any]] = {
    "seed_oss": {"model_type": "seed_oss", "head_dim": 48},
    "seed_oss-yarn-no-biases": {
        "model_type": "seed_oss",
        "head_dim": 32,
        "attention_bias": False,
        "rope_parameters": YARN,
    },
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 48},
    "ernie4_5-untied": {"model_type": "ernie4_5", "head_dim": 32, "tie_word_embeddings": False},
    "hunyuan_v1_dense": {"model_type": "hunyuan_v1_dense", "head_dim": 48},
    "hunyuan_v1_dense-tied-alpha": {
        "model_type": "hunyuan_v1_dense",
        "head_dim": 32,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "dynamic",
            "factor": 1.0,
            "alpha": 50.0,
            "rope_theta": 1e4,
        },
    },
    "starcoder2": {"model_type": "starcoder2"},
    "starcoder2-untied": {
        "model_type": "starcoder2",
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "exaone4": {
        "model_type": "exaone4",
        "head_dim": 32,
        "sliding_window": None,
        "layer_types": [FULL] * 2,
    },
    "exaone4-tied-llama3": {
        "model_type": "exaone4",
        "head_dim": 32,
        "sliding_window": None,
        "layer_types": [FULL] * 2,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3,
    },
    "exaone4-windows": {
        "model_type": "exaone4",
        "head_dim": 16,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 64,
        "sliding_window": 40,
    },
    "olmoe": {"model_type": "olmoe"},
    "glm4_moe": {"model_type": "glm4_moe", "head_dim": 48, "num_hidden_layers": 3},
    "glm4_moe-norms-biases": {
        "model_type": "glm4_moe",
        "head_dim": 32,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 2,
        "n_shared_experts": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "norm_topk_prob": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.75,
        },
    },
    "glm4_moe-groups": {
        "model_type": "glm4_moe",
        "n_routed_experts": 12,
        "n_group": 4,
        "topk_group": 2,
        "num_hidden_layers": 3,
    },
    "glm4_moe-all-groups": {"model_type": "glm4_moe", "n_group": 2, "topk_group": 2},
    "olmo3": {"model_type": "olmo3", "num_hidden_layers": 5, "sliding_window": 40},
    "olmo3-yarn": {
        "model_type": "olmo3",
        "num_hidden_layers": 3,
        "sliding_window": 25,
        "layer_types": [SLIDING, FULL, SLIDING],
        "rope_parameters": {
            FULL: YARN,
            SLIDING: {"rope_type": "default", "rope_theta": 1e5},
        },
    },
    "nemotron": {"model_type": "nemotron"},
    "nemotron-biases-three-quarters": {
        "model_type": "nemotron",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e4,
            "partial_rotary_factor": 0.75,
        },
    },
    "stablelm": {"model_type": "stablelm"},
    "stablelm-biases-half": {
        "model_type": "stablelm",
        "use_qkv_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e4,
            "partial_rotary_factor": 0.5,
        },
    },
}

#: Of these mlx-lm computes GELU itself, and the model its approximation by tanh.
EXACT_GELU = ("starcoder2",)
#: Type and settings, and of the runtime that refuses the reason.
PARTIAL: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "seed_oss-all-biases": (
        {
            "model_type": "seed_oss",
            "head_dim": 32,
            "attention_out_bias": True,
            "mlp_bias": True,
        },
        {"gguf": "llama.cpp's seed_oss has no biases but"},
    ),
    "seed_oss-tied": (
        {"model_type": "seed_oss", "head_dim": 32, "tie_word_embeddings": True},
        {"mlx": "tied embeddings are not part of this architecture in mlx-lm"},
    ),
    "ernie4_5-biases": (
        {"model_type": "ernie4_5", "head_dim": 32, "use_bias": True},
        {"gguf": "llama.cpp's ernie4_5 has no biases"},
    ),
    "ernie4_5-linear": (
        {"model_type": "ernie4_5", "head_dim": 32, "rope_parameters": LINEAR},
        {"mlx": "mlx-lm's ernie4_5 has no linear rope scaling"},
    ),
    "hunyuan_v1_dense-biases": (
        {"model_type": "hunyuan_v1_dense", "head_dim": 32, "attention_bias": True},
        {"gguf": "llama.cpp's hunyuan-dense has no attention biases"},
    ),
    "hunyuan_v1_dense-yarn": (
        {"model_type": "hunyuan_v1_dense", "head_dim": 32, "rope_parameters": YARN},
        {"mlx": "mlx-lm's hunyuan_v1_dense has no yarn"},
    ),
    "exaone4-windows-in-some-layers": (
        {
            "model_type": "exaone4",
            "head_dim": 48,
            "num_hidden_layers": 3,
            "sliding_window": 40,
            "layer_types": [SLIDING, FULL, SLIDING],
        },
        {"gguf": "llama.cpp's exaone4 has windows with 64 layers"},
    ),
    "glm4_moe-tied": (
        {"model_type": "glm4_moe", "tie_word_embeddings": True},
        {"mlx": "tied embeddings"},
    ),
    "glm4_moe-yarn": (
        {"model_type": "glm4_moe", "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
        {"mlx": "mlx-lm's glm4_moe has no yarn"},
    ),
    "olmo3-tied-biases": (
        {
            "model_type": "olmo3",
            "num_hidden_layers": 4,
            "sliding_window": 40,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        {"gguf": "llama.cpp's olmo2 has no attention biases"},
    ),
    "nemotron-tied": (
        {"model_type": "nemotron", "tie_word_embeddings": True},
        {"gguf": "tied embeddings"},
    ),
    "nemotron-head-dim": (
        {"model_type": "nemotron", "head_dim": 48},
        {"gguf": "needs heads that add up"},
    ),
    "stablelm-linear": (
        {
            "model_type": "stablelm",
            "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.25},
        },
        {"mlx": "mlx-lm's stablelm has no linear rope scaling"},
    ),
    "olmoe-clipped": (
        {"model_type": "olmoe", "clip_qkv": 0.4},
        {"gguf": "does not clip", "mlx": "does not clip"},
    ),
    "olmoe-normalised": (
        {
            "model_type": "olmoe",
            "num_key_value_heads": 2,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
        {"gguf": "llama.cpp's olmoe does not normalise"},
    ),
}

#: What is not read at all: type and settings, and the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {}
