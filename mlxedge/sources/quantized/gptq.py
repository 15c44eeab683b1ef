"""GPTQ checkpoints, as GPTQModel and AutoGPTQ write them.

Of a layer ``X`` from ``in`` to ``out`` features: ``X.qweight`` i32 ``[in · bits / 32, out]`` packs
the codes of each output along the inputs as one little-endian bit stream, ``X.qzeros`` i32
``[groups, out · bits / 32]`` the zero points along the outputs, ``X.scales`` are ``[groups, out]``,
and ``X.g_idx`` i32 ``[in]`` gives the group of each input, in order unless ``desc_act`` is set.
Version 1 of the format stores the zero points less one: 1 is added to each field of the packed
words, which undoes exactly what GPTQModel's writer does (``convert_gptq_v1_to_v2_format`` in its
``utils/model.py``); for 3 bits that adds 4, and AutoGPTQ's files need 1. The rule
is w = scales[g_idx] · (q - zero), as in llama.cpp's conversion/base.py as vendored by
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from mlxedge.errors import CorruptFileError, UnsupportedEncodingError
from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.files import shown
from mlxedge.sources.quantized.integers import Integers, Scales, unpack
from mlxedge.sources.quantized.stored import FLOATS, Stored

BITS = (2, 3, 4, 8)
#: ``checkpoint_format`` → what is added to a stored zero point.
_FORMATS = {"gptq": 1, "gptq_v2": 0}


def read(stored: Stored, rules: dict[str, Any]) -> dict[str, SourceTensor]:
    """Every layer with a ``qweight``."""
    version = rules.get("checkpoint_format") or rules.get("format") or "gptq"
    if version not in _FORMATS:
        raise UnsupportedEncodingError(
            f"{stored.folder}: GPTQ weights in the layout {shown(str(version))!r}; mlxedge reads "
            f"{' and '.join(_FORMATS)}: save them so with GPTQModel"
        )
    bits = rules.get("bits")
    if bits not in BITS:
        raise UnsupportedEncodingError(
            f"{stored.folder}: GPTQ weights of {shown(str(bits))} bits; mlxedge reads "
            f"{', '.join(map(str, BITS))}"
        )
    if rules.get("rotation"):
        raise UnsupportedEncodingError(
            f"{stored.folder}: its weights are rotated ({shown(str(rules['rotation']))}), which "
            "mlxedge does not undo: start from the model's own weights"
        )
    if bits == 3 and version == "gptq":
        raise UnsupportedEncodingError(
            f"{stored.folder}: GPTQ weights of 3 bits in version 1 of the format, whose writers "
            "disagree on zero points: save them as gptq_v2 with GPTQModel"
        )
    size = rules.get("group_size", -1)
    if type(size) is not int or (size < 1 and size != -1):
        raise CorruptFileError(
            stored.folder / "config.json", f"group_size is {shown(str(size))}, not a size or -1"
        )
    order, offset = bool(rules.get("desc_act")), _FORMATS[version]
    made = {}
    for stem, _ in stored.ending(".qweight"):
        of_layer = _own(stored, stem, offset) if rules.get("dynamic") else None
        own_bits, own_size = of_layer or (bits, size)
        made[f"{stem}.weight"] = _layer(stored, stem, own_bits, own_size, order, offset)
    return made


def _own(stored: Stored, stem: str, offset: int) -> tuple[int, int] | None:
    """Bits and group size of a layer by its arrays, where ``dynamic`` gives some layers others."""
    codes, zeros = f"{stem}.qweight", f"{stem}.qzeros"
    height, out = stored.take(codes, ("i32", "u32"), (None, None)).shape
    groups, width = stored.take(zeros, ("i32", "u32"), (None, None), of=codes).shape
    bits = width * 32 // max(out, 1)
    if bits not in BITS or (bits == 3 and offset) or not groups:
        return None
    return bits, -(-height * 32 // bits // groups)


def _layer(
    stored: Stored, stem: str, bits: int, size: int, order: bool, offset: int
) -> SourceTensor:
    codes = f"{stem}.qweight"
    height, out = stored.take(codes, ("i32", "u32"), (None, None)).shape
    cols = height * 32 // bits
    groups = 1 if size == -1 else -(-cols // size)
    width = -(-out * bits // 32)
    stored.take(f"{stem}.qzeros", ("i32", "u32"), (groups, width), of=codes)
    stored.take(f"{stem}.scales", FLOATS, (groups, out), of=codes)
    index = f"{stem}.g_idx"
    if index in stored or order:
        stored.take(index, ("i32", "i64"), (cols,), of=codes)
    step = _one_in_each_field(bits) if offset else np.uint32(0)
    lock = threading.Lock()
    groups_of: list[np.ndarray] = []

    def group_of() -> np.ndarray:
        with lock:
            if not groups_of:
                groups_of.append(_group_index(stored, index, cols, groups, order))
            return groups_of[0]

    def words(start: int, stop: int) -> np.ndarray:
        return stored.columns(codes, start, stop).view(np.uint32).T

    def scales(start: int, stop: int) -> Scales:
        group_of()
        first = start // 32 * 32  # where a code begins a word, whatever its bits
        last = -(-stop * bits // 32)
        packed = stored.columns(f"{stem}.qzeros", first * bits // 32, last).view(np.uint32)
        zeros = unpack(packed + step, bits)[:, start - first : stop - first]
        return stored.columns(f"{stem}.scales", start, stop).T, zeros.T

    made = Integers(
        stored,
        (out, cols),
        bits,
        groups,
        f"{stem}.scales",
        words,
        scales,
        symmetric=False,
        group_of=group_of if order else None,
    )
    return made.tensor(f"{stem}.weight")


def _group_index(stored: Stored, name: str, cols: int, groups: int, order: bool) -> np.ndarray:
    """The group of each column, which must be in order unless ``order`` says that it is not."""
    plain = np.arange(cols) // -(-cols // groups)
    if name not in stored:
        return plain
    index = stored.array(name).astype(np.int64)
    if index.size and not 0 <= index.min() <= index.max() < groups:
        raise stored.corrupt(name, f"names groups outside 0 to {groups - 1}")
    if not order and not np.array_equal(index, plain):
        raise stored.corrupt(
            name,
            "reorders the groups, though config.json does not set desc_act: set it to true in "
            "quantization_config",
        )
    return index


def _one_in_each_field(bits: int) -> np.uint32:
    """What adds 1 to every code of a word."""
    return np.uint32(sum(1 << place for place in range(0, 32, bits)))
