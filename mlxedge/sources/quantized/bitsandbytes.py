"""bitsandbytes: NF4 and FP4 with one scale for each block of weights, and LLM.int8() rows.

4 bits: ``X.weight`` u8 packs the weights in order, the first of two in the high half; a code stands
for a number of ``X.weight.quant_map``, times the ``X.weight.absmax`` of its block. With double
quantization absmax are bytes themselves: ``nested_quant_map[absmax] · nested_absmax[block] +
nested_offset``. Sizes and that offset are JSON in ``X.weight.quant_state.bitsandbytes__nf4``
(``bitsandbytes/functional.py``, ``QuantState``). 8 bits: ``X.weight`` i8 times ``X.SCB`` of its
row, over 127.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from mlxedge.errors import UnsupportedEncodingError
from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.files import shown
from mlxedge.sources.quantized.stored import Stored, decoded

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
#: 1 / 127, as bitsandbytes' ``int8_vectorwise_dequant`` has it.
_INT8 = np.float32(0.007874015718698502)


def read(stored: Stored, rules: dict[str, Any]) -> dict[str, SourceTensor]:
    """Every weight with a state, and every one of i8 with scales of its rows."""
    made = {}
    for kind in _KINDS:
        for name, _ in stored.ending(_STATE + kind):
            made[name] = _four_bits(stored, name, name + _STATE + kind)
    for stem, _ in stored.ending(".SCB"):
        made[f"{stem}.weight"] = _eight_bits(stored, stem)
    for name in stored.names:
        if (
            name not in made
            and stored.entry(name).dtype in ("u8", "i8")
            and name.endswith("weight")
        ):
            raise UnsupportedEncodingError(
                f"{stored.folder}: {shown(name)} is {stored.entry(name).dtype} and has no "
                f"quantization state: mlxedge reads {', '.join(_KINDS)} and int8 of bitsandbytes"
            )
    return made


def _four_bits(stored: Stored, name: str, state_name: str) -> SourceTensor:
    state = _state(stored, state_name)
    shape, block = tuple(state["shape"]), state["blocksize"]
    size = math.prod(shape)
    blocks = -(-size // block)
    stored.take(name, ("u8", "i8", "bf16", "f16", "f32"))
    entry = stored.entry(name)
    if entry.nbytes != (size + 1) // 2:
        raise stored.corrupt(
            name, f"holds {entry.nbytes} bytes, and {list(shape)} of 4 bits take {(size + 1) // 2}"
        )
    absmax, codebook = f"{name}.absmax", f"{name}.quant_map"
    stored.take(codebook, ("f32",), (16,), of=name)
    nested = f"{name}.nested_absmax" in stored
    stored.take(absmax, ("u8",) if nested else ("f32",), (blocks,), of=name)
    inner = 0
    if nested:
        inner = _whole(stored, state_name, state, "nested_blocksize")
        stored.take(f"{name}.nested_absmax", ("f32",), (-(-blocks // inner),), of=name)
        stored.take(f"{name}.nested_quant_map", ("f32",), (256,), of=name)
        if not isinstance(state.get("nested_offset"), (int, float)):
            raise stored.corrupt(state_name, "has no nested_offset")
    cols = shape[-1]

    def scales(first: int, last: int) -> np.ndarray:
        found = _slice(stored, absmax, first, last)
        if not nested:
            return stored.scales(absmax, found)
        table = stored.scales(f"{name}.nested_quant_map", stored.array(f"{name}.nested_quant_map"))
        outer = first // inner
        above = _slice(stored, f"{name}.nested_absmax", outer, -(-last // inner))
        above = stored.scales(f"{name}.nested_absmax", above)
        index = np.arange(first, last) // inner - outer
        return table[found] * above[index] + np.float32(state["nested_offset"])

    def rows_of(start: int, stop: int) -> np.ndarray:
        begin, end = start * cols, stop * cols
        raw = _bytes(stored, name, begin // 2, (end + 1) // 2)
        table = stored.scales(codebook, stored.array(codebook))
        both = np.empty(2 * raw.size, np.uint8)
        both[::2], both[1::2] = raw >> np.uint8(4), raw & np.uint8(15)
        codes = both[begin % 2 : begin % 2 + end - begin]
        first = begin // block
        by = scales(first, -(-end // block))
        values = table[codes]
        values *= by[np.arange(begin, end) // block - first]
        return values.reshape(stop - start, cols)

    return decoded(name, shape, rows_of)


def _state(stored: Stored, name: str) -> dict[str, Any]:
    """The JSON in a tensor of bytes."""
    stored.take(name, ("u8",), (None,))
    try:
        state = json.loads(stored.array(name).tobytes())
    except (ValueError, RecursionError) as error:
        raise stored.corrupt(name, "is not JSON") from error
    shape = state.get("shape") if isinstance(state, dict) else None
    if (
        not isinstance(shape, list)
        or len(shape) < 2
        or any(type(n) is not int or not 0 < n < 1 << 40 for n in shape)
    ):
        raise stored.corrupt(name, f"gives the shape {shown(str(shape))}, which is no matrix's")
    _whole(stored, name, state, "blocksize")
    return dict(state)


def _whole(stored: Stored, name: str, state: dict[str, Any], key: str) -> int:
    value = state.get(key)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise stored.corrupt(name, f"gives {key} {shown(str(value))}, not a size")
    return value


def _slice(stored: Stored, name: str, first: int, last: int) -> np.ndarray:
    """Elements of an array of one dimension."""
    return stored.file(name).read_elements(name, first, last)


def _bytes(stored: Stored, name: str, first: int, last: int) -> np.ndarray:
    return stored.file(name).read_bytes(name, first, last)


def _eight_bits(stored: Stored, stem: str) -> SourceTensor:
    name, scale = f"{stem}.weight", f"{stem}.SCB"
    shape = stored.take(name, ("i8",), (None, None), of=scale).shape
    stored.take(scale, ("f32",), (shape[0],))
    stored.drop(f"{stem}.weight_format")
    if f"{stem}.weight_format" in stored:
        layout = stored.array(f"{stem}.weight_format").reshape(-1)
        if layout.size != 1 or layout[0] != 0:
            raise UnsupportedEncodingError(
                f"{stored.folder}: {shown(name)} is stored in a tiled layout of bitsandbytes; save "
                "the checkpoint again with bitsandbytes 0.45 or newer"
            )

    def rows_of(start: int, stop: int) -> np.ndarray:
        by = stored.scales(scale, _slice(stored, scale, start, stop))[:, None]
        return stored.rows(name, start, stop).astype(np.float32) * by * _INT8

    return decoded(name, shape, rows_of)
