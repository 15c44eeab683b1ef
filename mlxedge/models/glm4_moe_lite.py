"""glm4_moe_lite: GLM-4.7-Flash; DeepSeek-V3's graph with sizes of its own.

The layers that predict further tokens are left out.
"""

from __future__ import annotations

from dataclasses import replace

from mlxedge.models import deepseek_v3, latent

_SIZES = {
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
}
SPEC = replace(
    deepseek_v3.DENSE,
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    defaults={
        "rms_norm_eps": 1e-5,
        "n_shared_experts": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
    },
    adopts=lambda config: deepseek_v3.adopt_kinds(latent.adopt(config, _SIZES)),
    settles=lambda config: deepseek_v3.with_kinds(deepseek_v3.settle(config)),
    notes=lambda config, runtime: latent.epsilon_notes(config, ("gguf", "mlx"), runtime),
    reads=deepseek_v3.of_type("glm4_moe_lite"),
    back=lambda config, get: deepseek_v3.with_kinds(deepseek_v3.back(config, get)),
).spec()
