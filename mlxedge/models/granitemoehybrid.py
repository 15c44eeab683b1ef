"""granitemoehybrid: IBM's Granite 4; state spaces and some attention, each before an MLP that all
tokens go through, and experts beside that or none.

llama.cpp has models of attention alone as granite.
"""

from __future__ import annotations

from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, Get, Key, plain_rope
from mlxedge.models.experts import SHARED, STACKS, Experts
from mlxedge.models.granite import FACTORS, factors
from mlxedge.models.mixers import mamba2
from mlxedge.models.names import in_layers, names
from mlxedge.models.recasts import Join, Recast, World
from mlxedge.models.rope import Rope, rope_settings
from mlxedge.models.spaces import only_silu, whole_numbers
from mlxedge.models.spec import Config, Name

ATTENTION, SPACE = "full_attention", "linear_attention"
#: What Hub configs and mlx-lm call them.
_OLD = {"attention": ATTENTION, "mamba": SPACE}
_COUNT = ("num_experts", "num_local_experts")
_SHARED_WIDTH = "shared_intermediate_size"
EXPERTS = Experts(
    width="intermediate_size",
    shared_width=_SHARED_WIDTH,
    score="softmax_top",
    normalise=False,
    shared_gate=False,
    some=True,
)
_BLOCK, _MOE = "model.layers.{i}.", "model.layers.{i}.block_sparse_moe."
_LINEAR = tuple(f"{_BLOCK}shared_mlp.{part}_linear.weight" for part in ("input", "output"))
_MLP = tuple(f"{_BLOCK}mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
_DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_d_head": "auto",
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}


def _weights(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{_BLOCK}{module}.weight" for module in modules)


def _linear(world: World, parts: tuple[str, ...]) -> tuple[Recast, ...]:
    """Gate and up in one, and down."""
    both, down = _LINEAR
    return Recast(world, parts[:2], (both,), (Join(),)), Recast(world, parts[2:], (down,), ())


def _recasts() -> tuple[Recast, ...]:
    """Gate and up are one matrix in folders; of experts mlx-lm has them apart."""
    stacks, shared = _weights(STACKS), _weights(SHARED)
    return (
        Recast("stored", stacks[:2], (f"{_MOE}input_linear.weight",), (Join(),)),
        Recast("stored", stacks[2:], (f"{_MOE}output_linear.weight",), ()),
        *_linear("stored", shared),
        *_linear("mlx", shared),
        *_linear("stored", _MLP),
        *mamba2.RECASTS,
    )


def _layers(kind: str, config: Config) -> list[int]:
    return [i for i, own in enumerate(config["layer_types"]) if own == kind]


def _attending(config: Config) -> list[int]:
    return _layers(ATTENTION, config)


def _tensors() -> tuple[Name, ...]:
    made = names(
        rope_rows=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        experts=EXPERTS,
        block="block_sparse_moe",
        called={"mlp.gate": "block_sparse_moe.router.layer"},
    )
    spaces = mamba2.names(lambda config: _layers(SPACE, config))
    return (*in_layers(made, "self_attn", _attending), *spaces)


def _adopt(config: Config) -> Config:
    whole_numbers(config, 1, "hidden_size")
    return mamba2.adopt(config, {}, _DEFAULTS)


def _settle(config: Config) -> Config:
    """With ``layer_types`` as transformers 5 calls them."""
    layers = config["num_hidden_layers"]
    given = config.get("layer_types") or config.get("layers_block_type") or [SPACE] * layers
    types = [_OLD.get(kind, kind) for kind in given]
    if wrong := set(map(str, types)) - {ATTENTION, SPACE}:
        raise UnsupportedModelError(f"layer_types has {sorted(wrong)[0][:40]!r}")
    if ATTENTION not in types:
        raise UnsupportedModelError("state spaces without a layer of attention are not supported")
    only_silu(config)
    made = {k: v for k, v in config.items() if k != "layers_block_type"} | {"layer_types": types}
    if not next((made[k] for k in _COUNT if made.get(k) is not None), 0):
        made["intermediate_size"] = made[_SHARED_WIDTH]
    return made


def _ropes(config: Config) -> tuple[Rope | None, ...]:
    rope = rope_settings(config) if config.get("position_embedding_type") == "rope" else None
    return (rope,) * config["num_hidden_layers"]


def _mixers(config: Config) -> tuple[str, ...]:
    kinds = {ATTENTION: "attention", SPACE: "mamba2"}
    return tuple(kinds[kind] for kind in config["layer_types"])


def _check(config: Config, runtime: str) -> list[str]:
    found = [f"{key} is 0" for key in FACTORS if not config[key]]
    if _layers(SPACE, config):
        found += mamba2.objections(config, runtime)
    if runtime == "gguf":
        found += _check_gguf(config)
    if runtime == "mlx":
        heads = config["head_dim"] * config["num_attention_heads"]
        if heads != config["hidden_size"]:
            found.append("mlx-lm's granitemoehybrid needs heads that add up to the hidden size")
        if config.get("position_embedding_type") == "rope":
            found += plain_rope(config, "mlx-lm")
    return found


def _check_gguf(config: Config) -> list[str]:
    if not _layers(SPACE, config):
        alone = "llama.cpp's granite has attention alone"
        rotates = config.get("position_embedding_type") == "rope"
        found = [] if rotates else [f"{alone} with rotation only (position_embedding_type)"]
        return [*found, f"{alone} without experts only"] if config["num_experts"] else found
    if config["mamba_expand"] == 2:
        return []
    return ["llama.cpp's granitehybrid has twice as many channels (mamba_expand)"]


def _metadata(config: Config) -> gv.Metadata:
    if not _layers(SPACE, config):
        return {}
    attends = _attending(config)
    heads = [config["num_key_value_heads"] * (i in attends) for i in range(len(_mixers(config)))]
    return {
        "attention.head_count_kv": gv.array("i32", heads),
        "rope.scaling.finetuned": gv.boolean(config.get("position_embedding_type") == "rope"),
        **{key: gv.u32(value) for key, value in mamba2.metadata(config).items()},
    }


def _back(config: Config, get: Get) -> Config:
    heads = get("attention.head_count_kv")
    heads = [heads] * config["num_hidden_layers"] if isinstance(heads, int) else [*heads]
    own = mamba2.back(get)
    return (
        config
        | own
        | {
            "layer_types": [ATTENTION if count else SPACE for count in heads],
            "position_embedding_type": "rope" if get("rope.scaling.finetuned", True) else None,
            "mamba_expand": own["mamba_n_heads"] * own["mamba_d_head"] // config["hidden_size"],
            _SHARED_WIDTH: config[_SHARED_WIDTH] or config["intermediate_size"],
        }
    )


def _mlx(config: Config) -> Config:
    old = {new: name for name, new in _OLD.items()}
    rotates = config.get("position_embedding_type") == "rope"
    return {
        "layer_types": [old[kind] for kind in config["layer_types"]],
        "position_embedding_type": "rope" if rotates else "nope",
    }


SPEC = replace(
    Dense(
        model_type="granitemoehybrid",
        architecture="GraniteMoeHybridForCausalLM",
        arch="granitehybrid",
        archs=lambda config: None if _layers(SPACE, config) else "granite",
        names=_tensors(),
        experts=EXPERTS,
        recasts=_recasts(),
        mixers=_mixers,
        ropes=_ropes,
        factors=factors,
        fixed={"attention_bias": False, "mlp_bias": False},
        defaults={**dict.fromkeys(FACTORS, 1.0), _SHARED_WIDTH: 1024},
        keys=(
            *(Key(key, gguf, default=1.0) for key, gguf in FACTORS.items()),
            Key(_SHARED_WIDTH, "expert_shared_feed_forward_length", "u32", 0),
        ),
        freq_factors=True,
        adopts=_adopt,
        settles=_settle,
        gguf=_metadata,
        back=_back,
        mlx=_mlx,
        check=_check,
    ).spec(),
)
