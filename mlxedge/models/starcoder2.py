"""starcoder2: LayerNorm, biases everywhere, an MLP of two matrices.

mlx-lm computes GELU itself where the model has its approximation by tanh.
"""

from __future__ import annotations

from mlxedge.models.dense import Dense, plain_rope
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.windows import every_layer
from mlxedge.models.wiring import Wiring

WIRING = Wiring(layer_norm=True, mlp="plain", activation="gelu_pytorch_tanh")


def _check(config: Config, runtime: str) -> list[str]:
    found = [] if config["use_bias"] else ["use_bias: false is not in the runtimes"]
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("the runtimes need heads that add up to the hidden size")
    return found + (plain_rope(config, "mlx-lm") if runtime == "mlx" else [])


SPEC = Dense(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    arch="starcoder2",
    names=names(
        WIRING,
        qkv_bias="use_bias",
        o_bias="use_bias",
        mlp_bias="use_bias",
        norm_bias=True,
        called={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    ),
    wiring=WIRING,
    epsilon="norm_epsilon",
    fixed={"use_bias": True},
    defaults={"norm_epsilon": 1e-5, "use_bias": True},
    windows=lambda config: every_layer(config, None),
    check=_check,
).spec()
