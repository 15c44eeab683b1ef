"""Settings of random checkpoints with multi-head latent attention, as in ``architectures``."""

from __future__ import annotations

from typing import Any

from oracles.architectures import LINEAR, YARN

#: With as many heads of keys as of queries, and sizes that differ wherever they may.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
}
_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
#: What an architecture needs beside the sizes, or instead of them.
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_LATENT, **_EXPERTS, "topk_method": "greedy"},
    "deepseek_v3": {**_LATENT, **_EXPERTS, "n_group": 4, "topk_group": 2},
    "deepseek_v32": {
        **_LATENT,
        **_EXPERTS,
        **{"n_group": 4, "topk_group": 2},
        # Sees all that the tests show it; see test_latent_attention for less.
        **{"index_topk": 200, "index_n_heads": 16, "index_head_dim": 64},
    },
    "glm4_moe_lite": {**_LATENT, **_EXPERTS},
    "minicpm3": {**_LATENT, "v_head_dim": None},
    # Its embeddings are tied, but transformers empties the row of a token for padding as it loads.
    "youtu": {**_LATENT, "tie_word_embeddings": False},
    # As configs on the Hub call them.
    "kimi_k2": {**_LATENT, **_EXPERTS, "n_group": 1, "topk_group": 1},
    "youtu_llm": {**_LATENT, "tie_word_embeddings": False},
}
#: As DeepSeek-V2 and V3 have it: rotations are not scaled, scores are.
_SCALED = {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707}
_ONE = {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}

SAVED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"model_type": "deepseek_v2", "rope_parameters": _SCALED},
    "deepseek_v2-queries-whole": {
        "model_type": "deepseek_v2",
        "num_hidden_layers": 3,
        "q_lora_rank": None,
        "first_k_dense_replace": 2,
        "n_shared_experts": 1,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "rope_parameters": _ONE,
    },
    "deepseek_v3-queries-whole-no-groups": {
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "v_head_dim": 24,
    },
}

SAVED |= {
    "deepseek_v32": {"model_type": "deepseek_v32", "rope_parameters": _ONE},
    "deepseek_v32-no-groups": {
        "model_type": "deepseek_v32",
        "num_hidden_layers": 3,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "first_k_dense_replace": 2,
    },
    "glm4_moe_lite": {"model_type": "glm4_moe_lite", "num_hidden_layers": 3},
    "glm4_moe_lite-dense-groups-yarn": {
        "model_type": "glm4_moe_lite",
        "num_hidden_layers": 4,
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "q_lora_rank": None,
        "rope_parameters": _SCALED,
    },
    "youtu": {"model_type": "youtu"},
    "youtu-queries-whole": {"model_type": "youtu", "q_lora_rank": None},
    "kimi_k2": {"model_type": "kimi_k2", "rope_parameters": _ONE},
    "youtu_llm": {"model_type": "youtu_llm"},
    "minicpm3": {"model_type": "minicpm3", "num_hidden_layers": 3},
    "minicpm3-untied": {"model_type": "minicpm3", "tie_word_embeddings": False},
    "minicpm3-unscaled": {"model_type": "minicpm3", "hidden_size": 256},
}

#: Type and settings, and of the runtime that refuses the reason.
PARTIAL: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "deepseek_v2-groups": (
        {
            "model_type": "deepseek_v2",
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "rope_parameters": _SCALED,
        },
        {"gguf": "groups of experts by their two best"},
    ),
    "deepseek_v2-biases": (
        {
            "model_type": "deepseek_v2",
            "attention_bias": True,
            "rope_parameters": {**_SCALED, "mscale": 1.0},
        },
        {"gguf": "mscale equal to mscale_all_dim; llama.cpp's deepseek2 has no attention biases"},
    ),
    "deepseek_v2-linear": (
        {"model_type": "deepseek_v2", "rope_parameters": LINEAR},
        {
            "gguf": "llama.cpp's deepseek2 has no linear rope scaling",
            "mlx": "mlx-lm's deepseek_v2 has no linear rope scaling",
        },
    ),
    "deepseek_v2-tied": (
        {"model_type": "deepseek_v2", "tie_word_embeddings": True},
        {"mlx": "tied embeddings"},
    ),
    "deepseek_v3-linear": (
        {"model_type": "deepseek_v3", "rope_parameters": LINEAR},
        {"gguf": "llama.cpp's deepseek2 has no linear rope scaling"},
    ),
    "deepseek_v3-biases-yarn": (
        {"model_type": "deepseek_v3", "attention_bias": True, "rope_parameters": YARN},
        {"gguf": "mscale equal to mscale_all_dim; llama.cpp's deepseek2 has no attention biases"},
    ),
    "deepseek_v3-halves-tied": (
        {
            "model_type": "deepseek_v3",
            "rope_interleave": False,
            "tie_word_embeddings": True,
        },
        {"gguf": "rope_interleave: false", "mlx": "rope_interleave: false"},
    ),
}
PARTIAL |= {
    "deepseek_v32-biases-yarn-indexers": (
        {
            "model_type": "deepseek_v32",
            "attention_bias": True,
            "index_head_dim": 96,
            "rope_parameters": _SCALED,
        },
        {"gguf": "mscale_all_dim of 1 alone; .* no attention biases; .* an index_head_dim of 64"},
    ),
    "deepseek_v32-tied": (
        {"model_type": "deepseek_v32", "tie_word_embeddings": True},
        {"mlx": "tied embeddings"},
    ),
    "youtu-yarn": (
        {"model_type": "youtu", "rope_parameters": _SCALED},
        {"mlx": "mlx-lm's youtu does not scale scores"},
    ),
    "youtu-biases-linear": (
        {"model_type": "youtu", "attention_bias": True, "rope_parameters": LINEAR},
        {"gguf": "no linear rope scaling; llama.cpp's deepseek2 has no attention biases"},
    ),
    "deepseek_v3-all-groups": (
        {"model_type": "deepseek_v3", "topk_group": 4, "num_experts_per_tok": 1},
        {"mlx": "does not normalise the score of one expert"},
    ),
    "glm4_moe_lite-tied-biases": (
        {"model_type": "glm4_moe_lite", "attention_bias": True, "norm_topk_prob": False},
        {"gguf": "llama.cpp's deepseek2 has no attention biases"},
    ),
    "glm4_moe_lite-tied": (
        {"model_type": "glm4_moe_lite", "tie_word_embeddings": True},
        {"mlx": "tied embeddings"},
    ),
    "minicpm3-values": (
        {
            "model_type": "minicpm3",
            "v_head_dim": 40,
            "rope_parameters": LINEAR,
        },
        {"mlx": "heads of values .* no linear rope scaling"},
    ),
    "minicpm3-biases-scales": (
        {
            "model_type": "minicpm3",
            "attention_bias": True,
            "scale_emb": 3,
            "scale_depth": None,
            "dim_model_base": 64,
        },
        {"gguf": "scale_emb 12, scale_depth 1.4, dim_model_base 256; .* no attention biases"},
    ),
    "minicpm3-queries-whole": (
        {"model_type": "minicpm3", "q_lora_rank": None, "rope_parameters": YARN},
        {"gguf": "latents of queries", "mlx": "latents of queries"},
    ),
}

#: What is not read at all: type and settings, and the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek_v2-normalised": (
        {"model_type": "deepseek_v2", "norm_topk_prob": True},
        "deepseek_v2 with norm_topk_prob is not supported",
    ),
    "glm4_moe_lite-dense-between": (
        {
            "model_type": "glm4_moe_lite",
            "num_hidden_layers": 3,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
        },
        "dense layers after those with experts",
    ),
}
