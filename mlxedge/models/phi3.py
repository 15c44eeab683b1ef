"""phi3: Phi-3, 3.5 and 4, mini to medium; q, k and v are one matrix, gate and up another."""

from __future__ import annotations

from mlxedge.models.dense import Dense, Key, longrope_notes, longrope_objections
from mlxedge.models.names import names
from mlxedge.models.rope import LONG, rope_settings
from mlxedge.models.rope_files import rope_values
from mlxedge.models.spec import Config
from mlxedge.models.windows import every_layer
from mlxedge.models.wiring import Wiring

WIRING = Wiring(qkv_fused=True, mlp="fused", partial=True)
_ORIGINAL = "original_max_position_embeddings"


def _settle(config: Config) -> Config:
    """With the context of the first training, which both runtimes read."""
    rope = rope_settings(config)
    original = rope.original_max_position if rope.type == LONG else config[_ORIGINAL]
    return config | {_ORIGINAL: original, "sliding_window": config.get("sliding_window")}


def _check(config: Config, runtime: str) -> list[str]:
    rope = rope_settings(config)
    found = []
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        found.append("the runtimes need heads that add up to the hidden size")
    if rope.type not in ("default", LONG):
        found.append(f"phi3 has no {rope.type} rope scaling")
    if runtime == "mlx":
        found += longrope_objections(config)
    return found


def _mlx(config: Config) -> Config:
    """mlx-lm's phi3 reads ``type``, of old."""
    rope = rope_settings(config)
    if rope.type != LONG:
        return {}
    scaling = {k: v for k, v in rope_values(rope).items() if k != "rope_theta"}
    return {"rope_scaling": scaling | {"type": LONG}}


SPEC = Dense(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    arch="phi3",
    names=names(WIRING),
    wiring=WIRING,
    fixed={},
    defaults={"rms_norm_eps": 1e-5, _ORIGINAL: 4096},
    keys=(
        Key(_ORIGINAL, "rope.scaling.original_context_length", "u32", 4096),
        Key("sliding_window", "attention.sliding_window", "u32", none=0),
    ),
    head_dim_free=False,
    mlx=_mlx,
    longrope=True,
    windows=lambda config: every_layer(config, None),
    settles=_settle,
    check=_check,
    notes=longrope_notes,
).spec()
