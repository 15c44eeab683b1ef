"""qwen2: Qwen 1.5, 2 and 2.5; biases on q, k and v."""

from mlxedge.models.dense import Dense, qwen_windows
from mlxedge.models.names import names

SPEC = Dense(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    arch="qwen2",
    names=names(qkv_bias=True),
    fixed={"use_sliding_window": False},
    head_dim_free=False,
    windows=qwen_windows,
).spec()
