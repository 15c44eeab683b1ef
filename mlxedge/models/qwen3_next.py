"""qwen3_next: Qwen3-Next; Gated DeltaNet and gated attention, experts in every layer.

The layers that predict further tokens are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlxedge.models import delta_nets as nets
from mlxedge.models.delta_nets import A_LOG, CONV, QKV, A, B, Z
from mlxedge.models.dense import Dense
from mlxedge.models.experts import Experts
from mlxedge.models.mixers.gated_delta import settings
from mlxedge.models.recasts import Join, Recast, interleaved
from mlxedge.models.spec import Config

EXPERTS = Experts(shared_width="shared_expert_intermediate_size")
_LINEAR = "model.layers.{i}.linear_attn."


def _by_key_head(config: Config, sizes: Sequence[int]) -> np.ndarray:
    """Of each head of keys its query, its key, its values, and what gates these."""
    delta = settings(config)
    return interleaved(delta.key_heads, [delta.keys, delta.keys, delta.values, delta.values])


def _heads_by_key_head(config: Config, sizes: Sequence[int]) -> np.ndarray:
    """Of each head of keys what b has for its values, then what a has."""
    return interleaved(settings(config).key_heads, sizes)


_BA = Join(_heads_by_key_head)
_JOINED = ((QKV, Z), (f"{_LINEAR}in_proj_qkvz.weight",), (Join(_by_key_head),))
_SCALARS = ((B, A), (f"{_LINEAR}in_proj_ba.weight",), (_BA,))

SPEC = Dense(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    arch="qwen3next",
    names=nets.delta_names(EXPERTS),
    wiring=nets.WIRING,
    fixed={"attention_bias": False, "norm_topk_prob": True},
    defaults={**nets.DEFAULTS, "norm_topk_prob": True},
    experts=EXPERTS,
    mixers=nets.mixers,
    recasts=(
        Recast("stored", *_JOINED),
        Recast("stored", *_SCALARS),
        *nets.MLX,
        Recast("mlx", *_JOINED),
        Recast("mlx", *_SCALARS),
        Recast("gguf", (B, A), ("blk.{i}.ssm_ba.weight",), (_BA,)),
        Recast("gguf", (A_LOG,), ("blk.{i}.ssm_a",), (nets.RATE,)),
        Recast("gguf", (CONV,), ("blk.{i}.ssm_conv1d.weight",), (nets.FLAT,)),
        Recast("gguf", _JOINED[0], ("blk.{i}.ssm_in.weight",), _JOINED[2], written=False),
    ),
    drops_predicting=True,
    settles=nets.settle,
    mlx=nets.mlx,
    gguf=nets.gguf,
    check=nets.check(EXPERTS),
    back=nets.back,
).spec()
