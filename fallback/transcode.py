"""GGUF blocks as MLX groups that stand for the same weights: codes kept, nothing searched.

==========  =================  ================  =======
ggml        weight             MLX               bias
==========  =================  ================  =======
q4_0        d · (q - 8)        4 bits, group 32  -8 d
q4_1        d · q + m          4 bits, group 32  m
q5_0        d · (q - 16)       5 bits, group 32  -16 d
q5_1        d · q + m          5 bits, group 32  m
q8_0        d · q, q signed    8 bits, group 32  -128 d
mxfp4       E2M1 · 2^(e-127)   mxfp4             none
==========  =================  ================  =======

The scale is d. f16 and f32 hold d, m and the products exactly, so that decoding gives equal float32
numbers; only zeros may differ, in sign (d · 0 is -0 if d is negative, scale · code + bias is +0).
Not every block can be kept: bf16 cannot hold d; f16 cannot hold a bias beyond 65504, that is abs(d)
above 8188, 4094 or 511.75; and infinite or NaN scales only decode alike where m is stored. What is
left then is f32 scales or a new encoding.
"""

from __future__ import annotations

import numpy as np

from mlxedge.encodings import Affine, Encoding, GgmlBlock, MlxFloat
from mlxedge.fallback.bits import as_input, pack
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.plain import cast, first_nonfinite
from mlxedge.ops import Parts

_U32 = np.uint32
_GROUP = 32

#: ggml type: bits, and the code that stands for zero; None if the block stores its minimum.
_AFFINE: dict[str, tuple[int, int | None]] = {
    "q4_0": (4, 8),
    "q4_1": (4, None),
    "q5_0": (5, 16),
    "q5_1": (5, None),
    "q8_0": (8, 128),
}


def can_transcode(source: Encoding, target: Encoding) -> bool:
    """Whether :func:`transcode` can keep the weights of every ordinary block."""
    if source == target:
        return True
    if not isinstance(source, GgmlBlock):
        return False
    if isinstance(target, Affine):
        bits, _ = _AFFINE.get(source.name, (0, None))
        return (target.bits, target.group) == (bits, _GROUP) and target.scale_dtype != "bf16"
    return isinstance(target, MlxFloat) and source.name == target.mode == "mxfp4"


def transcode(parts: Parts, source: Encoding, target: Encoding) -> Parts | None:
    """The same weights in ``target``, or None if ``target`` cannot hold them exactly.

    ``source`` equal to ``target`` gives the same arrays, not copies.
    """
    if source == target:
        return parts
    if not (can_transcode(source, target) and isinstance(source, GgmlBlock)):
        return None
    stored = parts["weight"]
    shape = (*stored.shape[:-1], stored.shape[-1] // source.block_bytes * source.block_size)
    blocks = as_input(stored).reshape(-1, source.block_bytes)
    if isinstance(target, Affine):
        return _to_affine(blocks, shape, source, target)
    scales = np.ascontiguousarray(blocks[:, 0])
    if (scales == 255).any():  # 2^128 to ggml, NaN to the standard
        return None
    layout = target.parts(shape)
    return {
        "weight": _repacked(blocks, 1, 4).reshape(layout["weight"].shape),
        "scales": scales.reshape(layout["scales"].shape),
    }


def _to_affine(
    blocks: np.ndarray, shape: tuple[int, ...], source: GgmlBlock, target: Affine
) -> Parts | None:
    bits, zero = _AFFINE[source.name]
    d = cast(_f16_at(blocks, 0), "f32")
    if zero is None:
        biases = cast(_f16_at(blocks, 2), target.scale_dtype)
    else:
        biases = cast(np.float32(-zero) * d, target.scale_dtype)
        if first_nonfinite(biases) is not None:
            return None
    layout = target.parts(shape)
    weight = _repacked(blocks, 2 if zero is not None else 4, bits)
    return {
        "weight": weight.reshape(layout["weight"].shape),
        "scales": cast(d, target.scale_dtype).reshape(layout["scales"].shape),
        "biases": biases.reshape(layout["biases"].shape),
    }


def _f16_at(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0]


def _repacked(blocks: np.ndarray, start: int, bits: int) -> np.ndarray:
    """The codes of blocks as MLX packs them: u32 ``[blocks · bits]``."""
    out = np.empty(len(blocks) * bits, np.uint32)
    _repack(blocks, start, bits, out.view(np.uint8))
    return out


@kernel
def _repack(blocks: np.ndarray, start: int, bits: int, out: np.ndarray) -> None:
    """``start`` is where the codes of a block begin: fifth bits (if 5 bits), then the others."""
    codes = np.empty(_GROUP, np.uint8)
    size = _GROUP * bits // 8
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
        pack(codes, bits, out[i * size : (i + 1) * size])
