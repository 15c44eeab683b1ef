"""falcon_h1: TII's Falcon-H1; attention and a state space beside each other in every layer.

Folders of Hugging Face have multipliers in the config. GGUF and MLX have them in the weights, and
so have the canonical tensors; only the head that is tied to the embedding keeps a factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, Get
from mlxedge.models.mixers import mamba2
from mlxedge.models.names import names
from mlxedge.models.recasts import Recast, ScaleRows
from mlxedge.models.spaces import only_silu, whole_numbers
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import Factors, Wiring

if TYPE_CHECKING:
    import numpy as np

WIRING = Wiring(mlp_norm="pre_ff_layernorm")
_LISTS = {"mlp_multipliers": 2, "ssm_multipliers": 5}
_NUMBERS = (
    *("embedding_multiplier", "lm_head_multiplier", "key_multiplier", "attention_in_multiplier"),
    *("attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"),
)
_ONES = dict.fromkeys(_NUMBERS, 1.0) | {key: [1.0] * count for key, count in _LISTS.items()}
#: Biases that published models have not.
_BIASES = ("projectors_bias", "attention_bias", "mlp_bias", "mamba_proj_bias")
_DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_d_head": "auto",
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
_CALLED = {
    "model.norm": "model.final_layernorm",
    "mlp.gate_proj": "feed_forward.gate_proj",
    "mlp.up_proj": "feed_forward.up_proj",
    "mlp.down_proj": "feed_forward.down_proj",
}


def _in_rows(config: Config, rows: int) -> np.ndarray:
    """Of the matrix into the state space: gate, channels, B, C and time steps have their own."""
    import numpy as np

    own = mamba2.settings(config)
    shared = own.groups * own.size
    sizes = (own.inner, own.inner, shared, shared, own.heads)
    return np.repeat(config["ssm_multipliers"], sizes) * config["ssm_in_multiplier"]


def _by(*keys: str, item: int | None = None) -> Callable[[Config, int], np.ndarray]:
    """All rows times the product of some numbers of the config."""

    def factors(config: Config, rows: int) -> np.ndarray:
        import numpy as np

        numbers = [config[key] if item is None else config[key][item] for key in keys]
        return np.full(rows, np.prod(numbers))

    return factors


def _recasts() -> tuple[Recast, ...]:
    layer = "model.layers.{i}."
    factors = {
        "model.embed_tokens": _by("embedding_multiplier"),
        "lm_head": _by("lm_head_multiplier"),
        f"{layer}self_attn.q_proj": _by("attention_in_multiplier"),
        f"{layer}self_attn.k_proj": _by("attention_in_multiplier", "key_multiplier"),
        f"{layer}self_attn.v_proj": _by("attention_in_multiplier"),
        f"{layer}self_attn.o_proj": _by("attention_out_multiplier"),
        f"{layer}mamba.in_proj": _in_rows,
        f"{layer}mamba.out_proj": _by("ssm_out_multiplier"),
        f"{layer}mlp.gate_proj": _by("mlp_multipliers", item=0),
        f"{layer}mlp.down_proj": _by("mlp_multipliers", item=1),
    }
    return tuple(
        Recast("stored", (f"{module}.weight",), (f"{module}.weight",), (ScaleRows(own),))
        for module, own in factors.items()
    )


def _name(name: Name) -> Name:
    """llama.cpp has this one without an ending; not all models norm what the state space gives."""
    if name.gguf == "blk.{i}.ffn_norm.weight":
        return replace(name, gguf="blk.{i}.ffn_norm")
    if name.hf.endswith("mamba.norm.weight"):
        return replace(name, present=lambda config: bool(config["mamba_rms_norm"]))
    return name


def _adopt(config: Config) -> Config:
    made: Config = {**_ONES, "mamba_rms_norm": False, "mamba_norm_before_gate": True}
    made |= {key: value for key, value in config.items() if value is not None}
    whole_numbers(made, 1, "hidden_size")
    inner = made.get("mamba_d_ssm", 1024)
    if config.get("mamba_d_ssm", inner) is None:
        inner = made.get("mamba_expand", 2) * made["hidden_size"]
    heads = made.get("mamba_n_heads", 128)
    if type(inner) is int and type(heads) is int and heads > 0:
        made.setdefault("mamba_d_head", "auto")
        if made["mamba_d_head"] == "auto":
            made["mamba_d_head"] = inner // heads
    made = mamba2.adopt(made, {}, _DEFAULTS)
    if made["mamba_n_heads"] * made["mamba_d_head"] != inner:
        raise UnsupportedModelError("the heads of the state space are not mamba_d_ssm channels")
    return made | {"mamba_d_ssm": inner}


def _settle(config: Config) -> Config:
    only_silu(config)
    if biased := [key for key in _BIASES if config.get(key)]:
        raise UnsupportedModelError(f"falcon_h1 with {biased[0]} is not supported")
    if config["mamba_rms_norm"] and config["mamba_norm_before_gate"]:
        raise UnsupportedModelError("falcon_h1 with mamba_norm_before_gate is not supported")
    for key, count in (*((key, 0) for key in _NUMBERS), *_LISTS.items()):
        given = config[key] if count else [config[key]]
        sane = isinstance(given, list) and len(given) == (count or 1)
        if not sane or any(type(v) not in (int, float) or not abs(v) > 0 for v in given):
            raise UnsupportedModelError(f"{key} is {str(config[key])[:60]!r}")
    return config


def _tied_factor(config: Config) -> float:
    """The embedding that is the head as well has only its own multiplier."""
    if not config["tie_word_embeddings"]:
        return 1.0
    return float(config["lm_head_multiplier"] / config["embedding_multiplier"])


def _check(config: Config, runtime: str) -> list[str]:
    own_norms = not config["mamba_rms_norm"]
    found = mamba2.objections(config, runtime, own_norms=own_norms)
    if runtime == "gguf" and _tied_factor(config) != 1.0:
        found.append("llama.cpp's falcon-h1 does not scale the logits of tied embeddings")
    if runtime == "mlx" and mamba2.settings(config).limits != (0.0, float("inf")):
        found.append("mlx-lm's falcon_h1 does not limit time steps (time_step_limit)")
    return found


def _back(config: Config, get: Get) -> Config:
    own = mamba2.back(get)
    return config | own | {"mamba_d_ssm": own["mamba_n_heads"] * own["mamba_d_head"]}


_SPEC = Dense(
    model_type="falcon_h1",
    architecture="FalconH1ForCausalLM",
    arch="falcon-h1",
    names=tuple(_name(name) for name in (*names(WIRING, called=_CALLED), *mamba2.names())),
    wiring=WIRING,
    recasts=(*_recasts(), *mamba2.RECASTS),
    mixers=lambda config: ("beside",) * config["num_hidden_layers"],
    factors=lambda config: Factors(logits=_tied_factor(config)),
    fixed={
        **dict.fromkeys((*_BIASES, "mamba_rms_norm", "mamba_norm_before_gate"), False),
        **_ONES,
    },
    defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "tie_word_embeddings": False},
    adopts=_adopt,
    settles=_settle,
    gguf=lambda config: {key: gv.u32(v) for key, v in mamba2.metadata(config).items()},
    back=_back,
    check=_check,
).spec()
# mlx-lm leaves the multipliers of keys and values out as it reads folders that are not its own.
SPEC = replace(_SPEC, mlx_reads_stored=False)
