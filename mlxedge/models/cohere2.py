"""cohere2: Command R7B and Command A; cohere with windows, and rotation only where there is one."""

from __future__ import annotations

from mlxedge.models.cohere import WIRING, check
from mlxedge.models.dense import Dense, Key
from mlxedge.models.names import names
from mlxedge.models.rope import Rope, rope_settings
from mlxedge.models.spec import Config
from mlxedge.models.windows import period_of, periodic, windows_by_type
from mlxedge.models.wiring import Factors


def _ropes(config: Config) -> tuple[Rope | None, ...]:
    rope = rope_settings(config)
    return tuple(rope if window else None for window in windows_by_type(config))


def _check(config: Config, runtime: str) -> list[str]:
    found = check(config, runtime) + periodic(config, runtime)
    if not any(windows_by_type(config)):
        found.append("the runtime needs a sliding_window and a layer that has it")
    return found


SPEC = Dense(
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    arch="cohere2",
    names=names(WIRING, qkv_bias="attention_bias", o_bias="attention_bias"),
    wiring=WIRING,
    factors=lambda config: Factors(logits=float(config["logit_scale"])),
    ropes=_ropes,
    fixed={"attention_bias": False},
    defaults={
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    epsilon="layer_norm_eps",
    keys=(Key("logit_scale", "logit_scale", default=1.0),),
    mlx=lambda config: {"sliding_window_pattern": period_of(config)},
    tied={"gguf": True, "mlx": True},
    windowed={"gguf", "mlx"},
    period=4,
    windows=windows_by_type,
    check=_check,
).spec()
