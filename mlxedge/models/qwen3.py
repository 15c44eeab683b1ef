"""qwen3: dense Qwen 3; RMSNorm on each head of q and k, no biases."""

from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.windows import qwen_windows
from mlxedge.models.wiring import Wiring

WIRING = Wiring(head_norm="head")


def _check(config: Config, runtime: str) -> list[str]:
    if config.get("attention_bias"):
        return ["attention biases are not part of this architecture in llama.cpp and mlx-lm"]
    return []


SPEC = Dense(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    arch="qwen3",
    names=names(WIRING),
    wiring=WIRING,
    fixed={"attention_bias": False, "use_sliding_window": False},
    check=_check,
    windows=qwen_windows,
).spec()
