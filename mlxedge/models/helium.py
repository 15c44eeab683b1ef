"""helium: Kyutai's Helium 1; llama's graph, rotating neighbouring dimensions as llama.cpp's llama
does: in GGUF it is one, with its rows as they are."""

from __future__ import annotations

from mlxedge.models.dense import Dense, plain_rope
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Wiring

WIRING = Wiring(neighbours=True)


def _check(config: Config, runtime: str) -> list[str]:
    if runtime == "gguf":
        own = bool(config.get("attention_bias"))
        return ["a llama has a bias of the output, too (attention_bias)"] if own else []
    found = plain_rope(config, "mlx-lm")
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("mlx-lm's helium needs heads that add up to the hidden size")
    return found


SPEC = Dense(
    model_type="helium",
    architecture="HeliumForCausalLM",
    arch="llama",
    names=names(WIRING, qkv_bias="attention_bias", mlp_bias="mlp_bias"),
    wiring=WIRING,
    fixed={"attention_bias": False, "mlp_bias": False},
    defaults={"rms_norm_eps": 1e-8, "head_dim": 128},
    theta=1e5,
    unties=True,
    freq_factors=True,
    reads=lambda metadata: False,  # they are llama's
    check=_check,
).spec()
