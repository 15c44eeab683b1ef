"""mlx-lm loads folders of many types, and writes the same settings itself."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model, quantize_model
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.fallback import OPS
from mlxedge.recipes.overrides import parse_overrides
from mlxedge.sources import open_source

RULES = [r"layers\.0.*down_proj=8bit-g32", "gate_proj=mxfp8", "k_proj=nvfp4", "o_proj=3bit-g128"]
EIGHT = {"group_size": 32, "bits": 8, "mode": "affine"}
PATHS = {
    "model.layers.0.mlp.down_proj": EIGHT,
    "lm_head": {"group_size": 64, "bits": 6, "mode": "affine"},
    "model.embed_tokens": EIGHT,
    **{
        f"model.layers.{i}.{path}": {"group_size": group, "bits": bits, "mode": mode}
        for i in (0, 1)
        for path, group, bits, mode in (
            ("mlp.gate_proj", 32, 8, "mxfp8"),
            ("self_attn.k_proj", 16, 4, "nvfp4"),
            ("self_attn.o_proj", 128, 3, "affine"),
        )
    },
}

convert = functools.partial(mlxedge.convert, quality="reference", calibrate=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("m") / "tiny", tied=False, dtype="bf16")


@pytest.mark.parametrize("target", ["mlx:4bit", "mlx:mxfp4", "mlx:bf16"])
def test_mlx_lm_loads_every_weight(target: str, folder: Path, tmp_path: Path) -> None:
    made = parse_overrides([*RULES, "v_proj=bf16"], output="6bit", embedding="8bit-g32")
    convert(folder, target, tmp_path / "out", overrides=made)
    model, _ = load_model(tmp_path / "out")
    modules = dict(model.named_modules())
    for path, settings in PATHS.items():
        module = modules[path]
        assert {k: getattr(module, k) for k in settings} == settings, path
    assert not hasattr(modules["model.layers.0.self_attn.v_proj"], "bits")
    with open_source(tmp_path / "out") as source:
        for name, tensor in source.tensors.items():
            module = modules[name.removesuffix(".weight")]
            weight = module.weight
            if hasattr(module, "bits"):
                weight = mx.dequantize(
                    weight, module.scales, module.get("biases"), module.group_size, module.bits,
                    module.mode,
                )  # fmt: skip
            ours = OPS.decode(tensor.read(), tensor.encoding).reshape(tensor.shape)
            theirs = np.array(weight.astype(mx.float32))
            np.testing.assert_allclose(theirs, ours, rtol=0.02, atol=1e-3, err_msg=name)
    logits = model(mx.array([[1, 2, 3]]))
    assert np.isfinite(np.array(logits.astype(mx.float32))).all()


def test_mlx_lm_writes_the_same_settings(folder: Path, tmp_path: Path) -> None:
    made = parse_overrides(RULES, output="6bit", embedding="8bit-g32")
    convert(folder, "mlx:4bit", tmp_path / "out", overrides=made)
    ours = json.loads((tmp_path / "out" / "config.json").read_text())

    def predicate(path: str, module: Any) -> bool | dict[str, Any]:
        return PATHS.get(path, True)

    model, config = load_model(folder, lazy=True)
    _, theirs = quantize_model(model, config, 64, 4, quant_predicate=predicate)
    assert ours["quantization"] == theirs["quantization"]
    assert ours["quantization_config"] == ours["quantization"]
