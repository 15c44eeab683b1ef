"""Checkpoints whose weights are quantized already, by the tools of the Hugging Face world.

Each scheme is one module with ``read(stored, rules)``; :data:`METHODS` names it by the
``quant_method`` of config.json. Codes are kept in an encoding of ours where that stands for exactly
the same weights, so that a target may keep them too; other weights are decoded to f32 by the
scheme's own rule, row by row as they are asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.errors import CorruptFileError, UnsupportedEncodingError
from mlxedge.sources.checkpoint import Tensors
from mlxedge.sources.files import shown

if TYPE_CHECKING:
    from mlxedge.sources.folder import Weights

#: ``quant_method`` → the module that reads it.
METHODS = {
    "awq": "awq",
    "bitnet": "bitnet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed",
    "fbgemm_fp8": "scaled",
    "fp8": "scaled",
    "gptq": "gptq",
    "modelopt": "modelopt",
    "mxfp4": "mxfp4",
}
#: Where a config tells how the weights are quantized; the second is an older name.
_KEYS = ("quantization_config", "compression_config")


def quantization_rules(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What the folder says of how its weights are quantized, or ``None`` if they are not."""
    from mlxedge.sources.folder import MODELOPT_CONFIG, read_json

    text = config.get("text_config")
    # A model that sees as well may say it of its language model alone.
    for scope in (config, text if isinstance(text, dict) else {}):
        for key in _KEYS:
            rules = scope.get(key)
            if isinstance(rules, dict) and rules.get("quant_method"):
                return rules
    if not (folder / MODELOPT_CONFIG).is_file():
        return None
    rules = read_json(folder / MODELOPT_CONFIG).get("quantization")
    return rules | {"quant_method": "modelopt"} if isinstance(rules, dict) else None


def describe(rules: dict[str, Any]) -> str:
    """A few words for the reader: "gptq, 4 bits"."""
    method, bits = shown(str(rules["quant_method"])), rules.get("bits")
    kind = rules.get("format") or rules.get("quant_algo")
    words = [method] + ([f"{bits} bits"] if type(bits) is int else [])
    return ", ".join(words + ([shown(kind)] if isinstance(kind, str) else []))


def quantized_tensors(folder: Path, rules: dict[str, Any], weights: Weights) -> Tensors:
    """The folder's tensors; scales, zero points and the like are parts of their matrix.

    Raises UnsupportedEncodingError for a scheme that is not read, and CorruptFileError where codes,
    scales and ``rules`` contradict each other; as do the tensors when they are read.
    """
    from mlxedge.sources.quantized.stored import Stored

    method = str(rules["quant_method"])
    if method not in METHODS:
        raise UnsupportedEncodingError(
            f"{folder}: its weights are quantized with {shown(method)}; mlxedge reads "
            f"{', '.join(METHODS)}: start from one of those, or from f32, f16 or bf16 weights"
        )
    module = importlib.import_module(f"mlxedge.sources.quantized.{METHODS[method]}")
    stored = Stored(folder, weights)
    made = module.read(stored, rules)
    for name in stored.others():
        if name in made:
            raise CorruptFileError(stored.path(name), f"{shown(name)} is there twice")
        made[name] = stored.file(name).source_tensor(name)
    return Tensors(made)
