"""qwen3_5_text: the language model of Qwen3.5; Gated DeltaNet and gated attention, a dense MLP.

Rotation goes by three positions, which are one and the same where there are no images.
"""

from __future__ import annotations

from mlxedge.models import qwen3_5_nets as nets

SPEC = nets.qwen3_5(
    model_type="qwen3_5_text", architecture="Qwen3_5ForCausalLM", arch="qwen35", whole="qwen3_5"
)
