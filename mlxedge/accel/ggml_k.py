"""ggml's K-quants, blocks of 256 with quantized scales: q2_k, q3_k, q4_k, q5_k, q6_k.

After ``quantize_row_q*_K_ref`` in ``ggml/src/ggml-quants.c`` (llama.cpp as vendored by
llama-cpp-python 0.3.36). Each encoder takes f32 ``[N, 256]`` and returns u8 ``[N, block bytes]``.
"""

from __future__ import annotations

import mlx.core as mx

from mlxedge.accel.arrays import (
    combine_bits,
    first_absmax,
    join_fields,
    nearest_int,
)
from mlxedge.accel.casts import f16_bytes, round_through
from mlxedge.accel.k_search import GROUP_MAX_EPS, KSearch

BLOCK = 256


def _by_position(x: mx.array, size: int) -> mx.array:
    """Blocks ``[N, 256]`` as ``[size, N * 256 / size]``: position first, one column a sub-block."""
    return mx.contiguous(x.reshape(-1, size).T)


def _by_block(columns: mx.array) -> mx.array:
    """Back from ``[size, M]`` to ``[N, sub-blocks, size]``."""
    return columns.T.reshape(-1, BLOCK // columns.shape[0], columns.shape[0])


def _largest(x: mx.array) -> mx.array:
    """The largest positive value of each row of ``[N, k]``, 0 if there is none; keeps the axis."""
    return mx.where(x > 0, x, 0.0).max(axis=1, keepdims=True)


def _requantize(
    x: mx.array, searched: mx.array, d: mx.array, dm: mx.array | None, low: int, high: int
) -> mx.array:
    """Levels for the stored scale d (and minimum dm), counted from ``low``.

    ``x`` and ``searched`` are ``[N, sub-blocks, size]``, ``d`` and ``dm`` ``[N, sub-blocks]``.
    Where d is 0 the levels of the search stay, as in C.
    """
    d = d[..., None]
    shifted = x if dm is None else x + dm[..., None]
    levels = mx.clip(nearest_int(shifted / d), low, high) - low
    return mx.where(d == 0, searched.astype(mx.int32), levels)


def _two_bit_fields(levels: mx.array) -> mx.array:
    """Two low bits of 256 levels as 64 bytes; byte 32 h + l holds weights 128 h + l + 32 i."""
    rows = (levels & 3).reshape(-1, 2, 4, 32)
    return combine_bits([rows[:, :, i] for i in range(4)], shift=2).reshape(-1, 64)


def _high_bits(levels: mx.array, bit: int) -> mx.array:
    """Bit ``bit`` of 256 levels as 32 bytes; bit i of byte l is that of weight 32 i + l."""
    rows = ((levels >> bit) & 1).reshape(-1, 8, 32)
    return combine_bits([rows[:, i] for i in range(8)], shift=1)


def _nibble_fields(levels: mx.array) -> mx.array:
    """Four low bits of 256 levels as 128 bytes; byte 32 h + l holds weights 64 h + l (+ 32)."""
    rows = (levels & 15).reshape(-1, 4, 2, 32)
    return combine_bits([rows[:, :, 0], rows[:, :, 1]], shift=4).reshape(-1, 128)


def _pack_six_bit_pairs(ls: mx.array, lm: mx.array) -> mx.array:
    """Eight 6-bit scales and eight 6-bit minimums ``[N, 8]`` in 12 bytes, as q4_k and q5_k do."""
    return mx.concatenate(
        [
            ls[:, :4] | (ls[:, 4:] >> 4 << 6),
            lm[:, :4] | (lm[:, 4:] >> 4 << 6),
            (ls[:, 4:] & 15) | ((lm[:, 4:] & 15) << 4),
        ],
        axis=1,
    )


def encode_q2_k(x: mx.array, search: KSearch) -> mx.array:
    columns = _by_position(x, 16)
    levels, scales, mins = search.scale_and_min(
        columns, mx.abs(columns), nmax=3, rmin=-0.5, rdelta=0.1, nstep=15, absolute=True
    )
    scales, mins = scales.reshape(-1, 16), mins.reshape(-1, 16)
    max_scale, max_min = _largest(scales), _largest(mins)
    ls = mx.where(max_scale > 0, nearest_int(15.0 / max_scale * scales), 0)
    lm = mx.where(max_min > 0, nearest_int(15.0 / max_min * mins), 0)
    packed = (ls | (lm << 4)) & 0xFF
    d, dmin = max_scale / 15.0, max_min / 15.0
    levels = _requantize(
        x.reshape(-1, 16, 16),
        _by_block(levels),
        round_through(d, "f16") * (packed & 15).astype(mx.float32),
        round_through(dmin, "f16") * (packed >> 4).astype(mx.float32),
        0,
        3,
    )
    return join_fields([packed, _two_bit_fields(levels), f16_bytes(d), f16_bytes(dmin)])


def encode_q3_k(x: mx.array, search: KSearch) -> mx.array:
    levels, scales = search.scale_by_descent(_by_position(x, 16), 4)
    scales = scales.reshape(-1, 16)
    _, max_scale = first_absmax(scales, axis=1)
    iscale = -32.0 / max_scale
    as_i8 = ((nearest_int(iscale * scales) + 128) & 0xFF) - 128
    used = max_scale != 0
    stored = mx.where(used, mx.clip(as_i8, -32, 31) + 32, 0)
    d = mx.where(used, 1.0 / iscale, 0.0)
    levels = _requantize(
        x.reshape(-1, 16, 16),
        _by_block(levels),
        round_through(d, "f16") * (stored - 32).astype(mx.float32),
        None,
        -4,
        3,
    )
    low, high = stored & 15, (stored >> 4).reshape(-1, 4, 4)
    packed = [low[:, :8] | (low[:, 8:] << 4), combine_bits([high[:, i] for i in range(4)], shift=2)]
    return join_fields([_high_bits(levels, 2), _two_bit_fields(levels), *packed, f16_bytes(d)])


def _encode_with_six_bit_scales(
    x: mx.array, search: KSearch, nmax: int, rmin: float, nstep: int
) -> tuple[mx.array, mx.array]:
    """The part that q4_k and q5_k share: head ``[N, 16]`` (d, dmin, scales) and levels."""
    columns = _by_position(x, 32)
    spread = mx.sqrt(search.sum(columns * columns) / 32.0)
    levels, scales, mins = search.scale_and_min(
        columns,
        spread + mx.abs(columns),
        nmax=nmax,
        rmin=rmin,
        rdelta=0.1,
        nstep=nstep,
        absolute=False,
    )
    scales, mins = scales.reshape(-1, 8), mins.reshape(-1, 8)
    max_scale, max_min = _largest(scales), _largest(mins)
    inv_scale = mx.where(max_scale > 0, 63.0 / max_scale, 0.0)
    inv_min = mx.where(max_min > 0, 63.0 / max_min, 0.0)
    ls = mx.minimum(nearest_int(inv_scale * scales) & 0xFF, 63)
    lm = mx.minimum(nearest_int(inv_min * mins) & 0xFF, 63)
    d, dmin = max_scale / 63.0, max_min / 63.0
    levels = _requantize(
        x.reshape(-1, 8, 32),
        _by_block(levels),
        round_through(d, "f16") * ls.astype(mx.float32),
        round_through(dmin, "f16") * lm.astype(mx.float32),
        0,
        nmax,
    )
    head = join_fields([f16_bytes(d), f16_bytes(dmin), _pack_six_bit_pairs(ls, lm)])
    return head, levels


def encode_q4_k(x: mx.array, search: KSearch) -> mx.array:
    head, levels = _encode_with_six_bit_scales(x, search, nmax=15, rmin=-1.0, nstep=20)
    return join_fields([head, _nibble_fields(levels)])


def encode_q5_k(x: mx.array, search: KSearch) -> mx.array:
    head, levels = _encode_with_six_bit_scales(x, search, nmax=31, rmin=-0.5, nstep=15)
    return join_fields([head, _high_bits(levels, 4), _nibble_fields(levels)])


def encode_q6_k(x: mx.array, search: KSearch) -> mx.array:
    levels, scales = search.scale(_by_position(x, 16), 32)
    scales = scales.reshape(-1, 16)
    max_abs, max_scale = first_absmax(scales, axis=1)
    iscale = -128.0 / max_scale
    stored = ((mx.minimum(nearest_int(iscale * scales), 127) + 128) & 0xFF) - 128
    d = 1.0 / iscale
    levels = _requantize(
        x.reshape(-1, 16, 16),
        _by_block(levels),
        round_through(d, "f16") * stored.astype(mx.float32),
        None,
        -32,
        31,
    )
    low, high = (levels & 15).reshape(-1, 2, 4, 32), (levels >> 4).reshape(-1, 2, 4, 32)
    ql = low[:, :, :2] | (low[:, :, 2:] << 4)
    qh = combine_bits([high[:, :, i] for i in range(4)], shift=2)
    block = join_fields([ql.reshape(-1, 128), qh.reshape(-1, 64), stored & 0xFF, f16_bytes(d)])
    return mx.where(max_abs < GROUP_MAX_EPS, mx.array(0, mx.uint8), block)


ENCODERS = {
    "q2_k": encode_q2_k,
    "q3_k": encode_q3_k,
    "q4_k": encode_q4_k,
    "q5_k": encode_q5_k,
    "q6_k": encode_q6_k,
}
