"""nemotron_h: NVIDIA's Nemotron-H and Nemotron Nano 2; each layer is a state space, attention that
does not rotate, or an MLP of two matrices.

transformers keeps time steps above ``time_step_min``. NVIDIA's own code, llama.cpp, mlx-lm and this
one go by ``time_step_limit``, which is no limit where a config does not say otherwise.
"""

from __future__ import annotations

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, Get, no_ropes
from mlxedge.models.mixers import mamba2
from mlxedge.models.names import in_layers, names
from mlxedge.models.spaces import EPSILON, MODULES, stored, whole_numbers
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import Wiring

ATTENTION, SPACE, MLP = "full_attention", "linear_attention", "mlp"
_LETTERS = {"*": ATTENTION, "M": SPACE, "-": MLP, "E": "moe"}
_OLD = {"attention": ATTENTION, "mamba": SPACE}
_MIXERS = {ATTENTION: "attention", SPACE: "mamba2", MLP: "mlp"}
WIRING = Wiring(attention_norm="norm", mlp_norm=None, mlp="none", activation="relu2")
#: By the names that the mixer has for them.
_CALLED = {
    "mamba_n_heads": "mamba_num_heads",
    "mamba_d_head": "mamba_head_dim",
    "mamba_n_groups": "n_groups",
    "mamba_d_state": "ssm_state_size",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_proj_bias": "use_bias",
}
_DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_d_head": 64,
    "mamba_n_groups": 8,
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
#: Where transformers is to compute what GGUF files mean.
_NO_LEAST = 1e-12
_MODULES = {
    "model.layers.{i}.self_attn.": "backbone.layers.{i}.mixer.",
    "model.layers.{i}.mlp.": "backbone.layers.{i}.mixer.",
    **MODULES,
}


def _layers(kind: str, config: Config) -> list[int]:
    return [i for i, own in enumerate(config["layer_types"]) if own == kind]


def _tensors() -> tuple[Name, ...]:
    # With the wiring of an MLP after each mixer, for their names.
    plain = Wiring(attention_norm="norm", mlp_norm=None, mlp="plain")
    made = names(plain, mlp_bias="mlp_bias")
    made = in_layers(made, "self_attn", lambda config: _layers(ATTENTION, config))
    made = in_layers(made, "mlp", lambda config: _layers(MLP, config))
    spaces = mamba2.names(lambda config: _layers(SPACE, config))
    return tuple(stored(name, _MODULES) for name in (*made, *spaces))


def _types(config: Config) -> list[str]:
    """Of each layer; in old configs they are letters."""
    given = config.get("layers_block_type") or config.get("layer_types")
    given = given or config.get("hybrid_override_pattern") or []
    types = [_LETTERS.get(kind, _OLD.get(kind, kind)) for kind in given]
    if wrong := set(map(str, types)) - set(_MIXERS):
        raise UnsupportedModelError(
            f"nemotron_h with layers of {sorted(wrong)[0][:40]!r} is not supported"
        )
    if ATTENTION not in types or SPACE not in types:
        raise UnsupportedModelError("nemotron_h needs a layer of attention and a state space")
    return types


def _adopt(config: Config) -> Config:
    whole_numbers(config, 1, "hidden_size")
    if config.get("mamba_hidden_act") not in (None, "silu", "swish"):
        raise UnsupportedModelError("mamba_hidden_act of nemotron_h must be silu")
    made = mamba2.adopt(config, _CALLED, _DEFAULTS)
    made |= {own: made[key] for key, own in _CALLED.items()}
    types = _types(made)
    head_dim = made.get("head_dim") or made.get("attention_head_dim") or 128
    left = ("layers_block_type", "hybrid_override_pattern")
    return {k: v for k, v in made.items() if k not in left} | {
        "hidden_act": made.get("mlp_hidden_act") or "relu2",
        "mlp_hidden_act": made.get("mlp_hidden_act") or "relu2",
        "head_dim": head_dim,
        "layer_types": types,
        "num_hidden_layers": len(types),
    }


def _mixers(config: Config) -> tuple[str, ...]:
    return tuple(_MIXERS[kind] for kind in config["layer_types"])


def _metadata(config: Config) -> gv.Metadata:
    def by_layer(kind: str, value: int) -> gv.GgufValue:
        return gv.array("i32", [value * (own == kind) for own in config["layer_types"]])

    return {
        "attention.head_count_kv": by_layer(ATTENTION, config["num_key_value_heads"]),
        "feed_forward_length": by_layer(MLP, config["intermediate_size"]),
        # For a head that predicts further tokens.
        "attention.layer_norm_epsilon": gv.f32(config[EPSILON]),
        **{key: gv.u32(value) for key, value in mamba2.metadata(config).items()},
    }


def _back(config: Config, get: Get) -> Config:
    pairs = zip(get("attention.head_count_kv"), get("feed_forward_length"), strict=True)
    types = [ATTENTION if heads else MLP if width else SPACE for heads, width in pairs]
    own = {_CALLED[key]: value for key, value in mamba2.back(get).items()}
    return config | own | {"layer_types": types, "time_step_min": _NO_LEAST}


def _mlx(config: Config) -> Config:
    letters = {kind: letter for letter, kind in _LETTERS.items()}
    return {
        "hybrid_override_pattern": [letters[kind] for kind in config["layer_types"]],
        "layers_block_type": config["layer_types"],
    }


SPEC = Dense(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    arch="nemotron_h",
    names=_tensors(),
    wiring=WIRING,
    recasts=mamba2.RECASTS,
    mixers=_mixers,
    ropes=no_ropes,
    epsilon=EPSILON,
    fixed={"mlp_bias": False, "use_bias": False, "use_conv_bias": True},
    defaults={
        EPSILON: 1e-5,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 21504,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    tied={"mlx": False},
    adopts=_adopt,
    gguf=_metadata,
    back=_back,
    mlx=_mlx,
    check=lambda config, runtime: mamba2.objections(config, runtime, own_norms=True),
).spec()
