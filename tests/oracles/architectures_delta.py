"""Settings of random checkpoints with layers of linear attention by the gated delta rule."""

from __future__ import annotations

from typing import Any

LINEAR, FULL = "linear_attention", "full_attention"
_HEADS = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e5,
    "partial_rotary_factor": 0.25,
}

#: What an architecture needs beside the sizes, or instead of them.
OWN: dict[str, dict[str, Any]] = {
    "qwen3_next": _HEADS | _EXPERTS,
    "qwen3_5_text": _HEADS,
    "qwen3_5_moe_text": _HEADS | _EXPERTS,
    "kimi_linear": {
        # The runtimes take it for the norms of latents as well, transformers 1e-6.
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 40,
        "linear_head_dim": 32,
        "linear_num_heads": 4,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 2,
    },
}
SAVED: dict[str, dict[str, Any]] = {
    "qwen3_next": {"model_type": "qwen3_next", "num_hidden_layers": 4},
    "qwen3_next-tied-yarn-every-second": {
        "model_type": "qwen3_next",
        "num_hidden_layers": 3,
        "layer_types": [LINEAR, FULL, LINEAR],
        "linear_num_value_heads": 2,
        "linear_conv_kernel_dim": 3,
        "tie_word_embeddings": True,
        "rope_parameters": _YARN,
    },
    "qwen3_5_text": {"model_type": "qwen3_5_text", "num_hidden_layers": 4},
    "qwen3_5_text-tied-every-third-half": {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 3,
        "layer_types": [LINEAR, LINEAR, FULL],
        "linear_num_value_heads": 6,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e5,
            "partial_rotary_factor": 0.5,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    },
    "qwen3_5_moe_text": {"model_type": "qwen3_5_moe_text", "num_hidden_layers": 4},
    "kimi_linear": {"model_type": "kimi_linear", "num_hidden_layers": 5},
    "kimi_linear-two-dense": {
        "model_type": "kimi_linear",
        "num_hidden_layers": 4,
        "layer_types": [FULL, LINEAR, LINEAR, FULL],
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "linear_conv_kernel_dim": 3,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
    },
}
#: Type and settings, and of the runtime that refuses the reason.
PARTIAL: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "qwen3_next-dense-between": (
        {
            "model_type": "qwen3_next",
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "linear_value_head_dim": 48,
        },
        {"gguf": "heads of keys and of values of one size.*experts in every layer.*norm_topk_prob"},
    ),
    "qwen3_next-biases-llama3": (
        {
            "model_type": "qwen3_next",
            "num_hidden_layers": 4,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e5,
                "partial_rotary_factor": 0.5,
            },
        },
        {"gguf": "no bias of the output of attention.*no llama3 rope factors"},
    ),
    "qwen3_next-no-interval": (
        {
            "model_type": "qwen3_next",
            "num_hidden_layers": 3,
            "layer_types": [FULL, LINEAR, LINEAR],
        },
        {"mlx": "full attention in every so many layers"},
    ),
    "qwen3_5_text-biases": (
        {
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 4,
            "attention_bias": True,
            "linear_key_head_dim": 16,
        },
        {"gguf": "heads of keys and of values of one size.*no bias of the output of attention"},
    ),
    "qwen3_5_text-no-interval-yarn": (
        {
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 3,
            "layer_types": [LINEAR, FULL, FULL],
            "rope_parameters": _YARN,
        },
        {"mlx": "full attention in every so many layers"},
    ),
    "qwen3_5_text-sections": (
        {
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 2,
            "layer_types": [LINEAR, FULL],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [6, 1, 1],
            },
        },
        {"gguf": "an mrope_section that covers what rotates"},
    ),
    "qwen3_5_moe_text-one-expert-tied": (
        {
            "model_type": "qwen3_5_moe_text",
            "num_hidden_layers": 4,
            "layer_types": [LINEAR, FULL, FULL, LINEAR],
            "num_experts_per_tok": 1,
            "linear_num_value_heads": 2,
            "tie_word_embeddings": True,
        },
        {"mlx": "full attention in every so many layers"},
    ),
    "olmo_hybrid": (
        {"model_type": "olmo_hybrid", "num_hidden_layers": 5},
        {"gguf": "llama.cpp does not have this architecture"},
    ),
    "olmo_hybrid-still-tied-biases": (
        {
            "model_type": "olmo_hybrid",
            "num_hidden_layers": 3,
            "layer_types": [FULL, LINEAR, LINEAR],
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_allow_neg_eigval": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": None},
        },
        {"gguf": "llama.cpp does not have this architecture"},
    ),
    "kimi_linear-ranks-heads": (
        {
            "model_type": "kimi_linear",
            "num_hidden_layers": 2,
            "layer_types": [LINEAR, FULL],
            "q_lora_rank": 48,
            "linear_num_heads": 2,
            "norm_topk_prob": False,
        },
        {
            "gguf": "no latents of queries.*as many heads of both kinds.*norm_topk_prob is false",
            "mlx": "no latents of queries",
        },
    ),
}

#: What is not read at all: type and settings, and the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {}
