"""nemotron: Nemotron 3 and 4, Minitron; LayerNorm with weights less one, an MLP of two matrices."""

from __future__ import annotations

from mlxedge.models.dense import Dense, plain_rope
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Wiring

WIRING = Wiring(layer_norm=True, unit_norm=True, mlp="plain", activation="relu2", partial=True)


def _check(config: Config, runtime: str) -> list[str]:
    return plain_rope(config, "mlx-lm") if runtime == "mlx" else []


SPEC = Dense(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    arch="nemotron",
    names=names(
        WIRING,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        norm_bias=True,
    ),
    wiring=WIRING,
    epsilon="norm_eps",
    fixed={"attention_bias": False, "mlp_bias": False},
    defaults={"norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    head_dim_free=False,
    tied={"gguf": False},
    check=_check,
).spec()
