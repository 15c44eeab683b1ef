"""Architectures whose code is on the Hub, not in transformers, and what computes them there.

A checkpoint of one is made by another architecture of transformers that computes the same, and
config.json is then written as on the Hub.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

Settings = dict[str, Any]


def _granite(config: Settings) -> Settings:
    """MiniCPM's factors are Granite's."""
    made = {k: v for k, v in config.items() if k not in MINICPM}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    scale = {**MINICPM, **config}
    return made | {
        "model_type": "granite",
        "embedding_multiplier": float(scale["scale_emb"]),
        "residual_multiplier": scale["scale_depth"] / math.sqrt(config["num_hidden_layers"]),
        "logits_scaling": hidden / scale["dim_model_base"],
        "attention_multiplier": (config.get("head_dim") or hidden // heads) ** -0.5,
    }


def _llama(config: Settings) -> Settings:
    """InternLM 2's biases are those of llama's attention."""
    return config | {"model_type": "llama", "attention_bias": config["bias"]}


def _reads_only(model_type: str) -> Callable[[Settings], Settings]:
    """The language model of one that sees, without sections of its rotary embeddings."""

    def made(config: Settings) -> Settings:
        found = {k: v for k, v in config.items() if k != "mrope_section"}
        if rope := found.get("rope_parameters"):
            rope = {k: v for k, v in rope.items() if not k.startswith("mrope_")}
            found["rope_parameters"] = rope
        return found | {"model_type": model_type}

    return made


def _first_qwen(config: Settings) -> Settings:
    """It counts both halves of the MLP."""
    rope = {"rope_type": "default", "rope_theta": float(config["rotary_emb_base"])}
    return config | {
        "model_type": "qwen2",
        "intermediate_size": config["intermediate_size"] // 2,
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_parameters": rope,
    }


MINICPM: Settings = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 48}
#: By model_type: what makes its settings those of a type that transformers has, and what its own
#: config.json holds beside them.
STAND_INS: dict[str, tuple[Callable[[Settings], Settings], Settings]] = {
    "minicpm": (_granite, MINICPM),
    "mimo": (_reads_only("qwen2"), {}),
    "qwen2_vl_text": (_reads_only("qwen2"), {}),
    "qwen2_5_vl_text": (_reads_only("qwen2"), {}),
    "glm4v_text": (_reads_only("glm4"), {}),
    "qwen3_vl_text": (_reads_only("qwen3"), {}),
    "internlm2": (_llama, {"bias": False}),
    "baichuan": (lambda config: config | {"model_type": "llama"}, {}),
    "qwen": (_first_qwen, {"layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000}),
    "kimi_k2": (_reads_only("deepseek_v3"), {}),
    "youtu_llm": (_reads_only("youtu"), {}),
}


def config_of(model_type: str, **settings: Any) -> Any:
    """transformers' configuration of a model of this type, or of its stand-in."""
    from transformers import AutoConfig

    if model_type in STAND_INS:
        stand_in, own = STAND_INS[model_type]
        made = stand_in(own | settings)
        model_type = made.pop("model_type")
        settings = made
    return AutoConfig.for_model(model_type, **settings)


def hub_config(model_type: str, settings: Settings, saved: Settings) -> Settings:
    """What config.json holds on the Hub, of a config that transformers has saved."""
    if model_type not in STAND_INS:
        return saved
    own = {k: v for k, v in saved.items() if not k.endswith(("_multiplier", "_scaling"))}
    return own | STAND_INS[model_type][1] | settings | {"model_type": model_type}


def load_config(folder: Path) -> Any:
    """transformers' configuration for the weights in a folder, or ``None`` for its own."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config["model_type"] not in STAND_INS:
        return None
    return config_of(config.pop("model_type"), **config)
