"""apertus: Swiss AI's Apertus; an MLP of two matrices around xIELU, with its numbers trained."""

from __future__ import annotations

from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import TRAINED, Wiring

WIRING = Wiring(
    attention_norm="attention_layernorm",
    mlp_norm="feedforward_layernorm",
    head_norm="head",
    mlp="plain",
    activation="xielu",
)
_BUFFERS = ("beta", "eps")


def _number(part: str) -> Name:
    shape = () if part in _BUFFERS else ("one",)
    hf = f"model.layers.{{i}}.mlp.act_fn.{part}"
    return Name(hf, f"xielu.{part}.{{i}}", shape, listed=True)


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if runtime == "mlx" and config.get("attention_bias"):
        found.append("mlx-lm's apertus has no attention biases")
    heads = config["head_dim"] * config["num_attention_heads"]
    if runtime == "mlx" and heads != config["hidden_size"]:
        found.append("mlx-lm's apertus needs heads that add up to the hidden size")
    return found


SPEC = Dense(
    model_type="apertus",
    architecture="ApertusForCausalLM",
    arch="apertus",
    names=(
        *names(WIRING, qkv_bias="attention_bias", o_bias="attention_bias"),
        *map(_number, TRAINED["xielu"]),
    ),
    wiring=WIRING,
    fixed={"attention_bias": False, "mlp_bias": False, "post_norm": False, "qk_norm": True},
    defaults={"rms_norm_eps": 1e-5},
    theta=12e6,
    freq_factors=True,
    tied={"gguf": False},
    check=_check,
).spec()
