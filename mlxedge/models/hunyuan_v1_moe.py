"""hunyuan_v1_moe: Tencent's Hunyuan-A13B; hunyuan_v1_dense's attention, experts in every layer and
one of the same width that all tokens share."""

from __future__ import annotations

from typing import Any

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, Get
from mlxedge.models.experts import Experts
from mlxedge.models.hunyuan_v1_dense import WIRING, rope_with_alpha
from mlxedge.models.names import names
from mlxedge.models.spec import Config

EXPERTS = Experts(
    width="intermediate_size",
    shared_width="intermediate_size",
    sparse=False,
    normalise=True,
    shared_gate=False,
)


def _settle(config: Config) -> Config:
    """With one number where there may be one for each layer."""
    expected = {
        "moe_topk": None,
        "num_experts": None,
        "moe_intermediate_size": config["intermediate_size"],
        "num_shared_expert": 1,
    }
    made: dict[str, Any] = {}
    for key, only in expected.items():
        given = config.get(key)
        each = given if isinstance(given, list) else [given]
        if any(one != each[0] for one in each) or (only and each[0] not in (None, only)):
            raise UnsupportedModelError(
                f"hunyuan_v1_moe is supported with experts that are alike in all layers, of the "
                f"width intermediate_size and one shared ({key})"
            )
        if given is not None:
            made[key] = each[0]
    if config.get("use_cla"):
        raise UnsupportedModelError("hunyuan_v1_moe that shares keys between layers (use_cla)")
    return config | made | {"num_experts_per_tok": made.get("moe_topk", 1)}


def _check(config: Config, runtime: str) -> list[str]:
    if config.get("attention_bias"):
        return ["llama.cpp's hunyuan-moe has no attention biases"]
    return []


def _back(config: Config, get: Get) -> Config:
    return config | {"moe_topk": config["num_experts_per_tok"]}


SPEC = Dense(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    arch="hunyuan-moe",
    names=names(
        WIRING,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        experts=EXPERTS,
        called={
            "self_attn.q_norm": "self_attn.query_layernorm",
            "self_attn.k_norm": "self_attn.key_layernorm",
            "mlp.gate": "mlp.gate.wg",
            **{
                f"mlp.shared_expert.{part}_proj": f"mlp.shared_mlp.{part}_proj"
                for part in ("gate", "up", "down")
            },
        },
    ),
    wiring=WIRING,
    experts=EXPERTS,
    ropes=lambda config: (rope_with_alpha(config),) * config["num_hidden_layers"],
    fixed={"attention_bias": False, "use_qk_norm": True},
    defaults={"rms_norm_eps": 1e-5},
    gguf=lambda config: {"expert_shared_feed_forward_length": gv.u32(config["intermediate_size"])},
    lacks=("mlx",),
    unlike={"mlx": "mlx-lm has no hunyuan_v1_moe: what it calls hunyuan scores experts otherwise"},
    settles=_settle,
    check=_check,
    back=_back,
).spec()
