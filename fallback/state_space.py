"""Selective state spaces: the scans of Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060).

A channel c of a position i has the state h[i] = exp(A · dt[i]) · h[i - 1] + dt[i] · x[i] · B[i] of
``size`` numbers and gives y[i] = C[i] · h[i] + D · x[i]. In Mamba-2 the channels of a head share A
and dt, the heads of a group B and C; in Mamba every channel has its own dt and ``size`` numbers A,
and all share B and C. A state holds ``[vectors, size, 16]`` f32, a vector being sixteen channels of
a head; it is zero before position 0. Positions go one after another, so that it does not matter how
a prompt is cut.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from mlxedge.fallback.frame import (
    BUFFER,
    BUFFER_ROW,
    KV,
    START,
    STEP_SIGNATURE,
    THREADS,
    N,
)
from mlxedge.fallback.lanes import LANES, inline, spread
from mlxedge.fallback.linear import compile_c
from mlxedge.fallback.memory import get_f32, get_i64, load_f32, put_f32, store_f32
from mlxedge.fallback.tiles import exp, fma, keep_lanes, zeros

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
#: Above this softplus is the identity in f32.
_LINEAR = np.float32(20.0)

#: Fields of the steps, after the function's address.
_FIRST, _SECOND, _THIRD, _FOURTH, _FIFTH, _SIXTH = (8 * i for i in range(1, 7))
#: Fields of a scan.
(
    _X, _B, _C, _DT, _DECAY, _OUT, _SLOT, _HEADS, _HEAD_DIM, _GROUPS, _SIZE, _A, _D, _B_AT, _C_AT,
) = (8 * i for i in range(1, 16))  # fmt: skip


def _time_steps(step: int, frame: int, thread: int) -> None:
    """dt = softplus(dt + bias), kept within limits, and decay = exp(A · dt) where there is A."""
    buffer, other = frame + get_i64(step + _FIRST), frame + get_i64(step + _SECOND)
    dt, dt_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    decay, decay_row = get_i64(other + BUFFER), get_i64(other + BUFFER_ROW)
    width, bias, a = get_i64(step + _THIRD), get_i64(step + _FOURTH), get_i64(step + _FIFTH)
    low, high = get_f32(step + _SIXTH), get_f32(step + _SIXTH + 8)
    n, threads = get_i64(frame + N) * width, get_i64(frame + THREADS)
    for unit in range(thread * n // threads, (thread + 1) * n // threads):
        i, c = unit // width, unit % width
        p = dt + i * dt_row + 4 * c
        v = get_f32(p) + get_f32(bias + 4 * c)
        if v < _LINEAR:
            v = np.float32(math.log1p(math.exp(v)))
        v = min(max(v, low), high)
        put_f32(p, v)
        if a != 0:
            rate = get_f32(a + 4 * c)
            put_f32(decay + i * decay_row + 4 * c, np.float32(math.exp(rate * v)))


@inline
def _put_lanes(p: int, v: Any, count: int, at: int) -> None:
    """Store the first ``count`` lanes; ``at`` is memory for all."""
    if count >= LANES:
        store_f32(p, v)
        return
    store_f32(at, v)
    for k in range(count):
        put_f32(p + 4 * k, get_f32(at + 4 * k))


def _scan(step: int, frame: int, thread: int) -> None:
    """Mamba-2's, with one decay for the channels of a head."""
    heads, head_dim = get_i64(step + _HEADS), get_i64(step + _HEAD_DIM)
    groups, size = get_i64(step + _GROUPS), get_i64(step + _SIZE)
    buffer = frame + get_i64(step + _X)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    b_column, c_column = get_i64(step + _B_AT), get_i64(step + _C_AT)
    buffer = frame + get_i64(step + _DT)
    dt, dt_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _DECAY)
    decay, decay_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _OUT)
    out, out_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    states, d = get_i64(get_i64(frame + KV) + 16 * get_i64(step + _SLOT)), get_i64(step + _D)
    vectors = (head_dim + LANES - 1) // LANES
    for unit in range(thread, heads * vectors, get_i64(frame + THREADS)):
        head, lane = unit // vectors, unit % vectors * LANES
        column, count = 4 * (head * head_dim + lane), min(LANES, head_dim - lane)
        shared = 4 * size * (head // (heads // groups))
        # The state is followed by room for a vector.
        state = states + 64 * (size + 1) * unit
        if get_i64(frame + START) == 0:
            for s in range(size):
                store_f32(state + 64 * s, zeros())
        for i in range(get_i64(frame + N)):
            row = x + i * x_row
            v = keep_lanes(load_f32(row + column), 0, count, _ZERO)
            moved = v * get_f32(dt + i * dt_row + 4 * head)
            kept = get_f32(decay + i * decay_row + 4 * head)
            b, c = row + b_column + shared, row + c_column + shared
            y = v * get_f32(d + 4 * head)
            for s in range(size):
                h = fma(moved, spread(get_f32(b + 4 * s)), load_f32(state + 64 * s) * kept)
                store_f32(state + 64 * s, h)
                y = fma(h, spread(get_f32(c + 4 * s)), y)
            _put_lanes(out + i * out_row + column, y, count, state + 64 * size)


def _scan_channels(step: int, frame: int, thread: int) -> None:
    """Mamba's, with a decay for every number of a channel's state."""
    channels, size = get_i64(step + _HEADS), get_i64(step + _SIZE)
    buffer = frame + get_i64(step + _X)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _B)
    b, b_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _C)
    c, c_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _DT)
    dt, dt_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _OUT)
    out, out_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    states, d = get_i64(get_i64(frame + KV) + 16 * get_i64(step + _SLOT)), get_i64(step + _D)
    vectors = (channels + LANES - 1) // LANES
    for unit in range(thread, vectors, get_i64(frame + THREADS)):
        column = 64 * unit
        rates, state = get_i64(step + _A) + 64 * size * unit, states + 64 * (size + 1) * unit
        if get_i64(frame + START) == 0:
            for s in range(size):
                store_f32(state + 64 * s, zeros())
        for i in range(get_i64(frame + N)):
            v, rate = load_f32(x + i * x_row + column), load_f32(dt + i * dt_row + column)
            moved, y = v * rate, v * load_f32(d + column)
            for s in range(size):
                kept = exp(load_f32(rates + 64 * s) * rate)
                h = moved * get_f32(b + i * b_row + 4 * s)
                h = fma(load_f32(state + 64 * s), kept, h)
                store_f32(state + 64 * s, h)
                y = fma(h, spread(get_f32(c + i * c_row + 4 * s)), y)
            store_f32(out + i * out_row + column, y)


def _group_norm(step: int, frame: int, thread: int) -> None:
    """RMSNorm of each group of neighbouring columns, in place."""
    buffer = frame + get_i64(step + _FIRST)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    weight, groups, size = (
        get_i64(step + _SECOND),
        get_i64(step + _THIRD),
        get_i64(step + _FOURTH),
    )
    epsilon = get_f32(step + _FIFTH)
    n, threads = get_i64(frame + N) * groups, get_i64(frame + THREADS)
    for unit in range(thread * n // threads, (thread + 1) * n // threads):
        column = 4 * size * (unit % groups)
        p = x + unit // groups * x_row + column
        squares = _ZERO
        for k in range(size):
            squares += get_f32(p + 4 * k) * get_f32(p + 4 * k)
        factor = _ONE / np.sqrt(squares / np.float32(size) + epsilon)
        for k in range(size):
            put_f32(p + 4 * k, get_f32(p + 4 * k) * factor * get_f32(weight + column + 4 * k))


_STEPS = {
    "time steps": _time_steps,
    "scan": _scan,
    "scan channels": _scan_channels,
    "group norm": _group_norm,
}


@cache
def space_kernel(name: str) -> Any:
    return compile_c(STEP_SIGNATURE, _STEPS[name])


def state_cells(heads: int, head_dim: int, size: int) -> int:
    """Of a layer: its states, each followed by room for a vector."""
    return heads * -(-head_dim // LANES) * LANES * (size + 1)


def packed(a: np.ndarray) -> np.ndarray:
    """A ``[channels, size]`` as the scan of channels reads it: ``[vectors, size, 16]`` f32, in one
    array."""
    rows = np.pad(a, ((0, -a.shape[0] % LANES), (0, 0))).reshape(-1, LANES, a.shape[1])
    return np.ascontiguousarray(rows.swapaxes(1, 2), np.float32).reshape(-1)
