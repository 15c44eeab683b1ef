"""Floats of 8 bits that are multiplied by scales of rows, of blocks or of all.

``X`` (``….weight``, or a stack of experts) is stored in FP8 with scales beside it:
``X_scale_inv`` by DeepSeek, Qwen and transformers (``quant_method`` "fp8"), ``X_scale`` by
compressed-tensors, FBGEMM and ModelOpt, ``….qscale_weight`` by Mistral. Their shape tells what each
covers; with ``weight_block_size`` ``[128, 128]`` it is ``[out / 128, in / 128]``, rounded up. Every
one of them is a factor: w = scale · x, in f32 (``dequant_simple`` in llama.cpp's conversion/base.py
as vendored by llama-cpp-python 0.3.36). Scales of one byte are powers of two (E8M0).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlxedge.encodings import MLX_FLOAT
from mlxedge.errors import CorruptFileError
from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.files import check_rows, shown
from mlxedge.sources.quantized.stored import FLOATS, FP8, Stored, as_f32, decoded

#: What the scales of a tensor are called: its own name and this, or this in place of "weight".
_SUFFIXES = ("_scale_inv", "_scale")
_MISTRAL = "qscale_weight"
#: Of activations and of the KV cache.
_UNUSED = (
    "_activation_scale",
    ".activation_scale",
    ".input_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".prob_scale",
    ".qscale_act",
    ".input_zero_point",
    ".output_zero_point",
)
_SCALES = (*FLOATS, "u8", "f8_e8m0")
_MXFP8 = MLX_FLOAT["mxfp8"]


def read(stored: Stored, rules: dict[str, Any]) -> dict[str, SourceTensor]:
    """Every tensor of FP8."""
    block = block_of(stored, rules.get("weight_block_size"))
    made = {
        name: scaled(stored, name, block)
        for name in stored.names
        if stored.entry(name).dtype in FP8
    }
    drop_unused(stored)
    return made


def block_of(stored: Stored, given: Any) -> tuple[int, int] | None:
    """The sizes of a block as a config gives them, or ``None``."""
    if given is None:
        return None
    if (
        not isinstance(given, list)
        or len(given) != 2
        or not all(type(n) is int and n > 0 for n in given)
    ):
        raise CorruptFileError(
            stored.folder / "config.json",
            f"a block of weights is {shown(str(given))}, not two sizes",
        )
    return given[0], given[1]


def drop_unused(stored: Stored) -> None:
    stored.drop(*(stem + suffix for stem, suffix in stored.ending(*_UNUSED)))


def scale_name(stored: Stored, name: str) -> str | None:
    """What the scales of tensor ``name`` are called, if it has any."""
    for candidate in (
        *(name + suffix for suffix in _SUFFIXES),
        name.removesuffix("weight") + _MISTRAL,
    ):
        if candidate in stored:
            return candidate
    return None


def scaled(stored: Stored, name: str, block: tuple[int, int] | None) -> SourceTensor:
    """Tensor ``name``, of FP8, times its scales."""
    entry = stored.take(name, FP8)
    shape = entry.shape
    scale = scale_name(stored, name)
    if scale is None:
        raise stored.corrupt(name, f"is {entry.dtype} and has no scales ({name}{_SUFFIXES[0]})")
    found = stored.take(scale, _SCALES, of=name)
    if len(shape) < 2:
        raise stored.corrupt(name, f"is {entry.dtype} {list(shape)}; matrices alone are quantized")
    grid = _grid(stored, scale, shape, found.shape, block)
    if (
        entry.dtype == "f8_e4m3"
        and found.dtype in ("u8", "f8_e8m0")
        and grid[-2:] == (1, _MXFP8.group)
        and _MXFP8.fits(shape)
    ):
        return _mxfp8(stored, name, scale, shape)
    rows, cols = shape[-2:]
    height, width = grid
    down, across = -(-rows // height), -(-cols // width)
    columns = np.arange(cols) // width

    def spread(start: int, stop: int) -> np.ndarray:
        """The scales of rows ``start:stop``, ``[stop - start, across]``."""
        index = np.arange(start, stop)
        lines = index // rows * down + index % rows // height
        first, last = int(lines[0]), int(lines[-1]) + 1
        if len(found.shape) < 2 or found.shape[-1] != across:
            values = stored.array(scale).reshape(-1, across)[first:last]
        else:
            values = stored.rows(scale, first, last)
        return stored.scales(scale, values)[lines - first]

    def rows_of(start: int, stop: int) -> np.ndarray:
        codes = as_f32(stored.rows(name, start, stop))
        if stop == start:
            return codes
        factor = spread(start, stop)
        return codes * (factor if across == 1 else factor[:, columns])

    return decoded(name, shape, rows_of)


def _grid(
    stored: Stored,
    name: str,
    shape: tuple[int, ...],
    scales: tuple[int, ...],
    block: tuple[int, int] | None,
) -> tuple[int, int]:
    """How many rows and columns of a matrix of ``shape`` one of ``scales`` covers."""
    *lead, rows, cols = shape
    matrices = math.prod(lead)
    if math.prod(scales) == matrices:
        return rows, cols
    inner = scales[len(lead) :] if scales[: len(lead)] == tuple(lead) else ()
    if len(inner) > 2:  # ModelOpt leaves ones between
        inner = tuple(n for n in inner if n != 1)
    if inner in ((rows,), (rows, 1)):
        return 1, cols
    if len(inner) == 2:
        down, across = inner
        if block and (-(-rows // block[0]), -(-cols // block[1])) == inner:
            return block
        if down and across and rows % down == cols % across == 0:
            return rows // down, cols // across
    raise stored.corrupt(
        name,
        f"is {list(scales)}, which covers no weights of {list(shape)} evenly"
        + (f" in blocks of {list(block)}" if block else ""),
    )


def _mxfp8(stored: Stored, name: str, scale: str, shape: tuple[int, ...]) -> SourceTensor:
    """Blocks of 32 along a row with powers of two are what MLX calls mxfp8."""
    rows = math.prod(shape[:-1])

    def read_rows(start: int, stop: int) -> dict[str, np.ndarray]:
        check_rows(name, rows, start, stop)
        scales = stored.rows(scale, start, stop).view(np.uint8)
        stored.scales(scale, scales)
        return {"weight": stored.rows(name, start, stop).view("<u4"), "scales": scales}

    return SourceTensor(name, shape, _MXFP8, read_rows)
