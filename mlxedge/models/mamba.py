"""mamba: the first Mamba; state spaces in all layers, no attention and no MLP."""

from __future__ import annotations

from collections.abc import Callable

from mlxedge import gguf_values as gv
from mlxedge.models.mixers import mamba
from mlxedge.models.spaces import Spaces
from mlxedge.models.spec import Config

#: By the names that the mixer has for them.
CALLED = {
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_rank": "time_step_rank",
    "mamba_expand": "expand",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_proj_bias": "use_bias",
}
_DEFAULTS = {
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_dt_rank": "auto",
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}


def _adopt(config: Config) -> Config:
    made = mamba.adopt({"tie_word_embeddings": True, **config}, CALLED, _DEFAULTS)
    made |= {own: made[key] for key, own in CALLED.items()}
    one = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": made["hidden_size"]}
    # transformers goes by this one where it is given.
    inner = made.get("intermediate_size")
    inner = made["mamba_inner"] if inner is None else inner
    return made | one | {"intermediate_size": inner, "mamba_inner": inner}


def _back(get: Callable[[str], int], hidden: int) -> Config:
    return {
        "conv_kernel": get("ssm.conv_kernel"),
        "state_size": get("ssm.state_size"),
        "time_step_rank": get("ssm.time_step_rank"),
        "expand": get("ssm.inner_size") // hidden,
    }


SPEC = Spaces(
    model_type="mamba",
    architecture="MambaForCausalLM",
    mixer="mamba",
    tensors=mamba.names(),
    recasts=mamba.RECASTS,
    adopt=_adopt,
    metadata=mamba.metadata,
    back=_back,
    objections=mamba.objections,
    extra=lambda config: {"ssm.dt_b_c_rms": gv.boolean(False)},
    reads=lambda metadata: (
        not ((norms := metadata.get("mamba.ssm.dt_b_c_rms")) is not None and norms.value)
    ),
).spec()
