"""jamba: AI21's Jamba; the first Mamba's state spaces with norms, attention that does not rotate in
every so many layers, and experts in every so many, or none."""

from __future__ import annotations

from collections.abc import Sequence

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, Get, no_ropes
from mlxedge.models.experts import Experts
from mlxedge.models.mixers import mamba
from mlxedge.models.names import in_layers, names
from mlxedge.models.spaces import only_silu, whole_numbers
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import Wiring

WIRING = Wiring(mlp_norm="pre_ff_layernorm")
EXPERTS = Experts(width="intermediate_size", normalise=False, some=True)
_DEFAULTS = {
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_dt_rank": "auto",
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
_CALLED = {
    "model.norm": "model.final_layernorm",
    "mlp.gate": "feed_forward.router",
    **{f"mlp.{part}_proj": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")},
}
_PERIODS = ("attn_layer_period", "expert_layer_period")


def _attending(config: Config) -> list[int]:
    period, offset = config["attn_layer_period"], config["attn_layer_offset"]
    return [i for i in range(config["num_hidden_layers"]) if i % period == offset]


def _spaces(config: Config) -> list[int]:
    attending = _attending(config)
    return [i for i in range(config["num_hidden_layers"]) if i not in attending]


def _tensors() -> tuple[Name, ...]:
    made = names(WIRING, experts=EXPERTS, block="feed_forward", called=_CALLED)
    norms = (
        Name(
            f"model.layers.{{i}}.mamba.{part}_layernorm.weight",
            f"blk.{{i}}.ssm_{part}_norm.weight",
            (size,),
            layers=_spaces,
        )
        for part, size in (("dt", "ssm_rank"), ("b", "ssm_size"), ("c", "ssm_size"))
    )
    return (*in_layers(made, "self_attn", _attending), *mamba.names(_spaces), *norms)


def _adopt(config: Config) -> Config:
    whole_numbers(config, 1, "hidden_size")
    return mamba.adopt(config, {}, _DEFAULTS)


def _settle(config: Config) -> Config:
    only_silu(config)
    whole_numbers(config, 1, *_PERIODS)
    whole_numbers(config, 0, "attn_layer_offset", "expert_layer_offset")
    if not _attending(config) or not _spaces(config):
        raise UnsupportedModelError("jamba needs a layer of attention and a state space")
    count = config["num_experts"]
    period, offset = config["expert_layer_period"], config["expert_layer_offset"]
    dense = [i for i in range(config["num_hidden_layers"]) if i % period != offset]
    # One expert alone is none.
    return config | {
        "num_experts": 0 if count == 1 else count,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


def _mixers(config: Config) -> tuple[str, ...]:
    attending = _attending(config)
    layers = range(config["num_hidden_layers"])
    return tuple("attention" if i in attending else "mamba" for i in layers)


def _check(config: Config, runtime: str) -> list[str]:
    found = mamba.objections(config, runtime)
    if runtime == "mlx" and EXPERTS.layers(config):
        found.append("mlx-lm's jamba normalises the scores of experts, this model does not")
    heads = config["head_dim"] * config["num_attention_heads"]
    if runtime == "mlx" and heads != config["hidden_size"]:
        found.append("mlx-lm's jamba needs heads that add up to the hidden size")
    return found


def _metadata(config: Config) -> gv.Metadata:
    attending = _attending(config)
    layers = range(config["num_hidden_layers"])
    heads = [config["num_key_value_heads"] * (i in attending) for i in layers]
    return {
        "attention.head_count_kv": gv.array("i32", heads),
        **{key: gv.u32(value) for key, value in mamba.metadata(config).items()},
    }


def _back(config: Config, get: Get) -> Config:
    """Files do not say which layers have experts: in those of published models it is every second
    one."""
    heads: Sequence[int] = get("attention.head_count_kv")
    first, *others = [i for i, count in enumerate(heads) if count] or [0]
    return config | {
        "attn_layer_offset": first,
        "attn_layer_period": others[0] - first if others else len(heads),
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_conv": get("ssm.conv_kernel"),
        "mamba_d_state": get("ssm.state_size"),
        "mamba_dt_rank": get("ssm.time_step_rank"),
        "mamba_expand": get("ssm.inner_size") // config["hidden_size"],
    }


SPEC = Dense(
    model_type="jamba",
    architecture="JambaForCausalLM",
    arch="jamba",
    names=_tensors(),
    wiring=WIRING,
    experts=EXPERTS,
    recasts=mamba.RECASTS,
    mixers=_mixers,
    ropes=no_ropes,
    fixed={"mamba_conv_bias": True, "mamba_proj_bias": False},
    defaults={
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
    },
    head_dim_free=False,
    adopts=_adopt,
    settles=_settle,
    gguf=_metadata,
    back=_back,
    check=_check,
).spec()
