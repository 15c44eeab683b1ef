"""The compiled steps of a forward pass, but for attention.

Activations are f32. One position multiplies by the blocks of a matrix in registers; several decode
a tile of rows that all of them use. A step shares out its own work: by position, or through its
counter, a grain of rows at a time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from mlxedge.fallback.activations import activate, tanh
from mlxedge.fallback.frame import (
    BUFFER,
    BUFFER_ROW,
    COUNTERS,
    SCRATCH,
    SCRATCH_BYTES,
    START,
    STEP_SIGNATURE,
    THREADS,
    TOKENS,
    N,
)
from mlxedge.fallback.lanes import LANES, inline, spread, where
from mlxedge.fallback.linear import COLS, KERNEL, compile_c
from mlxedge.fallback.memory import get_f32, get_i64, load_f32, put_f32, store_f32
from mlxedge.fallback.team import call_6, fetch_add
from mlxedge.fallback.tiles import (
    TILE_COLS,
    TILE_ROWS,
    dot_tile,
    exp,
    fma,
    keep_lanes,
    total,
    zeros,
)

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)

# Fields of a step, after the function's address.
_FIRST, _SECOND, _THIRD, _FOURTH, _FIFTH, _SIXTH, _BIASES, _PIECES = (8 * i for i in range(1, 9))
_X, _GRAIN, _NUMBER, _COUNT, _PARTS = (8 * i for i in range(1, 6))
#: Per matrix of a linear step: its address, rows, output buffer, bias or 0, buffer to add to or 0.
PART_FIELDS = 5
_MATRIX, _ROWS, _OUT, _BIAS, _SUM = (8 * i for i in range(PART_FIELDS))


def _embed(step: int, frame: int, thread: int) -> None:
    """Decode the rows of the tokens, or of their positions; the first one for tokens that the table
    does not have."""
    matrix, buffer = get_i64(step + _FIRST), frame + get_i64(step + _SECOND)
    rows = get_i64(step + _FOURTH)
    out, out_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    tokens, by_position = get_i64(frame + TOKENS), get_i64(step + _THIRD)
    for i in range(thread, get_i64(frame + N), get_i64(frame + THREADS)):
        token = get_i64(frame + START) + i if by_position else get_i64(tokens + 8 * i)
        if token >= rows:
            token = 0
        call_6(get_i64(matrix + KERNEL), matrix, token, token + 1, 0, out + i * out_row, out_row)


def _norm(step: int, frame: int, thread: int) -> None:
    """RMSNorm, x · weight / sqrt(mean(x²) + ε), or LayerNorm, which is that of x - mean(x) and adds
    a bias, if there is one; of each piece of a row by itself."""
    buffer, to = frame + get_i64(step + _FIRST), frame + get_i64(step + _SECOND)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    out, out_row = get_i64(to + BUFFER), get_i64(to + BUFFER_ROW)
    weight, cols = get_i64(step + _THIRD), get_i64(step + _FOURTH)
    epsilon, centred, bias = get_f32(step + _FIFTH), get_i64(step + _SIXTH), get_i64(step + _BIASES)
    stop, pieces = (cols + LANES - 1) // LANES * 64, get_i64(step + _PIECES)
    for unit in range(thread, get_i64(frame + N) * pieces, get_i64(frame + THREADS)):
        i, first = unit // pieces, unit % pieces * stop
        p, o = x + i * x_row + first, out + i * out_row + first
        mean = _ZERO
        if centred:
            sums = zeros()
            for d in range(0, stop, 64):
                sums = sums + load_f32(p + d)
            mean = total(sums) / np.float32(cols)
        squares = zeros()
        for d in range(0, stop, 64):
            v = load_f32(p + d)
            if centred:
                v = keep_lanes(v - mean, 0, cols - d // 4, _ZERO)
            squares = fma(v, v, squares)
        factor = _ONE / np.sqrt(total(squares) / np.float32(cols) + epsilon)
        for d in range(0, stop, 64):
            v = load_f32(weight + d) * ((load_f32(p + d) - mean) * factor)
            if bias != 0:
                v = v + load_f32(bias + d)
            store_f32(o + d, v)


def _gate(step: int, frame: int, thread: int) -> None:
    """activation(gate) · up, into gate; without up, the activation alone."""
    buffer, to = frame + get_i64(step + _FIRST), frame + get_i64(step + _SECOND)
    gate, gate_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    up, up_row = get_i64(to + BUFFER), get_i64(to + BUFFER_ROW)
    kind, gated = get_i64(step + _FIFTH), get_i64(step + _SECOND) != 0
    numbers = get_i64(step + _SIXTH)
    vectors = (get_i64(step + _THIRD) + LANES - 1) // LANES
    n, threads = get_i64(frame + N) * get_i64(step + _FOURTH), get_i64(frame + THREADS)
    for unit in range(thread * vectors * n // threads, (thread + 1) * vectors * n // threads):
        i, d = unit // vectors, unit % vectors * 64
        v = activate(kind, load_f32(gate + i * gate_row + d), numbers)
        if gated:
            v = v * load_f32(up + i * up_row + d)
        store_f32(gate + i * gate_row + d, v)


def _clamped_gate(step: int, frame: int, thread: int) -> None:
    """g · sigmoid(alpha · g) · (u + 1), into gate; g and u are gate and up within limits. Beyond
    the width all stays zero, since g does."""
    buffer, to = frame + get_i64(step + _FIRST), frame + get_i64(step + _SECOND)
    gate, gate_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    up, up_row = get_i64(to + BUFFER), get_i64(to + BUFFER_ROW)
    vectors = (get_i64(step + _THIRD) + LANES - 1) // LANES
    n, threads = get_i64(frame + N) * get_i64(step + _FOURTH), get_i64(frame + THREADS)
    alpha, limit = get_f32(step + _FIFTH), get_f32(step + _SIXTH)
    for unit in range(thread * vectors * n // threads, (thread + 1) * vectors * n // threads):
        i, d = unit // vectors, unit % vectors * 64
        g, u = load_f32(gate + i * gate_row + d), load_f32(up + i * up_row + d)
        g = where(g > spread(limit), spread(limit), g)
        u = where(u > spread(limit), spread(limit), u)
        u = where(u > spread(-limit), u, spread(-limit))
        store_f32(gate + i * gate_row + d, g / (exp(g * -alpha) + _ONE) * (u + _ONE))


def _add(step: int, frame: int, thread: int) -> None:
    """Add a multiple of a buffer to another."""
    buffer, onto = frame + get_i64(step + _FIRST), frame + get_i64(step + _SECOND)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    out, out_row = get_i64(onto + BUFFER), get_i64(onto + BUFFER_ROW)
    vectors = (get_i64(step + _THIRD) + LANES - 1) // LANES
    factor = get_f32(step + _FOURTH)
    n, threads = get_i64(frame + N), get_i64(frame + THREADS)
    for unit in range(thread * vectors * n // threads, (thread + 1) * vectors * n // threads):
        i, d = unit // vectors, unit % vectors * 64
        p = out + i * out_row + d
        store_f32(p, load_f32(p) + load_f32(x + i * x_row + d) * factor)


def _scale(step: int, frame: int, thread: int) -> None:
    """x · factor, and then cap · tanh(x / cap) if there is a cap. All rows are one array: those of
    a result do not end with whole vectors. Of columns of a buffer the vectors of a row are told."""
    buffer = frame + get_i64(step + _FIRST)
    x, row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    each, vectors = get_i64(step + _FOURTH), (get_i64(frame + N) * row + 63) // 64
    if each == 0:
        each, row = vectors, 0
    else:
        vectors = get_i64(frame + N) * each
    factor, cap = get_f32(step + _SECOND), get_f32(step + _THIRD)
    threads = get_i64(frame + THREADS)
    for unit in range(thread * vectors // threads, (thread + 1) * vectors // threads):
        p = x + unit // each * row + unit % each * 64
        v = load_f32(p) * factor
        if cap > _ZERO:
            v = tanh(v * (_ONE / cap)) * cap
        store_f32(p, v)


def _clip(step: int, frame: int, thread: int) -> None:
    """x within a limit on both sides."""
    buffer = frame + get_i64(step + _FIRST)
    x, row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    vectors, limit = get_i64(frame + N) * row // 64, get_f32(step + _SECOND)
    threads = get_i64(frame + THREADS)
    for unit in range(thread * vectors // threads, (thread + 1) * vectors // threads):
        v = load_f32(x + 64 * unit)
        v = where(v > spread(limit), spread(limit), v)
        store_f32(x + 64 * unit, where(v > spread(-limit), v, spread(-limit)))


def _temper(step: int, frame: int, thread: int) -> None:
    """x · (1 + β·log(1 + ⌊position / span⌋))."""
    buffer = frame + get_i64(step + _FIRST)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    stop = (get_i64(step + _SECOND) + LANES - 1) // LANES * 64
    beta, span, start = get_f32(step + _THIRD), get_i64(step + _FOURTH), get_i64(frame + START)
    for i in range(thread, get_i64(frame + N), get_i64(frame + THREADS)):
        turns = np.float32((start + i) // span)
        factor = _ONE + beta * np.log(_ONE + turns)
        for d in range(0, stop, 64):
            p = x + i * x_row + d
            store_f32(p, load_f32(p) * factor)


@inline
def _finish(part: int, frame: int, first: int, stop: int, n: int) -> None:
    """Add bias and residual to columns ``first`` to ``stop`` of a product."""
    bias, onto = get_i64(part + _BIAS), get_i64(part + _SUM)
    buffer = frame + get_i64(part + _OUT)
    out, out_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    if bias != 0:
        for i in range(n):
            for r in range(first, stop):
                p = out + i * out_row + 4 * r
                put_f32(p, get_f32(p) + get_f32(bias + 4 * r))
    if onto != 0:
        x, x_row = get_i64(frame + onto + BUFFER), get_i64(frame + onto + BUFFER_ROW)
        for i in range(n):
            for r in range(first, stop):
                p = x + i * x_row + 4 * r
                put_f32(p, get_f32(p) + get_f32(out + i * out_row + 4 * r))


@inline
def multiply(
    matrix: int, first: int, stop: int, x: int, x_row: int, out: int, out_row: int, n: int, at: int
) -> None:
    """out[i, first:stop] = x[i] · rows, through decoded rows in scratch memory ``at``.

    A tile may read the rows after the last of x, which must be there; nothing is written but what
    was asked for: what is beyond belongs to nobody, or to another thread.
    """
    cols, rows = get_i64(matrix + COLS), stop - first
    row = 4 * cols
    call_6(get_i64(matrix + KERNEL), matrix, first, stop, 0, at, row)
    edge = at + (rows + TILE_ROWS) * row
    for i in range(0, n, TILE_COLS):
        xi, to = x + i * x_row, out + i * out_row + 4 * first
        for r in range(0, rows, TILE_ROWS):
            if i + TILE_COLS <= n and r + TILE_ROWS <= rows:
                dot_tile(at + r * row, row, xi, x_row, cols, to + 4 * r, out_row)
            else:
                dot_tile(at + r * row, row, xi, x_row, cols, edge, 4 * TILE_ROWS)
                for c in range(min(TILE_COLS, n - i)):
                    for k in range(min(TILE_ROWS, rows - r)):
                        value = get_f32(edge + 4 * (c * TILE_ROWS + k))
                        put_f32(to + c * out_row + 4 * (r + k), value)


def _linear(step: int, frame: int, thread: int) -> None:
    """Products of one input with several matrices, a grain of rows at a time."""
    n = get_i64(frame + N)
    buffer = frame + get_i64(step + _X)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    weights = get_i64(frame + SCRATCH) + thread * get_i64(frame + SCRATCH_BYTES)
    counter = get_i64(frame + COUNTERS) + 8 * get_i64(step + _NUMBER)
    parts, count = step + _PARTS, get_i64(step + _COUNT)
    grain = get_i64(step + _GRAIN)
    if n == 1:
        rows = 0
        for k in range(count):
            rows += get_i64(parts + 8 * PART_FIELDS * k + _ROWS)
        threads = get_i64(frame + THREADS)
        grain = rows if threads == 1 else max(16, rows // (4 * threads))
    while True:
        unit = fetch_add(counter, 1)
        part = parts
        for _ in range(count):
            units = (get_i64(part + _ROWS) + grain - 1) // grain
            if unit < units:
                break
            unit -= units
            part += 8 * PART_FIELDS
        if part == parts + 8 * PART_FIELDS * count:
            break
        matrix = get_i64(part + _MATRIX)
        first = unit * grain
        stop = min(first + grain, get_i64(part + _ROWS))
        buffer = frame + get_i64(part + _OUT)
        out, out_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
        if n == 1:
            call_6(get_i64(matrix + KERNEL), matrix, first, stop, x, out, 0)
        else:
            multiply(matrix, first, stop, x, x_row, out, out_row, n, weights)
        _finish(part, frame, first, stop, n)


_STEPS = {
    "embed": _embed,
    "norm": _norm,
    "gate": _gate,
    "clamped_gate": _clamped_gate,
    "add": _add,
    "scale": _scale,
    "clip": _clip,
    "temper": _temper,
    "linear": _linear,
}


@cache
def step_kernel(name: str) -> Any:
    """The compiled function of a step, of ``frame.STEP_SIGNATURE``."""
    return compile_c(STEP_SIGNATURE, _STEPS[name])


def grain(cols: int) -> int:
    """Rows to decode at a time: about 256 KiB of floats, which a core's own cache holds."""
    return int(np.clip(65536 // cols, 16, 32)) // TILE_ROWS * TILE_ROWS


def scratch_bytes(cols: int) -> int:
    """What one thread needs for a tile of rows of ``cols``."""
    return 4 * cols * (grain(cols) + 2 * TILE_ROWS)
