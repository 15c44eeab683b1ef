"""glm4v_text: the language model of GLM-4.1V, which on text computes as GLM-4 does: all get one."""

from __future__ import annotations

from mlxedge.models import glm4
from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.qwen2_vl_text import adopt, plain

SPEC = Dense(
    model_type="glm4v_text",
    architecture="Glm4ForCausalLM",
    arch="glm4",
    names=names(glm4.WIRING, qkv_bias=True),
    wiring=glm4.WIRING,
    fixed={"attention_bias": True},
    defaults={"attention_bias": True, "rms_norm_eps": 1e-5},
    tied={"mlx": False},
    adopts=lambda config: adopt(config, [8, 12, 12]),
    mlx=lambda config: {"model_type": "glm4"},
    hf=lambda config: plain(config, "glm4", "Glm4ForCausalLM"),
    reads=lambda metadata: False,  # they are GLM-4's
    check=glm4.check,
).spec()
