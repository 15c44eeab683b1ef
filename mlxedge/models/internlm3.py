"""internlm3: Shanghai AI Laboratory's InternLM 3; llama's graph, and llama's files in GGUF."""

from __future__ import annotations

from dataclasses import replace

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, under
from mlxedge.models.names import names
from mlxedge.models.rope import Rope, rope_settings
from mlxedge.models.rope_files import rope_values
from mlxedge.models.spec import Config

#: As the configs of its own remote code call them.
_BIASES = {"qkv_bias": "attention_bias", "bias": "mlp_bias"}


def _settle(config: Config) -> Config:
    if bool(config.get("attention_bias")) != bool(config.get("mlp_bias")):
        raise UnsupportedModelError(
            "internlm3 with biases in attention (qkv_bias) or the MLP (bias) alone is not supported"
        )
    return config


def settled_rope(config: Config) -> Rope:
    """ "dynamic" stretches beyond the context that the config declares, where generation stops."""
    rope = rope_settings(config)
    return replace(rope, type="default", factor=1.0) if rope.type == "dynamic" else rope


def _check(config: Config, runtime: str) -> list[str]:
    if runtime != "mlx":
        return []
    found = []
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("mlx-lm's internlm3 needs heads that add up to the hidden size")
    if (kind := rope_settings(config).type) not in ("default", "linear", "dynamic"):
        found.append(f"mlx-lm's internlm3 has no {kind} rope scaling")
    return found


def _mlx(config: Config) -> Config:
    made: Config = {own: bool(config.get(key)) for own, key in _BIASES.items()}
    rope = rope_settings(config)
    if rope.type == "dynamic":
        values = rope_values(rope)
        scaling = {k: v for k, v in values.items() if k != "rope_theta"}
        made |= {"rope_parameters": values, "rope_scaling": scaling}
    return made


def dynamic_notes(config: Config, runtime: str) -> list[str]:
    if runtime != "gguf" or rope_settings(config).type != "dynamic":
        return []
    longest = config["max_position_embeddings"]
    return [f"beyond {longest} tokens llama.cpp does not stretch rotary embeddings (dynamic)"]


SPEC = Dense(
    model_type="internlm3",
    architecture="InternLM3ForCausalLM",
    arch="llama",
    names=names(
        rope_rows=True, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    ropes=lambda config: (settled_rope(config),) * config["num_hidden_layers"],
    fixed={"attention_bias": False, "mlp_bias": False},
    defaults={"rms_norm_eps": 1e-5, "head_dim": 128, "max_position_embeddings": 32768},
    freq_factors=True,
    adopts=lambda config: under(config, _BIASES),
    settles=_settle,
    mlx=_mlx,
    notes=dynamic_notes,
    reads=lambda metadata: False,  # they are llama's
    check=_check,
).spec()
