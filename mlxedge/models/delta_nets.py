"""What Qwen3-Next and Qwen3.5 share: layers of linear attention (Gated DeltaNet) and, as
``layer_types`` says, of gated attention, with a part of each head rotated.

Names and metadata are those of ``Qwen3NextModel`` in llama.cpp's conversion/qwen.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Get, experts_everywhere
from mlxedge.models.experts import Experts
from mlxedge.models.mixers import gated_attention, gated_delta
from mlxedge.models.mixers.gated_delta import settings
from mlxedge.models.names import names
from mlxedge.models.recasts import Join, Recast, Reshape, Values
from mlxedge.models.spec import PREDICTING, Config, Name
from mlxedge.models.windows import every
from mlxedge.models.wiring import Wiring

WIRING = Wiring(unit_norm=True, head_norm="head", partial=True)
LINEAR, FULL = "linear_attention", "full_attention"
_MIXERS = {LINEAR: gated_delta.NAME, FULL: gated_attention.NAME}
#: What transformers takes where a config is silent.
DEFAULTS = {
    "partial_rotary_factor": 0.25,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}
_INTERVAL = "full_attention_interval"
_BLOCK = "model.layers.{i}."
_LINEAR = f"{_BLOCK}{gated_delta.MODULE}."
A_LOG, DT_BIAS = f"{_LINEAR}A_log", f"{_LINEAR}dt_bias"
CONV, OUT = f"{_LINEAR}conv1d.weight", f"{_LINEAR}out_proj.weight"
QKV, Z, B, A = (f"{_LINEAR}in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))
_NORMS = (
    "model.norm.weight",
    f"{_BLOCK}input_layernorm.weight",
    f"{_BLOCK}post_attention_layernorm.weight",
    f"{_BLOCK}self_attn.q_norm.weight",
    f"{_BLOCK}self_attn.k_norm.weight",
)


def of_kind(kind: str) -> Callable[[Config], list[int]]:
    """The layers of a kind."""
    return lambda config: [i for i, k in enumerate(config["layer_types"]) if k == kind]


def mixers(config: Config) -> tuple[str, ...]:
    return tuple(_MIXERS[kind] for kind in config["layer_types"])


def delta_names(experts: Experts | None = None) -> tuple[Name, ...]:
    """The tensors, those of linear attention with the projections of qkv, z, b and a apart."""
    made = names(WIRING, qkv_bias="attention_bias", o_bias="attention_bias", experts=experts)
    linear: list[tuple[str, str, tuple[str, ...]]] = [
        (QKV, "attn_qkv.weight", ("delta_channels", "hidden")),
        (Z, "attn_gate.weight", ("delta_values", "hidden")),
        (B, "ssm_beta.weight", ("delta_heads", "hidden")),
        (A, "ssm_alpha.weight", ("delta_heads", "hidden")),
        (CONV, "ssm_conv1d.weight", ("delta_channels", "one", "delta_kernel")),
        (A_LOG, "ssm_a", ("delta_heads",)),
        (DT_BIAS, "ssm_dt.bias", ("delta_heads",)),
        (f"{_LINEAR}norm.weight", "ssm_norm.weight", ("delta_head",)),
        (OUT, "ssm_out.weight", ("hidden", "delta_values")),
    ]
    return (
        *(_name(name) for name in made),
        *(
            Name(hf, f"blk.{{i}}.{gguf}", shape, layers=of_kind(LINEAR), exact=hf == A_LOG)
            for hf, gguf, shape in linear
        ),
    )


def _name(name: Name) -> Name:
    """llama.cpp calls the MLP's norm by where it stands; ``q_proj`` has the gates as well."""
    name = replace(name, gguf=name.gguf.replace("ffn_norm", "post_attention_norm"))
    if not name.hf.startswith(f"{_BLOCK}self_attn."):
        return name
    if ".q_proj." in name.hf:
        name = replace(name, shape=("gated_q", *name.shape[1:]))
    return replace(name, layers=of_kind(FULL))


def _rate(log: np.ndarray) -> np.ndarray:
    return -np.exp(log)


def _log(rate: np.ndarray) -> np.ndarray:
    return np.log(-rate)


RATE = Values(_rate, _log)
#: GGUF has the convolution's weights without the axis of one, MLX with it as the last.
FLAT = Reshape(lambda shape: (shape[0], shape[2]))
_ADDED = Values(lambda weight: weight + 1.0, lambda weight: weight - 1.0)
#: mlx-lm's norms are plain ones.
MLX = (
    *(Recast("mlx", (name,), (name,), (_ADDED,)) for name in _NORMS),
    Recast("mlx", (CONV,), (CONV,), (Reshape(lambda shape: (shape[0], shape[2], shape[1])),)),
)


def stacked_in_one(world: Any = "stored") -> tuple[Recast, ...]:
    """Experts as the Hub has those of Qwen3.5: gate and up in one stack."""
    gate, up, down = (f"{_BLOCK}mlp.experts.{part}_proj" for part in ("gate", "up", "down"))
    return (
        Recast(
            world,
            (f"{gate}.weight", f"{up}.weight"),
            (f"{_BLOCK}mlp.experts.gate_up_proj",),
            (Join(),),
        ),
        Recast(world, (f"{down}.weight",), (down,), ()),
    )


def tiled(size: int, before: Callable[[Config], int] = lambda config: 0) -> Any:
    """An ``Order`` for rows by head of values: the first head of every head of keys, then all the
    second, as ggml repeats heads of keys; ``before`` them are rows that stay. ``size`` is that of
    a head, 0 for what the config says."""

    def order(config: Config, sizes: Sequence[int]) -> np.ndarray:
        delta, first = settings(config), before(config)
        rows = np.arange(delta.value_heads * (size or delta.value_dim))
        heads = rows.reshape(delta.key_heads, delta.value_heads // delta.key_heads, -1)
        return np.concatenate([np.arange(first), first + heads.swapaxes(0, 1).ravel()])

    return order


def _keys(config: Config) -> int:
    return 2 * settings(config).keys


_TILED_VALUES, _TILED_HEADS = Join(tiled(0)), Join(tiled(1))
_TILED_CHANNELS = Join(tiled(0, before=_keys))
#: ``_LinearAttentionVReorderBase`` in llama.cpp's conversion/qwen.py.
TILED = (
    Recast("gguf", (QKV,), ("blk.{i}.attn_qkv.weight",), (_TILED_CHANNELS,)),
    Recast("gguf", (Z,), ("blk.{i}.attn_gate.weight",), (_TILED_VALUES,)),
    Recast("gguf", (B,), ("blk.{i}.ssm_beta.weight",), (_TILED_HEADS,)),
    Recast("gguf", (A,), ("blk.{i}.ssm_alpha.weight",), (_TILED_HEADS,)),
    Recast("gguf", (CONV,), ("blk.{i}.ssm_conv1d.weight",), (FLAT, _TILED_CHANNELS)),
    Recast("gguf", (A_LOG,), ("blk.{i}.ssm_a",), (RATE, _TILED_HEADS)),
    Recast("gguf", (DT_BIAS,), ("blk.{i}.ssm_dt.bias",), (_TILED_HEADS,)),
    Recast("gguf", (OUT,), ("blk.{i}.ssm_out.weight",), (Join(tiled(0), columns=True),)),
)


def settle(config: Config) -> Config:
    """With ``layer_types``; raises UnsupportedModelError for kinds of layers that are others."""
    interval = config[_INTERVAL]
    if type(interval) is not int or interval < 1:
        raise UnsupportedModelError(f"{_INTERVAL} is {str(interval)[:40]!r}, not a positive number")
    layers = range(1, config["num_hidden_layers"] + 1)
    kinds = config.get("layer_types") or [LINEAR if i % interval else FULL for i in layers]
    if other := sorted({str(kind)[:40] for kind in kinds if kind not in _MIXERS}):
        raise UnsupportedModelError(f"layers of type {', '.join(other)} are not supported")
    settings(config)
    ahead = {key: 0 for key in (*PREDICTING, "mtp_num_hidden_layers") if key in config}
    return config | {"layer_types": kinds, **ahead}


def _interval(config: Config) -> int | None:
    """Every how many layers one has full attention; ``None`` if they follow no such rule."""
    return every([kind == FULL for kind in config["layer_types"]])


def check(experts: Experts | None) -> Callable[[Config, str], list[str]]:
    def objections(config: Config, runtime: str) -> list[str]:
        delta = settings(config)
        found = []
        if runtime == "mlx":
            if _interval(config) in (None, 1):
                found.append(
                    "mlx-lm has full attention in every so many layers (full_attention_interval), "
                    "this model otherwise (layer_types)"
                )
            return found
        if delta.key_dim != delta.value_dim:
            found.append(
                "llama.cpp needs heads of keys and of values of one size (linear_key_head_dim, "
                "linear_value_head_dim)"
            )
        if config.get("attention_bias"):
            found.append("llama.cpp has no bias of the output of attention (attention_bias)")
        if experts is not None:
            found += experts_everywhere(experts, config, runtime)
            if not config["norm_topk_prob"]:
                found.append("llama.cpp always normalises scores: norm_topk_prob is false")
        return found

    return objections


def mlx(config: Config) -> Config:
    return {_INTERVAL: _interval(config)}


def gguf(config: Config) -> gv.Metadata:
    delta = settings(config)
    values = {
        "ssm.conv_kernel": gv.u32(delta.kernel),
        "ssm.state_size": gv.u32(delta.key_dim),
        "ssm.group_count": gv.u32(delta.key_heads),
        "ssm.time_step_rank": gv.u32(delta.value_heads),
        "ssm.inner_size": gv.u32(delta.values),
        "attention.recurrent_layers": gv.array(
            "bool", [k == LINEAR for k in config["layer_types"]]
        ),
    }
    if (interval := _interval(config)) is not None:
        values[_INTERVAL] = gv.u32(interval)
    return values


def back(config: Config, get: Get) -> Config:
    """``layer_types`` and the sizes of linear attention."""
    layers = config["num_hidden_layers"]
    interval = int(get(_INTERVAL, DEFAULTS[_INTERVAL]))
    recurrent = get("attention.recurrent_layers")
    if recurrent is None:
        recurrent = [i % interval != 0 for i in range(1, layers + 1)]
    heads = int(get("ssm.time_step_rank", 0))
    if heads < 1:
        raise UnsupportedModelError("the GGUF metadata lacks a positive ssm.time_step_rank")
    return config | {
        "layer_types": [LINEAR if linear else FULL for linear in recurrent[:layers]],
        "linear_conv_kernel_dim": get("ssm.conv_kernel"),
        "linear_key_head_dim": get("ssm.state_size"),
        "linear_value_head_dim": int(get("ssm.inner_size", 0)) // heads,
        "linear_num_key_heads": get("ssm.group_count"),
        "linear_num_value_heads": heads,
        _INTERVAL: interval,
    }
