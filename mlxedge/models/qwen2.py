"""qwen2: Qwen 1.5, 2 and 2.5; biases on q, k and v."""

from mlxedge.models.dense import Dense
from mlxedge.models.names import names
from mlxedge.models.windows import qwen_windows

SPEC = Dense(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    arch="qwen2",
    names=names(qkv_bias=True),
    fixed={"use_sliding_window": False},
    head_dim_free=False,
    windows=qwen_windows,
).spec()
