"""Encoders of ggml's K-quants: 256 weights a super-block, sub-block scales quantized in turn.

Byte for byte ``quantize_row_q*_K_ref`` of ggml-quants.c (llama.cpp as vendored by
llama-cpp-python 0.3.36) compiled without contraction of multiply and add: what
``ggml_quantize_chunk`` writes without an importance matrix.

Each kernel takes the weights, float32 ``[256 · n]``, and fills ``out``, uint8 ``[bytes · n]``. The
search runs on sixteen sub-blocks at once (``ggml_search``); the codes are then computed again
with the scales as stored, sixteen weights of one sub-block at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.fallback.ggml_search import (
    INVERSE,
    LARGEST,
    MINIMUM,
    OFFSET,
    SCALE,
    TINY,
    search_affine,
    search_descent,
    search_symmetric,
)
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.lanes import (
    LANES,
    absolute,
    float_bits,
    inline,
    inner,
    load,
    nearest_code,
    put_half,
    spread,
    spread_int,
    square_root,
    store,
    store_bytes,
    transpose,
)

BLOCK = 256
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_FOUR = np.float32(4.0)
_MAGIC = np.float32(12582912.0)


@inline
def nearest_int(value: Any) -> Any:
    """ggml's ``nearest_int`` of a float32."""
    return (float_bits(value + _MAGIC) & 0x007FFFFF) - 0x00400000


@inline
def _affine_codes(x: Any, d: Any, m: Any, inverse: Any, offset: Any, top: Any) -> Any:
    """Codes of 16 weights for x = d · code - m, or as the search left them if ``d`` is zero."""
    if d != _ZERO:
        return nearest_code((x + m) / d, 0, top)
    return nearest_code(inverse * (x - offset), 0, top)


@inline
def symmetric_codes(x: Any, inverse: Any, largest: Any, top: Any) -> Any:
    """Codes of 16 weights, 0…2·top - 1, as a symmetric search left them."""
    if largest < TINY:
        return spread_int(0)
    return nearest_code(inverse * x, -top, top - 1) + top


@inner
def _weigh_rms(tile: Any, weights: Any) -> None:
    """The weights of Q4_K and Q5_K: root mean square of the 32 weights plus magnitude."""
    total = spread(_ZERO)
    for i in range(32):
        x = load(tile, LANES * i)
        total = total + x * x
    rms = square_root(total / np.float32(32.0))
    for i in range(32):
        store(weights, LANES * i, rms + absolute(load(tile, LANES * i)))


@inner
def _weigh_powers(tile: Any, squares: Any, cubes: Any) -> None:
    for i in range(16):
        x = load(tile, LANES * i)
        store(squares, LANES * i, x * x)
        store(cubes, LANES * i, x * x * x)


@inline
def _largest(values: Any, start: Any, count: Any) -> Any:
    """The greatest of ``values[start : start + count]`` and zero."""
    largest = _ZERO
    for i in range(start, start + count):
        if values[i] > largest:
            largest = values[i]
    return largest


@inner
def _put_scales_6bit(found: Any, lane: Any, out: Any, at: Any, steps: Any) -> None:
    """Quantize the scales and minimums of 8 sub-blocks to 6 bits and write them at ``out[at]``.

    Layout: f16 d, f16 dmin, 12 bytes. ``steps`` gets d · scale (8) and dmin · minimum (8).
    """
    max_scale = _largest(found, SCALE + lane, 8)
    max_min = _largest(found, MINIMUM + lane, 8)
    limit = np.float32(63.0)
    inverse_scale = limit / max_scale if max_scale > _ZERO else _ZERO
    inverse_min = limit / max_min if max_min > _ZERO else _ZERO
    d = put_half(out, at, max_scale / limit)
    dmin = put_half(out, at + 2, max_min / limit)
    scales = at + 4
    for j in range(8):
        # A negative scale wraps to a large byte, then to 63: ggml's bytes hold it so.
        s = min(63, nearest_int(inverse_scale * found[SCALE + lane + j]) & 0xFF)
        m = min(63, nearest_int(inverse_min * found[MINIMUM + lane + j]) & 0xFF)
        steps[j] = d * np.float32(s)
        steps[8 + j] = dmin * np.float32(m)
        if j < 4:
            out[scales + j] = s
            out[scales + 4 + j] = m
        else:
            out[scales + 4 + j] = (s & 15) | (m & 15) << 4
            out[scales + j - 4] |= (s >> 4) << 6
            out[scales + j] |= (m >> 4) << 6


@inner
def put_q4_k(
    x: Any, start: Any, steps: Any, found: Any, inverse: Any, offset: Any, out: Any, at: Any
) -> None:
    """Write the codes of the Q4_K block that begins at ``x[start]``, for scales already written.

    ``steps``: 8 scales, then 8 minimums, as stored. ``inverse`` and ``offset`` say where in
    ``found`` the search left those of the 8 sub-blocks.
    """
    for pair in range(4):
        j = 2 * pair
        base = start + 32 * j
        a, b = inverse + j, offset + j
        for i in range(0, 32, 16):
            low = _affine_codes(load(x, base + i), steps[j], steps[8 + j], found[a], found[b], 15)
            high = _affine_codes(
                load(x, base + 32 + i), steps[j + 1], steps[9 + j], found[a + 1], found[b + 1], 15
            )
            store_bytes(out, at + 16 + 32 * pair + i, low | high << 4)


@inner
def put_q5_k(
    x: Any, start: Any, steps: Any, found: Any, inverse: Any, offset: Any, out: Any, at: Any
) -> None:
    """As :func:`put_q4_k`, of a Q5_K block."""
    for i in range(0, 32, 16):
        fifth = spread_int(0)
        for pair in range(4):
            j = 2 * pair
            base = start + 32 * j + i
            a, b = inverse + j, offset + j
            low = _affine_codes(load(x, base), steps[j], steps[8 + j], found[a], found[b], 31)
            high = _affine_codes(
                load(x, base + 32), steps[j + 1], steps[9 + j], found[a + 1], found[b + 1], 31
            )
            fifth = fifth | low >> 4 << j | high >> 4 << (j + 1)
            store_bytes(out, at + 48 + 32 * pair + i, low & 15 | (high & 15) << 4)
        store_bytes(out, at + 16 + i, fifth)


@inner
def put_q2_k(
    x: Any,
    start: Any,
    d: Any,
    dmin: Any,
    found: Any,
    inverse: Any,
    offset: Any,
    out: Any,
    at: Any,
) -> None:
    """As :func:`put_q4_k`, of a Q2_K block, whose scales and minimums are read from ``out``."""
    for part in range(4):
        # 32 bytes hold 128 weights: sub-blocks 0, 2, 4, 6 in the first 16, the odd ones after.
        sub = 8 * (part // 2) + part % 2
        packed = spread_int(0)
        for j in range(4):
            lane = sub + 2 * j
            s = np.float32(out[at + lane] & 15)
            m = np.float32(out[at + lane] >> 4)
            weights = load(x, start + 16 * lane)
            codes = _affine_codes(
                weights, d * s, dmin * m, found[inverse + lane], found[offset + lane], 3
            )
            packed = packed | codes << (2 * j)
        store_bytes(out, at + 16 + 16 * part, packed)


@kernel
def encode_q4_k(x: Any, out: Any) -> None:
    tile = np.empty(32 * LANES, np.float32)
    weights = np.empty(32 * LANES, np.float32)
    levels = np.empty(32 * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    steps = np.empty(16, np.float32)
    blocks = x.size // BLOCK
    for first in range(0, blocks, 2):
        count = min(2, blocks - first)
        start = BLOCK * first
        transpose(x, start, 32, 8 * count, tile, 0)
        transpose(x, start + 16, 32, 8 * count, tile, 16 * LANES)
        _weigh_rms(tile, weights)
        search_affine(
            tile, weights, levels, 32, 15, np.float32(-1.0), np.float32(0.1), 20, False, found
        )
        for b in range(count):
            at = 144 * (first + b)
            _put_scales_6bit(found, 8 * b, out, at, steps)
            put_q4_k(x, start + BLOCK * b, steps, found, INVERSE + 8 * b, OFFSET + 8 * b, out, at)


@kernel
def encode_q5_k(x: Any, out: Any) -> None:
    tile = np.empty(32 * LANES, np.float32)
    weights = np.empty(32 * LANES, np.float32)
    levels = np.empty(32 * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    steps = np.empty(16, np.float32)
    blocks = x.size // BLOCK
    for first in range(0, blocks, 2):
        count = min(2, blocks - first)
        start = BLOCK * first
        transpose(x, start, 32, 8 * count, tile, 0)
        transpose(x, start + 16, 32, 8 * count, tile, 16 * LANES)
        _weigh_rms(tile, weights)
        search_affine(
            tile, weights, levels, 32, 31, np.float32(-0.5), np.float32(0.1), 15, False, found
        )
        for b in range(count):
            at = 176 * (first + b)
            _put_scales_6bit(found, 8 * b, out, at, steps)
            put_q5_k(x, start + BLOCK * b, steps, found, INVERSE + 8 * b, OFFSET + 8 * b, out, at)


@kernel
def encode_q2_k(x: Any, out: Any) -> None:
    tile = np.empty(16 * LANES, np.float32)
    weights = np.empty(16 * LANES, np.float32)
    levels = np.empty(16 * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    limit = np.float32(15.0)
    for block in range(x.size // BLOCK):
        start = BLOCK * block
        at = 84 * block
        transpose(x, start, 16, 16, tile, 0)
        for i in range(16):
            store(weights, LANES * i, absolute(load(tile, LANES * i)))
        search_affine(
            tile, weights, levels, 16, 3, np.float32(-0.5), np.float32(0.1), 15, True, found
        )
        max_scale = _largest(found, SCALE, 16)
        max_min = _largest(found, MINIMUM, 16)
        inverse_scale = limit / max_scale if max_scale > _ZERO else _ZERO
        inverse_min = limit / max_min if max_min > _ZERO else _ZERO
        for j in range(16):
            s = nearest_int(inverse_scale * found[SCALE + j])
            m = nearest_int(inverse_min * found[MINIMUM + j])
            out[at + j] = (s | m << 4) & 0xFF
        d = put_half(out, at + 80, max_scale / limit)
        dmin = put_half(out, at + 82, max_min / limit)
        put_q2_k(x, start, d, dmin, found, INVERSE, OFFSET, out, at)


@inner
def _signed_largest_scale(found: Any) -> Any:
    """The first of the 16 scales of greatest magnitude; 0 if there is none."""
    largest = _ZERO
    extreme = _ZERO
    for j in range(16):
        scale = found[SCALE + j]
        if abs(scale) > largest:
            largest = abs(scale)
            extreme = scale
    return extreme


@inner
def put_q3_k(x: Any, start: Any, steps: Any, spare: Any, out: Any, at: Any) -> None:
    """Write the codes of the Q3_K block that begins at ``x[start]``, for 16 scales ``steps`` as
    stored. ``spare`` has the codes of sub-block k from ``16 · k`` on, if its scale is zero."""
    for side in range(2):
        top = spread_int(0)
        for part in range(2):
            packed = spread_int(0)
            for j in range(4):
                lane = 8 * part + 2 * j + side
                if steps[lane] != _ZERO:
                    code = nearest_code(load(x, start + 16 * lane) / steps[lane], -4, 3) + 4
                else:
                    code = nearest_code(load(spare, 16 * lane), 0, 7)
                packed = packed | (code & 3) << (2 * j)
                top = top | code >> 2 << (4 * part + j)
            store_bytes(out, at + 32 + 32 * part + 16 * side, packed)
        store_bytes(out, at + 16 * side, top)


@kernel
def encode_q3_k(x: Any, out: Any) -> None:
    tile = np.empty(16 * LANES, np.float32)
    squares = np.empty(16 * LANES, np.float32)
    cubes = np.empty(16 * LANES, np.float32)
    levels = np.empty(16 * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    spare = np.empty(16 * LANES, np.float32)
    steps = np.empty(16, np.float32)
    for block in range(x.size // BLOCK):
        start = BLOCK * block
        at = 110 * block
        transpose(x, start, 16, 16, tile, 0)
        _weigh_powers(tile, squares, cubes)
        search_descent(tile, squares, cubes, levels, 16, 4, found)

        scales = at + 96
        out[scales : scales + 12] = 0
        extreme = _signed_largest_scale(found)
        inverse = np.float32(-32.0) / extreme
        d = put_half(out, at + 108, _ONE / inverse if extreme != _ZERO else _ZERO)
        for j in range(16):
            s = -32
            if extreme != _ZERO:
                s = nearest_int(inverse * found[SCALE + j]) & 0xFF
                s = s - 256 if s > 127 else s
                s = max(-32, min(31, s))
                out[scales + j % 8] |= (s + 32 & 15) << (4 * (j // 8))
                out[scales + 8 + j % 4] |= (s + 32 >> 4) << (2 * (j // 4))
            steps[j] = d * np.float32(s)

        for lane in range(16):
            if steps[lane] == _ZERO:
                zero = found[LARGEST + lane] < TINY
                for i in range(16):
                    spare[16 * lane + i] = _ZERO if zero else levels[LANES * i + lane] + _FOUR
        put_q3_k(x, start, steps, spare, out, at)


@inline
def _q6_codes(x: Any, start: Any, steps: Any, found: Any, lane: Any) -> Any:
    """Codes of the 16 weights of a sub-block."""
    weights = load(x, start + 16 * lane)
    if steps[lane] != _ZERO:
        return nearest_code(weights / steps[lane], -32, 31) + 32
    return symmetric_codes(weights, found[INVERSE + lane], found[LARGEST + lane], 32)


@inner
def put_q6_k(x: Any, start: Any, steps: Any, found: Any, out: Any, at: Any) -> None:
    """Write the Q6_K block that begins at ``x[start]``, from what the search found."""
    extreme = _signed_largest_scale(found)
    if abs(extreme) < TINY:
        out[at : at + 210] = 0
        return
    inverse = np.float32(-128.0) / extreme
    d = put_half(out, at + 208, _ONE / inverse)
    for j in range(16):
        s = min(127, nearest_int(inverse * found[SCALE + j])) & 0xFF
        out[at + 192 + j] = s
        steps[j] = d * np.float32(s - 256 if s > 127 else s)
    for part in range(2):
        for side in range(2):
            top = spread_int(0)
            for j in range(2):
                lane = 8 * part + 2 * j + side
                low = _q6_codes(x, start, steps, found, lane)
                high = _q6_codes(x, start, steps, found, lane + 4)
                store_bytes(out, at + 64 * part + 32 * j + 16 * side, low & 15 | high << 4)
                top = top | low >> 4 << (2 * j) | high >> 4 << (2 * j + 4)
            store_bytes(out, at + 128 + 32 * part + 16 * side, top)


@kernel
def encode_q6_k(x: Any, out: Any) -> None:
    tile = np.empty(16 * LANES, np.float32)
    squares = np.empty(16 * LANES, np.float32)
    cubes = np.empty(16 * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    steps = np.empty(16, np.float32)
    for block in range(x.size // BLOCK):
        start = BLOCK * block
        transpose(x, start, 16, 16, tile, 0)
        _weigh_powers(tile, squares, cubes)
        search_symmetric(tile, squares, cubes, 16, 32, found)
        put_q6_k(x, start, steps, found, out, 210 * block)
