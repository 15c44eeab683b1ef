"""Tiny models whose layers are stored as the quantizers of the Hugging Face world do it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from oracles.tiny import write_tiny_llama

Arrays = dict[str, torch.Tensor]
#: Of the weights as they are; makes the arrays that stand in their place.
Coder = Callable[[str, torch.Tensor], Arrays]
GROUP = 32


def _codes(weight: torch.Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes around the middle of their range and f16 scales ``[out, groups]``."""
    grouped = weight.numpy().astype(np.float32).reshape(weight.shape[0], -1, GROUP)
    middle = 2 ** (bits - 1)
    scales = (np.abs(grouped).max(-1) / (middle - 1)).astype(np.float16)
    codes = np.rint(grouped / scales[:, :, None].astype(np.float32)) + middle
    return codes.reshape(weight.shape).astype(np.uint32), scales


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of a row as i32 words, the first in the lowest bits."""
    each = 32 // bits
    places = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    words = (codes.reshape(codes.shape[0], -1, each) << places).sum(-1, dtype=np.uint32)
    return words.view(np.int32)


def _gptq(bits: int) -> Coder:
    def code(stem: str, weight: torch.Tensor) -> Arrays:
        codes, scales = _codes(weight, bits)
        zeros = np.full(scales.T.shape, 2 ** (bits - 1) - 1, np.uint32)
        index = np.arange(weight.shape[1], dtype=np.int32) // GROUP
        arrays = {"qweight": _packed(codes, bits).T, "qzeros": _packed(zeros, bits),
                  "scales": scales.T, "g_idx": index}  # fmt: skip
        return {f"{stem}.{n}": torch.from_numpy(a.copy()) for n, a in arrays.items()}

    return code


def _compressed(stem: str, weight: torch.Tensor) -> Arrays:
    codes, scales = _codes(weight, 4)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return {
        f"{stem}.weight_packed": torch.from_numpy(_packed(codes, 4)),
        f"{stem}.weight_scale": torch.from_numpy(scales),
        f"{stem}.weight_shape": shape,
    }


def _fp8(stem: str, weight: torch.Tensor) -> Arrays:
    rows, cols = weight.shape
    blocks = weight.float().reshape(rows // 128, 128, cols // 128, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(rows, cols)
    return {
        f"{stem}.weight": codes.to(torch.float8_e4m3fn),
        f"{stem}.weight_scale_inv": scale,
    }


_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
#: By name: what config.json says, and how a layer is stored.
QUANTIZED: dict[str, tuple[dict[str, Any], Coder]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}, _gptq(4)),
    "gptq-8bit": ({"quant_method": "gptq", "bits": 8, "group_size": GROUP}, _gptq(8)),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4}},
        },
        _compressed,
    ),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, _fp8),
}


def write_quantized_model(folder: Path, kind: str, *, shards: int = 1, **settings: Any) -> Path:
    """A tiny model whose linear layers are stored as ``kind``; in as many shards as asked for."""
    rules, code = QUANTIZED[kind]
    write_tiny_llama(folder, dtype="f16", **settings)
    weights = folder / "model.safetensors"
    stored: Arrays = {}
    for name, tensor in load_file(weights).items():
        if name.endswith("_proj.weight"):
            stored |= code(name.removesuffix(".weight"), tensor)
        else:
            stored[name] = tensor
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": rules}))
    weights.unlink()
    names, owner = sorted(stored), {}
    for i in range(shards):
        file = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        )
        part = {name: stored[name].contiguous() for name in names[i::shards]}
        owner |= dict.fromkeys(part, file)
        save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": owner}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
