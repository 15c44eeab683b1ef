"""LoRA adapters in PEFT's files, made without it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mlxedge.sources import open_source

RANK = 4


def write_adapter(folder: Path, base: Path, *modules: str) -> Path:
    """Random factors for the matrices of ``base`` whose names hold one of ``modules``."""
    folder.mkdir(parents=True, exist_ok=True)
    random, factors = np.random.default_rng(11), {}
    with open_source(base) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            if not any(module in name for module in modules):
                continue
            rows, cols = tensor.shape
            stem = "base_model.model." + name.removesuffix(".weight")
            factors[f"{stem}.lora_A.weight"] = random.normal(0, 0.1, (RANK, cols))
            factors[f"{stem}.lora_B.weight"] = random.normal(0, 0.1, (rows, RANK))
    save_file({n: a.astype(np.float32) for n, a in factors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
