"""qwen2_moe: Qwen 1.5 and 2 with experts and one that all tokens share; biases on q, k and v."""

from mlxedge.models.dense import Dense, experts_everywhere, plain_rope
from mlxedge.models.experts import Experts
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.windows import qwen_windows

EXPERTS = Experts(shared_width="shared_expert_intermediate_size")


def _check(config: Config, runtime: str) -> list[str]:
    found = experts_everywhere(EXPERTS, config, runtime)
    if config["norm_topk_prob"]:
        found.append("the runtime does not normalise the scores of experts (norm_topk_prob)")
    if not config.get("qkv_bias", True):
        found.append("qkv_bias: false is not part of this architecture in llama.cpp and mlx-lm")
    if config["tie_word_embeddings"]:
        found.append("tied embeddings are not part of this architecture in llama.cpp and mlx-lm")
    if runtime == "mlx":
        found += plain_rope(config, "mlx-lm")
        if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
            found.append("mlx-lm's qwen2_moe needs heads that add up to the hidden size")
    return found


def _windows(config: Config) -> tuple[int, ...]:
    """Without ``layer_types``, every second layer below ``max_window_layers``."""
    if config.get("layer_types") or not config.get("use_sliding_window"):
        return qwen_windows(config)
    window, last = int(config.get("sliding_window", 4096) or 0), config.get("max_window_layers", 28)
    return tuple(
        window if i % 2 == 0 and i < last else 0 for i in range(config["num_hidden_layers"])
    )


SPEC = Dense(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    arch="qwen2moe",
    names=names(qkv_bias=True, experts=EXPERTS),
    fixed={"use_sliding_window": False, "norm_topk_prob": False},
    head_dim_free=False,
    experts=EXPERTS,
    windows=_windows,
    check=_check,
).spec()
