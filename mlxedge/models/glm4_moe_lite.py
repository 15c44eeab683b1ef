"""glm4_moe_lite: GLM-4.7-Flash; DeepSeek-V3's graph with sizes of its own.

The layers that predict further tokens are left out.
"""

from __future__ import annotations

from dataclasses import replace

from mlxedge.errors import UnsupportedModelError
from mlxedge.models import deepseek_v3, latent
from mlxedge.models.dense import Get
from mlxedge.models.spec import Config

_SIZES = {
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
}
_DENSE, _SPARSE = "dense", "sparse"


def _adopt(config: Config) -> Config:
    """transformers 5 lists the kind of each layer, older configs have the number of dense ones."""
    config = latent.adopt(config, _SIZES)
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return config
    if not isinstance(kinds, list) or len(kinds) != config.get("num_hidden_layers"):
        raise UnsupportedModelError("the config's mlp_layer_types is not a list of all layers")
    first = kinds.index(_SPARSE) if _SPARSE in kinds else len(kinds)
    if kinds != _kinds(first, len(kinds)):
        raise UnsupportedModelError(
            "glm4_moe_lite with dense layers after those with experts is not supported "
            "(mlp_layer_types)"
        )
    return config | {"first_k_dense_replace": first}


def _kinds(dense: int, layers: int) -> list[str]:
    return [_DENSE if layer < dense else _SPARSE for layer in range(layers)]


def _settle(config: Config) -> Config:
    config = deepseek_v3.settle(config)
    kinds = _kinds(config["first_k_dense_replace"], config["num_hidden_layers"])
    return config | {"mlp_layer_types": kinds}


def _back(config: Config, get: Get) -> Config:
    config = deepseek_v3.back(config, get)
    kinds = _kinds(config["first_k_dense_replace"], config["num_hidden_layers"])
    return config | {"mlp_layer_types": kinds}


SPEC = replace(
    deepseek_v3.DENSE,
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    defaults={
        "rms_norm_eps": 1e-5,
        "n_shared_experts": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
    },
    adopts=_adopt,
    settles=_settle,
    notes=lambda config, runtime: latent.epsilon_notes(config, ("gguf", "mlx"), runtime),
    reads=deepseek_v3.of_type("glm4_moe_lite"),
    back=_back,
).spec()
