"""Settings of random checkpoints of decoders whose files hold tensors fused or transposed, in the
tables of ``oracles.architectures``."""

from __future__ import annotations

from typing import Any

from oracles.architectures import LINEAR

NO_MLX = {"mlx": "mlx-lm does not have this architecture"}
NO_LLAMA_CPP = {"gguf": "llama.cpp does not have this architecture"}
#: Falcon 40B's way.
NEW: dict[str, Any] = {"new_decoder_architecture": True}

#: What an architecture needs beside the sizes, or instead of them.
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 512, "num_key_value_heads": 4, "intermediate_size": 512},
    "gpt_neox": {"intermediate_size": 512, "num_key_value_heads": 4},
    "falcon": {"num_kv_heads": 2, "ffn_hidden_size": 192, "num_key_value_heads": 1},
    "internlm2": {"bias": False},
    "qwen": {
        "num_key_value_heads": 4,
        "intermediate_size": 384,
        "kv_channels": 32,
        "rotary_emb_base": 10000,
    },
    # Its runtime tells what it computes by their number.
    "baichuan": {
        "num_hidden_layers": 32,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_key_value_heads": 4,
    },
    "bloom": {"num_key_value_heads": 4, "intermediate_size": 512},
    "mpt": {"num_key_value_heads": 4, "intermediate_size": 512, "max_seq_len": 256},
    "gpt_bigcode": {"n_inner": 320, "num_key_value_heads": 1, "intermediate_size": 320},
    "gptj": {
        "n_inner": 512,
        "rotary_dim": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
    },
}
#: mlx-lm computes GELU itself, or its approximation by tanh, and the model the other one.
OTHER_GELU = ("gpt_neox", "gpt_bigcode", "gptj-gelu")
SAVED: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "num_hidden_layers": 3},
    "gpt_neox": {"model_type": "gpt_neox", "num_hidden_layers": 3},
    "gpt_neox-in-turn-half": {
        "model_type": "gpt_neox",
        "hidden_act": "gelu_fast",
        "use_parallel_residual": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e4,
            "partial_rotary_factor": 0.5,
        },
    },
    "gpt_bigcode": {"model_type": "gpt_bigcode", "num_hidden_layers": 3},
    "gpt_bigcode-heads-untied-gelu": {
        "model_type": "gpt_bigcode",
        "multi_query": False,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "activation_function": "gelu",
    },
    "qwen": {"model_type": "qwen", "num_hidden_layers": 3},
    "internlm2": {"model_type": "internlm2"},
    "internlm2-dynamic": {
        "model_type": "internlm2",
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e5},
    },
    "internlm2-linear": {"model_type": "internlm2", "rope_parameters": LINEAR},
}
PARTIAL: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "gpt2-narrow": (
        {"model_type": "gpt2", "n_inner": 192, "intermediate_size": 192},
        {"mlx": "four times as wide"},
    ),
    "gpt2-untied": (
        {"model_type": "gpt2", "tie_word_embeddings": False},
        {"mlx": "untied embeddings"},
    ),
    "gpt2-scale-by-layer": (
        {"model_type": "gpt2", "num_hidden_layers": 3, "scale_attn_by_inverse_layer_idx": True},
        {"gguf": "scales attention alike", "mlx": "scales attention alike"},
    ),
    "bloom": ({"model_type": "bloom", "num_hidden_layers": 3}, NO_MLX),
    "bloom-six-heads-untied": (
        {
            "model_type": "bloom",
            "hidden_size": 192,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "tie_word_embeddings": False,
        },
        NO_MLX,
    ),
    "mpt": ({"model_type": "mpt", "num_hidden_layers": 3}, NO_MLX),
    "mpt-six-heads-clipped": (
        {
            "model_type": "mpt",
            "hidden_size": 192,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "attn_config": {"clip_qkv": 1.5},
        },
        NO_MLX,
    ),
    "mpt-scaled": (
        {"model_type": "mpt", "attn_config": {"softmax_scale": 0.1}},
        NO_MLX | {"gguf": "softmax_scale"},
    ),
    "baichuan": ({"model_type": "baichuan"}, NO_MLX),
    "baichuan-of-three": (
        {"model_type": "baichuan", "num_hidden_layers": 3},
        NO_MLX | {"gguf": "rotates with 32 layers"},
    ),
    "qwen-theta": (
        {"model_type": "qwen", "rotary_emb_base": 500000},
        {"mlx": "by a base of 10000"},
    ),
    "gptj": ({"model_type": "gptj", "num_hidden_layers": 3}, NO_LLAMA_CPP),
    "gptj-gelu": (
        {"model_type": "gptj", "rotary_dim": 24, "activation_function": "gelu"},
        NO_LLAMA_CPP,
    ),
    "gptj-narrow-tied": (
        {
            "model_type": "gptj",
            "n_inner": 192,
            "intermediate_size": 192,
            "tie_word_embeddings": True,
        },
        NO_LLAMA_CPP | {"mlx": "four times as wide.*tied embeddings"},
    ),
    "gpt_bigcode-no-scale": (
        {"model_type": "gpt_bigcode", "scale_attn_weights": False},
        {"gguf": "always scales attention", "mlx": "always scales attention"},
    ),
    "gpt_neox-no-biases": (
        {"model_type": "gpt_neox", "attention_bias": False},
        {"gguf": "always has attention biases", "mlx": "always has attention biases"},
    ),
    "gpt_neox-tied": (
        {"model_type": "gpt_neox", "tie_word_embeddings": True},
        {"gguf": "tied embeddings", "mlx": "tied embeddings"},
    ),
    "gpt_neox-narrow-linear": (
        {
            "model_type": "gpt_neox",
            "intermediate_size": 192,
            "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.25},
        },
        {"mlx": "no linear rope scaling; mlx-lm's gpt_neox has an MLP four times as wide"},
    ),
    "falcon": ({"model_type": "falcon"}, NO_MLX),
    "falcon-heads": (
        {
            "model_type": "falcon",
            "multi_query": False,
            "num_kv_heads": 4,
            "tie_word_embeddings": False,
        },
        NO_MLX,
    ),
    "falcon-new": ({"model_type": "falcon", **NEW, "num_hidden_layers": 3}, NO_MLX),
    "falcon-new-one-norm": (
        {
            "model_type": "falcon",
            **NEW,
            "num_ln_in_parallel_attn": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        NO_MLX,
    ),
    "falcon-biases": (
        {"model_type": "falcon", **NEW, "bias": True},
        NO_MLX | {"gguf": "llama.cpp's falcon has no biases"},
    ),
    "falcon-in-turn": (
        {"model_type": "falcon", "parallel_attn": False},
        NO_MLX | {"gguf": "attention and MLP side by side"},
    ),
    "internlm2-biases": (
        {"model_type": "internlm2", "bias": True},
        {"gguf": "llama.cpp's internlm2 has no biases"},
    ),
    "internlm2-tied": (
        {"model_type": "internlm2", "tie_word_embeddings": True},
        {"gguf": "tied embeddings"},
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom-residual": (
        {"model_type": "bloom", "apply_residual_connection_post_layernorm": True},
        "bloom with apply_residual_connection_post_layernorm",
    ),
    "mpt-norms": (
        {"model_type": "mpt", "attn_config": {"qk_ln": True}},
        "mpt with qk_ln 'True' is not supported",
    ),
    "falcon-alibi": ({"model_type": "falcon", "alibi": True}, "falcon with alibi"),
}
