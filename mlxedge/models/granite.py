"""granite: llama's graph with factors on embeddings, attention, residuals and logits."""

from __future__ import annotations

from mlxedge.models.dense import Dense, Key
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Factors

#: Config key → GGUF key; each is 1 where a config leaves it out.
FACTORS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def factors(config: Config) -> Factors:
    return Factors(
        embedding=float(config["embedding_multiplier"]),
        attention=float(config["attention_multiplier"]),
        residual=float(config["residual_multiplier"]),
        logits=1.0 / float(config["logits_scaling"]),
    )


def zeros(config: Config, runtime: str) -> list[str]:
    """An objection to each factor that is 0."""
    return [f"{key} is 0" for key in FACTORS if not config[key]]


def _check(config: Config, runtime: str) -> list[str]:
    found = zeros(config, runtime)
    heads = config["head_dim"] * config["num_attention_heads"]
    if runtime == "mlx" and heads != config["hidden_size"]:
        found.append("mlx-lm's granite needs heads that add up to the hidden size")
    return found


SPEC = Dense(
    model_type="granite",
    architecture="GraniteForCausalLM",
    arch="granite",
    names=names(
        rope_rows=True, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    factors=factors,
    fixed={"attention_bias": False, "mlp_bias": False},
    defaults=dict.fromkeys(FACTORS, 1.0),
    keys=tuple(Key(key, gguf, default=1.0) for key, gguf in FACTORS.items()),
    freq_factors=True,
    check=_check,
).spec()
