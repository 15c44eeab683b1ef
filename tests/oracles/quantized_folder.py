"""Folders with a few quantized tensors, and how what is read from them is looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from mlxedge.fallback import OPS
from mlxedge.sources import open_source


def write_folder(folder: Path, rules: Mapping[str, Any] | None, arrays: Mapping[str, Any]) -> Path:
    """``arrays`` are NumPy's or torch's."""
    import torch

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
