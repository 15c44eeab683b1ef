"""stablelm: StableLM 3B, Zephyr and StableLM 2; LayerNorm, a part of each head rotated.

StableLM 2 12B has attention and MLP side by side, and LayerNorms of q and k with weights for each
head, which are tensors of their own in files.
"""

from __future__ import annotations

from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.models.dense import Dense, plain_rope
from mlxedge.models.names import names
from mlxedge.models.spec import Config, Name
from mlxedge.models.wiring import Wiring

WIRING = Wiring(layer_norm=True, partial=True, head_norm="head")
_PARALLEL = replace(WIRING, mlp_norm=None, parallel=True)


def _wires(config: Config) -> Wiring:
    return _PARALLEL if config.get("use_parallel_residual") else WIRING


def _names() -> tuple[Name, ...]:
    found = []
    for name in names(WIRING, qkv_bias="use_qkv_bias", norm_bias=True):
        if ".post_attention_layernorm." in name.hf:
            name = replace(name, present=lambda config: not config.get("use_parallel_residual"))
        elif "_norm." in name.hf:
            part, heads = ("q", "heads") if "q_norm" in name.hf else ("k", "kv_heads")
            apart = f"model.layers.{{i}}.self_attn.{part}_layernorm.norms.{{e}}.weight"
            name = replace(
                name,
                shape=(heads, "head"),
                present=lambda config: bool(config.get("qk_layernorm")),
                stored=apart,
                mlx=apart,
            )
        found.append(name)
    return tuple(found)


def _check(config: Config, runtime: str) -> list[str]:
    found = plain_rope(config, "mlx-lm") if runtime == "mlx" else []
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("the runtimes need heads that add up to the hidden size")
    return found


SPEC = Dense(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    arch="stablelm",
    names=_names(),
    wiring=WIRING,
    epsilon="layer_norm_eps",
    fixed={"use_qkv_bias": False, "use_parallel_residual": False, "qk_layernorm": False},
    defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
    tied={"gguf": False, "mlx": False},
    wires=_wires,
    back=lambda config, get: {
        **config,
        "use_parallel_residual": bool(get("use_parallel_residual")),
    },
    gguf=lambda config: {
        "use_parallel_residual": gv.boolean(config.get("use_parallel_residual", False))
    },
    check=_check,
).spec()
