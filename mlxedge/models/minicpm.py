"""minicpm: OpenBMB's MiniCPM 1, 2 and 4; llama's graph with factors on embeddings, residuals and
logits.

transformers does not have it, and mlx-lm's leaves a factor out where embeddings are tied: both get
a Granite.
"""

from __future__ import annotations

import math

from mlxedge import gguf_values as gv
from mlxedge.models.dense import Dense, longrope_notes, longrope_objections
from mlxedge.models.names import names
from mlxedge.models.rope import LONG, rope_settings
from mlxedge.models.rope_files import Get, shortest
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Factors

#: What its own configuration takes for keys that are left out.
_FACTORS = {"scale_emb": 1.0, "dim_model_base": 1, "scale_depth": 1.0}


def _residual(config: Config) -> float:
    return float(config["scale_depth"]) / math.sqrt(config["num_hidden_layers"])


def _logits(config: Config) -> float:
    """What logits are divided by."""
    return float(config["hidden_size"] / config["dim_model_base"])


def _factors(config: Config) -> Factors:
    return Factors(
        embedding=float(config["scale_emb"]),
        residual=_residual(config),
        logits=1.0 / _logits(config),
    )


def _granite(config: Config) -> Config:
    """The config of a Granite that computes the same."""
    return {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": float(config["scale_emb"]),
        "attention_multiplier": config["head_dim"] ** -0.5,
        "residual_multiplier": _residual(config),
        "logits_scaling": _logits(config),
        "attention_bias": False,
        "mlp_bias": False,
    }


def _gguf(config: Config) -> gv.Metadata:
    made = {
        "embedding_scale": gv.f32(config["scale_emb"]),
        "residual_scale": gv.f32(_residual(config)),
        "logit_scale": gv.f32(_logits(config)),
    }
    if rope_settings(config).type == LONG:
        made["rope.scaling.type"] = gv.string(LONG)
    return made


def _back(config: Config, get: Get) -> Config:
    """Files of old say nothing of factors: they are those of the first models."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    depth = get("residual_scale", 1.4 / math.sqrt(layers)) * math.sqrt(layers)
    # The key divides; without it llama.cpp takes that of a base of 256.
    base = hidden / get("logit_scale", hidden / 256)
    return config | {
        "scale_emb": shortest(get("embedding_scale", 12.0)),
        "scale_depth": float(f"{depth:.6g}"),
        "dim_model_base": round(base) if abs(base - round(base)) < 1e-3 else shortest(base),
    }


def _check(config: Config, runtime: str) -> list[str]:
    found = [f"{key} is 0" for key in _FACTORS if not config[key]]
    full = config["head_dim"] * config["num_attention_heads"]
    if runtime == "mlx" and full != config["hidden_size"]:
        found.append("mlx-lm's granite needs heads that add up to the hidden size")
    return found + (longrope_objections(config) if runtime == "mlx" else [])


def _notes(config: Config, runtime: str) -> list[str]:
    found = longrope_notes(config, runtime)
    if config.get("sparse_config"):
        found.append("the model's sparse attention to long contexts (sparse_config) becomes full")
    return found


SPEC = Dense(
    model_type="minicpm",
    architecture="MiniCPMForCausalLM",
    arch="minicpm",
    names=names(rope_rows=True),
    factors=_factors,
    fixed={},
    defaults={**_FACTORS, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    longrope=True,
    gguf=_gguf,
    mlx=_granite,
    hf=lambda config: {k: v for k, v in config.items() if k not in _FACTORS} | _granite(config),
    back=_back,
    check=_check,
    notes=_notes,
).spec()
