"""Folders with a few quantized tensors, and how what is read from them is looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mlxedge.fallback import OPS
from mlxedge.sources import open_source
from oracles.tiny import write_tiny_llama


def write_folder(folder: Path, rules: Mapping[str, Any] | None, arrays: Mapping[str, Any]) -> Path:
    """``arrays`` are NumPy's or torch's."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"model_type": "llama", "torch_dtype": "bfloat16"}
    if rules is not None:
        config["quantization_config"] = dict(rules)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(a)) if isinstance(a, np.ndarray) else a
        for name, a in arrays.items()
    }
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def read_weights(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Every tensor: its encoding, and its weights as f32 in its own shape.

    Rows are read whole, one by one and in pieces that fit nothing; all must agree.
    """
    found = {}
    with open_source(folder) as checkpoint:
        for name, tensor in checkpoint.tensors.items():

            def rows(start: int, stop: int, tensor: Any = tensor) -> np.ndarray:
                return OPS.decode(tensor.read_rows(start, stop), tensor.encoding)

            whole = OPS.decode(tensor.read(), tensor.encoding)
            for step in (1, 3, 7):
                starts = range(0, tensor.rows, step)
                pieces = [rows(i, min(i + step, tensor.rows)) for i in starts]
                np.testing.assert_array_equal(np.concatenate(pieces), whole)
            found[name] = tensor.encoding.name, whole.reshape(tensor.shape)
    return found


def awq_layer(
    layer: str, group: int, rows: int = 64, cols: int = 128, scale: float | None = None
) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """A layer as AutoAWQ packs it (``awq/modules/linear/gemm.py``, ``from_linear``)."""
    random, groups = np.random.default_rng(5), 1 if group == -1 else cols // group
    codes = random.integers(0, 16, (rows, cols))
    zeros = random.integers(0, 16, (rows, groups))
    scales = random.uniform(0.001, 0.1, (rows, groups)).astype(np.float16)
    if scale is not None:
        scales[:] = scale
    weights = np.empty((rows, cols), np.float32)
    for r in range(rows):
        for c in range(cols):
            g = c * groups // cols
            weights[r, c] = np.float32(scales[r, g]) * np.float32(codes[r, c] - zeros[r, g])

    def packed(values: np.ndarray) -> np.ndarray:
        out = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for word in range(out.shape[1]):
            for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                out[:, word] |= values[:, word * 8 + output].astype(np.uint32) << (4 * place)
        return out.view(np.int32)

    arrays = {
        f"{layer}.qweight": packed(codes.T),
        f"{layer}.qzeros": packed(zeros.T),
        f"{layer}.scales": scales.T,
    }
    rules = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return rules, arrays, weights


def awq_model(folder: Path, scale: float | None = None) -> tuple[Path, Path]:
    """A tiny model with AWQ layers in groups of 32, and the same one with their decoded weights in
    f16, which holds them if the ``scale`` of all is a power of two."""
    whole = write_tiny_llama(folder / "whole", dtype="f16")
    tensors = load_file(whole / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        rows, cols = tensor.shape
        stem = name.removesuffix(".weight")
        _, arrays, weights = awq_layer(stem, 32, rows, cols, scale)
        tensors[name] = torch.from_numpy(weights).to(torch.float16)
        for part, array in arrays.items():
            stored[part] = torch.from_numpy(np.ascontiguousarray(array))
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    made = folder / "awq"
    made.mkdir()
    for file in whole.iterdir():
        if file.name != "model.safetensors":
            (made / file.name).write_bytes(file.read_bytes())
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (made / "config.json").write_text(json.dumps(config))
    save_file(stored, made / "model.safetensors", metadata={"format": "pt"})
    return whole, made
