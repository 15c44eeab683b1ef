"""qwen3_5_moe_text: the language model of Qwen3.5 with experts in every layer."""

from __future__ import annotations

from mlxedge.models import qwen3_5_nets as nets
from mlxedge.models.experts import Experts

SPEC = nets.qwen3_5(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    arch="qwen35moe",
    whole="qwen3_5_moe",
    experts=Experts(shared_width="shared_expert_intermediate_size", sparse=False, normalise=True),
)
