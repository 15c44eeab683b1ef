"""arcee: Arcee's AFM 4.5B; llama's attention, an MLP of two matrices around the square of ReLU."""

from __future__ import annotations

from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Wiring

WIRING = Wiring(mlp="plain", activation="relu2")


def _check(config: Config, runtime: str) -> list[str]:
    found = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    return [f"llama.cpp's arcee has no biases ({', '.join(found)})"] if found else []


SPEC = Dense(
    model_type="arcee",
    architecture="ArceeForCausalLM",
    arch="arcee",
    names=names(
        WIRING,
        rope_rows=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    wiring=WIRING,
    fixed={"attention_bias": False, "mlp_bias": False},
    defaults={"rms_norm_eps": 1e-5},
    freq_factors=True,
    lacks=("mlx",),
    check=_check,
).spec()
