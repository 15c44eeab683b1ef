"""mimo: Xiaomi's MiMo 7B; Qwen 2's graph, and its files in GGUF. The layers that predict further
tokens are left out."""

from __future__ import annotations

from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.spec import Config


def _check(config: Config, runtime: str) -> list[str]:
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        return ["the runtimes need heads that add up to the hidden size"]
    return []


SPEC = Dense(
    model_type="mimo",
    architecture="MiMoForCausalLM",
    arch="qwen2",
    names=names(qkv_bias=True),
    fixed={},
    head_dim_free=False,
    drops_predicting=True,
    hf=lambda config: (
        config
        | {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": False,
        }
    ),
    reads=lambda metadata: False,  # they are Qwen's
    check=_check,
).spec()
