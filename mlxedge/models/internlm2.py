"""internlm2: InternLM 2 and 2.5 of Shanghai AI Laboratory; llama's graph, with q, k and v in one
matrix by heads of keys. transformers has it by its own remote code alone."""

from __future__ import annotations

from mlxedge.models.dense import Dense
from mlxedge.models.internlm3 import dynamic_notes, settled_rope
from mlxedge.models.names import names
from mlxedge.models.recasts import groups_apart, joined_qkv
from mlxedge.models.rope import rope_settings
from mlxedge.models.spec import Config

_MODULES = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if runtime == "gguf" and config["bias"]:
        found.append("llama.cpp's internlm2 has no biases")
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("the runtimes' internlm2 needs heads that add up to the hidden size")
    kind = rope_settings(config).type
    if runtime == "mlx" and kind not in ("default", "linear", "dynamic"):
        found.append(f"mlx-lm's internlm2 has no {kind} rope scaling")
    return found


def _mlx(config: Config) -> Config:
    """It wants the older ``type``."""
    rope = rope_settings(config)
    if rope.type == "default":
        return {}
    scaling = {"type": rope.type, "rope_type": rope.type, "factor": rope.factor}
    return {"rope_scaling": scaling, "rope_parameters": scaling | {"rope_theta": rope.theta}}


SPEC = Dense(
    model_type="internlm2",
    architecture="InternLM2ForCausalLM",
    arch="internlm2",
    names=names(rope_rows=True, qkv_bias="bias", o_bias="bias", called=_MODULES),
    recasts=(
        *joined_qkv("stored", "model.layers.{i}.attention.wqkv", groups_apart),
        *joined_qkv("mlx", "model.layers.{i}.attention.wqkv", groups_apart),
    ),
    fixed={"bias": False},
    defaults={"bias": True, "max_position_embeddings": 2048, "tie_word_embeddings": False},
    tied={"gguf": False},
    ropes=lambda config: (settled_rope(config),) * config["num_hidden_layers"],
    mlx=_mlx,
    notes=dynamic_notes,
    check=_check,
).spec()
