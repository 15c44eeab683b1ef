"""mistral: llama's graph. llama.cpp and mlx-lm attend to everything, where a model with a
``sliding_window`` attends to the last tokens only; they agree up to that many tokens."""

from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.windows import every_layer

SPEC = Dense(
    model_type="mistral",
    architecture="MistralForCausalLM",
    arch="llama",
    names=names(rope_rows=True),
    fixed={},
    freq_factors=True,
    windows=lambda config: every_layer(config, 4096),
    reads=lambda metadata: False,  # in GGUF it is a llama
).spec()
