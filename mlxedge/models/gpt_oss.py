"""gpt_oss: OpenAI's gpt-oss; attention with sinks, every second layer with a window, experts in
every layer whose gate is clamped, biases everywhere.

Folders have gate and up of the experts row by row in one tensor, which is transposed in those of
floats and is not in the published ones, whose codes are MXFP4.
"""

from __future__ import annotations

from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.models.dense import Dense, Get
from mlxedge.models.experts import Experts
from mlxedge.models.names import names
from mlxedge.models.recasts import Join, Recast, Transpose, row_by_row
from mlxedge.models.rope import rope_settings
from mlxedge.models.spec import Config, Name
from mlxedge.models.windows import windows_by_type
from mlxedge.models.wiring import Wiring

EXPERTS = Experts(
    width="intermediate_size",
    sparse=False,
    score="softmax_top",
    normalise=False,
    biases=True,
    clamped=("swiglu_alpha", "swiglu_limit"),
    published="mxfp4",
)
WIRING = Wiring(sinks=True)
_GATE = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
#: No key of llama.cpp's, which always rounds; what a file without it means is the published models.
_TRUNCATE = "rope.scaling.yarn_truncate"
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _adopt(config: Config) -> Config:
    """With the scaling that a config means that does not tell of any."""
    if config.get("rope_parameters") is None and "rope_scaling" not in config:
        return config | {"rope_scaling": dict(_YARN)}
    return config


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if not config["attention_bias"]:
        found.append("the runtimes need the biases of attention (attention_bias)")
    if any(config[key] != value for key, value in _GATE.items()):
        found.append("the runtimes have a gate with alpha 1.702 and limit 7 (swiglu_alpha)")
    if {bool(window) for window in windows_by_type(config)} != {True, False}:
        found.append("the runtimes need layers with windows and layers without")
    return found


def _gguf(config: Config) -> gv.Metadata:
    rope = rope_settings(config)
    return {_TRUNCATE: gv.boolean(True)} if rope.type == "yarn" and rope.truncate else {}


def _back(config: Config, get: Get) -> Config:
    rope = config["rope_parameters"]
    if rope["rope_type"] != "yarn":
        return config
    told = {"truncate": bool(get(_TRUNCATE, False))}
    return config | {
        "rope_parameters": rope | told,
        "rope_scaling": config["rope_scaling"] | told,
    }


def _name(name: Name) -> Name:
    """llama.cpp calls the MLP's norm by where it stands."""
    return replace(name, gguf=name.gguf.replace("ffn_norm", "post_attention_norm"))


_EXPERTS = "model.layers.{i}.mlp.experts."
_GATE_UP = tuple(f"{_EXPERTS}{part}_proj.weight" for part in ("gate", "up"))
_DOWN = f"{_EXPERTS}down_proj"
RECASTS = (
    Recast("stored", _GATE_UP, (f"{_EXPERTS}gate_up_proj",), (Join(row_by_row), Transpose())),
    Recast("stored", _GATE_UP, (f"{_EXPERTS}gate_up_proj.weight",), (Join(row_by_row),)),
    Recast("stored", (f"{_DOWN}.weight",), (_DOWN,), (Transpose(),)),
    Recast(
        "stored",
        tuple(f"{_EXPERTS}{part}_proj.bias" for part in ("gate", "up")),
        (f"{_EXPERTS}gate_up_proj_bias",),
        (Join(row_by_row, columns=True),),
    ),
    Recast("stored", (f"{_DOWN}.bias",), (f"{_DOWN}_bias",), ()),
)

SPEC = Dense(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    arch="gpt-oss",
    names=tuple(
        _name(name)
        for name in names(
            WIRING,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            experts=EXPERTS,
            stacks="experts",
            apart=False,
            called={"mlp.gate": "mlp.router"},
        )
    ),
    wiring=WIRING,
    experts=EXPERTS,
    recasts=RECASTS,
    fixed={"attention_bias": True},
    defaults={"rms_norm_eps": 1e-5, "sliding_window": 128, "attention_bias": True, **_GATE},
    theta=150000.0,
    adopts=_adopt,
    rounds_ramp=True,
    windowed={"gguf", "mlx"},
    windows=windows_by_type,
    period=2,
    tied={"gguf": False, "mlx": False},
    gguf=_gguf,
    check=_check,
    back=_back,
).spec()
