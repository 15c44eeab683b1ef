"""mamba2: Mamba-2 and Codestral Mamba; state spaces in all layers, no attention and no MLP."""

from __future__ import annotations

from collections.abc import Callable

from mlxedge.models.mixers import mamba2
from mlxedge.models.spaces import Spaces
from mlxedge.models.spec import Config

#: By the names that the mixer has for them.
CALLED = {
    "mamba_n_heads": "num_heads",
    "mamba_d_head": "head_dim",
    "mamba_n_groups": "n_groups",
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_proj_bias": "use_bias",
}
_DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_d_head": 64,
    "mamba_n_groups": 8,
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}


def _adopt(config: Config) -> Config:
    made = mamba2.adopt(config, CALLED, _DEFAULTS)
    made |= {own: made[key] for key, own in CALLED.items()}
    heads = made["num_heads"]
    return made | {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": heads * made["head_dim"],
    }


def _back(get: Callable[[str], int], hidden: int) -> Config:
    own = mamba2.back(get)
    expand = own["mamba_n_heads"] * own["mamba_d_head"] // hidden
    return {"expand": expand, **{CALLED[key]: value for key, value in own.items()}}


SPEC = Spaces(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    mixer="mamba2",
    tensors=mamba2.names(),
    recasts=mamba2.RECASTS,
    adopt=_adopt,
    metadata=mamba2.metadata,
    back=_back,
    objections=mamba2.objections,
).spec()
