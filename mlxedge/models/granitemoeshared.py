"""granitemoeshared: granitemoe with an expert that all tokens share."""

from __future__ import annotations

from dataclasses import replace

from mlxedge.models.dense import Dense, Key
from mlxedge.models.experts import SHARED
from mlxedge.models.granite import FACTORS, factors, zeros
from mlxedge.models.granitemoe import EXPERTS as WITHOUT_SHARED
from mlxedge.models.granitemoe import KEYS, RECASTS, tensors
from mlxedge.models.recasts import Join, Recast

_WIDTH = "shared_intermediate_size"
_GGUF_WIDTH = "expert_shared_feed_forward_length"
EXPERTS = replace(WITHOUT_SHARED, shared_width=_WIDTH, shared_gate=False)
_LAYER = "model.layers.{i}."
_GATE, _UP, _DOWN = (f"{_LAYER}{part}.weight" for part in SHARED)


SPEC = Dense(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    arch="granitemoe",
    names=tensors(EXPERTS),
    experts=EXPERTS,
    recasts=(
        *RECASTS,
        Recast("stored", (_GATE, _UP), (f"{_LAYER}shared_mlp.input_linear.weight",), (Join(),)),
        Recast("stored", (_DOWN,), (f"{_LAYER}shared_mlp.output_linear.weight",), ()),
    ),
    factors=factors,
    fixed={"attention_bias": False},
    defaults={**dict.fromkeys(FACTORS, 1.0), _WIDTH: 1024},
    keys=(*KEYS, Key(_WIDTH, _GGUF_WIDTH, "u32")),
    freq_factors=True,
    lacks=("mlx",),
    reads=lambda metadata: f"granitemoe.{_GGUF_WIDTH}" in metadata,
    check=zeros,
).spec()
