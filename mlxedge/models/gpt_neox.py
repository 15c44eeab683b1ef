"""gpt_neox: Pythia, GPT-NeoX-20B, Dolly and others; q, k and v of each head in turn in one matrix.

GELU is exact in transformers, and its approximation by tanh in the runtimes.
"""

from __future__ import annotations

from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.models.dense import GELUS, Dense, plain_rope, under
from mlxedge.models.names import names
from mlxedge.models.recasts import heads_apart, joined_qkv
from mlxedge.models.rope import rope_settings
from mlxedge.models.rope_files import Get
from mlxedge.models.spec import Config
from mlxedge.models.wiring import NAMES, Wiring

WIRING = Wiring(layer_norm=True, mlp="plain", activation="gelu", partial=True, parallel=True)
_IN_TURN = replace(WIRING, parallel=False)
_MODULES = {
    "model.layers": "gpt_neox.layers",
    "model.embed_tokens": "gpt_neox.embed_in",
    "model.norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
    "self_attn.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
_MLX_MODULES = _MODULES | {
    "model.layers": "model.h",
    "model.embed_tokens": "model.embed_in",
    "model.norm": "model.final_layer_norm",
    "lm_head": "model.embed_out",
}


def _wires(config: Config) -> Wiring:
    return WIRING if config["use_parallel_residual"] else _IN_TURN


def _adopt(config: Config) -> Config:
    return under(config, {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"})


def _settle(config: Config) -> Config:
    """With the older keys as well: mlx-lm reads no others, transformers these beside a scaling."""
    rope = rope_settings(config)
    return config | {"rotary_emb_base": rope.theta, "rotary_pct": rope.fraction}


def _check(config: Config, runtime: str) -> list[str]:
    found = plain_rope(config, "mlx-lm") if runtime == "mlx" else []
    if not config["attention_bias"]:
        found.append(f"{NAMES[runtime]}'s gpt_neox always has attention biases")
    if runtime == "mlx" and config["intermediate_size"] != 4 * config["hidden_size"]:
        found.append("mlx-lm's gpt_neox has an MLP four times as wide as the stream")
    return found


def _back(config: Config, get: Get) -> Config:
    return config | {"use_parallel_residual": bool(get("use_parallel_residual", True))}


SPEC = Dense(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    arch="gptneox",
    names=names(
        WIRING,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias=True,
        norm_bias=True,
        called=_MODULES,
        mlx_called=_MLX_MODULES,
    ),
    recasts=(
        *joined_qkv("stored", "gpt_neox.layers.{i}.attention.query_key_value", heads_apart),
        *joined_qkv("mlx", "model.h.{i}.attention.query_key_value", heads_apart),
        *joined_qkv("gguf", "blk.{i}.attn_qkv"),
    ),
    buffers=(r".*\.attention\.(bias|masked_bias)",),
    wiring=WIRING,
    nearly=GELUS,
    wires=_wires,
    epsilon="layer_norm_eps",
    fixed={"attention_bias": True},
    defaults={
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    tied={"gguf": False, "mlx": False},
    adopts=_adopt,
    settles=_settle,
    gguf=lambda config: {"use_parallel_residual": gv.boolean(config["use_parallel_residual"])},
    back=_back,
    check=_check,
).spec()
