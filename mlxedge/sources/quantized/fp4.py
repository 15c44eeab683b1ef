"""Codes of four bits, floats with one bit of mantissa (E2M1), two to a byte, the first one low.

MXFP4 has a power of two (E8M0) for each 32 of them and is kept as it is. NVFP4 has an E4M3 scale
for each 16 and one f32 for the whole tensor, which ModelOpt multiplies by and compressed-tensors
divides by; there is no encoding of ours with the latter, so it is decoded: w = code · (scale ·
global), all in f32.
"""

from __future__ import annotations

import math

import numpy as np

from mlxedge.encodings import MLX_FLOAT
from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.files import check_rows
from mlxedge.sources.quantized.stored import E2M1, Stored, decoded

_MXFP4 = MLX_FLOAT["mxfp4"]
_NVFP4_GROUP = 16


def mxfp4(stored: Stored, name: str, codes: str, scale: str) -> SourceTensor:
    """Tensor ``name`` from ``codes`` u8 ``[…, cols / 2]`` (or ``[…, cols / 32, 16]``) and ``scale``
    u8 ``[…, cols / 32]``."""
    found = stored.take(scale, ("u8", "f8_e8m0"), of=codes).shape
    shape = (*found[:-1], found[-1] * _MXFP4.group)
    stored.take(codes, ("u8",), (*shape[:-1], shape[-1] // 2), (*found, _MXFP4.group // 2))
    rows = math.prod(shape[:-1])
    per_row = found[-1] if len(stored.entry(codes).shape) > len(found) else 1

    def read_rows(start: int, stop: int) -> dict[str, np.ndarray]:
        check_rows(name, rows, start, stop)
        scales = stored.rows(scale, start, stop).view(np.uint8)
        stored.scales(scale, scales)
        packed = stored.rows(codes, start * per_row, stop * per_row).reshape(stop - start, -1)
        return {"weight": packed.view("<u4"), "scales": scales}

    return SourceTensor(name, shape, _MXFP4, read_rows)


def nvfp4(
    stored: Stored, name: str, codes: str, scale: str, overall: str, *, divides: bool
) -> SourceTensor:
    """Tensor ``name`` from ``codes`` u8 ``[…, cols / 2]``, ``scale`` E4M3 ``[…, cols / 16]`` and
    ``overall`` f32, one in all or one for each matrix of a stack."""
    packed = stored.take(codes, ("u8",)).shape
    if len(packed) < 2:
        raise stored.corrupt(codes, f"is {list(packed)}; matrices alone are quantized")
    *lead, rows, width = packed
    shape = (*lead, rows, width * 2)
    groups = shape[-1] // _NVFP4_GROUP
    stored.take(scale, ("f8_e4m3",), (*lead, rows, groups), of=codes)
    if shape[-1] % _NVFP4_GROUP:
        raise stored.corrupt(codes, f"has rows of {shape[-1]}, no multiple of {_NVFP4_GROUP}")
    count = math.prod(stored.take(overall, ("f32",), of=codes).shape)
    if count not in (1, math.prod(lead)):
        raise stored.corrupt(overall, f"holds {count} numbers for {math.prod(lead)} matrices")

    def rows_of(start: int, stop: int) -> np.ndarray:
        whole = stored.scales(overall, stored.array(overall).reshape(-1))
        factor = whole[np.arange(start, stop) // rows if count > 1 else 0]
        scales = stored.scales(scale, stored.rows(scale, start, stop))
        by = np.reshape(factor, (-1, 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            scales = stored.scales(overall, scales / by if divides else scales * by)
        raw = stored.rows(codes, start, stop)
        found = np.empty((stop - start, shape[-1]), np.float32)
        found[:, ::2] = E2M1[raw & np.uint8(15)]
        found[:, 1::2] = E2M1[raw >> np.uint8(4)]
        grouped = found.reshape(stop - start, groups, _NVFP4_GROUP)
        grouped *= scales[:, :, None]
        return found

    return decoded(name, shape, rows_of)
