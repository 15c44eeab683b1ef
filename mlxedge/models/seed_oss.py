"""seed_oss: ByteDance's Seed; llama's graph with biases on q, k and v."""

from __future__ import annotations

from dataclasses import replace

from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.spec import Config


def _check(config: Config, runtime: str) -> list[str]:
    missing = [key for key in ("attention_out_bias", "mlp_bias") if config.get(key)]
    if runtime == "gguf" and missing:
        return [f"llama.cpp's seed_oss has no biases but of q, k and v ({', '.join(missing)})"]
    return []


#: llama.cpp calls the MLP's norm by where it stands.
_NAMES = tuple(
    replace(name, gguf=name.gguf.replace("ffn_norm", "post_attention_norm"))
    for name in names(qkv_bias="attention_bias", o_bias="attention_out_bias", mlp_bias="mlp_bias")
)

SPEC = Dense(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    arch="seed_oss",
    names=_NAMES,
    fixed={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    defaults={"attention_bias": True, "head_dim": 128},
    # mlx-lm multiplies with the embedding's packed weights as if they were floats.
    tied={"mlx": False},
    check=_check,
).spec()
