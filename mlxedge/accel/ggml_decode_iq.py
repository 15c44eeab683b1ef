"""ggml's lattice formats (iq1, iq2, iq3) to f32: each decoder takes u8 ``[N, block bytes]``.

Codes are indices into lattices of 4 or 8 numbers, which the ``gguf`` package holds
(``gguf.quants``). After ``dequantize_row_iq*`` of ``ggml/src/ggml-quants.c`` (llama.cpp as vendored
by llama-cpp-python 0.3.36); fields of a block are named in order in the comments. All products are
exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlxedge.accel.casts import f16_from_bytes, f32_from_f16

#: What iq1 formats add to or subtract from lattice points.
_DELTA = 0.125


@functools.cache
def _lattice(name: str) -> np.ndarray:
    """The lattice of a format, f32 ``[points, 4 or 8]``."""
    from gguf import quants

    format_ = getattr(quants, name)
    format_.init_grid()
    return np.ascontiguousarray(format_.grid.reshape(format_.grid_shape), dtype=np.float32)


def _points(name: str, index: mx.array) -> mx.array:
    """Lattice points ``[..., 4 or 8]`` of indices ``[...]``."""
    return mx.take(mx.array(_lattice(name)), index, axis=0)


def _as(raw: mx.array, dtype: mx.Dtype) -> mx.array:
    """Bytes ``[N, n]`` read as little-endian integers."""
    return mx.contiguous(raw).view(dtype)


def _shifted(values: mx.array, shifts: list[int], mask: int) -> mx.array:
    """``(values >> shift) & mask`` for each shift, along a new last axis."""
    return (values[..., None] >> mx.array(shifts, values.dtype)) & mask


def _signs(bits: mx.array) -> mx.array:
    """Bytes ``[...]`` of sign bits as ±1 ``[..., 8]``."""
    return 1.0 - 2.0 * _shifted(bits, list(range(8)), 1).astype(mx.float32)


def _paired_signs(bits: mx.array) -> mx.array:
    """Seven sign bits ``[...]``, the eighth making the number of ones even, as ±1 ``[..., 8]``."""
    parity = _shifted(bits, list(range(7)), 1).sum(axis=-1).astype(bits.dtype) & 1
    return _signs(bits | (parity << 7))


def _scaled(d: mx.array, codes: mx.array, factor: float) -> mx.array:
    """Scale of each sub-block: d ``[N, 1]`` · (1/2 + code) · factor, ``[N, sub-blocks]``."""
    return d * (0.5 + codes.astype(mx.float32)) * factor


def _iq2_xxs(blocks: mx.array) -> mx.array:  # d f16, 8 × (index[4], signs and scale u32)
    words = _as(blocks[:, 2:], mx.uint32).reshape(-1, 8, 2)
    index, rest = _shifted(words[..., 0], [0, 8, 16, 24], 255), words[..., 1]
    scale = _scaled(f16_from_bytes(blocks[:, :2]), rest >> 28, 0.25)
    signs = _paired_signs(_shifted(rest, [0, 7, 14, 21], 127))
    return scale[..., None, None] * _points("IQ2_XXS", index) * signs


def _iq2_xs(blocks: mx.array) -> mx.array:  # d f16, qs u16[32] (index, signs << 9), scales[8]
    qs = _as(blocks[:, 2:66], mx.uint16)
    codes = _shifted(blocks[:, 66:], [0, 4], 15).reshape(-1, 16)
    scale = _scaled(f16_from_bytes(blocks[:, :2]), codes, 0.25)
    points = _points("IQ2_XS", qs & 511) * _paired_signs(qs >> 9)
    return scale[..., None, None] * points.reshape(-1, 16, 2, 8)


def _iq2_s(blocks: mx.array) -> mx.array:  # d f16, qs[32], signs[32], qh[8], scales[8]
    high = _shifted(blocks[:, 66:74], [0, 2, 4, 6], 3).reshape(-1, 32).astype(mx.uint16)
    index = blocks[:, 2:34].astype(mx.uint16) | (high << 8)
    codes = _shifted(blocks[:, 74:], [0, 4], 15).reshape(-1, 16)
    scale = _scaled(f16_from_bytes(blocks[:, :2]), codes, 0.25)
    points = _points("IQ2_S", index) * _signs(blocks[:, 34:66])
    return scale[..., None, None] * points.reshape(-1, 16, 2, 8)


def _iq3_xxs(blocks: mx.array) -> mx.array:  # d f16, qs[64], signs and scale u32[8]
    rest = _as(blocks[:, 66:], mx.uint32)
    scale = _scaled(f16_from_bytes(blocks[:, :2]), rest >> 28, 0.5)
    signs = _paired_signs(_shifted(rest, [0, 7, 14, 21], 127))
    points = _points("IQ3_XXS", blocks[:, 2:66]).reshape(-1, 8, 4, 8)
    return scale[..., None, None] * points * signs


def _iq3_s(blocks: mx.array) -> mx.array:  # d f16, qs[64], qh[8], signs[32], scales[4]
    high = _shifted(blocks[:, 66:74], list(range(8)), 1).reshape(-1, 64).astype(mx.uint16)
    index = blocks[:, 2:66].astype(mx.uint16) | (high << 8)
    codes = _shifted(blocks[:, 106:], [0, 4], 15).reshape(-1, 8).astype(mx.float32)
    scale = f16_from_bytes(blocks[:, :2]) * (1.0 + 2.0 * codes)
    points = _points("IQ3_S", index).reshape(-1, 8, 4, 8)
    return scale[..., None, None] * points * _signs(blocks[:, 74:106]).reshape(-1, 8, 4, 8)


def _iq1_s(blocks: mx.array) -> mx.array:  # d f16, qs[32], qh u16[8]
    qh = _as(blocks[:, 34:], mx.uint16)
    high = _shifted(qh, [0, 3, 6, 9], 7).reshape(-1, 32)
    index = blocks[:, 2:34].astype(mx.uint16) | (high << 8)
    scale = f16_from_bytes(blocks[:, :2]) * (2 * ((qh >> 12) & 7) + 1).astype(mx.float32)
    delta = mx.where((qh >> 15) == 0, _DELTA, -_DELTA)
    points = _points("IQ1_S", index).reshape(-1, 8, 4, 8)
    return scale[..., None, None] * (points + delta[..., None, None])


def _iq1_m(blocks: mx.array) -> mx.array:  # qs[32], qh[16], scales u16[4] (3 bits, and of d 4)
    scales = _as(blocks[:, 48:], mx.uint16)
    d = scales[:, 0] >> 12
    for i in range(1, 4):
        d = d | (scales[:, i] >> 12 << (4 * i))
    codes = _shifted(scales, [0, 3, 6, 9], 7).reshape(-1, 16)
    scale = f32_from_f16(d[:, None]) * (2 * codes + 1).astype(mx.float32)
    qh = _shifted(blocks[:, 32:48], [0, 4], 15).reshape(-1, 32)
    index = blocks[:, :32].astype(mx.uint16) | ((qh & 7).astype(mx.uint16) << 8)
    delta = mx.where((qh & 8) == 0, _DELTA, -_DELTA)
    points = _points("IQ1_M", index) + delta[..., None]
    return scale[..., None, None] * points.reshape(-1, 16, 2, 8)


DECODERS: dict[str, Callable[[mx.array], mx.array]] = {
    "iq1_s": _iq1_s,
    "iq1_m": _iq1_m,
    "iq2_xxs": _iq2_xxs,
    "iq2_xs": _iq2_xs,
    "iq2_s": _iq2_s,
    "iq3_xxs": _iq3_xxs,
    "iq3_s": _iq3_s,
}
