"""deepseek_v3: DeepSeek-V3, V3.1 and R1, Kimi K2, Moonlight; latent attention, experts in groups
with scores by sigmoid and a correction of the choice, dense layers first.

The layers that predict further tokens are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models import latent
from mlxedge.models.dense import Dense, Get
from mlxedge.models.experts import Experts
from mlxedge.models.names import names
from mlxedge.models.rope import rope_settings
from mlxedge.models.rope_files import both_styles
from mlxedge.models.routed import (
    EXPERTS,
    KEYS,
    SHARED_EXPERTS,
    SIGMOID,
    after_dense,
    normalised,
    one_expert,
)
from mlxedge.models.routed import metadata as score_metadata
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import Wiring

WIRING = Wiring(neighbours=True)
#: The sizes that transformers takes where a config is silent.
SIZES = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
#: What all models of the family have.
FIXED: dict[str, Any] = {"attention_bias": False, "moe_layer_freq": 1}


def tensors(experts: Experts) -> tuple[Name, ...]:
    return latent.latent_names(names(WIRING, experts=experts, called=SHARED_EXPERTS))


def settle_experts(config: Config) -> Config:
    """With the keys that mixtures of experts are read from."""
    latent.check_sizes(config)
    if config.get("moe_layer_freq", 1) != 1:
        raise UnsupportedModelError(
            f"{config['model_type']} with moe_layer_freq is not supported: transformers ignores it"
        )
    return after_dense(config)


def settle(config: Config) -> Config:
    named = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    for key, only in named.items():
        if config.get(key, only) != only:
            raise UnsupportedModelError(
                f"{config['model_type']} with {key} {str(config[key])[:40]!r} is not supported, "
                f"{only!r} alone is"
            )
    return settle_experts(config) | named


_DENSE, _SPARSE = "dense", "sparse"


def adopt_kinds(config: Config) -> Config:
    """``first_k_dense_replace`` of a config that lists the kind of each layer, as transformers 5
    does for the younger of the family."""
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return config
    if not isinstance(kinds, list) or len(kinds) != config.get("num_hidden_layers"):
        raise UnsupportedModelError("the config's mlp_layer_types is not a list of all layers")
    first = kinds.index(_SPARSE) if _SPARSE in kinds else len(kinds)
    if kinds != _kinds(first, len(kinds)):
        raise UnsupportedModelError(
            f"{config['model_type']} with dense layers after those with experts is not supported "
            "(mlp_layer_types)"
        )
    return config | {"first_k_dense_replace": first}


def with_kinds(config: Config) -> Config:
    """The other way."""
    kinds = _kinds(config["first_k_dense_replace"], config["num_hidden_layers"])
    return config | {"mlp_layer_types": kinds}


def _kinds(dense: int, layers: int) -> list[str]:
    return [_DENSE if layer < dense else _SPARSE for layer in range(layers)]


def check(config: Config, runtime: str) -> list[str]:
    found = []
    if not config.get("rope_interleave", True):
        found.append("the runtimes rotate neighbouring dimensions alone (rope_interleave: false)")
    if runtime == "gguf":
        return found + gguf_objections(config)
    return found + one_expert(config, runtime)


def gguf_objections(config: Config) -> list[str]:
    """What llama.cpp's deepseek2 has not."""
    found = latent.yarn_objections(config)
    if config.get("attention_bias"):
        found.append("llama.cpp's deepseek2 has no attention biases")
    if latent.is_lite(config) and config["q_lora_rank"] is not None:
        found.append(
            f"llama.cpp's deepseek2 of {config['num_hidden_layers']} layers has no latents of "
            "queries (q_lora_rank)"
        )
    return found


def metadata(config: Config) -> gv.Metadata:
    return latent.deepseek2_metadata(config) | score_metadata(config)


def mlx(config: Config) -> Config:
    return both_styles(latent.told(rope_settings(config)))


def back(config: Config, get: Get) -> Config:
    """``n_routed_experts`` is what transformers and mlx-lm call their number."""
    config = latent.yarn_from_gguf(latent.sizes_from_gguf(config, get), get)
    return config | {"n_routed_experts": config["num_experts"], **normalised(get)}


#: Of GLM-4.7-Flash, whose files have nothing else that tells.
_GLM_VOCABULARY = 154880


def of_type(model_type: str) -> Callable[[Mapping[str, gv.GgufValue]], bool]:
    """Whether a file of deepseek2 that has experts is of this type."""

    def reads(metadata: Mapping[str, gv.GgufValue]) -> bool:
        count, vocab, scores = (
            found.value if (found := metadata.get(f"deepseek2.{key}")) else None
            for key in ("expert_count", "vocab_size", "expert_gating_func")
        )
        by_score = "deepseek_v3" if scores == SIGMOID else "deepseek_v2"
        own = "glm4_moe_lite" if vocab == _GLM_VOCABULARY else by_score
        return bool(count) and own == model_type

    return reads


DENSE = Dense(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    arch="deepseek2",
    names=tensors(EXPERTS),
    wiring=WIRING,
    mixers=latent.everywhere,
    recasts=(latent.SPLIT_GGUF, latent.SPLIT_MLX),
    experts=EXPERTS,
    fixed=FIXED,
    defaults={
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "max_position_embeddings": 4096,
    },
    drops_predicting=True,
    keys=KEYS,
    yarn_told=("gguf", "mlx"),
    gguf=metadata,
    mlx=mlx,
    tied={"mlx": False},
    adopts=lambda config: latent.adopt(config, SIZES),
    settles=settle,
    notes=lambda config, runtime: latent.epsilon_notes(config, ("gguf",), runtime),
    reads=of_type("deepseek_v3"),
    check=check,
    back=back,
)
SPEC = DENSE.spec()
