"""compressed-tensors: integers packed or plain, FP8, NVFP4, MXFP4 and MXFP8.

Which of them a layer is shows in its arrays, so that mixed checkpoints need no matching of layer
names: ``weight_packed`` of 32-bit words are integers, of bytes they are E2M1 codes, and ``weight``
of 8 bits has scales beside it (``compressed_tensors/compressors``, version 0.20). Packed integers:
``weight_packed`` i32 ``[out, in · bits / 32]`` is a little-endian bit stream of q + 2^(bits-1),
``weight_scale`` ``[out, groups]``, ``weight_zero_point`` i32 ``[out · bits / 32, groups]`` packs
zero points alike along the rows, ``weight_g_idx`` gives the group of each column where they are out
of order, and ``weight_shape`` the matrix's own shape.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from mlxedge.errors import CorruptFileError, UnsupportedEncodingError
from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.files import shown
from mlxedge.sources.quantized import fp4, scaled
from mlxedge.sources.quantized.integers import Integers, Scales, pack, unpack
from mlxedge.sources.quantized.stored import FLOATS, FP8, Stored

_PACKED = ".weight_packed"
#: How compressed-tensors calls what is not quantized.
_DENSE = (None, "dense")
_MX_SCALES = ("u8", "f8_e8m0")
_GROUP_ORDER = ".weight_g_idx"


def read(stored: Stored, rules: dict[str, Any]) -> dict[str, SourceTensor]:
    """Every layer that is packed, and every tensor of 8 bits with scales."""
    sparsity = rules.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in _DENSE:
        raise UnsupportedEncodingError(
            f"{stored.folder}: its weights are stored sparse ({shown(str(sparsity['format']))}), "
            "which mlxedge does not read: start from a dense checkpoint"
        )
    if isinstance(turned := rules.get("transform_config"), dict) and turned.get("config_groups"):
        raise UnsupportedEncodingError(
            f"{stored.folder}: its weights are rotated (transform_config), which mlxedge does not "
            "undo: start from a checkpoint without transforms"
        )
    if stored_marlin := next(stored.ending(".scale_packed", ".meta"), None):
        raise UnsupportedEncodingError(
            f"{stored.folder}: {shown(''.join(stored_marlin))} is in the marlin-24 layout, which "
            "mlxedge does not read: start from a pack-quantized or dense checkpoint"
        )
    plans = _groups(stored, rules)
    made: dict[str, SourceTensor] = {}
    for stem, _ in stored.ending(_PACKED):
        name = f"{stem}.weight"
        made[name] = _packed(stored, stem, name, plans)
    blocks = {_block(plan) for plan in plans} - {None}
    block = scaled.block_of(stored, list(*blocks)) if len(blocks) == 1 else None
    for name in stored.names:
        dtype = stored.entry(name).dtype
        if dtype in FP8 and not name.endswith("_scale"):
            made[name] = scaled.scaled(stored, name, block)
        elif dtype == "i8" and f"{name}_scale" in stored:
            made[name] = _bytes(stored, name)
    stored.drop(*(stem + ".input_global_scale" for stem, _ in stored.ending(".input_global_scale")))
    scaled.drop_unused(stored)
    return made


def _groups(stored: Stored, rules: dict[str, Any]) -> list[dict[str, Any]]:
    """The ``weights`` of the config's groups."""
    groups = rules.get("config_groups") or {}
    plans = [
        group["weights"]
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]
    if groups and not plans:
        raise CorruptFileError(
            stored.folder / "config.json", "config_groups says nothing of the weights"
        )
    return plans


def _block(plan: dict[str, Any]) -> tuple[Any, ...] | None:
    block = plan.get("block_structure")
    return tuple(block) if isinstance(block, list) else None


def _packed(stored: Stored, stem: str, name: str, plans: list[dict[str, Any]]) -> SourceTensor:
    codes, scale = stem + _PACKED, f"{stem}.weight_scale"
    overall = f"{stem}.weight_global_scale"
    if stored.entry(codes).dtype != "u8":
        return _integers(stored, stem, name, plans)
    if overall in stored:
        return fp4.nvfp4(stored, name, codes, scale, overall, divides=True)
    if scale in stored and stored.entry(scale).dtype not in _MX_SCALES:
        raise stored.corrupt(codes, f"has no {overall.rpartition('.')[2]}, which NVFP4 needs")
    return fp4.mxfp4(stored, name, codes, scale)


def _integers(stored: Stored, stem: str, name: str, plans: list[dict[str, Any]]) -> SourceTensor:
    codes, scale, zero = stem + _PACKED, f"{stem}.weight_scale", f"{stem}.weight_zero_point"
    rows, width = stored.take(codes, ("i32",), (None, None)).shape
    found = stored.take(scale, FLOATS, (rows, None), (rows,), (1,), of=codes).shape
    # One scale for all is as many as there are rows.
    groups = found[1] if len(found) == 2 else 1
    bits, cols = _size(stored, codes, width, groups, plans)
    index, shape = stem + _GROUP_ORDER, f"{stem}.weight_shape"
    stored.take(shape, ("i64", "i32"), (2,), of=codes)
    if zero in stored:
        stored.take(zero, ("i32",), (-(-rows * bits // 32), groups), of=codes)
    if index in stored:
        stored.take(index, ("i32", "i64"), (cols,))
    lock = threading.Lock()
    checked: list[np.ndarray] = []

    def group_of() -> np.ndarray:
        with lock:
            if not checked:
                given = stored.array(shape).tolist()
                if given != [rows, cols]:
                    raise stored.corrupt(
                        shape, f"says {given}, and the arrays beside it are of {[rows, cols]}"
                    )
                order = np.arange(cols) // -(-cols // groups)
                if index in stored:
                    order = stored.array(index)
                    if not 0 <= order.min() <= order.max() < groups:
                        raise stored.corrupt(index, f"names groups outside 0 to {groups - 1}")
                checked.append(order)
            return checked[0]

    def words(start: int, stop: int) -> np.ndarray:
        return stored.rows(codes, start, stop).view(np.uint32)

    def scales(start: int, stop: int) -> Scales:
        group_of()
        if len(found) == 2:
            values = stored.rows(scale, start, stop)
        else:
            whole = stored.array(scale)
            values = np.broadcast_to(whole, (rows,))[start:stop, None]
        if zero not in stored:
            return values, None
        first = start // 32 * 32  # where a code begins a word, whatever its bits
        packed = stored.rows(zero, first * bits // 32, -(-stop * bits // 32))
        points = unpack(packed.view(np.uint32).T, bits)
        return values, points.T[start - first : stop - first]

    made = Integers(
        stored,
        (rows, cols),
        bits,
        groups,
        scale,
        words,
        scales,
        symmetric=zero not in stored,
        group_of=group_of if index in stored else None,
    )
    return made.tensor(name)


def _bytes(stored: Stored, name: str) -> SourceTensor:
    """Integers of 8 bits, with ``X_scale`` and ``X_zero_point`` of rows or groups."""
    scale, zero = f"{name}_scale", f"{name}_zero_point"
    rows, cols = stored.take(name, ("i8",), (None, None)).shape
    shape = stored.take(scale, FLOATS, (rows, None), (rows,), (1,), of=name).shape
    groups = shape[1] if len(shape) == 2 else 1
    if groups < 1 or cols % groups:
        raise stored.corrupt(scale, f"gives {groups} scales to rows of {cols}")
    if zero in stored:
        stored.take(zero, ("i8",), shape, of=name)

    def of_rows(array: str, start: int, stop: int) -> np.ndarray:
        if len(shape) == 2:
            return stored.rows(array, start, stop)
        return np.broadcast_to(stored.array(array), (rows,))[start:stop, None]

    def words(start: int, stop: int) -> np.ndarray:
        codes = stored.rows(name, start, stop).view(np.uint8) ^ np.uint8(128)
        return pack(np.pad(codes, ((0, 0), (0, -cols % 4))), 8)

    def scales(start: int, stop: int) -> Scales:
        points = None
        if zero in stored:
            points = of_rows(zero, start, stop).astype(np.int16) + 128
        return of_rows(scale, start, stop), points

    symmetric = zero not in stored
    made = Integers(stored, (rows, cols), 8, groups, scale, words, scales, symmetric=symmetric)
    return made.tensor(name)


def _size(
    stored: Stored, codes: str, width: int, groups: int, plans: list[dict[str, Any]]
) -> tuple[int, int]:
    """Bits and columns of packed codes: those of a group of the config that fit the arrays."""
    for plan in plans:
        bits, size = plan.get("num_bits"), plan.get("group_size")
        if type(bits) is not int or not 1 <= bits <= 8:
            continue
        cols = width * 32 // bits
        if groups > 1 and type(size) is int and size > 0:
            cols = size * groups
        if -(-cols * bits // 32) == width:
            return bits, cols
    known = ", ".join(
        f"{shown(str(plan.get('num_bits')))} bits in groups of {shown(str(plan.get('group_size')))}"
        for plan in plans
    )
    raise stored.corrupt(
        codes,
        f"has {width} words in a row and {groups} scales: config.json names {known or 'none'}",
    )
