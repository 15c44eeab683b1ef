"""Small random checkpoints of any architecture, made and saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def write_checkpoint(
    folder: Path, model_type: str, dtype: str = "float32", seed: int = 0, **settings: Any
) -> Path:
    """A model as ``save_pretrained`` leaves it, with a tokenizer.

    Weights are normal, with a spread that keeps activations near one, so that every part of the
    model shows in the logits; norms and biases differ from their initial ones and zeros.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SIZES | OWN.get(model_type, {}) | settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder, SIZES["vocab_size"])
    return folder
