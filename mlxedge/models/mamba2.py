"""mamba2: Mamba-2 and Codestral Mamba; state spaces in all layers, no attention and no MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlxedge import gguf_values as gv
from mlxedge.errors import TokenizerError, UnsupportedModelError
from mlxedge.models.dense import no_windows
from mlxedge.models.mixers import mamba2
from mlxedge.models.names import names
from mlxedge.models.rope_files import shortest
from mlxedge.models.spec import Config, ModelSpec, Name
from mlxedge.models.wiring import Wiring

if TYPE_CHECKING:
    import numpy as np

WIRING = Wiring(attention_norm="norm", mlp_norm=None, mlp="none")
#: By the names that mixers have for them.
CALLED = {
    "mamba_n_heads": "num_heads",
    "mamba_d_head": "head_dim",
    "mamba_n_groups": "n_groups",
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_proj_bias": "use_bias",
}
_DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_d_head": 64,
    "mamba_n_groups": 8,
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
#: What llama.cpp's converter takes for a context without a limit.
_ENDLESS = 1 << 20
_MODULES = {
    "model.layers.{i}.mamba.": "backbone.layers.{i}.mixer.",
    "model.layers.": "backbone.layers.",
    "model.embed_tokens.": "backbone.embeddings.",
    "model.norm.": "backbone.norm_f.",
}


def _stored(name: Name) -> Name:
    for module, own in _MODULES.items():
        if name.hf.startswith(module):
            other = own + name.hf.removeprefix(module)
            return replace(name, stored=other, mlx=other)
    return name


def _tensors() -> tuple[Name, ...]:
    made = (*names(WIRING), *mamba2.names())
    return tuple(_stored(name) for name in made if ".self_attn." not in name.hf)


def _adopt(config: Config) -> Config:
    """With sizes of an attention that is not there: they are the state space's."""
    if type(config.get("hidden_size")) is not int:
        raise UnsupportedModelError("the config needs a positive whole number for hidden_size")
    made = mamba2.adopt(config, CALLED, _DEFAULTS)
    made |= {own: made[key] for key, own in CALLED.items()}
    heads, inner = made["num_heads"], made["num_heads"] * made["head_dim"]
    made |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    made["intermediate_size"] = inner
    return {
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": _ENDLESS,
        "tie_word_embeddings": False,
        **made,
    }


def _settle(config: Config) -> Config:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError("mamba2 with another hidden_act than silu is not supported")
    return config


def _gguf_metadata(config: Config) -> gv.Metadata:
    values = {
        "block_count": gv.u32(config["num_hidden_layers"]),
        "context_length": gv.u32(config["max_position_embeddings"]),
        "embedding_length": gv.u32(config["hidden_size"]),
        "feed_forward_length": gv.u32(0),
        "attention.head_count": gv.u32(0),
        "attention.head_count_kv": gv.u32(0),
        "attention.layer_norm_rms_epsilon": gv.f32(config["layer_norm_epsilon"]),
        "vocab_size": gv.u32(config["vocab_size"]),
    }
    values |= {key: gv.u32(value) for key, value in mamba2.metadata(config).items()}
    return {f"mamba2.{key}": value for key, value in values.items()}


def _config_from_gguf(
    metadata: Mapping[str, gv.GgufValue], extra: Mapping[str, np.ndarray]
) -> Config:
    def get(key: str) -> int:
        found = metadata.get(f"mamba2.{key}")
        if found is None or not isinstance(found.value, int) or found.value <= 0:
            raise UnsupportedModelError(
                f"the GGUF metadata lacks a positive mamba2.{key}: the file is incomplete"
            )
        return found.value

    def optional(key: str) -> Any:
        found = metadata.get(key)
        return None if found is None else found.value

    own, hidden = mamba2.back(get), get("embedding_length")
    vocab = optional("mamba2.vocab_size") or len(optional("tokenizer.ggml.tokens") or ())
    if not vocab:
        raise TokenizerError("the GGUF metadata says neither vocab_size nor the tokens")
    epsilon = optional("mamba2.attention.layer_norm_rms_epsilon")
    return {
        "model_type": "mamba2",
        "architectures": [SPEC.architecture],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": get("block_count"),
        "max_position_embeddings": get("context_length"),
        "layer_norm_epsilon": 1e-5 if epsilon is None else shortest(epsilon),
        "vocab_size": vocab,
        "expand": own["mamba_n_heads"] * own["mamba_d_head"] // hidden,
        "use_bias": False,
        "use_conv_bias": True,
        **{CALLED[key]: value for key, value in own.items()},
    }


def _check(config: Config, runtime: str) -> list[str]:
    found = mamba2.objections(config, runtime)
    if runtime == "mlx" and config["layer_norm_epsilon"] != 1e-5:
        found.append("mlx-lm's mamba2 has norms with 1e-5 before its blocks (layer_norm_epsilon)")
    return found


def _mlx_config(config: Config) -> Config:
    """mlx-lm has no defaults for these."""
    return {"time_step_rank": "auto", **config}


SPEC = ModelSpec(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    gguf_arch="mamba2",
    names=_tensors(),
    wiring=WIRING,
    attends=False,
    widths=mamba2.widths,
    mixers=lambda config: ("mamba2",) * config["num_hidden_layers"],
    windows=no_windows,
    window=lambda config, runtime: None,
    ropes=lambda config: (None,) * config["num_hidden_layers"],
    epsilon="layer_norm_epsilon",
    adopt=_adopt,
    settle=_settle,
    gguf_metadata=_gguf_metadata,
    gguf_extra=lambda config: {},
    config_from_gguf=_config_from_gguf,
    mlx_config=_mlx_config,
    objections=_check,
    recasts=mamba2.RECASTS,
)
