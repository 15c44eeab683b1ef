"""exaone: LG's EXAONE 3.0, 3.5 and Deep; llama's graph under names of GPT-2's kind."""

from __future__ import annotations

from mlxedge.models.dense import Dense, under
from mlxedge.models.names import names
from mlxedge.models.spec import Config

#: As the configs of its own remote code call them, which mlx-lm reads.
_KEYS = {
    "num_layers": "num_hidden_layers",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}
_CALLED = {
    "model.embed_tokens": "transformer.wte",
    "model.layers": "transformer.h",
    "model.norm": "transformer.ln_f",
    "self_attn.q_proj": "attn.attention.q_proj",
    "self_attn.k_proj": "attn.attention.k_proj",
    "self_attn.v_proj": "attn.attention.v_proj",
    "self_attn.o_proj": "attn.attention.out_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
}


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    heads = config["head_dim"] * config["num_attention_heads"]
    if runtime == "mlx" and heads != config["hidden_size"]:
        found.append("mlx-lm's exaone needs heads that add up to the hidden size")
    biases = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if runtime == "gguf" and biases:
        found.append(f"llama.cpp's exaone has no biases ({', '.join(biases)})")
    return found


SPEC = Dense(
    model_type="exaone",
    architecture="ExaoneForCausalLM",
    arch="exaone",
    names=names(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        called=_CALLED,
    ),
    fixed={"attention_bias": False, "mlp_bias": False},
    defaults={"rms_norm_eps": 1e-5},
    theta=5e5,
    freq_factors=True,
    adopts=lambda config: under(config, _KEYS),
    mlx=lambda config: {own: config.get(key, "silu") for own, key in _KEYS.items()},
    check=_check,
).spec()
