"""Compiled steps for what is not one stream of hidden states: several that are mixed (AltUp), and
activations of which few are kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from mlxedge.fallback.frame import BUFFER, BUFFER_ROW, STEP_SIGNATURE, THREADS, N
from mlxedge.fallback.lanes import LANES, inline, spread, where
from mlxedge.fallback.linear import compile_c
from mlxedge.fallback.memory import get_f32, get_i64, load_f32, store_f32
from mlxedge.fallback.tiles import fma, keep_lanes, total, zeros

_ZERO = np.float32(0.0)
#: The least mean square that counts (transformers' modeling_gemma3n.py).
_LEAST = np.float32(1e-5)

# Fields of a step, after the function's address.
_FIRST, _SECOND, _THIRD, _FOURTH, _FIFTH, _SIXTH, _SEVENTH = (8 * i for i in range(1, 8))


@inline
def _mean_square(p: int, cols: int) -> float:
    squares = zeros()
    for d in range(0, (cols + LANES - 1) // LANES * 64, 64):
        v = load_f32(p + d)
        squares = fma(v, v, squares)
    return total(squares) / np.float32(cols)


def _mix(step: int, frame: int, thread: int) -> None:
    """out_i = base_i + Σ_j coefficient[i, j] · x_j, the pieces of each side by side in a row."""
    to, buffer = frame + get_i64(step + _FIRST), frame + get_i64(step + _SECOND)
    out, out_row = get_i64(to + BUFFER), get_i64(to + BUFFER_ROW)
    base, base_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _THIRD)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _FOURTH)
    factors, factors_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    vectors, pieces = get_i64(step + _FIFTH), get_i64(step + _SIXTH)
    inputs = get_i64(step + _SEVENTH)
    for i in range(thread, get_i64(frame + N), get_i64(frame + THREADS)):
        for piece in range(pieces):
            place = 64 * vectors * piece
            p = factors + i * factors_row + 4 * inputs * piece
            for d in range(0, 64 * vectors, 64):
                v = load_f32(base + i * base_row + place + d)
                for j in range(inputs):
                    v = fma(
                        spread(get_f32(p + 4 * j)),
                        load_f32(x + i * x_row + 64 * vectors * j + d),
                        v,
                    )
                store_f32(out + i * out_row + place + d, v)


def _match(step: int, frame: int, thread: int) -> None:
    """x, with the root mean square of another buffer."""
    buffer, other = frame + get_i64(step + _FIRST), frame + get_i64(step + _SECOND)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    like, like_row = get_i64(other + BUFFER), get_i64(other + BUFFER_ROW)
    cols = get_i64(step + _THIRD)
    for i in range(thread, get_i64(frame + N), get_i64(frame + THREADS)):
        own = max(_mean_square(x + i * x_row, cols), _LEAST)
        factor = np.sqrt(_mean_square(like + i * like_row, cols)) / np.sqrt(own)
        for d in range(0, (cols + LANES - 1) // LANES * 64, 64):
            p = x + i * x_row + d
            store_f32(p, load_f32(p) * factor)


def _cut(step: int, frame: int, thread: int) -> None:
    """max(0, x - cutoff), where the cutoff is the mean of a row plus so many of its standard
    deviations."""
    buffer = frame + get_i64(step + _FIRST)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    cols, deviations = get_i64(step + _SECOND), get_f32(step + _THIRD)
    stop = (cols + LANES - 1) // LANES * 64
    for i in range(thread, get_i64(frame + N), get_i64(frame + THREADS)):
        p = x + i * x_row
        sums, squares = zeros(), zeros()
        for d in range(0, stop, 64):
            sums = sums + load_f32(p + d)
        mean = total(sums) / np.float32(cols)
        for d in range(0, stop, 64):
            v = keep_lanes(load_f32(p + d) - mean, 0, cols - d // 4, _ZERO)
            squares = fma(v, v, squares)
        cutoff = mean + np.sqrt(total(squares) / np.float32(cols)) * deviations
        for d in range(0, stop, 64):
            v = load_f32(p + d) - cutoff
            v = where(spread(_ZERO) > v, spread(_ZERO), v)
            store_f32(p + d, keep_lanes(v, 0, cols - d // 4, _ZERO))


def _multiply(step: int, frame: int, thread: int) -> None:
    """out = x · weight."""
    buffer, to = frame + get_i64(step + _FIRST), frame + get_i64(step + _SECOND)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    out, out_row = get_i64(to + BUFFER), get_i64(to + BUFFER_ROW)
    weight, vectors = get_i64(step + _THIRD), get_i64(step + _FOURTH)
    for i in range(thread, get_i64(frame + N), get_i64(frame + THREADS)):
        for d in range(0, 64 * vectors, 64):
            store_f32(out + i * out_row + d, load_f32(x + i * x_row + d) * load_f32(weight + d))


_STEPS = {"mix": _mix, "match": _match, "cut": _cut, "multiply": _multiply}


@cache
def stream_kernel(name: str) -> Any:
    """The compiled function of a step, of ``frame.STEP_SIGNATURE``."""
    return compile_c(STEP_SIGNATURE, _STEPS[name])
