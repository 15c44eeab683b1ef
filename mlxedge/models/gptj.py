"""gptj: GPT-J 6B; attention and MLP side by side, a part of each head rotated by neighbours.
llama.cpp does not have the architecture."""

from __future__ import annotations

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import GELUS, Dense
from mlxedge.models.gpt2 import BUFFERS, SPELLINGS, adopt
from mlxedge.models.names import names
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import Wiring

WIRING = Wiring(
    layer_norm=True,
    mlp="plain",
    mlp_norm=None,
    activation="gelu_new",
    parallel=True,
    partial=True,
    neighbours=True,
)
_MODULES = {
    "model.layers": "transformer.h",
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.out_proj",
    "mlp.up_proj": "mlp.fc_in",
    "mlp.down_proj": "mlp.fc_out",
}


def _settle(config: Config) -> Config:
    rotated = config.get("rotary_dim", 64)
    if type(rotated) is not int or not 0 < rotated <= config["head_dim"] or rotated % 2:
        raise UnsupportedModelError(
            f"rotary_dim is {str(rotated)[:40]!r}, no even number up to that of a head, "
            f"{config['head_dim']}"
        )
    fraction = rotated / config["head_dim"]
    return config | {"rotary_dim": rotated, "partial_rotary_factor": fraction}


def _check(config: Config, runtime: str) -> list[str]:
    if runtime == "gguf" or config["intermediate_size"] == 4 * config["hidden_size"]:
        return []
    return ["mlx-lm's gptj has an MLP four times as wide as the stream"]


SPEC = Dense(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    arch="gptj",
    names=(
        *names(
            WIRING,
            mlp_bias=True,
            norm_bias=True,
            called=_MODULES,
            mlx_called={m: own.replace("transformer.", "model.") for m, own in _MODULES.items()},
        ),
        Name("lm_head.bias", "output.bias", ("vocab",)),
    ),
    spellings=SPELLINGS,
    buffers=BUFFERS,
    lacks=("gguf",),
    wiring=WIRING,
    nearly=GELUS,
    epsilon="layer_norm_epsilon",
    fixed={},
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": False},
    tied={"mlx": False},
    adopts=adopt,
    settles=_settle,
    check=_check,
).spec()
