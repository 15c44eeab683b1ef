"""ernie4_5: Baidu's dense ERNIE 4.5; llama's graph, rotating neighbouring dimensions."""

from __future__ import annotations

from mlxedge.models.dense import Dense, plain_rope
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Wiring

WIRING = Wiring(neighbours=True)


def _check(config: Config, runtime: str) -> list[str]:
    found = plain_rope(config, "mlx-lm") if runtime == "mlx" else []
    if runtime == "gguf" and config.get("use_bias"):
        found.append("llama.cpp's ernie4_5 has no biases (use_bias)")
    return found


SPEC = Dense(
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    arch="ernie4_5",
    names=names(WIRING, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias"),
    wiring=WIRING,
    fixed={"use_bias": False},
    defaults={"head_dim": 128, "rms_norm_eps": 1e-5},
    theta=5e5,
    check=_check,
).spec()
