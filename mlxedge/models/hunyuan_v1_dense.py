"""hunyuan_v1_dense: Tencent's dense Hunyuan; llama's graph with RMSNorm on each rotated head of q
and k, and rotary embeddings whose base grows with ``alpha``."""

from __future__ import annotations

from dataclasses import replace

from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.rope import Rope, rope_settings
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Wiring

WIRING = Wiring(head_norm="last")


def rope_with_alpha(config: Config) -> Rope:
    """ "dynamic" with ``alpha`` is a larger base at any length (NTK-aware scaling), as in
    transformers' ``compute_ntk_alpha_rope_parameters``."""
    rope = rope_settings(config)
    alpha = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("alpha")
    if rope.type != "dynamic" or not alpha:
        return rope
    dims = config["head_dim"]
    return replace(
        rope, type="default", factor=1.0, theta=rope.theta * float(alpha) ** (dims / (dims - 2))
    )


def _check(config: Config, runtime: str) -> list[str]:
    kind = rope_with_alpha(config).type
    if runtime == "mlx" and kind != "default":
        return [f"mlx-lm's hunyuan_v1_dense has no {kind} rope scaling without alpha"]
    if runtime == "gguf" and config.get("attention_bias"):
        return ["llama.cpp's hunyuan-dense has no attention biases"]
    return []


SPEC = Dense(
    model_type="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    arch="hunyuan-dense",
    names=names(
        WIRING,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        called={
            "self_attn.q_norm": "self_attn.query_layernorm",
            "self_attn.k_norm": "self_attn.key_layernorm",
        },
    ),
    wiring=WIRING,
    ropes=lambda config: (rope_with_alpha(config),) * config["num_hidden_layers"],
    fixed={"attention_bias": False, "use_qk_norm": True},
    defaults={"rms_norm_eps": 1e-5},
    check=_check,
).spec()
