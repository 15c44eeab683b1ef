"""qwen3_vl_text: the language model of Qwen 3 VL, which on text computes as Qwen 3 does.

llama.cpp has an architecture for it, mlx-lm and transformers get a Qwen 3.
"""

from __future__ import annotations

from mlxedge import gguf_values as gv
from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.qwen2_vl_text import SECTIONS, adopt, plain
from mlxedge.models.rope import rope_settings
from mlxedge.models.rope_files import Get
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Wiring

WIRING = Wiring(head_norm="head")
_GGUF = "rope.dimension_sections"


def _gguf(config: Config) -> gv.Metadata:
    return {_GGUF: gv.array("i32", (*config[SECTIONS], 0)[:4])}


def _back(config: Config, get: Get) -> Config:
    found = get(_GGUF)
    return config if found is None else config | {SECTIONS: [int(size) for size in found[:3]]}


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if config.get("attention_bias"):
        found.append("attention biases are not part of this architecture in the runtimes")
    pairs, given = rope_settings(config).dims(config["head_dim"]) // 2, config[SECTIONS]
    sane = isinstance(given, list) and len(given) == 3 and all(type(n) is int for n in given)
    if runtime == "gguf" and not (sane and sum(given) == pairs):
        found.append(f"mrope_section is {str(given)[:40]}, not three parts of {pairs} pairs")
    return found


SPEC = Dense(
    model_type="qwen3_vl_text",
    architecture="Qwen3ForCausalLM",
    arch="qwen3vl",
    names=names(WIRING),
    wiring=WIRING,
    fixed={"attention_bias": False},
    theta=5e5,
    defaults={"head_dim": 128},
    adopts=lambda config: adopt(config, [24, 20, 20]),
    gguf=_gguf,
    mlx=lambda config: {"model_type": "qwen3"},
    hf=lambda config: plain(config, "qwen3", "Qwen3ForCausalLM"),
    back=_back,
    check=_check,
).spec()
