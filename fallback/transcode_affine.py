"""Affine groups of MLX kept in ggml's blocks and in other affine groups.

A weight is scale · q + bias. ggml's q4_1 and q5_1 store just that, in f16 and for 32 weights: a
group of 64 or 128 becomes two or four blocks with the same scales. q4_0, q5_0 and q8_0 have no
bias; their codes are signed. They hold a group if its bias is a whole multiple of its scale,
bias = -z · scale, and all codes less z lie in their range: so it is for what was symmetric once,
and in q5_0 and q8_0 for whole zero points. Codes fit into more bits than they need.

Scales and biases are exact if the target's dtype holds them and rounded to nearest, once, if it
does not; those too large for f16 cannot be kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxedge.encodings import Affine, Encoding, GgmlBlock
from mlxedge.fallback.bits import as_input, pack, unpack
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.plain import cast, first_nonfinite
from mlxedge.ops import Fidelity, Parts

_BLOCK = 32


@dataclass(frozen=True)
class Block:
    """A ggml type: its bits, the code of zero (None: it stores a bias), where codes begin."""

    bits: int
    zero: int | None
    start: int


BLOCKS = {
    "q4_0": Block(4, 8, 2),
    "q4_1": Block(4, None, 4),
    "q5_0": Block(5, 16, 2),
    "q5_1": Block(5, None, 4),
    "q8_0": Block(8, 128, 2),
}


def can_transcode(source: Affine, target: Encoding) -> bool:
    """Whether some groups of ``source`` can be kept in ``target``."""
    if isinstance(target, Affine):
        return target.bits >= source.bits and source.group % target.group == 0
    block = BLOCKS.get(target.name) if isinstance(target, GgmlBlock) else None
    return block is not None and block.bits >= source.bits


def fidelity(source: Affine, target: Encoding, scales: Parts | None) -> Fidelity | None:
    """Of groups with these "scales" and "biases"; without them, the worst that may be."""
    if scales is None:
        narrow = not isinstance(target, Affine) and BLOCKS[target.name].zero is not None
        held = target.scale_dtype if isinstance(target, Affine) else "f16"
        safe = held in ("f32", source.scale_dtype)
        return None if narrow else "exact" if safe else "rounded once"
    found = _heads(scales, source, target)
    return None if found is None else found[2]


def transcode(parts: Parts, source: Affine, target: Encoding) -> tuple[Parts, Fidelity] | None:
    """The groups in ``target``, or None if it cannot hold one of them."""
    found = _heads(parts, source, target)
    if found is None:
        return None
    first, second, kept = found
    if isinstance(target, Affine):
        return _to_affine(parts["weight"], first, second, source, target), kept
    if isinstance(target, GgmlBlock):
        return _to_blocks(parts["weight"], first, second, source, target), kept
    return None


def _to_affine(
    stored: np.ndarray, scales: np.ndarray, biases: np.ndarray, source: Affine, target: Affine
) -> Parts:
    repeat, weight = source.group // target.group, stored
    if target.bits != source.bits:
        shape = (*stored.shape[:-1], stored.shape[-1] * 32 // source.bits)
        weight = np.empty(target.parts(shape)["weight"].shape, np.uint32)
        packed = as_input(stored).reshape(-1).view(np.uint8)
        _widen(packed, source.bits, target.bits, weight.reshape(-1).view(np.uint8))
    return {
        "weight": weight,
        "scales": np.repeat(scales, repeat, axis=-1),
        "biases": np.repeat(biases, repeat, axis=-1),
    }


def _to_blocks(
    stored: np.ndarray, first: np.ndarray, second: np.ndarray, source: Affine, target: GgmlBlock
) -> Parts:
    """``second`` holds biases, or what is added to codes."""
    block, repeat = BLOCKS[target.name], source.group // _BLOCK
    first, second = (np.repeat(a, repeat, axis=-1) for a in (first, second))
    out = np.empty((*first.shape, target.block_bytes), np.uint8)
    out[..., :2] = first.view(np.uint8).reshape(*first.shape, 2)
    if block.zero is None:
        out[..., 2:4] = second.view(np.uint8).reshape(*second.shape, 2)
        second = np.zeros(second.shape, np.int16)
    packed = as_input(stored).reshape(-1).view(np.uint8)
    flat = out.reshape(-1, target.block_bytes)
    _put(packed, source.bits, as_input(second.reshape(-1)), block.bits, block.start, flat)
    return {"weight": out.reshape(*stored.shape[:-1], -1)}


def _heads(
    parts: Parts, source: Affine, target: Encoding
) -> tuple[np.ndarray, np.ndarray, Fidelity] | None:
    """Scales, and biases or what is added to codes (i16), as the target has them."""
    scales, biases = cast(parts["scales"], "f32"), cast(parts["biases"], "f32")
    dtype = target.scale_dtype if isinstance(target, Affine) else "f16"
    first = cast(scales, dtype)
    zero = None if isinstance(target, Affine) else BLOCKS[target.name].zero
    if zero is not None:
        shift = _shifts(scales, biases, source.bits, BLOCKS[target.name].bits, zero)
        pair = None if shift is None else (first, shift)
        stored = [(first, scales)]
    else:
        second = cast(biases, dtype)
        pair, stored = (first, second), [(first, scales), (second, biases)]
    if pair is None or any(first_nonfinite(made) is not None for made, _ in stored):
        return None
    exact = all(np.array_equal(cast(made, "f32"), wide) for made, wide in stored)
    return *pair, "exact" if exact else "rounded once"


def _shifts(
    scales: np.ndarray, biases: np.ndarray, bits: int, wide: int, zero: int
) -> np.ndarray | None:
    """i16: what turns codes into the target's; None where a group has no whole zero point, or one
    that puts a code out of range."""
    wide_scales, wide_biases = scales.astype(np.float64), biases.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = float(1 << (bits - 1))  # of no scale any will do
        point = np.where(scales == 0, middle, np.rint(-wide_biases / wide_scales))
    # In f64 the products are exact.
    whole = np.isfinite(point) & (point * wide_scales == -wide_biases)
    shift = zero - point
    fits = (shift >= 0) & (shift + (1 << bits) <= 1 << wide)
    if not (whole & fits).all():
        return None
    return shift.astype(np.int16)


@kernel
def _widen(packed: np.ndarray, bits: int, wide: int, out: np.ndarray) -> None:
    """Codes of ``bits`` in ``wide`` bits each."""
    codes = np.empty(_BLOCK, np.uint8)
    size, larger = _BLOCK * bits // 8, _BLOCK * wide // 8
    for i in range(packed.size // size):
        unpack(packed[i * size : (i + 1) * size], bits, codes)
        pack(codes, wide, out[i * larger : (i + 1) * larger])


@kernel
def _put(
    packed: np.ndarray, bits: int, shifts: np.ndarray, wide: int, start: int, out: np.ndarray
) -> None:
    """Codes plus their block's shift into blocks u8 ``[blocks, bytes]`` from byte ``start``: fifth
    bits (if 5), then the others, those of weights 16 apart in one byte; signed if 8."""
    codes = np.empty(_BLOCK, np.uint8)
    size = _BLOCK * bits // 8
    for i in range(out.shape[0]):
        unpack(packed[i * size : (i + 1) * size], bits, codes)
        block = out[i]
        for j in range(_BLOCK):
            codes[j] = np.uint8(codes[j] + shifts[i])
        if wide == 8:
            for j in range(_BLOCK):
                block[start + j] = codes[j] ^ np.uint8(0x80)
            continue
        at = start
        if wide == 5:
            for k in range(4):
                fifths = np.uint8(0)
                for j in range(8):
                    fifths |= np.uint8((codes[8 * k + j] >> np.uint8(4)) << np.uint8(j))
                block[at + k] = fifths
            at += 4
        for j in range(16):
            low = codes[j] & np.uint8(15)
            block[at + j] = np.uint8(low | ((codes[j + 16] & np.uint8(15)) << np.uint8(4)))
