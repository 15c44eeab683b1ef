"""The steps of a mixture of experts: who serves a token, their products, and the weighted sum.

A slot is one pair of a position and an expert that was chosen for it. Slots are sorted by expert,
then by position, so that the rows of an expert stand together and its matrix is decoded once for
all of them. Steps between :func:`_gather` and :func:`_combine` work on buffers with a row per slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types

from mlxedge.fallback.forward_ops import multiply
from mlxedge.fallback.frame import (
    BUFFER,
    BUFFER_FIELDS,
    BUFFER_ROW,
    BUFFERS,
    COUNTERS,
    SCRATCH,
    SCRATCH_BYTES,
    STEP_FIELDS,
    STEP_SIGNATURE,
    THREADS,
    N,
)
from mlxedge.fallback.lanes import LANES, inline, spread, where
from mlxedge.fallback.linear import KERNEL, Matrix, compile_c
from mlxedge.fallback.memory import (
    ADDRESS,
    NOTHING,
    get_f32,
    get_i64,
    load_f32,
    op,
    put_f32,
    store_f32,
    write,
)
from mlxedge.fallback.team import call_6, fetch_add
from mlxedge.fallback.tiles import exp, fma, highest, keep_lanes, total, zeros

if TYPE_CHECKING:
    from mlxedge.fallback.tape import Arrays, Buffer, Watch

_LOW = np.float32(-np.inf)
_ZERO, _ONE, _TINY = np.float32(0.0), np.float32(1.0), np.float32(1e-20)

#: How logits become scores, as steps know it.
SCORES = {"softmax": 0, "sigmoid": 1, "softmax_top": 2}
_SIGMOID, _SOFTMAX_TOP = SCORES["sigmoid"], SCORES["softmax_top"]


@dataclass(frozen=True)
class Choice:
    """Which ``top_k`` of ``experts`` serve each position, made anew by every ``Tape.route``.

    It lives in int64 memory of whoever walks the tape, by number as a buffer does: how many experts
    have slots and which, in order; the first slot of every expert, with an end; a cell of scratch
    for each; then by position and choice the expert, the slot and the weight (f32, packed); and the
    position of each slot.
    """

    number: int
    experts: int
    top_k: int

    @property
    def offset(self) -> int:
        return BUFFERS + 8 * BUFFER_FIELDS * self.number

    def cells(self, rows: int) -> int:
        """The int64 cells that passes of up to ``rows`` positions need."""
        return 3 * self.experts + 2 + 4 * rows * self.top_k

    def spans(self, memory: np.ndarray) -> Iterator[tuple[int, slice]]:
        """The experts that have slots, in order, and their slots."""
        first = 1 + self.experts
        for expert in memory[1 : 1 + memory[0]].tolist():
            yield expert, slice(*memory[first + expert : first + expert + 2].tolist())


@dataclass(frozen=True)
class ExpertProduct:
    """``out = x @ W[e].T + bias[e]`` for the slots of every expert e.

    ``matrix`` holds a stack ``[experts, out.width, x.width]`` as ``experts · out.width`` rows;
    ``bias`` is f32 ``[experts, out.width]``.
    """

    matrix: Matrix
    out: Buffer
    bias: np.ndarray | None = None


#: Rows that a product without a kernel decodes at a time.
_TILE = 256


@dataclass(frozen=True)
class HostedExperts:
    """A product with a stack whose format has no kernel."""

    product: ExpertProduct
    x: Buffer
    choice: Choice

    def run(self, arrays: Arrays, tokens: np.ndarray, n: int, watch: Watch | None) -> None:
        product, rows = self.product, self.product.out.width
        for expert, slots in self.choice.spans(arrays[self.choice.number]):
            x = arrays[self.x.number][slots, : self.x.width]
            out = arrays[product.out.number][slots, :rows]
            for first in range(0, rows, _TILE):
                stop = min(first + _TILE, rows)
                tile = product.matrix.decode(expert * rows + first, expert * rows + stop)
                out[:, first:stop] = x @ tile.T
            if product.bias is not None:
                out += product.bias[expert]


@dataclass(frozen=True)
class ExpertTap:
    """A place where the rows of each expert can be looked at."""

    name: Any
    buffer: Buffer
    choice: Choice

    def run(self, arrays: Arrays, tokens: np.ndarray, n: int, watch: Watch | None) -> None:
        if watch is None:
            return
        x = arrays[self.buffer.number][:, : self.buffer.width]
        for expert, slots in self.choice.spans(arrays[self.choice.number]):
            watch(self.name, x[slots], expert, self.choice.experts)


@op(NOTHING, ADDRESS, types.int64)
def put_i64(b: Any, p: Any, value: Any) -> Any:
    return write(b, p, value)


# Fields of a step, after the function's address.
_X, _CHOICE, _NUMBER, _EXPERTS, _TOP_K = (8 * i for i in range(1, 6))
_SCORE, _NORMALISE, _SCALE, _BIAS, _GROUPS, _MOST_GROUPS, _BEST, _EACH = (
    8 * i for i in range(6, 14)
)
_GRAIN, _COUNT, _PARTS = (8 * i for i in range(6, 9))
_OTHER, _ADD = 8 * 6, 8 * 7
#: Per matrix of a product: its address, rows of an expert, output buffer, bias or 0.
PART_FIELDS = 4
#: Matrices that fit the fields of one step.
MOST_PARTS = (STEP_FIELDS - _PARTS // 8) // PART_FIELDS
_MATRIX, _ROWS, _OUT, _PART_BIAS = (8 * i for i in range(PART_FIELDS))


@inline
def _picks(memory: int, experts: int) -> int:
    """Where the fields by position and choice begin."""
    return memory + 8 * (3 * experts + 2)


@inline
def _softmax(x: int, out: int, count: int) -> None:
    """Softmax of ``count`` f32; whole vectors are read and written, zeros beyond the last."""
    top = spread(_LOW)
    for j in range(0, count, LANES):
        v = keep_lanes(load_f32(x + 4 * j), 0, count - j, _LOW)
        top = where(v > top, v, top)
    most = spread(highest(top))
    sums = zeros()
    for j in range(0, count, LANES):
        v = keep_lanes(exp(load_f32(x + 4 * j) - most), 0, count - j, _ZERO)
        store_f32(out + 4 * j, v)
        sums = sums + v
    factor = _ONE / total(sums)
    for j in range(0, count, LANES):
        store_f32(out + 4 * j, load_f32(out + 4 * j) * factor)


@inline
def _choose(values: int, count: int, most: int, ids: int) -> None:
    """The indices (i64) of the ``most`` largest of ``count`` f32, the largest first, and of equal
    ones the lower index. Always ``most`` different indices, whatever the values."""
    kept = 0
    for e in range(count):
        value = get_f32(values + 4 * e)
        if kept == most:
            if not value > get_f32(values + 4 * get_i64(ids + 8 * (most - 1))):
                continue
            j = most - 1
        else:
            j = kept
            kept += 1
        while j > 0:
            before = get_i64(ids + 8 * (j - 1))
            if not value > get_f32(values + 4 * before):
                break
            put_i64(ids + 8 * j, before)
            j -= 1
        put_i64(ids + 8 * j, e)


@inline
def _keep_groups(ranks: int, experts: int, groups: int, most: int, best: int, at: int) -> None:
    """Lower all ranks but those in the ``most`` best groups, by the sum of a group's ``best`` (one
    or two) highest. ``at`` is scratch memory of ``12 · groups`` bytes."""
    size, ids = experts // groups, at + 4 * groups
    for g in range(groups):
        first, second = _LOW, _LOW
        for e in range(g * size, (g + 1) * size):
            value = get_f32(ranks + 4 * e)
            if value > first:
                first, second = value, first
            elif value > second:
                second = value
        put_f32(at + 4 * g, first + second if best > 1 else first)
    _choose(at, groups, most, ids)
    for g in range(groups):
        kept = False
        for j in range(most):
            kept = kept or get_i64(ids + 8 * j) == g
        if not kept:
            for e in range(g * size, (g + 1) * size):
                put_f32(ranks + 4 * e, _LOW)


@inline
def _sort(memory: int, experts: int, top_k: int, n: int) -> None:
    """Number the slots: by expert, then by position."""
    active, starts, cursors = memory + 8, memory + 8 * (1 + experts), memory + 8 * (2 + 2 * experts)
    picks, count = _picks(memory, experts), n * top_k
    slots, positions = picks + 8 * count, picks + 24 * count
    for e in range(experts):
        put_i64(cursors + 8 * e, 0)
    for j in range(count):
        cursor = cursors + 8 * get_i64(picks + 8 * j)
        put_i64(cursor, get_i64(cursor) + 1)
    used, start = 0, 0
    for e in range(experts):
        here = get_i64(cursors + 8 * e)
        put_i64(starts + 8 * e, start)
        put_i64(cursors + 8 * e, start)
        if here > 0:
            put_i64(active + 8 * used, e)
            used += 1
        start += here
    put_i64(starts + 8 * experts, start)
    put_i64(memory, used)
    for j in range(count):
        cursor = cursors + 8 * get_i64(picks + 8 * j)
        slot = get_i64(cursor)
        put_i64(cursor, slot + 1)
        put_i64(slots + 8 * j, slot)
        put_i64(positions + 8 * slot, j // top_k)


def _route(step: int, frame: int, thread: int) -> None:
    """Score and choose experts, position by position; whichever thread ends last sorts."""
    n, threads = get_i64(frame + N), get_i64(frame + THREADS)
    buffer = frame + get_i64(step + _X)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    memory = get_i64(frame + get_i64(step + _CHOICE) + BUFFER)
    experts, top_k = get_i64(step + _EXPERTS), get_i64(step + _TOP_K)
    score, normalise = get_i64(step + _SCORE), get_i64(step + _NORMALISE)
    scale, bias = get_f32(step + _SCALE), get_i64(step + _BIAS)
    each = get_i64(step + _EACH)
    groups, top_groups = get_i64(step + _GROUPS), get_i64(step + _MOST_GROUPS)
    stored = (experts + LANES - 1) // LANES * LANES
    scores = get_i64(frame + SCRATCH) + thread * get_i64(frame + SCRATCH_BYTES)
    ranks, chosen, spare = scores + 4 * stored, scores + 8 * stored, scores + 12 * stored
    picks = _picks(memory, experts)
    weights = picks + 16 * n * top_k
    for i in range(thread, n, threads):
        logits, ids = x + i * x_row, picks + 8 * i * top_k
        if score == _SIGMOID:
            for j in range(0, experts, LANES):
                v = load_f32(logits + 4 * j)
                store_f32(scores + 4 * j, spread(_ONE) / (exp(v * -_ONE) + _ONE))
        elif score == _SOFTMAX_TOP:
            for j in range(0, experts, LANES):
                store_f32(scores + 4 * j, load_f32(logits + 4 * j))
        else:
            _softmax(logits, scores, experts)
        for j in range(0, experts, LANES):
            v = load_f32(scores + 4 * j)
            store_f32(ranks + 4 * j, v + load_f32(bias + 4 * j) if bias != 0 else v)
        if groups > 1:
            best = get_i64(step + _BEST)
            _keep_groups(ranks, experts, groups, top_groups, best, spare)
        _choose(ranks, experts, top_k, ids)
        for k in range(top_k):
            put_f32(chosen + 4 * k, get_f32(scores + 4 * get_i64(ids + 8 * k)))
        if score == _SOFTMAX_TOP:
            _softmax(chosen, chosen, top_k)
        factor = scale
        if normalise != 0:
            every = _ZERO
            for k in range(top_k):
                every += get_f32(chosen + 4 * k)
            factor = scale / (every + _TINY)
        for k in range(top_k):
            weight = get_f32(chosen + 4 * k) * factor
            if each != 0:
                weight *= get_f32(each + 4 * get_i64(ids + 8 * k))
            put_f32(weights + 4 * (i * top_k + k), weight)
    counter = get_i64(frame + COUNTERS) + 8 * get_i64(step + _NUMBER)
    if fetch_add(counter, 1) == threads - 1:
        _sort(memory, experts, top_k, n)


def _gather(step: int, frame: int, thread: int) -> None:
    """Copy the row of each slot's position."""
    buffer, to = frame + get_i64(step + _X), frame + get_i64(step + _OTHER)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    out, out_row = get_i64(to + BUFFER), get_i64(to + BUFFER_ROW)
    memory = get_i64(frame + get_i64(step + _CHOICE) + BUFFER)
    slots = get_i64(frame + N) * get_i64(step + _TOP_K)
    positions = _picks(memory, get_i64(step + _EXPERTS)) + 24 * slots
    for slot in range(thread, slots, get_i64(frame + THREADS)):
        source, target = x + get_i64(positions + 8 * slot) * x_row, out + slot * out_row
        for d in range(0, out_row, 64):
            store_f32(target + d, load_f32(source + d))


def _products(step: int, frame: int, thread: int) -> None:
    """Products of the slots of each expert with its rows, a grain of rows at a time."""
    buffer = frame + get_i64(step + _X)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    memory = get_i64(frame + get_i64(step + _CHOICE) + BUFFER)
    active, starts = memory + 8, memory + 8 * (1 + get_i64(step + _EXPERTS))
    used = get_i64(memory)
    scratch = get_i64(frame + SCRATCH) + thread * get_i64(frame + SCRATCH_BYTES)
    counter = get_i64(frame + COUNTERS) + 8 * get_i64(step + _NUMBER)
    parts, count = step + _PARTS, get_i64(step + _COUNT)
    end = parts + 8 * PART_FIELDS * count
    grain = get_i64(step + _GRAIN)
    if get_i64(frame + N) == 1:
        rows = 0
        for k in range(count):
            rows += used * get_i64(parts + 8 * PART_FIELDS * k + _ROWS)
        grain = max(16, rows // (4 * get_i64(frame + THREADS)))
    while True:
        unit = fetch_add(counter, 1)
        part, pieces = parts, 1
        while part < end:
            pieces = (get_i64(part + _ROWS) + grain - 1) // grain
            if unit < pieces * used:
                break
            unit -= pieces * used
            part += 8 * PART_FIELDS
        if part == end:
            break
        expert = get_i64(active + 8 * (unit // pieces))
        slot = get_i64(starts + 8 * expert)
        n = get_i64(starts + 8 * (expert + 1)) - slot
        matrix, rows = get_i64(part + _MATRIX), get_i64(part + _ROWS)
        first = unit % pieces * grain
        stop = min(first + grain, rows)
        buffer = frame + get_i64(part + _OUT)
        out, out_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
        out += slot * out_row
        # Kernels write to the column of a matrix's row, which here is one of all experts'.
        above = expert * rows
        at, to = x + slot * x_row, out - 4 * above
        if n == 1:
            call_6(get_i64(matrix + KERNEL), matrix, above + first, above + stop, at, to, 0)
        else:
            multiply(matrix, above + first, above + stop, at, x_row, to, out_row, n, scratch)
        bias = get_i64(part + _PART_BIAS)
        if bias != 0:
            bias += 4 * above
            for i in range(n):
                for r in range(first, stop):
                    p = out + i * out_row + 4 * r
                    put_f32(p, get_f32(p) + get_f32(bias + 4 * r))


def _combine(step: int, frame: int, thread: int) -> None:
    """Sum the weighted rows of a position's slots, in the order of its choices."""
    buffer, to = frame + get_i64(step + _X), frame + get_i64(step + _OTHER)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    out, out_row = get_i64(to + BUFFER), get_i64(to + BUFFER_ROW)
    memory = get_i64(frame + get_i64(step + _CHOICE) + BUFFER)
    n, threads, top_k = get_i64(frame + N), get_i64(frame + THREADS), get_i64(step + _TOP_K)
    slots = _picks(memory, get_i64(step + _EXPERTS)) + 8 * n * top_k
    weights, vectors = slots + 8 * n * top_k, x_row // 64
    add = get_i64(step + _ADD) != 0
    for unit in range(thread * vectors * n // threads, (thread + 1) * vectors * n // threads):
        i, d = unit // vectors, unit % vectors * 64
        every = zeros()
        for j in range(i * top_k, (i + 1) * top_k):
            row = x + get_i64(slots + 8 * j) * x_row
            every = fma(spread(get_f32(weights + 4 * j)), load_f32(row + d), every)
        p = out + i * out_row + d
        store_f32(p, load_f32(p) + every if add else every)


def _scale(step: int, frame: int, thread: int) -> None:
    """x = x · sigmoid(s), with one s for a row."""
    buffer, by = frame + get_i64(step + _X), frame + get_i64(step + _CHOICE)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    s, s_row = get_i64(by + BUFFER), get_i64(by + BUFFER_ROW)
    n, threads, vectors = get_i64(frame + N), get_i64(frame + THREADS), x_row // 64
    for unit in range(thread * vectors * n // threads, (thread + 1) * vectors * n // threads):
        i, p = unit // vectors, x + unit // vectors * x_row + unit % vectors * 64
        factor = spread(_ONE) / (exp(spread(-get_f32(s + i * s_row))) + _ONE)
        store_f32(p, load_f32(p) * factor)


_STEPS = {
    "route": _route,
    "gather": _gather,
    "products": _products,
    "combine": _combine,
    "scale": _scale,
}


@cache
def expert_kernel(name: str) -> Any:
    """The compiled function of a step, of ``frame.STEP_SIGNATURE``."""
    return compile_c(STEP_SIGNATURE, _STEPS[name])


def route_scratch_bytes(experts: int) -> int:
    """What one thread needs to choose: four rows of scores and one of indices, at most."""
    return 24 * (-(-experts // LANES) * LANES)
