"""lfm2: Liquid's LFM2; gated short convolutions, and attention in some layers."""

from __future__ import annotations

from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, Get, Key, plain_rope
from mlxedge.models.mixers import shortconv
from mlxedge.models.names import in_layers, names
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import NAMES, Wiring

ATTENTION, CONVOLUTION = "full_attention", "conv"
WIRING = Wiring(attention_norm="operator_norm", mlp_norm="ffn_norm", head_norm="head")
#: Modules by the names in files.
CALLED = {
    "model.norm": "model.embedding_norm",
    "self_attn.o_proj": "self_attn.out_proj",
    "self_attn.q_norm": "self_attn.q_layernorm",
    "self_attn.k_norm": "self_attn.k_layernorm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def _layers(kind: str, config: Config) -> list[int]:
    return [i for i, own in enumerate(config["layer_types"]) if own == kind]


def attending(config: Config) -> list[int]:
    return _layers(ATTENTION, config)


def tensors(made: tuple[Name, ...]) -> tuple[Name, ...]:
    """``made`` with attention in some layers, and convolutions in the others. The last norm is
    called by mistake what another one is called elsewhere: see llama.cpp's llama-arch.cpp."""
    last = {"output_norm.weight": "token_embd_norm.weight"}
    own = tuple(replace(name, gguf=last.get(name.gguf, name.gguf)) for name in made)
    convolving = shortconv.names(lambda config: _layers(CONVOLUTION, config))
    return (*in_layers(own, "self_attn", attending), *convolving)


def adopt(config: Config) -> Config:
    """Under the keys of transformers, which knows the others as well."""
    made = dict(config)
    if made.get("tie_embedding") is not None:
        made["tie_word_embeddings"] = made.pop("tie_embedding")
    return {"tie_word_embeddings": True} | made


def settle_types(config: Config) -> Config:
    """With ``layer_types``, and what mlx-lm reads instead."""
    layers = config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:
        given = config.get("full_attn_idxs")
        attends = range(layers) if given is None else given
        if not all(type(i) is int and 0 <= i < layers for i in attends):
            raise UnsupportedModelError("the config's full_attn_idxs is not a list of layers")
        types = [ATTENTION if i in attends else CONVOLUTION for i in range(layers)]
    if wrong := set(map(str, types)) - {ATTENTION, CONVOLUTION}:
        raise UnsupportedModelError(f"layer_types has {sorted(wrong)[0][:40]!r}")
    if ATTENTION not in types:
        raise UnsupportedModelError("convolutions without a layer of attention are not supported")
    width = config["conv_L_cache"]
    if type(width) is not int or not 0 < width < 1 << 10:
        raise UnsupportedModelError(f"conv_L_cache is {str(width)[:40]!r}")
    made = config | {"layer_types": types}
    return made | {"full_attn_idxs": attending(made)}


def _adopt(config: Config) -> Config:
    made = adopt(config)
    if made.get("block_ff_dim") is not None:
        made["intermediate_size"] = made["block_ff_dim"]
    return made


def _settle(config: Config) -> Config:
    """With the size that the MLP has, which the config may leave to a computation."""
    config = settle_types(config)
    width = config["intermediate_size"]
    if config["block_auto_adjust_ff_dim"]:
        width = int(2 * width / 3)
        factor, multiple = config["block_ffn_dim_multiplier"], config["block_multiple_of"]
        if factor is not None:
            if type(factor) not in (int, float) or type(multiple) is not int or multiple < 1:
                raise UnsupportedModelError("the config's size of the MLP makes no sense")
            width = -(-int(factor * width) // multiple) * multiple
    return config | {
        "intermediate_size": width,
        "block_ff_dim": width,
        "block_auto_adjust_ff_dim": False,
    }


def mixers(config: Config) -> tuple[str, ...]:
    kinds = {ATTENTION: "attention", CONVOLUTION: "shortconv"}
    return tuple(kinds[kind] for kind in config["layer_types"])


def check(config: Config, runtime: str) -> list[str]:
    name, found = NAMES[runtime], []
    if config["conv_L_cache"] < 2:
        found.append(f"{name} needs convolutions of more than one position (conv_L_cache)")
    if runtime == "gguf" and config.get("conv_bias"):
        found.append(f"{name}'s {config['model_type']} has no biases (conv_bias)")
    if runtime == "mlx":
        found += plain_rope(config, name)
        if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
            found.append(f"{name}'s lfm2 needs heads that add up to the hidden size")
    return found


def metadata(config: Config) -> gv.Metadata:
    attends = attending(config)
    heads = [config["num_key_value_heads"] * (i in attends) for i in range(len(mixers(config)))]
    return {"attention.head_count_kv": gv.array("i32", heads)}


def back(config: Config, get: Get) -> Config:
    heads = get("attention.head_count_kv")
    heads = [heads] * config["num_hidden_layers"] if isinstance(heads, int) else [*heads]
    types = [ATTENTION if own else CONVOLUTION for own in heads]
    return config | {"layer_types": types}


def mlx(config: Config) -> Config:
    """mlx-lm has no defaults for these."""
    return {
        "layer_types": config["layer_types"],
        "full_attn_idxs": config["full_attn_idxs"],
        "block_dim": config["hidden_size"],
    }


DEFAULTS = {"norm_eps": 1e-5, "conv_L_cache": 3, "conv_bias": False}

SPEC = Dense(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    arch="lfm2",
    names=tensors(names(WIRING, called=CALLED)),
    wiring=WIRING,
    mixers=mixers,
    epsilon="norm_eps",
    theta=1e6,
    fixed={"conv_bias": False, "block_auto_adjust_ff_dim": False},
    defaults={
        **DEFAULTS,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    keys=(Key("conv_L_cache", "shortconv.l_cache", "u32", 3),),
    recasts=shortconv.RECASTS,
    head_dim_free=False,
    tied={"mlx": True},
    adopts=_adopt,
    settles=_settle,
    gguf=metadata,
    back=back,
    mlx=mlx,
    check=check,
).spec()
