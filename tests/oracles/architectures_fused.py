"""Settings of random checkpoints of decoders whose files hold tensors fused or transposed, in the
tables of ``oracles.architectures``."""

from __future__ import annotations

from typing import Any

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}

OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 512, "num_key_value_heads": 4, "intermediate_size": 512},
}
SAVED: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "num_hidden_layers": 3},
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
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {}
