"""mixtral: mistral's graph with experts in every layer.

llama.cpp runs it as a llama with experts. transformers keeps the experts apart under the names of
the first release, ``block_sparse_moe.experts.E.w1`` (gate), ``w3`` (up) and ``w2`` (down).
"""

from mlxedge.models.dense import Dense, plain_rope
from mlxedge.models.experts import Experts
from mlxedge.models.names import names
from mlxedge.models.spec import Config
from mlxedge.models.windows import every_layer

EXPERTS = Experts(width="intermediate_size", sparse=False, score="softmax_top", normalise=False)


def _check(config: Config, runtime: str) -> list[str]:
    if runtime == "gguf":
        return []
    found = plain_rope(config, "mlx-lm")
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("mlx-lm's mixtral needs heads that add up to the hidden size")
    return found


SPEC = Dense(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    arch="llama",
    names=names(
        rope_rows=True, experts=EXPERTS, block="block_sparse_moe", parts=("w1", "w3", "w2")
    ),
    fixed={},
    freq_factors=True,
    experts=EXPERTS,
    windows=lambda config: every_layer(config, None),
    reads=lambda metadata: "llama.expert_count" in metadata,
    check=_check,
).spec()
