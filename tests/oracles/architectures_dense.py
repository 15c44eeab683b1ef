"""Settings of random checkpoints of dense decoders, in the tables of ``oracles.architectures``."""

from __future__ import annotations

from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1e5,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e5,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}
PLAIN = {"rope_type": "default", "rope_theta": 1e5}

OWN: dict[str, dict[str, Any]] = {}
SAVED: dict[str, dict[str, Any]] = {
    "apertus": {"model_type": "apertus", "rope_parameters": LLAMA3},
    "apertus-plain-rope": {
        "model_type": "apertus",
        "num_key_value_heads": 4,
        "rope_parameters": PLAIN,
    },
}
PARTIAL: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "apertus-biases": (
        {"model_type": "apertus", "attention_bias": True},
        {"mlx": "mlx-lm's apertus has no attention biases"},
    ),
    "apertus-head-dim": (
        {"model_type": "apertus", "head_dim": 48},
        {"mlx": "mlx-lm's apertus needs heads that add up"},
    ),
    "apertus-tied": (
        {"model_type": "apertus", "tie_word_embeddings": True},
        {"gguf": "tied embeddings"},
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {}
