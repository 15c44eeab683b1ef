"""Settings of random checkpoints of architectures with states: short convolutions, state spaces."""

from __future__ import annotations

from typing import Any

FULL, CONV, SPACE, MLP = "full_attention", "conv", "linear_attention", "mlp"

OWN: dict[str, dict[str, Any]] = {
    "lfm2": {
        "block_multiple_of": 32,
        "num_hidden_layers": 4,
        "layer_types": [CONV, FULL, CONV, CONV],
    },
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": [CONV, FULL, CONV, CONV],
        "num_dense_layers": 1,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 4,
        "layer_types": [SPACE, SPACE, FULL, SPACE],
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 32,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "intermediate_size": 64,
        "shared_intermediate_size": 96,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.125,
        "residual_multiplier": 0.3,
        "logits_scaling": 2.5,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 12,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "use_mamba_kernels": False,
    },
    "falcon_h1": {
        "mamba_d_ssm": 160,
        "mamba_n_heads": 5,
        "mamba_d_state": 16,
        "mamba_chunk_size": 32,
        "mamba_norm_before_gate": False,
        "lm_head_multiplier": 0.7,
        "embedding_multiplier": 2.5,
        "mlp_multipliers": [0.8, 1.3],
        "key_multiplier": 0.6,
        "attention_in_multiplier": 1.2,
        "attention_out_multiplier": 0.9,
        "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.4,
    },
    "nemotron_h": {
        "num_hidden_layers": 5,
        "layers_block_type": [SPACE, MLP, FULL, SPACE, MLP],
        "head_dim": 48,
        "mamba_num_heads": 6,
        "mamba_head_dim": 32,
        "n_groups": 3,
        "ssm_state_size": 16,
        "chunk_size": 32,
        # The least that transformers alone goes by.
        "time_step_min": 1e-12,
    },
    "mamba": {"intermediate_size": 256, "tie_word_embeddings": True},
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
    "jamba": {"model_type": "jamba"},
    "jamba-tied-low-rank": {
        "model_type": "jamba",
        "tie_word_embeddings": True,
        "attn_layer_period": 4,
        "mamba_dt_rank": 6,
        "mamba_d_conv": 3,
    },
    "falcon_h1": {"model_type": "falcon_h1"},
    "falcon_h1-tied-norm": {
        "model_type": "falcon_h1",
        "tie_word_embeddings": True,
        "lm_head_multiplier": 2.5,
        "mamba_rms_norm": True,
        "mamba_d_ssm": None,
        "mamba_n_heads": 8,
        "head_dim": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    },
    "nemotron_h": {"model_type": "nemotron_h"},
    "nemotron_h-biases": {
        "model_type": "nemotron_h",
        "mlp_bias": True,
        "conv_kernel": 3,
        "num_key_value_heads": 4,
        "layer_norm_epsilon": 1e-4,
    },
    "mamba": {"model_type": "mamba"},
    "mamba-untied-low-rank": {
        "model_type": "mamba",
        "tie_word_embeddings": False,
        "time_step_rank": 5,
        "state_size": 12,
        "conv_kernel": 3,
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
    "lfm2_moe": {"model_type": "lfm2_moe"},
    "lfm2_moe-everywhere": {
        "model_type": "lfm2_moe",
        "num_dense_layers": 0,
        "conv_L_cache": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    },
    "granitemoehybrid": {"model_type": "granitemoehybrid"},
    "granitemoehybrid-dense-tied": {
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "tie_word_embeddings": True,
        "mamba_d_conv": 3,
    },
    "granitemoehybrid-dense-attention-rotated": {
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": [FULL] * 4,
        "position_embedding_type": "rope",
        "attention_bias": True,
    },
    "granitemoehybrid-rotated": {
        "model_type": "granitemoehybrid",
        "position_embedding_type": "rope",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "layer_types": [SPACE, FULL, FULL, SPACE],
        "attention_bias": True,
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
    "jamba-experts": (
        {"model_type": "jamba", "num_experts": 6, "num_experts_per_tok": 2},
        {"mlx": "normalises the scores"},
    ),
    "jamba-biases": (
        {
            "model_type": "jamba",
            "mamba_expand": 3,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
        },
        {"gguf": "no biases around .*; .* needs biases .*; .* have twice as many"},
    ),
    "falcon_h1-tied-scaled": (
        {"model_type": "falcon_h1", "tie_word_embeddings": True},
        {"gguf": "does not scale the logits"},
    ),
    "falcon_h1-groups-limits": (
        {
            "model_type": "falcon_h1",
            "mamba_n_groups": 5,
            "mamba_rms_norm": True,
            "time_step_limit": [0.1, 0.8],
        },
        {"gguf": "does not limit", "mlx": "one norm for all groups .*; .* does not limit"},
    ),
    "nemotron_h-biased-spaces": (
        {"model_type": "nemotron_h", "use_bias": True, "use_conv_bias": False},
        {"gguf": "no biases around .*; .* needs biases of"},
    ),
    "mamba-wide-biases": (
        {
            "model_type": "mamba",
            "expand": 3,
            "intermediate_size": 384,
            "use_bias": True,
            "use_conv_bias": False,
        },
        {"gguf": "no biases around .*; .* needs biases of .*; .* have twice as many channels"},
    ),
    "mamba-epsilon": (
        {"model_type": "mamba", "layer_norm_epsilon": 1e-4},
        {"mlx": "norms with 1e-5"},
    ),
    "lfm2_moe-other-scores": (
        {
            "model_type": "lfm2_moe",
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "conv_bias": True,
        },
        {"gguf": "no biases .*; .* needs a correction .*; .* always normalises .*; .* not scale"},
    ),
    "lfm2_moe-untied": (
        {"model_type": "lfm2_moe", "tie_word_embeddings": False},
        {"mlx": "untied embeddings"},
    ),
    "granitemoehybrid-attention-alone": (
        {"model_type": "granitemoehybrid", "layer_types": [FULL] * 4},
        {"gguf": "attention alone with rotation only .*; .* without experts only"},
    ),
    "granitemoehybrid-groups-linear": (
        {
            "model_type": "granitemoehybrid",
            "mamba_n_groups": 2,
            "position_embedding_type": "rope",
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
        },
        {"mlx": "this model one for each; mlx-lm's granitemoehybrid has no linear rope scaling"},
    ),
    "granitemoehybrid-wide-limits": (
        {
            "model_type": "granitemoehybrid",
            "mamba_expand": 3,
            "mamba_proj_bias": True,
            "time_step_limit": [0.1, 1.0],
        },
        {"gguf": "does not limit time steps .*; llama.cpp has no biases .*; .* twice as many"},
    ),
    "granitemoehybrid-dense-no-bias": (
        {"model_type": "granitemoehybrid", "num_local_experts": 0, "mamba_conv_bias": False},
        {"gguf": "needs biases of the convolution"},
    ),
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
        {"gguf": "no biases around a state space; llama.cpp needs biases of"},
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
    "granitemoehybrid-spaces-alone": (
        {"model_type": "granitemoehybrid", "layer_types": [SPACE] * 4},
        "without a layer of attention",
    ),
}
#: What these need to be 256 wide and have nine layers.
WIDE: dict[str, dict[str, Any]] = {
    "lfm2-by-number": {"full_attn_idxs": [1, 3, 5, 6, 8]},
    "lfm2_moe-everywhere": {
        "layer_types": [FULL, CONV, CONV] * 3,
        "num_dense_layers": 2,
        "moe_intermediate_size": 256,
    },
    "jamba": {},
    "falcon_h1": {"mamba_d_ssm": 320},
    "nemotron_h": {"layers_block_type": [SPACE, MLP, FULL] * 3, "head_dim": 64},
    "mamba": {"intermediate_size": 512},
    "mamba2": {"num_heads": 16},
    "granitemoehybrid": {"layer_types": [SPACE, FULL, SPACE] * 3},
    "granitemoehybrid-dense-attention-rotated": {"layer_types": [FULL] * 9},
}
