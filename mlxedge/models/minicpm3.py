"""minicpm3: MiniCPM3-4B; latent attention without experts, scaled embeddings, blocks and logits."""

from __future__ import annotations

import math
from typing import Any

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models import latent
from mlxedge.models.dense import Dense, Get
from mlxedge.models.names import names
from mlxedge.models.recasts import Recast, Scale
from mlxedge.models.rope import LONG, Rope, rope_settings
from mlxedge.models.rope_files import both_styles, rope_values
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Factors

_SIZES = {
    "q_lora_rank": 768,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
}
#: What a silent config means, and all that llama.cpp computes with.
_SCALES = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}


def _adopt(config: Config) -> Config:
    """A null stands for no scaling, where there can be none."""
    config = {"v_head_dim": None, **_SIZES, **_SCALES, **config}
    heads, hidden, layers = (
        size if type(size) is int else 0
        for size in map(config.get, ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    )
    if min(heads, hidden, layers) > 0:
        config["v_head_dim"] = config["v_head_dim"] or hidden // heads
        if config["scale_depth"] is None:
            config["scale_depth"] = math.sqrt(layers)
        if config["dim_model_base"] is None:
            config["dim_model_base"] = hidden
    return latent.adopt(config, _SIZES)


def _settle(config: Config) -> Config:
    latent.check_sizes(config)
    wrong = [key for key in _SCALES if not _positive(config[key])]
    if wrong:
        raise UnsupportedModelError(f"the config needs positive numbers for {', '.join(wrong)}")
    return config | {"rope_interleave": False}


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _factors(config: Config) -> Factors:
    return Factors(
        embedding=float(config["scale_emb"]),
        residual=config["scale_depth"] / math.sqrt(config["num_hidden_layers"]),
        logits=config["dim_model_base"] / config["hidden_size"],
    )


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if config["q_lora_rank"] is None:
        found.append("the runtimes have latents of queries alone (q_lora_rank)")
    if rope_settings(config).mscale_all_dim:
        found.append("the runtimes do not scale scores by yarn's mscale_all_dim")
    return found + (_gguf(config) if runtime == "gguf" else _mlx_lm(config))


def _gguf(config: Config) -> list[str]:
    found = []
    if wrong := [key for key, value in _SCALES.items() if config[key] != value]:
        only = ", ".join(f"{key} {_SCALES[key]}" for key in wrong)
        found.append(f"llama.cpp's minicpm3 always has {only}")
    if config.get("attention_bias"):
        found.append("llama.cpp's minicpm3 has no attention biases")
    return found


def _mlx_lm(config: Config) -> list[str]:
    found = []
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config["v_head_dim"] * heads != hidden:
        found.append("mlx-lm's minicpm3 has heads of values that add up to the hidden size")
    if (kind := rope_settings(config).type) not in ("default", LONG):
        found.append(f"mlx-lm's minicpm3 has no {kind} rope scaling")
    return found


def _metadata(config: Config) -> gv.Metadata:
    values = {
        "attention.kv_lora_rank": gv.u32(config["kv_lora_rank"]),
        "attention.key_length": gv.u32(config["qk_nope_head_dim"] + config["qk_rope_head_dim"]),
        "attention.value_length": gv.u32(config["v_head_dim"]),
    }
    if (rank := config["q_lora_rank"]) is not None:
        values["attention.q_lora_rank"] = gv.u32(rank)
    return values


def _mlx(config: Config) -> Config:
    """mlx-lm has factors for each frequency only, which are all one where there is no scaling."""
    rope, hidden = rope_settings(config), config["hidden_size"]
    if rope.type == "default":
        ones = (1.0,) * (config["qk_rope_head_dim"] // 2)
        longest = config.get("max_position_embeddings") or 2048
        rope = Rope(
            theta=rope.theta,
            type=LONG,
            original_max_position=longest,
            short_factor=ones,
            long_factor=ones,
        )
    told = both_styles(rope_values(rope))
    # Logits of tied embeddings are not scaled there: the last norm is instead.
    return told | ({"dim_model_base": hidden} if config["tie_word_embeddings"] else {})


def _last_norm(config: Config) -> float:
    return _factors(config).logits if config["tie_word_embeddings"] else 1.0


_NORM = ("model.norm.weight",)


def _back(config: Config, get: Get) -> Config:
    """Files of llama.cpp's converter have no size of values: it is what the hidden size gives."""

    def found(key: str, default: Any = None) -> Any:
        heads = config["num_attention_heads"]
        if key == "attention.value_length":
            default = config["hidden_size"] // heads
        return get(key, default)

    return latent.sizes_from_gguf(config, found) | _SCALES


SPEC = Dense(
    model_type="minicpm3",
    architecture="MiniCPM3ForCausalLM",
    arch="minicpm3",
    names=latent.latent_names(names()),
    mixers=latent.everywhere,
    factors=_factors,
    fixed={"attention_bias": False},
    defaults={"rms_norm_eps": 1e-5},
    recasts=(Recast("mlx", _NORM, _NORM, (Scale(_last_norm),)),),
    longrope=True,
    gguf=_metadata,
    mlx=_mlx,
    adopts=_adopt,
    settles=_settle,
    notes=lambda config, runtime: latent.epsilon_notes(config, ("gguf", "mlx"), runtime),
    check=_check,
    back=_back,
).spec()
