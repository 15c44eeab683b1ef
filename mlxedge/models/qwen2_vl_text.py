"""qwen2_vl_text: the language model of Qwen 2 VL, which on text computes as Qwen 2 does.

Positions of its rotary embeddings are of time, height and width, all the same in text. All
runtimes get a Qwen 2: llama.cpp's qwen2vl leaves the norms' epsilon out.
"""

from __future__ import annotations

from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.rope import rope_settings
from mlxedge.models.rope_files import both_styles, rope_values
from mlxedge.models.spec import Config, ModelSpec
from mlxedge.models.windows import qwen_windows

#: How many pairs of dimensions turn by time, height and width.
SECTIONS = "mrope_section"


def adopt(config: Config, usual: list[int]) -> Config:
    """With ``mrope_section`` apart; the type of scaling that is named after it is none."""
    made = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values := made.get(key), dict):
            continue
        rope = {k: v for k, v in values.items() if not k.startswith("mrope_")}
        for kind in ("type", "rope_type"):
            if rope.get(kind) == "mrope":
                rope[kind] = "default"
        made |= {key: rope or None, SECTIONS: values.get(SECTIONS) or made.get(SECTIONS)}
    return made | {SECTIONS: made.get(SECTIONS) or usual}


def plain(config: Config, model_type: str, architecture: str) -> Config:
    """As the config of a model that only reads."""
    made = {k: v for k, v in config.items() if k != SECTIONS}
    rope = both_styles(rope_values(rope_settings(config)))
    return made | rope | {"model_type": model_type, "architectures": [architecture]}


def spec_of(model_type: str) -> ModelSpec:
    """Qwen 2.5's is the same."""
    return Dense(
        model_type=model_type,
        architecture="Qwen2ForCausalLM",
        arch="qwen2",
        names=names(qkv_bias=True),
        fixed={"use_sliding_window": False},
        theta=1e6,
        defaults={"rms_norm_eps": 1e-5},
        head_dim_free=False,
        windows=qwen_windows,
        adopts=lambda config: adopt(config, [16, 24, 24]),
        mlx=lambda config: {"model_type": "qwen2"},
        hf=lambda config: plain(config, "qwen2", "Qwen2ForCausalLM"),
        reads=lambda metadata: False,  # they are Qwen's
    ).spec()


SPEC = spec_of("qwen2_vl_text")
