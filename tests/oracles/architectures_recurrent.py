"""Settings of random checkpoints of architectures with states: short convolutions, state spaces."""

from __future__ import annotations

from typing import Any

FULL, CONV = "full_attention", "conv"

OWN: dict[str, dict[str, Any]] = {
    "lfm2": {
        "block_multiple_of": 32,
        "num_hidden_layers": 4,
        "layer_types": [CONV, FULL, CONV, CONV],
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 32,
        "state_size": 16,
        "n_groups": 1,
        "chunk_size": 32,
    },
}
SAVED: dict[str, dict[str, Any]] = {
    "lfm2": {"model_type": "lfm2"},
    "lfm2-exact-size-wide": {
        "model_type": "lfm2",
        "layer_types": [FULL, CONV, FULL, CONV],
        "conv_L_cache": 5,
        "block_auto_adjust_ff_dim": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    },
    "lfm2-by-number": {
        "model_type": "lfm2",
        "layer_types": None,
        "full_attn_idxs": [1, 3],
        "block_ffn_dim_multiplier": 1.3,
        "num_key_value_heads": 4,
    },
    "mamba2": {"model_type": "mamba2"},
    "mamba2-tied-odd-heads": {
        "model_type": "mamba2",
        "num_heads": 4,
        "head_dim": 64,
        "conv_kernel": 3,
        "state_size": 24,
        "tie_word_embeddings": True,
    },
}
PARTIAL: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "lfm2-biases": (
        {"model_type": "lfm2", "conv_bias": True},
        {"gguf": "llama.cpp's lfm2 has no biases"},
    ),
    "lfm2-untied-linear": (
        {
            "model_type": "lfm2",
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
        },
        {"mlx": "mlx-lm's lfm2 has no linear rope scaling; untied embeddings"},
    ),
    "lfm2-head-dim": (
        {"model_type": "lfm2", "head_dim": 48},
        {"gguf": "needs heads that add up", "mlx": "needs heads that add up"},
    ),
    "lfm2-one-position": (
        {"model_type": "lfm2", "conv_L_cache": 1},
        {"gguf": "more than one position", "mlx": "more than one position"},
    ),
}
PARTIAL |= {
    "mamba2-groups": (
        {"model_type": "mamba2", "n_groups": 4, "layer_norm_epsilon": 1e-4},
        {"mlx": "this model one for each"},
    ),
    "mamba2-limits": (
        {"model_type": "mamba2", "time_step_limit": [0.05, 0.7]},
        {"gguf": "does not limit time steps"},
    ),
    "mamba2-biases": (
        {"model_type": "mamba2", "use_bias": True, "use_conv_bias": False},
        {"gguf": "no biases around a state space; llama.cpp's mamba2 needs biases of"},
    ),
    "mamba2-epsilon": (
        {"model_type": "mamba2", "layer_norm_epsilon": 1e-4},
        {"mlx": "norms with 1e-5"},
    ),
    "mamba2-narrow-heads": (
        {
            "model_type": "mamba2",
            "hidden_size": 100,
            "num_heads": 8,
            "head_dim": 25,
            "conv_kernel": 1,
        },
        {"gguf": "more than one position", "mlx": "more than one position"},
    ),
}
#: What nothing of ours computes, with the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lfm2-all-convolutions": (
        {"model_type": "lfm2", "layer_types": [CONV] * 4},
        "without a layer of attention",
    ),
}
