"""llama: Llama 1–3.x, SmolLM and SmolLM2, TinyLlama, Yi and others of this graph."""

from mlxedge.models.dense import Dense
from mlxedge.models.names import names

SPEC = Dense(
    model_type="llama",
    architecture="LlamaForCausalLM",
    arch="llama",
    names=names(
        rope_rows=True, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    fixed={"attention_bias": False, "mlp_bias": False},
    freq_factors=True,
    reads=lambda metadata: "llama.expert_count" not in metadata,
).spec()
