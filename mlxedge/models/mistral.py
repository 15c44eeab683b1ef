"""mistral: llama's graph. llama.cpp and mlx-lm attend to everything, where a model with a
``sliding_window`` attends to the last tokens only; they agree up to that many tokens."""

from mlxedge.models.dense import Dense, names

SPEC = Dense(
    model_type="mistral",
    architecture="MistralForCausalLM",
    arch="llama",
    names=names(rope_rows=True),
    fixed={},
    freq_factors=True,
).spec()
