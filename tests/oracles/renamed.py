"""Tensors as the remote code of an architecture on the Hub names and joins them, made of those of
the one that stands in for it in transformers (``oracles.stand_ins``), and back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Weights = dict[str, np.ndarray]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Renamed:
    """``names``: parts of names on the Hub by transformers', each taken in turn. ``joined``: what
    the Hub calls the module of q, k and v (transformers' names), which ``join`` makes one of and
    ``part`` three."""

    names: dict[str, str]
    joined: str
    join: Callable[[Settings, list[np.ndarray]], np.ndarray]
    part: Callable[[Settings, np.ndarray], list[np.ndarray]]


def _heads(config: Settings) -> tuple[int, int, int]:
    """Heads of keys, heads of queries for each, and their size."""
    keys, heads = config["num_key_value_heads"], config["num_attention_heads"]
    return keys, heads // keys, config["hidden_size"] // heads


def _join_groups(config: Settings, parts: list[np.ndarray]) -> np.ndarray:
    keys, _, size = _heads(config)
    apart = [part.reshape(keys, -1, size, *part.shape[1:]) for part in parts]
    joined = np.concatenate(apart, axis=1)
    return joined.reshape(-1, *parts[0].shape[1:])


def _part_groups(config: Settings, joined: np.ndarray) -> list[np.ndarray]:
    keys, each, size = _heads(config)
    apart = joined.reshape(keys, each + 2, size, *joined.shape[1:])
    parts = apart[:, :-2], apart[:, -2], apart[:, -1]
    return [part.reshape(-1, *joined.shape[1:]) for part in parts]


def _join(config: Settings, parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts)


def _part(config: Settings, joined: np.ndarray) -> list[np.ndarray]:
    return np.split(joined, 3)


RENAMED: dict[str, Renamed] = {
    "internlm2": Renamed(
        {
            "model.embed_tokens": "model.tok_embeddings",
            "lm_head": "output",
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
        },
        "attention.wqkv",
        _join_groups,
        _part_groups,
    ),
    "baichuan": Renamed({}, "self_attn.W_pack", _join, _part),
    "qwen": Renamed(
        {
            "model.layers": "transformer.h",
            "model.embed_tokens": "transformer.wte",
            "model.norm": "transformer.ln_f",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.gate_proj": "mlp.w2",
            "mlp.up_proj": "mlp.w1",
            "mlp.down_proj": "mlp.c_proj",
        },
        "attn.c_attn",
        _join,
        _part,
    ),
}
_PARTS = [f"self_attn.{part}_proj." for part in "qkv"]


def rename(folder: Path, to_hub: bool) -> None:
    """Change the tensors in a folder, where they are of an architecture that it is done for."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    renamed = RENAMED.get(config["model_type"])
    if renamed is None:
        return
    path = folder / "model.safetensors"
    weights = load_file(path)
    made = _to_hub(renamed, config, weights) if to_hub else _from_hub(renamed, config, weights)
    made = {name: np.ascontiguousarray(values) for name, values in made.items()}
    save_file(made, path, metadata={"format": "pt"})


def as_transformers(folder: Path) -> Path:
    """The folder, or a copy of it with the tensors of the architecture that stands in."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config["model_type"] not in RENAMED:
        return folder
    copy = folder.with_name(f"{folder.name}-as-transformers")
    shutil.copytree(folder, copy)
    rename(copy, to_hub=False)
    return copy


def _to_hub(renamed: Renamed, config: Settings, weights: Weights) -> Weights:
    made: Weights = {}
    for name, values in weights.items():
        if _PARTS[0] in name:
            parts = [weights[name.replace(_PARTS[0], part)] for part in _PARTS]
            name = name.replace(_PARTS[0], f"{renamed.joined}.")
            values = renamed.join(config, parts)
        elif any(part in name for part in _PARTS):
            continue
        for theirs, own in renamed.names.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\g<1>{own}.", name)
        made[name] = values
    return made


def _from_hub(renamed: Renamed, config: Settings, weights: Weights) -> Weights:
    made: Weights = {}
    for name, values in weights.items():
        for theirs, own in renamed.names.items():
            name = re.sub(rf"(^|\.){re.escape(own)}\.", rf"\g<1>{theirs}.", name)
        if f".{renamed.joined}." not in name:
            made[name] = values
            continue
        for part, own_values in zip(_PARTS, renamed.part(config, values), strict=True):
            made[name.replace(f"{renamed.joined}.", part)] = own_values
    return made
