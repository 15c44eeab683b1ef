"""Settings of random checkpoints of dense decoders, in the tables of ``oracles.architectures``."""

from __future__ import annotations

from typing import Any

from oracles.architectures import LINEAR, LLAMA3, YARN

PLAIN = {"rope_type": "default", "rope_theta": 1e5}

HALF = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}
WHOLE = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 1.0}
#: Every 32 positions queries grow.
TEMPERED = {
    **YARN,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

SECTIONS = {**PLAIN, "mrope_section": [4, 6, 6]}

OWN: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_5_vl_text": {"rope_parameters": SECTIONS},
    "glm4v_text": {
        "head_dim": 32,
        "attention_bias": True,
        "rope_parameters": {**HALF, "mrope_section": [2, 3, 3]},
    },
    "qwen3_vl_text": {"head_dim": 32, "rope_parameters": SECTIONS},
    "jais2": {"num_key_value_heads": 4},
    "internlm3": {"head_dim": 32},
    "helium": {"head_dim": 32},
    "glm": {"head_dim": 32, "rope_parameters": WHOLE},
    "minicpm": {"tie_word_embeddings": False},
}
SAVED: dict[str, dict[str, Any]] = {
    "apertus": {"model_type": "apertus", "rope_parameters": LLAMA3},
    "apertus-plain-rope": {
        "model_type": "apertus",
        "num_key_value_heads": 4,
        "rope_parameters": PLAIN,
    },
}
SAVED |= {
    "internlm3": {
        "model_type": "internlm3",
        "rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 1e5},
    },
    "internlm3-biases-linear-tied": {
        "model_type": "internlm3",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": LINEAR,
    },
    "ministral3": {"model_type": "ministral3", "head_dim": 48, "rope_parameters": TEMPERED},
    "ministral3-tied-not-tempered": {
        "model_type": "ministral3",
        "head_dim": 32,
        "tie_word_embeddings": True,
        "rope_parameters": {
            **TEMPERED,
            "mscale_all_dim": 0.0,
            "llama_4_scaling_beta": 0,
            "beta_fast": 4.0,
        },
    },
    "minicpm": {"model_type": "minicpm"},
    "minicpm-longrope": {
        "model_type": "minicpm",
        "scale_emb": 3,
        "scale_depth": 2.5,
        "dim_model_base": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 1.0,
            "original_max_position_embeddings": 256,
            "short_factor": [1.0, 1.1, 1.3, 1.2] * 4,
            "long_factor": [1.0, 1.1, 1.3, 1.2] * 4,
        },
    },
    "minicpm-tied": {"model_type": "minicpm", "tie_word_embeddings": True},
    "exaone": {"model_type": "exaone", "rope_parameters": LLAMA3},
    "exaone-tied": {"model_type": "exaone", "tie_word_embeddings": True, "rope_parameters": LINEAR},
    "stablelm-parallel": {
        "model_type": "stablelm",
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "rope_parameters": HALF,
    },
    "stablelm-head-norms": {"model_type": "stablelm", "qk_layernorm": True, "use_qkv_bias": True},
    "stablelm-parallel-alone": {"model_type": "stablelm", "use_parallel_residual": True},
    "phi": {"model_type": "phi", "num_key_value_heads": 4},
    "phi-half-grouped": {"model_type": "phi", "rope_parameters": HALF},
    "glm-rotates-all": {"model_type": "glm"},
    "glm-tied-no-biases": {
        "model_type": "glm",
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "mimo": {"model_type": "mimo"},
    "helium": {"model_type": "helium"},
    "helium-mlp-biases-tied": {
        "model_type": "helium",
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
    },
}
SAVED |= {
    "qwen2_vl_text": {"model_type": "qwen2_vl_text"},
    "qwen2_5_vl_text-yarn-untied": {
        "model_type": "qwen2_5_vl_text",
        "tie_word_embeddings": False,
        "rope_parameters": {**YARN, "mrope_section": [6, 6, 4]},
    },
    "glm4v_text": {"model_type": "glm4v_text"},
    "qwen3_vl_text": {
        "model_type": "qwen3_vl_text",
        "head_dim": 48,
        "rope_parameters": {**PLAIN, "mrope_section": [8, 8, 8], "mrope_interleaved": True},
    },
}
PARTIAL: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "apertus-biases": (
        {"model_type": "apertus", "attention_bias": True},
        {"mlx": "mlx-lm's apertus has no attention biases"},
    ),
    "apertus-head-dim": (
        {"model_type": "apertus", "head_dim": 48},
        {"mlx": "mlx-lm's apertus needs heads that add up"},
    ),
    "apertus-tied": (
        {"model_type": "apertus", "tie_word_embeddings": True},
        {"gguf": "tied embeddings"},
    ),
}
PARTIAL |= {
    "internlm3-llama3": (
        {"model_type": "internlm3", "rope_parameters": LLAMA3},
        {"mlx": "mlx-lm's internlm3 has no llama3 rope scaling"},
    ),
    "internlm3-head-dim": (
        {"model_type": "internlm3", "head_dim": 48},
        {"mlx": "mlx-lm's internlm3 needs heads that add up"},
    ),
    "minicpm-head-dim": (
        {"model_type": "minicpm", "head_dim": 48},
        {"mlx": "mlx-lm's granite needs heads that add up"},
    ),
    "exaone-biases": (
        {"model_type": "exaone", "attention_bias": True, "mlp_bias": True},
        {"gguf": "llama.cpp's exaone has no biases"},
    ),
    "phi-linear": (
        {"model_type": "phi", "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
        {"mlx": "mlx-lm's phi has no linear rope scaling"},
    ),
    "phi-tied": (
        {"model_type": "phi", "tie_word_embeddings": True},
        {"gguf": "tied embeddings", "mlx": "tied embeddings"},
    ),
    "glm": (
        {"model_type": "glm", "rope_parameters": HALF},
        {"mlx": "mlx-lm's glm rotates all of a head"},
    ),
    "arcee": (
        {"model_type": "arcee", "head_dim": 48, "rope_parameters": LLAMA3},
        {"mlx": "mlx-lm does not have this architecture"},
    ),
    "arcee-tied": (
        {"model_type": "arcee", "tie_word_embeddings": True},
        {"mlx": "mlx-lm does not have this architecture"},
    ),
    "arcee-biases": (
        {"model_type": "arcee", "attention_bias": True, "mlp_bias": True},
        {
            "gguf": "llama.cpp's arcee has no biases",
            "mlx": "mlx-lm does not have this architecture",
        },
    ),
    "jais2": (
        {"model_type": "jais2"},
        {"mlx": "mlx-lm does not have this architecture"},
    ),
    "jais2-no-biases": (
        {"model_type": "jais2", "attention_bias": False, "mlp_bias": False},
        {
            "gguf": "llama.cpp's jais2 needs biases",
            "mlx": "mlx-lm does not have this architecture",
        },
    ),
    "olmo": (
        {"model_type": "olmo"},
        {"mlx": "mlx-lm does not have this architecture"},
    ),
    "olmo-clipped-tied": (
        {
            "model_type": "olmo",
            "clip_qkv": 0.75,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_parameters": LINEAR,
        },
        {"mlx": "mlx-lm does not have this architecture"},
    ),
    "helium-biases": (
        {"model_type": "helium", "attention_bias": True, "rope_parameters": PLAIN},
        {"gguf": "a llama has a bias of the output"},
    ),
    "olmo-biases": (
        {"model_type": "olmo", "attention_bias": True},
        {
            "gguf": "llama.cpp's olmo has no attention biases",
            "mlx": "mlx-lm does not have this architecture",
        },
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "phi-head-norms": (
        {"model_type": "phi", "qk_layernorm": True},
        "phi with norms of q and k",
    ),
}
