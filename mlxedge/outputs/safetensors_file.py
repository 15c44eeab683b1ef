"""Where tensors go in one or many safetensors files, and the bytes before them.

The format is an 8-byte length, a JSON header and the tensors without holes
(huggingface/safetensors, README "Format"). Shards follow mlx-lm and transformers: a new file once
5 GiB are full, named ``model-00001-of-0000N.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlxedge.plan import DataFile, PlannedTensor, place_parts

SHARD_BYTES = 5 << 30
_DTYPE = {"f32": "F32", "f16": "F16", "bf16": "BF16", "u32": "U32", "u8": "U8"}


@dataclass(frozen=True)
class Layout:
    """Shards, tensors with their places, and the text of ``model.safetensors.index.json``."""

    files: list[DataFile]
    tensors: list[PlannedTensor]
    index: bytes


def lay_out(
    tensors: Sequence[PlannedTensor], metadata: dict[str, str], total_parameters: int
) -> Layout:
    """Place ``tensors`` in as many files as they need, in the given order."""
    groups: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes

    files: list[DataFile] = []
    placed: list[PlannedTensor] = []
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        offset = 0
        entries: dict[str, Any] = {"__metadata__": metadata}
        pending: list[PlannedTensor] = []
        for tensor in group:
            parts = tensor.encoding.parts(tensor.shape)
            places, end = place_parts(parts.values(), offset, number, 1)
            made = replace(tensor, places=dict(zip(parts, places, strict=True)))
            for part in parts:
                for stored, place in made.stored(part):
                    weight_map[stored] = name
                    entries[stored] = {
                        "dtype": _DTYPE[place.part.dtype],
                        "shape": list(place.part.shape),
                        "data_offsets": [place.offset, place.offset + place.part.nbytes],
                    }
            pending.append(made)
            offset = end
        header = _header(entries)
        for tensor in pending:
            shifted = {
                part: replace(place, offset=place.offset + len(header))
                for part, place in tensor.places.items()
            }
            placed.append(replace(tensor, places=shifted))
        files.append(DataFile(name, header, len(header) + offset))
        total += offset

    index = {
        "metadata": {"total_size": total, "total_parameters": total_parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return Layout(files, placed, (json.dumps(index, indent=4) + "\n").encode())


def _header(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
