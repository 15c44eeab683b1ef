"""qwen3_moe: Qwen 3 with experts; RMSNorm on each head of q and k, no biases."""

from mlxedge.models.dense import Dense, experts_everywhere
from mlxedge.models.experts import Experts
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.windows import every_layer, no_windows
from mlxedge.models.wiring import Wiring

EXPERTS = Experts()
WIRING = Wiring(head_norm="head")


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if config.get("attention_bias"):
        found.append("attention biases are not part of this architecture in llama.cpp and mlx-lm")
    if runtime == "gguf":
        found += experts_everywhere(EXPERTS, config, runtime)
        if not config["norm_topk_prob"]:
            found.append("llama.cpp's qwen3moe always normalises scores: norm_topk_prob is false")
    return found


def _windows(config: Config) -> tuple[int, ...]:
    return every_layer(config, 4096) if config.get("use_sliding_window") else no_windows(config)


SPEC = Dense(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    arch="qwen3moe",
    names=names(WIRING, experts=EXPERTS),
    wiring=WIRING,
    fixed={"attention_bias": False, "use_sliding_window": False, "norm_topk_prob": True},
    experts=EXPERTS,
    windows=_windows,
    check=_check,
).spec()
