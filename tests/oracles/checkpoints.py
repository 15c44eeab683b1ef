"""Small random checkpoints of any architecture, made and saved by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from oracles import (
    architectures,
    architectures_delta,
    architectures_dense,
    architectures_fused,
    architectures_gemma,
    architectures_mla,
    architectures_moe,
    architectures_recurrent,
)
from oracles.renamed import rename
from oracles.stand_ins import STAND_INS, config_of, hub_config
from oracles.tiny import write_tokenizer

#: Small, and large enough that groups of 32 and 64 fit.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    # Within the small vocabulary, which those of real models are not.
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
#: What an architecture needs beside the sizes, or instead of them.
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}

SLIDING, FULL = "sliding_attention", "full_attention"
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.3,
    "logits_scaling": 2.5,
}

#: Name → model_type and settings of a checkpoint that transformers saves. A new architecture adds
#: its line here.
SAVED: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral"},
    "mixtral-one-of-five": {
        "model_type": "mixtral",
        "num_local_experts": 5,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {"model_type": "qwen2_moe"},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 24},
    "qwen3_moe-all-of-four": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "tie_word_embeddings": True,
    },
    "gemma": {"model_type": "gemma", "head_dim": 48},
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "head_dim": 48,
        "query_pre_attn_scalar": 48,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 9.0,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "hidden_size": 256,
        "num_hidden_layers": 7,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 40,
    },
    "gemma3_text-untied-linear-every-third": {
        "model_type": "gemma3_text",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "head_dim": 80,
        "query_pre_attn_scalar": 80,
        "sliding_window": 33,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
        "tie_word_embeddings": False,
        "rope_parameters": {
            FULL: {**LINEAR, "rope_theta": 1e5},
            SLIDING: {"rope_type": "default", "rope_theta": 5e3},
        },
    },
    "glm4": {"model_type": "glm4", "head_dim": 48},
    "glm4-biases-three-quarters": {
        "model_type": "glm4",
        "head_dim": 32,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e4,
            "partial_rotary_factor": 0.75,
        },
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "smollm3-untied-yarn": {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "tie_word_embeddings": False,
        "rope_parameters": {**YARN, "rope_theta": 1e5},
    },
    "granite": {"model_type": "granite", **GRANITE},
    "granite-biases-tied-llama3": {
        "model_type": "granite",
        **GRANITE,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {**LLAMA3, "rope_theta": 1e5},
    },
    "olmo2": {"model_type": "olmo2"},
    "olmo2-linear": {
        "model_type": "olmo2",
        "num_key_value_heads": 4,
        "rope_parameters": {**LINEAR, "rope_theta": 5e5},
    },
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "phi3-tied-half": {
        "model_type": "phi3",
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "sliding_window": 200,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e5,
            "partial_rotary_factor": 0.5,
        },
    },
    "cohere": {"model_type": "cohere", "logit_scale": 0.5},
    "cohere-qk-norm": {
        "model_type": "cohere",
        "use_qk_norm": True,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "num_hidden_layers": 64,
    },
    "cohere2": {"model_type": "cohere2", "num_hidden_layers": 5, "sliding_window": 40},
    "cohere2-every-second": {
        "model_type": "cohere2",
        "num_hidden_layers": 4,
        "sliding_window": 25,
        "layer_types": [SLIDING, FULL] * 2,
        "logit_scale": 1.5,
    },
}
#: Type and settings, and of the runtime that refuses the reason.
PARTIAL: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
#: What is not read at all: type and settings, and the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {}
for family in (
    *(architectures, architectures_dense, architectures_fused, architectures_mla),
    *(architectures_delta, architectures_gemma, architectures_moe, architectures_recurrent),
):
    OWN |= family.OWN
    SAVED |= family.SAVED
    PARTIAL |= family.PARTIAL
    REFUSED |= family.REFUSED
#: The settings of all.
ALL = SAVED | {name: settings for name, (settings, _) in PARTIAL.items()}


def write_checkpoint(
    folder: Path, model_type: str, dtype: str = "float32", seed: int = 0, **settings: Any
) -> Path:
    """A model as ``save_pretrained`` leaves it, with a tokenizer.

    Weights are normal, with a spread that keeps activations near one, so that every part of the
    model shows in the logits; norms and biases differ from their initial ones and zeros.
    """
    import torch
    from transformers import AutoModelForCausalLM

    settings = SIZES | OWN.get(model_type, {}) | settings
    config = config_of(model_type, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("q_norm.weight") and model_type in architectures_gemma.UNSCALED:
                parameter.mul_(parameter.numel() ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias")):
                buffer.normal_(0.0, 0.1)
            if name.endswith("layer_scalar"):
                buffer.normal_(1.0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if model_type in STAND_INS:
        path = folder / "config.json"
        saved = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(hub_config(model_type, settings, saved)), "utf-8")
    rename(folder, to_hub=True)
    write_tokenizer(folder, SIZES["vocab_size"])
    return folder
