"""Codes kept in another encoding: the same weights, nothing searched.

==============  ========================  =====================  ===========
from ggml       weight                    to MLX                 bias
==============  ========================  =====================  ===========
q4_0            d · (q - 8)               4 bits, group 32       -8 d
q4_1            d · q + m                 4 bits, group 32       m
q5_0            d · (q - 16)              5 bits, group 32       -16 d
q5_1            d · q + m                 5 bits, group 32       m
q8_0            d · q, q signed           8 bits, group 32       -128 d
q4_k, q5_k      d · sc · q - dmin · mn    4, 5 bits, group 32    -dmin · mn
mxfp4           E2M1 · 2^(e-127)          mxfp4                  none
==============  ========================  =====================  ===========

The scale is d, or d · sc. Codes also fit into more bits than they need. f16 and f32 hold d, m and
the products of d exactly, and f32 those of d with sc, so that decoding gives equal float32 numbers;
only zeros may differ, in sign (d · 0 is -0 if d is negative, scale · code + bias is +0). Elsewhere
scales are rounded once: bf16 holds 8 bits of d, f16 11 of the 17 of d · sc. Some blocks cannot be
kept: f16 cannot hold a bias beyond 65504, and infinite or NaN scales decode alike only where m is
stored. The way back, and from one MLX group to another, is ``transcode_affine``.
"""

from __future__ import annotations

import numpy as np

from mlxedge.encodings import Affine, Encoding, GgmlBlock, MlxFloat
from mlxedge.fallback import transcode_affine
from mlxedge.fallback.bits import as_input, pack
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.plain import cast, first_nonfinite
from mlxedge.fallback.transcode_affine import BLOCKS
from mlxedge.ops import Fidelity, Parts

_U32 = np.uint32
_GROUP = 32

#: Those with eight groups of 32 in a block: bits.
_SUPER = {"q4_k": 4, "q5_k": 5}


def can_transcode(source: Encoding, target: Encoding) -> bool:
    """Whether :func:`transcode` keeps codes of ``source`` in ``target``, if only of some blocks."""
    if source == target:
        return True
    if isinstance(source, Affine):
        return transcode_affine.can_transcode(source, target)
    if isinstance(source, MlxFloat):
        return isinstance(target, GgmlBlock) and source.mode == target.name == "mxfp4"
    if not isinstance(source, GgmlBlock):
        return False
    if isinstance(target, Affine):
        simple = BLOCKS.get(source.name)
        bits = simple.bits if simple else _SUPER.get(source.name)
        return bits is not None and target.group == _GROUP and bits <= target.bits
    return isinstance(target, MlxFloat) and source.name == target.mode == "mxfp4"


def fidelity(source: Encoding, target: Encoding, scales: Parts | None) -> Fidelity | None:
    """How :func:`transcode` will keep ordinary blocks, or None if it cannot. Of affine groups the
    ``scales`` (and biases) decide; without them it is the worst that may be."""
    if not can_transcode(source, target):
        return None
    if isinstance(source, Affine) and source != target:
        return transcode_affine.fidelity(source, target, scales)
    if isinstance(source, GgmlBlock) and isinstance(target, Affine):
        held = ("f32",) if source.name in _SUPER else ("f16", "f32")
        return "exact" if target.scale_dtype in held else "rounded once"
    return "exact"


def transcode(parts: Parts, source: Encoding, target: Encoding) -> tuple[Parts, Fidelity] | None:
    """The same codes in ``target``, or None if it cannot hold them.

    ``source`` equal to ``target`` gives the same arrays, not copies.
    """
    if source == target:
        return parts, "exact"
    if not can_transcode(source, target):
        return None
    if isinstance(source, Affine):
        return transcode_affine.transcode(parts, source, target)
    made: Parts | None
    if isinstance(source, MlxFloat):
        made = _to_mxfp4_blocks(parts)
    elif isinstance(source, GgmlBlock) and isinstance(target, (Affine, MlxFloat)):
        stored = parts["weight"]
        shape = (*stored.shape[:-1], stored.shape[-1] // source.block_bytes * source.block_size)
        blocks = as_input(stored).reshape(-1, source.block_bytes)
        if isinstance(target, MlxFloat):
            made = _to_mxfp4_groups(blocks, shape, target)
        else:
            made = _to_affine(blocks, shape, source, target)
    kept = fidelity(source, target, None)
    return None if made is None or kept is None else (made, kept)


def _to_affine(
    blocks: np.ndarray, shape: tuple[int, ...], source: GgmlBlock, target: Affine
) -> Parts | None:
    d = cast(_f16_at(blocks, 0), "f32")
    layout = target.parts(shape)
    weight = np.empty(layout["weight"].shape, np.uint32)
    packed = weight.reshape(-1).view(np.uint8)
    if source.name in _SUPER:
        scale, minimum = _of_groups(blocks)
        scales = cast(scale * d[:, None], target.scale_dtype)
        biases = cast(-minimum * cast(_f16_at(blocks, 2), "f32")[:, None], target.scale_dtype)
        finite = first_nonfinite(scales) is None and first_nonfinite(biases) is None
        _repack_super(blocks, _SUPER[source.name], target.bits, packed)
    else:
        simple = BLOCKS[source.name]
        scales = cast(d, target.scale_dtype)
        finite = True
        if simple.zero is None:
            biases = cast(_f16_at(blocks, 2), target.scale_dtype)
        else:
            # Of the rounded scale, so that only that was rounded.
            biases = cast(np.float32(-simple.zero) * cast(scales, "f32"), target.scale_dtype)
            finite = first_nonfinite(biases) is None
        _repack(blocks, simple.start, simple.bits, target.bits, packed)
    if not finite:
        return None
    return {
        "weight": weight,
        "scales": scales.reshape(layout["scales"].shape),
        "biases": biases.reshape(layout["biases"].shape),
    }


def _of_groups(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The six-bit scales and minima of the groups of K-quants, f32 ``[blocks, 8]``."""
    q = blocks[:, 4:16]
    low, high = np.uint8(15), np.uint8(63)
    scale = np.concatenate([q[:, :4] & high, (q[:, 8:] & low) | (q[:, :4] >> 6 << 4)], axis=1)
    minimum = np.concatenate([q[:, 4:8] & high, (q[:, 8:] >> 4) | (q[:, 4:8] >> 6 << 4)], axis=1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _f16_at(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0]


@kernel
def _repack(blocks: np.ndarray, start: int, bits: int, wide: int, out: np.ndarray) -> None:
    """Codes as MLX packs them, in ``wide`` bits each. ``start`` is where the codes of a block
    begin: fifth bits (if 5 bits), then the others."""
    codes = np.empty(_GROUP, np.uint8)
    size = _GROUP * wide // 8
    for i in range(blocks.shape[0]):
        block = blocks[i]
        if bits == 8:
            signed = block[start : start + 32]
            for j in range(32):
                codes[j] = signed[j] ^ np.uint8(0x80)
        else:
            at = start + (4 if bits == 5 else 0)
            nibbles = block[at : at + 16]
            for j in range(16):
                codes[j] = nibbles[j] & np.uint8(15)
                codes[j + 16] = nibbles[j] >> np.uint8(4)
            if bits == 5:
                for j in range(32):
                    fifth = (_U32(block[start + j // 8]) >> _U32(j % 8)) & _U32(1)
                    codes[j] |= np.uint8(fifth << _U32(4))
        pack(codes, wide, out[i * size : (i + 1) * size])


@kernel
def _repack_super(blocks: np.ndarray, bits: int, wide: int, out: np.ndarray) -> None:
    """The same for Q4_K and Q5_K: two groups share 32 bytes, one in the low halves, and the fifth
    bits of all groups 32 others."""
    codes = np.empty(_GROUP, np.uint8)
    size = _GROUP * wide // 8
    start = 48 if bits == 5 else 16
    for i in range(blocks.shape[0]):
        block = blocks[i]
        fifths = block[16:48]
        for group in range(8):
            nibbles = block[start + group // 2 * 32 : start + group // 2 * 32 + 32]
            shift = np.uint8(4 * (group % 2))
            for j in range(32):
                codes[j] = (nibbles[j] >> shift) & np.uint8(15)
            if bits == 5:
                for j in range(32):
                    codes[j] |= ((fifths[j] >> np.uint8(group)) & np.uint8(1)) << np.uint8(4)
            at = (i * 8 + group) * size
            pack(codes, wide, out[at : at + size])


def _to_mxfp4_groups(blocks: np.ndarray, shape: tuple[int, ...], target: MlxFloat) -> Parts | None:
    scales = np.ascontiguousarray(blocks[:, 0])
    if (scales == 255).any():  # 2^128 to ggml, NaN to the standard
        return None
    layout = target.parts(shape)
    weight = np.empty(layout["weight"].shape, np.uint32)
    _repack(blocks, 1, 4, 4, weight.reshape(-1).view(np.uint8))
    return {"weight": weight, "scales": scales.reshape(layout["scales"].shape)}


def _to_mxfp4_blocks(parts: Parts) -> Parts | None:
    """ggml pairs the codes 16 apart where MLX pairs neighbours."""
    scales = parts["scales"]
    if (scales == 255).any():
        return None
    packed = np.ascontiguousarray(parts["weight"]).view(np.uint8).reshape(-1, 16)
    codes = np.empty((len(packed), 32), np.uint8)
    codes[:, ::2], codes[:, 1::2] = packed & np.uint8(15), packed >> np.uint8(4)
    out = np.empty((len(packed), 17), np.uint8)
    out[:, 0] = scales.reshape(-1)
    out[:, 1:] = codes[:, :16] | (codes[:, 16:] << np.uint8(4))
    return {"weight": out.reshape(*scales.shape[:-1], -1)}
