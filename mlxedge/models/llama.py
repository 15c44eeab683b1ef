"""llama: Llama 1–3.x, SmolLM and SmolLM2, TinyLlama, Yi and others of this graph."""

from mlxedge.models.dense import Dense, names

SPEC = Dense(
    model_type="llama",
    architecture="LlamaForCausalLM",
    arch="llama",
    names=names(rope_rows=True, qkv_bias=True, o_bias=True, mlp_bias=True),
    fixed={"attention_bias": False, "mlp_bias": False},
    freq_factors=True,
).spec()
