"""Gemma 3n and 4, as ``oracles.architectures`` has others."""

from __future__ import annotations

from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
#: As in E2B: inputs for each layer, shared keys and values, wide MLPs in those layers.
_SMALL = {
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "num_key_value_heads": 1,
    "final_logit_softcapping": 9.0,
}

#: Never published with rotary settings of the older style.
NEW = ("gemma4_text", "gemma4_unified_text")
#: Where scores are what they are, the norm of queries has to keep them small.
UNSCALED = ("gemma4_text", "gemma4_unified_text", "gemma3n_text")
#: What an architecture needs beside the sizes, or instead of them.
OWN: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "head_dim": 32,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 512,
        "sliding_window": 40,
    },
    "gemma4_unified_text": {"head_dim": 32, "global_head_dim": 64, "sliding_window": 40},
    "gemma3n_text": {
        "head_dim": 32,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 512,
        "num_kv_shared_layers": 0,
        "intermediate_size": 2048,
        "sliding_window": 40,
        "num_hidden_layers": 5,
        "activation_sparsity_pattern": [0.95] * 5,
    },
}
SAVED: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "model_type": "gemma4_text",
        **_SMALL,
        "num_hidden_layers": 7,
        "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL],
    },
    "gemma4_text-no-inputs-keys-as-values": {
        "model_type": "gemma4_text",
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "num_key_value_heads": 4,
        "num_hidden_layers": 7,
        "tie_word_embeddings": False,
        "final_logit_softcapping": 9.0,
        "rope_parameters": {
            FULL: {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 5e4,
                "factor": 2.0,
            },
            SLIDING: {"rope_type": "default", "rope_theta": 5e3},
        },
    },
    "gemma4_unified_text": {
        "model_type": "gemma4_unified_text",
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, FULL, FULL],
        "attention_k_eq_v": True,
    },
    "gemma3n_text": {
        "model_type": "gemma3n_text",
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL],
        "activation_sparsity_pattern": [0.95] * 3,
        "vocab_size_per_layer_input": 500,
    },
    "gemma3n_text-shared": {
        "model_type": "gemma3n_text",
        "num_hidden_layers": 23,
        "num_kv_shared_layers": 3,
        "layer_types": [*[SLIDING, SLIDING, SLIDING, FULL] * 5, SLIDING, SLIDING, FULL],
        "intermediate_size": 1024,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 13,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 5e4},
            SLIDING: {"rope_type": "default", "rope_theta": 5e3},
        },
    },
    "gemma4_text-experts": {
        "model_type": "gemma4_text",
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL],
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "final_logit_softcapping": 30.0,
    },
    "gemma4_text-same-heads": {
        "model_type": "gemma4_text",
        "global_head_dim": 32,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 64,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 5e4},
            SLIDING: {"rope_type": "default", "rope_theta": 5e3},
        },
    },
}
#: llama.cpp divides by one less where it takes the standard deviation of gates, which shows in
#: small models of many layers.
BOUNDS = {"gemma3n_text-shared": 2e-2}
#: mlx-lm shares keys and values through its cache alone.
CACHED = ("gemma3n_text",)

PARTIAL: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "gemma3n_text-other-sizes": (
        {
            "model_type": "gemma3n_text",
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 3,
            "layer_types": [FULL, SLIDING, FULL, SLIDING, SLIDING, FULL],
            "activation_sparsity_pattern": [0.9, 0.0, 0.5, 0.0, 0.95, 0.0],
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 32,
            "altup_correct_scale": False,
            "altup_active_idx": 2,
        },
        {"gguf": "llama.cpp's gemma3n shares keys and values from layer 20 on only"},
    ),
    "gemma3n_text-untied": (
        {"model_type": "gemma3n_text", "tie_word_embeddings": False, "sliding_window": 30},
        {"mlx": "untied embeddings are not part of this architecture in mlx-lm"},
    ),
    "gemma4_text-shared-otherwise": (
        {
            "model_type": "gemma4_text",
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 2,
            "layer_types": [FULL, SLIDING, SLIDING, SLIDING, FULL],
        },
        {"gguf": "llama.cpp lets layers share keys and values of the last two others only"},
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma3n_text-two-streams": (
        {"model_type": "gemma3n_text", "altup_num_inputs": 2},
        "gemma3n_text with other than four streams is not supported",
    ),
    "gemma4_text-heads": (
        {"model_type": "gemma4_text", "head_dim": 24},
        "gemma4_text needs heads of a multiple of 16 dimensions",
    ),
}
