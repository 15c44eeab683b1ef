"""stablelm: StableLM 3B, Zephyr and StableLM 2 1.6B; LayerNorm, a part of each head rotated.

StableLM 2 12B, which has attention and MLP side by side, is not read.
"""

from __future__ import annotations

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, plain_rope
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Wiring

WIRING = Wiring(layer_norm=True, partial=True)


def _settle(config: Config) -> Config:
    found = [key for key in ("use_parallel_residual", "qk_layernorm") if config.get(key)]
    if found:
        raise UnsupportedModelError(f"stablelm with {' and '.join(found)} is not supported")
    return config


def _check(config: Config, runtime: str) -> list[str]:
    found = plain_rope(config, "mlx-lm") if runtime == "mlx" else []
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("the runtimes need heads that add up to the hidden size")
    return found


SPEC = Dense(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    arch="stablelm",
    names=names(WIRING, qkv_bias="use_qkv_bias", norm_bias=True),
    wiring=WIRING,
    epsilon="layer_norm_eps",
    fixed={"use_qkv_bias": False, "use_parallel_residual": False, "qk_layernorm": False},
    defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
    tied={"gguf": False, "mlx": False},
    settles=_settle,
    check=_check,
).spec()
