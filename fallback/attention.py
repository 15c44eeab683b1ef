"""Causal grouped-query attention over a cache, with rotary embeddings.

The cache of a layer holds keys as ``[kv_heads, capacity / 16, head_dim, 16]`` (sixteen positions to
a vector, so that scores need no sum across lanes) and values as
``[kv_heads, capacity, padded value_dim]``, both f32; ``capacity`` is a multiple of ``SPAN``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from mlxedge.fallback.activations import tanh
from mlxedge.fallback.frame import (
    BUFFER,
    BUFFER_ROW,
    CAPACITY,
    COUNTERS,
    KV,
    ROPES,
    SCRATCH,
    SCRATCH_BYTES,
    START,
    STEP_SIGNATURE,
    THREADS,
    N,
)
from mlxedge.fallback.lanes import inline, spread, where
from mlxedge.fallback.linear import compile_c
from mlxedge.fallback.memory import get_f32, get_i64, load_f32, put_f32, store_f32
from mlxedge.fallback.team import fetch_add
from mlxedge.fallback.tiles import (
    exp,
    highest,
    keep_lanes,
    outer_1x1,
    outer_1x4,
    outer_4x1,
    outer_4x4,
    total,
)

#: Positions that are scored together.
SPAN = 64
_ROWS = 4
_LOW = np.float32(-np.inf)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)

#: Fields of the steps of this module, after the function's address.
(
    NUMBER, Q, K, V, OUT, SLOT, HEADS, KV_HEADS, HEAD_DIM, ROTATED, Q_NORM, K_NORM, EPSILON,
    SCALE, WINDOW, CAP, ROPE, NEIGHBOURS, NORM, NORM_ROW, VALUE_DIM, ROTATED_FROM, SINKS, KEPT,
    SLOPES, PLACED,
) = (8 * i for i in range(1, 27))  # fmt: skip
#: What the field NORM adds up: LayerNorm instead of RMSNorm, and after the rotation.
LAYER_NORM, NORM_LAST = 1, 2


@inline
def _normalise(p: int, weight: int, size: int, epsilon: float, kind: int) -> None:
    """RMSNorm, or LayerNorm, of ``size`` f32 at ``p``, in place."""
    mean = _ZERO
    if kind & LAYER_NORM:
        for d in range(size):
            mean += get_f32(p + 4 * d)
        mean /= np.float32(size)
    squares = _ZERO
    for d in range(size):
        value = get_f32(p + 4 * d) - mean
        squares += value * value
    factor = _ONE / np.sqrt(squares / np.float32(size) + epsilon)
    for d in range(size):
        put_f32(p + 4 * d, get_f32(weight + 4 * d) * ((get_f32(p + 4 * d) - mean) * factor))


@inline
def _rotate(p: int, cos: int, sin: int, half: int, neighbours: int) -> None:
    """Rotate the two halves of ``2 · half`` f32 at ``p`` against each other, in place, or each even
    one against the next."""
    apart, step = (1, 2) if neighbours else (half, 1)
    for d in range(half):
        c, s = get_f32(cos + 4 * d), get_f32(sin + 4 * d)
        q = p + 4 * d * step
        low, high = get_f32(q), get_f32(q + 4 * apart)
        put_f32(q, low * c - high * s)
        put_f32(q + 4 * apart, high * c + low * s)


@inline
def _place(p: int, weight: int, step: int, cos: int, sin: int) -> None:
    """Normalise, if there is a ``weight``, and rotate the head at ``p``, in either order."""
    size, half, kind = get_i64(step + HEAD_DIM), get_i64(step + ROTATED) // 2, get_i64(step + NORM)
    if weight != 0 and kind < NORM_LAST:
        _normalise(p, weight, size, get_f32(step + EPSILON), kind)
    _rotate(p + get_i64(step + ROTATED_FROM), cos, sin, half, get_i64(step + NEIGHBOURS))
    if weight != 0 and kind >= NORM_LAST:
        _normalise(p, weight, size, get_f32(step + EPSILON), kind)


def _keep(step: int, frame: int, thread: int) -> None:
    """Normalise and rotate q and k, and put k and v into the cache, if this layer has its own."""
    heads, kv_heads = get_i64(step + HEADS), get_i64(step + KEPT)
    size, half = get_i64(step + HEAD_DIM), get_i64(step + ROTATED) // 2
    value_size = get_i64(step + VALUE_DIM)
    padded = (value_size + 15) // 16 * 16
    capacity = get_i64(frame + CAPACITY)
    table = get_i64(frame + KV) + 16 * get_i64(step + SLOT)
    keys, values = get_i64(table), get_i64(table + 8)
    q_norm, k_norm = get_i64(step + Q_NORM), get_i64(step + K_NORM)
    norm_row, placed = get_i64(step + NORM_ROW), get_i64(step + PLACED)
    tables = get_i64(frame + ROPES) + 16 * get_i64(step + ROPE)
    cosines, sines = get_i64(tables), get_i64(tables + 8)
    every = heads + 2 * kv_heads
    for unit in range(thread, get_i64(frame + N) * every, get_i64(frame + THREADS)):
        i, h = unit // every, unit % every
        position = get_i64(frame + START) + i
        cos, sin = cosines + 4 * half * position, sines + 4 * half * position
        if h < heads:
            buffer = frame + get_i64(step + Q)
            p = get_i64(buffer + BUFFER) + i * get_i64(buffer + BUFFER_ROW) + 4 * size * h
            _place(p, q_norm + norm_row * h, step, cos, sin)
        elif h < heads + kv_heads:
            h -= heads
            buffer = frame + get_i64(step + K)
            p = get_i64(buffer + BUFFER) + i * get_i64(buffer + BUFFER_ROW) + 4 * size * h
            if placed == 0:
                _place(p, k_norm + norm_row * h, step, cos, sin)
            block = h * (capacity // 16) + position // 16
            out = keys + 64 * size * block + 4 * (position % 16)
            for d in range(size):
                put_f32(out + 64 * d, get_f32(p + 4 * d))
        else:
            h -= heads + kv_heads
            buffer = frame + get_i64(step + V)
            p = get_i64(buffer + BUFFER) + i * get_i64(buffer + BUFFER_ROW) + 4 * value_size * h
            out = values + 4 * padded * (h * capacity + position)
            for d in range(value_size):
                put_f32(out + 4 * d, get_f32(p + 4 * d))


@inline
def _softmax(
    scores: int, low: int, stop: int, first: int, last: int, scale: float, sink: float
) -> float:
    """Turn scores of positions ``low`` to ``stop`` into e^(scale · score - max), the others from
    ``first`` to ``last`` (multiples of 16) into 0; gives one over the sum, to which a ``sink`` adds
    what attends to nothing."""
    top = spread(_LOW)
    for p in range(first, last, 16):
        v = keep_lanes(load_f32(scores + 4 * p), low - p, stop - p, _LOW)
        top = where(v > top, v, top)
    highest_score = highest(top) * scale
    most = spread(sink if sink > highest_score else highest_score)
    sums = keep_lanes(exp(spread(sink) - most), 0, 1, _ZERO)
    for p in range(first, last, 16):
        v = exp(load_f32(scores + 4 * p) * scale - most)
        v = keep_lanes(v, low - p, stop - p, _ZERO)
        store_f32(scores + 4 * p, v)
        sums = sums + v
    return _ONE / total(sums)


@inline
def _cap(scores: int, first: int, last: int, scale: float, cap: float) -> None:
    """Turn scores into cap · tanh(scale · score / cap)."""
    for p in range(first, last, 16):
        v = load_f32(scores + 4 * p) * (scale / cap)
        store_f32(scores + 4 * p, tanh(v) * cap)


@inline
def _slope(
    scores: int, first: int, last: int, scale: float, slope: float, here: int, lanes: int
) -> None:
    """Turn scores into scale · score - slope · distance; ``lanes`` are the numbers 0 to 15."""
    numbers = load_f32(lanes)
    for p in range(first, last, 16):
        v = (numbers + np.float32(p - here)) * slope
        store_f32(scores + 4 * p, load_f32(scores + 4 * p) * scale + v)


def _attend(step: int, frame: int, thread: int) -> None:
    """Attention of n new positions to all before them; a tile is up to four rows of queries that
    share a head of the cache: neighbouring positions, or the heads of a group at one position."""
    heads, kv_heads = get_i64(step + HEADS), get_i64(step + KV_HEADS)
    size, window = get_i64(step + HEAD_DIM), get_i64(step + WINDOW)
    value_size, sinks = get_i64(step + VALUE_DIM), get_i64(step + SINKS)
    slopes = get_i64(step + SLOPES)
    padded, group = (value_size + 15) // 16 * 16, heads // kv_heads
    capacity = get_i64(frame + CAPACITY)
    table = get_i64(frame + KV) + 16 * get_i64(step + SLOT)
    keys, values = get_i64(table), get_i64(table + 8)
    n, start, scale = get_i64(frame + N), get_i64(frame + START), get_f32(step + SCALE)
    cap = get_f32(step + CAP)
    buffer = frame + get_i64(step + Q)
    q, q_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + OUT)
    out, out_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    scores = get_i64(frame + SCRATCH) + thread * get_i64(frame + SCRATCH_BYTES)
    row_bytes = 4 * capacity
    mixed = scores + _ROWS * row_bytes
    counter = get_i64(frame + COUNTERS) + 8 * get_i64(step + NUMBER)

    many = n >= _ROWS
    if many:
        tiles = (n + _ROWS - 1) // _ROWS
        units = heads * tiles
    else:
        tiles = (group + _ROWS - 1) // _ROWS
        units = n * kv_heads * tiles
    while True:
        unit = fetch_add(counter, 1)
        if unit >= units:
            break
        if many:
            # The last positions have the most to do: they go first.
            i, head = (tiles - 1 - unit // heads) * _ROWS, unit % heads
            rows = min(_ROWS, n - i)
            from_q, a_row, to_row = q + i * q_row + 4 * size * head, q_row, out_row
            to_out = out + i * out_row + 4 * value_size * head
            position, stride = start + i, 1
        else:
            i, head = unit // (kv_heads * tiles), unit // tiles % kv_heads * group
            head += unit % tiles * _ROWS
            rows = min(_ROWS, (head // group + 1) * group - head)
            from_q, a_row, to_row = q + i * q_row + 4 * size * head, 4 * size, 4 * value_size
            to_out = out + i * out_row + 4 * value_size * head
            position, stride = start + i, 0
        stop = position + stride * (rows - 1) + 1
        low = max(0, position + 1 - window) if window > 0 else 0
        first, last = low // SPAN * SPAN, (stop + SPAN - 1) // SPAN * SPAN
        kv = head // group
        k = keys + 4 * size * kv * capacity
        for p in range(first, last, SPAN):
            block = k + 4 * size * p
            if rows > 1:
                outer_4x4(from_q, a_row, block, 64, 64 * size, size, scores + 4 * p, row_bytes)
            else:
                outer_1x4(from_q, a_row, block, 64, 64 * size, size, scores + 4 * p, row_bytes)
        v = values + 4 * padded * (kv * capacity + first)
        at, mixed_row = scores + 4 * first, 4 * padded
        for r in range(rows):
            here = position + stride * r
            low = max(0, here + 1 - window) if window > 0 else 0
            row, factor = scores + r * row_bytes, scale
            if cap > _ZERO:
                _cap(row, first, last, scale, cap)
                factor = _ONE
            if slopes != 0:
                slope = get_f32(slopes + 64 + 4 * (head + (1 - stride) * r))
                _slope(row, first, last, factor, slope, here, slopes)
                factor = _ONE
            sink = _LOW
            if sinks != 0:
                sink = get_f32(sinks + 4 * (head + (1 - stride) * r))
            weight = _softmax(row, low, here + 1, first, last, factor, sink)
            put_f32(mixed + _ROWS * mixed_row + 4 * r, weight)
        d = 0
        while d < padded:
            to = mixed + 4 * d
            if rows > 1 and d + SPAN <= padded:
                outer_4x4(at, row_bytes, v + 4 * d, mixed_row, 64, stop - first, to, mixed_row)
                d += SPAN
            elif rows > 1:
                outer_4x1(at, row_bytes, v + 4 * d, mixed_row, 64, stop - first, to, mixed_row)
                d += 16
            elif d + SPAN <= padded:
                outer_1x4(at, row_bytes, v + 4 * d, mixed_row, 64, stop - first, to, mixed_row)
                d += SPAN
            else:
                outer_1x1(at, row_bytes, v + 4 * d, mixed_row, 64, stop - first, to, mixed_row)
                d += 16
        for r in range(rows):
            weight = get_f32(mixed + _ROWS * mixed_row + 4 * r)
            for d in range(value_size):
                put_f32(
                    to_out + r * to_row + 4 * d, get_f32(mixed + r * mixed_row + 4 * d) * weight
                )


def scratch_bytes(capacity: int, value_dim: int) -> int:
    """What one thread needs for a tile."""
    return 4 * _ROWS * (capacity + (value_dim + 15) // 16 * 16 + 1)


@cache
def keep_kernel() -> Any:
    return compile_c(STEP_SIGNATURE, _keep)


@cache
def attend_kernel() -> Any:
    return compile_c(STEP_SIGNATURE, _attend)
