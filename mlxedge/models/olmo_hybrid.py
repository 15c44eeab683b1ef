"""olmo_hybrid: OLMo Hybrid; layers of linear attention (Gated DeltaNet) with norms before its
parts, and OLMo 3's attention with norms after them, which may not rotate at all.

What files call the norms of both kinds of layers overlaps; here each has a name of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxedge.errors import UnsupportedModelError
from mlxedge.models import delta_nets as nets
from mlxedge.models.delta_nets import A_LOG, CONV, DT_BIAS, FULL, LINEAR, of_kind
from mlxedge.models.dense import Dense, one_rope, plain_rope
from mlxedge.models.mixers import gated_delta_apart
from mlxedge.models.mixers.gated_delta import settings
from mlxedge.models.names import names
from mlxedge.models.recasts import Each, Recast, Reshape, Split
from mlxedge.models.rope import Rope
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import Wiring

_BLOCK = "model.layers.{i}."
_LINEAR = f"{_BLOCK}linear_attn."
_BEFORE = ("attention_layer_norm", "feedforward_layer_norm")
WIRING = Wiring(
    attention_norm=None,
    mlp_norm=None,
    attention_out_norm="post_attention_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
    head_norm="width",
    apart=((gated_delta_apart.NAME, Wiring(attention_norm=_BEFORE[0], mlp_norm=_BEFORE[1])),),
)
_MIXERS = {LINEAR: gated_delta_apart.NAME, FULL: "attention"}
_OF_FULL = ("self_attn.", "post_attention_layernorm.", "post_feedforward_layernorm.")


def _names() -> tuple[Name, ...]:
    made = names(WIRING, qkv_bias="attention_bias", o_bias="attention_bias")
    full = tuple(_BLOCK + part for part in _OF_FULL)
    kept = (
        replace(name, layers=of_kind(FULL)) if name.hf.startswith(full) else name for name in made
    )
    linear: list[tuple[str, tuple[str, ...]]] = [
        *((f"{_LINEAR}{part}_proj.weight", ("delta_keys", "hidden")) for part in "qk"),
        *((f"{_LINEAR}{part}_proj.weight", ("delta_values", "hidden")) for part in "vg"),
        *((f"{_LINEAR}{part}_proj.weight", ("delta_heads", "hidden")) for part in "ab"),
        (CONV, ("delta_channels", "delta_kernel")),
        (A_LOG, ("delta_heads",)),
        (DT_BIAS, ("delta_heads",)),
        (f"{_LINEAR}o_norm.weight", ("delta_head",)),
        (f"{_LINEAR}o_proj.weight", ("hidden", "delta_values")),
        *((f"{_BLOCK}{module}.weight", ("hidden",)) for module in _BEFORE),
    ]
    return (
        *kept,
        *(
            # There is no GGUF of it: names there are only apart from each other.
            Name(hf, hf.replace("model.layers", "blk").replace("layer_norm", "norm"), shape,
                 layers=of_kind(LINEAR), exact=hf == A_LOG)
            for hf, shape in linear
        ),
    )  # fmt: skip


def _parts(config: Config) -> tuple[int, ...]:
    delta = settings(config)
    return delta.keys, delta.keys, delta.values


_CONVOLUTIONS = tuple(f"{_LINEAR}{part}_conv1d.weight" for part in "qkv")


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], shape[1] * shape[2]


#: Of each convolution's weights the axis of one, which MLX has as the last.
_MIDDLE = Reshape(lambda shape: (shape[0], 1, shape[1]), _flat)
_LAST = Reshape(lambda shape: (*shape, 1), _flat)


def _renamed(world: Any, ours: str, other: str, written: bool) -> Recast:
    both = (f"{_BLOCK}{ours}.weight",), (f"{_BLOCK}{other}.weight",)
    return Recast(world, *both, (), written=written)


def _settle(config: Config) -> Config:
    """With the sizes of linear attention, which by default follow from the others."""
    heads = config["num_attention_heads"]
    config = config | {
        key: heads
        for key in ("linear_num_key_heads", "linear_num_value_heads")
        if config.get(key) is None
    }
    if config.get("linear_key_head_dim") is None:
        count = config["linear_num_key_heads"]
        size = int(0.75 * config["hidden_size"] / count) if type(count) is int and count else None
        config["linear_key_head_dim"] = size
    if config.get("linear_value_head_dim") is None:
        config["linear_value_head_dim"] = 2 * (config["linear_key_head_dim"] or 0)
    kinds = config.get("layer_types") or _default_kinds(config["num_hidden_layers"])
    config = nets.settle(config | {"layer_types": kinds})
    if set(kinds) != {LINEAR, FULL}:
        raise UnsupportedModelError("olmo_hybrid needs layers of both kinds (layer_types)")
    return config


def _default_kinds(layers: int) -> list[str]:
    kinds = [FULL if i % 4 == 3 else LINEAR for i in range(layers)]
    return kinds if FULL in kinds else [*kinds[:-1], FULL]


def _turns(config: Config) -> bool:
    """Published models say that the base is null: nothing rotates."""
    rope = config.get("rope_parameters") or {}
    return not ("rope_theta" in rope and rope["rope_theta"] is None)


def _ropes(config: Config) -> tuple[Rope | None, ...]:
    return one_rope(config) if _turns(config) else (None,) * config["num_hidden_layers"]


def _mlx(config: Config) -> Config:
    kinds = {"layer_types": config["layer_types"]}
    if _turns(config):
        return kinds
    still = {"rope_type": "default", "rope_theta": None}
    return kinds | {"rope_parameters": still, "rope_theta": None, "rope_scaling": None}


SPEC = Dense(
    model_type="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    arch="olmo_hybrid",
    names=_names(),
    wiring=WIRING,
    fixed={"attention_bias": False, "linear_allow_neg_eigval": True},
    defaults={
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": True,
        "full_attention_interval": 4,
    },
    lacks=("gguf",),
    mixers=lambda config: tuple(_MIXERS[kind] for kind in config["layer_types"]),
    ropes=_ropes,
    recasts=(
        Recast("stored", (CONV,), _CONVOLUTIONS, (Split(_parts), Each(((_MIDDLE,),) * 3))),
        _renamed("stored", _BEFORE[0], "input_layernorm", written=False),
        _renamed("stored", _BEFORE[1], "post_attention_layernorm", written=False),
        _renamed("stored", "post_attention_layernorm", _BEFORE[1], written=True),
        Recast("mlx", (CONV,), _CONVOLUTIONS, (Split(_parts), Each(((_LAST,),) * 3))),
        _renamed("mlx", _BEFORE[0], "input_layernorm", written=True),
        _renamed("mlx", _BEFORE[1], "post_attention_layernorm", written=True),
    ),
    settles=_settle,
    mlx=_mlx,
    check=lambda config, runtime: plain_rope(config, "mlx-lm"),
).spec()
