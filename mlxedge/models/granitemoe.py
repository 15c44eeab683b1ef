"""granitemoe: granite's graph with experts in every layer, of which folders have gate and up in one
tensor."""

from __future__ import annotations

from mlxedge.models.dense import Dense, Key
from mlxedge.models.experts import STACKS, Experts
from mlxedge.models.granite import FACTORS, factors, zeros
from mlxedge.models.names import names
from mlxedge.models.recasts import Join, Recast
from mlxedge.models.spec import Config, Name

EXPERTS = Experts(width="intermediate_size", sparse=False, score="softmax_top", normalise=False)
_LAYER = "model.layers.{i}."
_GATE, _UP, _DOWN = (f"{_LAYER}{stack}.weight" for stack in STACKS)
_MOE = "block_sparse_moe"
RECASTS = (
    Recast("stored", (_GATE, _UP), (f"{_LAYER}{_MOE}.input_linear.weight",), (Join(),)),
    Recast("stored", (_DOWN,), (f"{_LAYER}{_MOE}.output_linear.weight",), ()),
)
KEYS = tuple(Key(key, gguf, default=1.0) for key, gguf in FACTORS.items())


def tensors(experts: Experts) -> tuple[Name, ...]:
    return names(
        rope_rows=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        experts=experts,
        block=_MOE,
        apart=False,
        called={"mlp.gate": f"{_MOE}.router.layer"},
    )


def _check(config: Config, runtime: str) -> list[str]:
    found = zeros(config, runtime)
    heads = config["head_dim"] * config["num_attention_heads"]
    if runtime == "mlx" and heads != config["hidden_size"]:
        found.append("mlx-lm's granitemoe needs heads that add up to the hidden size")
    return found


SPEC = Dense(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    arch="granitemoe",
    names=tensors(EXPERTS),
    experts=EXPERTS,
    recasts=RECASTS,
    factors=factors,
    fixed={"attention_bias": False},
    defaults=dict.fromkeys(FACTORS, 1.0),
    keys=KEYS,
    freq_factors=True,
    reads=lambda metadata: "granitemoe.expert_shared_feed_forward_length" not in metadata,
    check=_check,
).spec()
