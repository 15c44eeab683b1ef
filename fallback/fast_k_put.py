"""Write ggml's affine super-blocks from scales and minimums that a search found.

``found``, float32 ``[2 · 256 + 2 · 16]``, flat, is about sixteen super-blocks: the integer scale of
sub-block j of super-block k at ``16 · j + k``, its minimum 256 further; d of super-block k at
``512 + k``, dmin 16 further. ``scales``, float32 ``[32]``, is scratch. Codes are the nearest for
what is stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.fallback.lanes import (
    LANES,
    inline,
    inner,
    load,
    put_half,
    spread,
    spread_int,
    store_bytes,
    truncate,
    where,
)

SUPER_BLOCK = 256
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_MAGIC = np.float32(12582912.0)


@inline
def nearest_in(v: Any, low: Any, high: Any) -> Any:
    """The nearest integer, ties to even, from ``low`` to ``high``; ``low`` for NaN."""
    v = where(v > low, v, low)
    v = where(v < high, v, high)
    return (v + _MAGIC) - _MAGIC


@inline
def _codes(x: Any, at: Any, scale: Any, minimum: Any, top: Any) -> Any:
    """The nearest codes of 16 weights, for x = scale · code - minimum."""
    inverse = _ONE / scale if scale > _ZERO else _ZERO
    level = (load(x, at) + minimum) * inverse
    return truncate(nearest_in(level, spread(_ZERO), spread(np.float32(top))))


@inline
def _put_scales(found: Any, k: Any, out: Any, at: Any, scales: Any) -> None:
    """Write d, dmin and the 12 bytes of 6-bit integers; 8 scales and 8 minimums into ``scales``."""
    d = put_half(out, at, found[512 + k])
    dmin = put_half(out, at + 2, found[512 + LANES + k])
    for j in range(4):
        s, m = np.int32(found[LANES * j + k]), np.int32(found[256 + LANES * j + k])
        s_later = np.int32(found[LANES * (j + 4) + k])
        m_later = np.int32(found[256 + LANES * (j + 4) + k])
        out[at + 4 + j] = s | s_later >> 4 << 6
        out[at + 8 + j] = m | m_later >> 4 << 6
        out[at + 12 + j] = (s_later & 15) | (m_later & 15) << 4
    for j in range(8):
        scales[j] = d * found[LANES * j + k]
        scales[8 + j] = dmin * found[256 + LANES * j + k]


@inner
def put_q4_k(x: Any, start: Any, found: Any, k: Any, out: Any, at: Any, scales: Any) -> None:
    _put_scales(found, k, out, at, scales)
    for i in range(0, SUPER_BLOCK // 2, LANES):
        # 32 bytes hold the codes of two sub-blocks.
        j = i // 32 * 2
        here = start + 32 * j + i % 32
        low = _codes(x, here, scales[j], scales[8 + j], 15)
        high = _codes(x, here + 32, scales[j + 1], scales[9 + j], 15)
        store_bytes(out, at + 16 + i, low | high << 4)


@inner
def put_q5_k(x: Any, start: Any, found: Any, k: Any, out: Any, at: Any, scales: Any) -> None:
    _put_scales(found, k, out, at, scales)
    for i in range(0, 32, LANES):
        fifth = spread_int(0)
        for j in range(0, 8, 2):
            here = start + 32 * j + i
            low = _codes(x, here, scales[j], scales[8 + j], 31)
            high = _codes(x, here + 32, scales[j + 1], scales[9 + j], 31)
            fifth = fifth | low >> 4 << j | high >> 4 << (j + 1)
            store_bytes(out, at + 48 + 16 * j + i, low & 15 | (high & 15) << 4)
        store_bytes(out, at + 16 + i, fifth)


@inner
def put_q2_k(x: Any, start: Any, found: Any, k: Any, out: Any, at: Any, scales: Any) -> None:
    d = put_half(out, at + 80, found[512 + k])
    dmin = put_half(out, at + 82, found[512 + LANES + k])
    for j in range(16):
        s, m = found[LANES * j + k], found[256 + LANES * j + k]
        out[at + j] = np.int32(s) | np.int32(m) << 4
        scales[j] = d * s
        scales[16 + j] = dmin * m
    for part in range(4):
        # 32 bytes hold 128 weights: sub-blocks 0, 2, 4, 6 in the first 16, the odd ones after.
        packed = spread_int(0)
        for i in range(4):
            j = 8 * (part // 2) + part % 2 + 2 * i
            codes = _codes(x, start + 16 * j, scales[j], scales[16 + j], 3)
            packed = packed | codes << (2 * i)
        store_bytes(out, at + 16 + 16 * part, packed)
