"""youtu: Tencent's Youtu-LLM; DeepSeek-V3's attention, no experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxedge import gguf_values as gv
from mlxedge.models import deepseek_v3, latent
from mlxedge.models.dense import Dense, Get
from mlxedge.models.names import names
from mlxedge.models.rope import rope_settings
from mlxedge.models.spec import Config

#: What mlx-lm, and Tencent's own code, call it.
OTHER_NAME = "youtu_llm"


def _settle(config: Config) -> Config:
    latent.check_sizes(config)
    return config


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if not config.get("rope_interleave", True):
        found.append("the runtimes rotate neighbouring dimensions alone (rope_interleave: false)")
    if runtime == "gguf":
        return found + deepseek_v3.gguf_objections(config)
    if rope_settings(config).mscale_all_dim:
        found.append("mlx-lm's youtu does not scale scores by yarn's mscale_all_dim")
    return found


def _metadata(config: Config) -> gv.Metadata:
    """All layers are leading dense ones of a model whose experts nobody would see."""
    return latent.deepseek2_metadata(config) | {
        "leading_dense_block_count": gv.u32(config["num_hidden_layers"]),
        "expert_feed_forward_length": gv.u32(config["intermediate_size"]),
        "expert_shared_count": gv.u32(0),
    }


def _mlx(config: Config) -> Config:
    return deepseek_v3.mlx(config) | {"model_type": OTHER_NAME, "rope_traditional": True}


def _back(config: Config, get: Get) -> Config:
    return latent.yarn_from_gguf(latent.sizes_from_gguf(config, get), get)


def _reads(metadata: Any) -> bool:
    return not metadata.get("deepseek2.expert_count")


DENSE = Dense(
    model_type="youtu",
    architecture="YoutuForCausalLM",
    arch="deepseek2",
    names=latent.latent_names(names(deepseek_v3.WIRING)),
    wiring=deepseek_v3.WIRING,
    mixers=latent.everywhere,
    recasts=(latent.SPLIT_GGUF,),
    fixed={"attention_bias": False, "mlp_bias": False},
    defaults={"max_position_embeddings": 131072},
    yarn_told=("gguf", "mlx"),
    gguf=_metadata,
    mlx=_mlx,
    adopts=lambda config: latent.adopt(config, deepseek_v3.SIZES),
    settles=_settle,
    notes=lambda config, runtime: latent.epsilon_notes(config, ("gguf", "mlx"), runtime),
    reads=_reads,
    check=_check,
    back=_back,
)
SPEC = DENSE.spec()


def renamed(config: Config) -> Config:
    """A config under the other name."""
    named = {"model_type": DENSE.model_type, "architectures": [DENSE.architecture]}
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    return DENSE.adopts(kept | named)


#: For the file of that name.
OTHER = replace(DENSE, model_type=OTHER_NAME, adopts=renamed, reads=lambda metadata: False).spec()
