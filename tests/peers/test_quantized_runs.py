"""Every architecture quantized, as people convert it: the runtime loads it and computes numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import architectures_recurrent
from oracles.checkpoints import OWN, PARTIAL, SAVED, write_checkpoint
from oracles.llama_cpp import LlamaCpp
from oracles.llama_quantize import types

import mlxedge
from mlxedge.models import spec_for
from mlxedge.sources.gguf import read_gguf

#: Matrices of other kinds than llama's, or in one.
OTHERS = (
    *("phi3", "gemma3_text", "glm4", "cohere-qk-norm", "starcoder2", "nemotron", "stablelm"),
    *("apertus", "phi", "stablelm-parallel", "minicpm-tied"),
    *("gpt2", "gpt_neox", "falcon", "internlm2"),
    *architectures_recurrent.WIDE,
    *("gpt_oss", "granitemoe", "granitemoeshared", "afmoe", "ernie4_5_moe"),
    *("deepseek_v2-queries-whole", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "minicpm3"),
    "youtu",
    *("gemma4_text", "gemma4_text-no-inputs-keys-as-values", "gemma4_text-experts"),
    "gemma3n_text-shared",
    *("qwen3_next", "qwen3_5_text"),
)
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "moe_intermediate_size")
#: Number, as llama-quantize counts.
RECIPES = {
    **{"q2_k": 10, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_m": 17},
    **{"q6_k": 18, "iq4_xs": 30},
}

TOKENS = [int(t) for t in np.random.default_rng(2).integers(3, 512, 40)]


#: By name the settings of a checkpoint, and the formats that it is converted to: beside all that
#: both runtimes have, one of each architecture that only one of them has.
RUNS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    name: (settings, ("gguf", "mlx")) for name, settings in SAVED.items()
}
RUNS |= {
    settings["model_type"]: (settings, tuple({"gguf", "mlx"} - set(refused)))
    for settings, refused in PARTIAL.values()
    if set(refused) == set(spec_for(settings).lacks)
}


@pytest.mark.parametrize("name", RUNS)
def test_quantized_models_run(name: str, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm import load

    settings, formats = RUNS[name]
    folder = write_checkpoint(tmp_path / "source", **settings)
    targets = {"gguf": "gguf:q4_k_m", "mlx": "mlx:4bit"}
    mlxedge.convert(folder, [targets[kind] for kind in formats], tmp_path / "made")
    with mlxedge.load(folder, engine="numpy") as model:
        truth = model.logits(TOKENS)
    found = {}
    for made in (tmp_path / "made").rglob("*.gguf"):
        with LlamaCpp(made) as model:
            found["llama.cpp"] = model.logits(TOKENS)
    for config in (tmp_path / "made").rglob("config.json"):
        mlx_lm = load(str(config.parent))[0]
        found["mlx-lm"] = np.array(mlx_lm(mx.array([TOKENS]))[0].astype(mx.float32))
    assert len(found) == len(formats)
    for logits in found.values():
        assert np.isfinite(logits).all()
        # A random model's weights say more in four bits than chance does.
        assert np.corrcoef(logits.ravel(), truth.ravel())[0, 1] > 0.5


@pytest.mark.parametrize("name", [n for n in OTHERS if n in RUNS])
def test_types_equal_llama_quantizes(name: str, tmp_path: Path) -> None:
    settings = RUNS[name][0] | {"hidden_size": 256, "intermediate_size": 256}
    # Latents and heads of whole blocks, where there are some.
    settings |= {key: 256 for key in LATENT if key in OWN.get(settings["model_type"], {})}
    settings |= architectures_recurrent.WIDE.get(name, {})
    layers = max(9, settings.get("num_hidden_layers", 0))
    if types_of := settings.get("layer_types"):
        settings["layer_types"] = types_of * -(-layers // len(types_of))
        layers = len(settings["layer_types"])
    folder = write_checkpoint(tmp_path / "source", **settings | {"num_hidden_layers": layers})
    source = tmp_path / "source-F32.gguf"
    targets = ["gguf:f32", *(f"gguf:{recipe}" for recipe in RECIPES)]
    mlxedge.convert(folder, targets, tmp_path, quality="reference", calibrate=False)
    for recipe, number in RECIPES.items():
        made = read_gguf(tmp_path / f"source-{recipe.upper()}.gguf").tensors
        assert {t.name: t.encoding.name for t in made} == types(source, number), recipe
