"""jais2: Inception's Jais 2; LayerNorm, biases everywhere, an MLP of two matrices."""

from __future__ import annotations

from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Wiring

WIRING = Wiring(layer_norm=True, mlp="plain", activation="relu2")


def _check(config: Config, runtime: str) -> list[str]:
    missing = [key for key in ("attention_bias", "mlp_bias") if not config[key]]
    return [f"llama.cpp's jais2 needs biases ({', '.join(missing)})"] if missing else []


SPEC = Dense(
    model_type="jais2",
    architecture="Jais2ForCausalLM",
    arch="jais2",
    names=names(
        WIRING,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        norm_bias=True,
    ),
    wiring=WIRING,
    epsilon="layer_norm_eps",
    fixed={"attention_bias": True, "mlp_bias": True},
    defaults={"layer_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True},
    lacks=("mlx",),
    check=_check,
).spec()
