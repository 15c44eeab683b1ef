"""Settings of random checkpoints, as in ``architectures``: mixtures of experts."""

from __future__ import annotations

import math
from typing import Any

from oracles.architectures import LINEAR, LLAMA3, YARN

#: What transformers has no code of: tests/peers/test_remote_code_moe.py holds those to others.
REMOTE_CODE = ("bailing_moe", "deepseek")
SLIDING, FULL = "sliding_attention", "full_attention"


#: yarn's ramp between 32 rotations and one ends within a ten-thousandth of the pairs 4 and 8 of 32
#: dimensions, so that rounding its ends, which runtimes do, changes next to nothing.
WHOLE_RAMP = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 6436,
    "rope_theta": math.exp(16 * math.log(6436 / (64 * math.pi)) / 4.0001),
}


#: What an architecture needs beside the sizes, or instead of them.
OWN: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "head_dim": 32,
        "sliding_window": 40,
        "rope_parameters": WHOLE_RAMP,
    },
}
OWN["minimax_m2"] = {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 48}
OWN["dots1"] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
OWN["exaone_moe"] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "num_shared_experts": 2,
    "sliding_window": 40,
}
OWN["bailing_moe"] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "num_shared_experts": 1,
    "use_qk_norm": True,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
}
OWN["deepseek"] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
}
OWN["solar_open"] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "head_dim": 48,
}
OWN["afmoe"] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "num_shared_experts": 2,
    "route_scale": 2.5,
    "head_dim": 48,
    "sliding_window": 40,
    "mup_enabled": True,
}
OWN["hunyuan_v1_moe"] = {"num_experts": 6, "moe_topk": 3, "head_dim": 48}
OWN["ernie4_5_moe"] = {
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_intermediate_size": 64,
    "moe_num_shared_experts": 2,
}
OWN["granitemoe"] = OWN["granitemoeshared"] = {
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "shared_intermediate_size": 96,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.3,
    "logits_scaling": 2.5,
}
SAVED: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 5,
    },
    "gpt_oss-truncated": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 3,
        "head_dim": 48,
        "sliding_window": 25,
        "layer_types": [FULL, SLIDING, SLIDING],
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e5,
        },
    },
    "gpt_oss-plain-rope": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "minimax_m2": {"model_type": "minimax_m2"},
    "minimax_m2-half-one-of-four": {
        "model_type": "minimax_m2",
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 64,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e5,
            "partial_rotary_factor": 0.5,
        },
    },
    "dots1": {"model_type": "dots1", "num_hidden_layers": 3, "head_dim": 48},
    "dots1-groups-yarn": {
        "model_type": "dots1",
        "n_routed_experts": 12,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
        "norm_topk_prob": False,
        "rope_parameters": YARN,
    },
    "exaone_moe": {"model_type": "exaone_moe", "num_hidden_layers": 5, "head_dim": 48},
    "exaone_moe-groups-llama3": {
        "model_type": "exaone_moe",
        "num_hidden_layers": 3,
        "layer_types": [FULL, SLIDING, SLIDING],
        "num_experts": 12,
        "n_group": 4,
        "topk_group": 2,
        "mlp_layer_types": ["dense", "dense", "sparse"],
        "num_shared_experts": 1,
        "norm_topk_prob": False,
        "rope_parameters": LLAMA3,
    },
    "solar_open": {"model_type": "solar_open"},
    "solar_open-groups": {
        "model_type": "solar_open",
        "n_routed_experts": 12,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "norm_topk_prob": False,
    },
    "afmoe": {"model_type": "afmoe", "num_hidden_layers": 5},
    "afmoe-tied-yarn": {
        "model_type": "afmoe",
        "num_hidden_layers": 4,
        "num_dense_layers": 2,
        "num_shared_experts": 1,
        "tie_word_embeddings": True,
        "rope_parameters": YARN,
    },
    "granitemoe": {"model_type": "granitemoe"},
    "granitemoe-biases-tied-llama3": {
        "model_type": "granitemoe",
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3,
    },
}

#: Type and settings, and of the runtime that refuses the reason.
PARTIAL: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "gpt_oss-other-gate": (
        {
            "model_type": "gpt_oss",
            "swiglu_alpha": 1.2,
            "swiglu_limit": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        {"gguf": "alpha 1.702 and limit 7", "mlx": "alpha 1.702 and limit 7"},
    ),
    "gpt_oss-other-ramp": (
        {
            "model_type": "gpt_oss",
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "original_max_position_embeddings": 128,
                "rope_theta": 1e4,
            },
        },
        {"gguf": "llama.cpp reads no beta_fast and beta_slow of yarn for gpt-oss"},
    ),
    "minimax_m2-tied": (
        {"model_type": "minimax_m2", "tie_word_embeddings": True},
        {"gguf": "tied embeddings"},
    ),
    "minimax_m2-linear": (
        {"model_type": "minimax_m2", "rope_parameters": LINEAR},
        {"mlx": "mlx-lm's minimax_m2 has no linear rope scaling"},
    ),
    "dots1-fewer-keys-one": (
        {
            "model_type": "dots1",
            "num_key_value_heads": 2,
            "num_experts_per_tok": 1,
            "tie_word_embeddings": True,
        },
        {"gguf": "as many heads of keys", "mlx": "does not normalise the score of one expert"},
    ),
    "dots1-biases": (
        {"model_type": "dots1", "attention_bias": True},
        {"gguf": "no attention biases", "mlx": "no attention biases"},
    ),
    "exaone_moe-no-windows": (
        {"model_type": "exaone_moe", "layer_types": [FULL] * 2},
        {"gguf": "windows and layers without", "mlx": "windows and layers without"},
    ),
    "exaone_moe-tied-one": (
        {
            "model_type": "exaone_moe",
            "num_hidden_layers": 5,
            "tie_word_embeddings": True,
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
        },
        {"gguf": "tied embeddings"},
    ),
    "solar_open-yarn-biases": (
        {"model_type": "solar_open", "attention_bias": True, "rope_parameters": YARN},
        {"mlx": "mlx-lm's solar_open has no yarn"},
    ),
    "solar_open-tied": (
        {"model_type": "solar_open", "tie_word_embeddings": True},
        {"mlx": "tied embeddings"},
    ),
    "afmoe-every-third": (
        {"model_type": "afmoe", "num_hidden_layers": 3, "global_attn_every_n_layers": 3},
        {"gguf": "all layers but every fourth"},
    ),
    "afmoe-unscaled-biases": (
        {"model_type": "afmoe", "mup_enabled": False, "attention_bias": True},
        {"gguf": "always scales embeddings", "mlx": "no attention biases"},
    ),
    "hunyuan_v1_moe": ({"model_type": "hunyuan_v1_moe"}, {"mlx": "has no hunyuan_v1_moe"}),
    "hunyuan_v1_moe-tied-alpha": (
        {
            "model_type": "hunyuan_v1_moe",
            "moe_topk": [2, 2],
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "dynamic",
                "factor": 1.0,
                "alpha": 50.0,
                "rope_theta": 1e4,
            },
        },
        {"mlx": "has no hunyuan_v1_moe"},
    ),
    "hunyuan_v1_moe-biases": (
        {"model_type": "hunyuan_v1_moe", "attention_bias": True},
        {"gguf": "no attention biases", "mlx": "has no hunyuan_v1_moe"},
    ),
    "ernie4_5_moe": (
        {"model_type": "ernie4_5_moe", "num_hidden_layers": 3},
        {"mlx": "leaves out what is added to scores"},
    ),
    "ernie4_5_moe-untied-none-shared": (
        {
            "model_type": "ernie4_5_moe",
            "tie_word_embeddings": False,
            "moe_layer_start_index": 0,
            "moe_num_shared_experts": 0,
            "rope_parameters": LINEAR,
        },
        {"mlx": "leaves out what is added to scores"},
    ),
    "ernie4_5_moe-every-second": (
        {
            "model_type": "ernie4_5_moe",
            "num_hidden_layers": 5,
            "moe_layer_interval": 2,
            "moe_layer_end_index": 2,
        },
        {"gguf": "experts in all layers from the first", "mlx": "leaves out"},
    ),
    "granitemoeshared": (
        {"model_type": "granitemoeshared"},
        {"mlx": "does not have this architecture"},
    ),
    "granitemoeshared-biases-tied": (
        {
            "model_type": "granitemoeshared",
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": LINEAR,
        },
        {"mlx": "does not have this architecture"},
    ),
    "gpt_oss-no-windows-no-biases": (
        {"model_type": "gpt_oss", "layer_types": [FULL] * 2, "attention_bias": False},
        {"gguf": "need the biases of attention", "mlx": "layers with windows and layers without"},
    ),
}

#: What is not read at all: type and settings, and the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ernie4_5_moe-biases": (
        {"model_type": "ernie4_5_moe", "use_bias": True},
        "ernie4_5_moe with biases",
    ),
    "hunyuan_v1_moe-differs": (
        {"model_type": "hunyuan_v1_moe", "moe_topk": [2, 3]},
        "alike in all layers",
    ),
}
