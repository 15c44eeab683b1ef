"""The gated delta rule over a state: linear attention that forgets and corrects itself.

Yang, Kautz and Hatamizadeh, Gated Delta Networks (arXiv 2412.06464): of each head of values a state
S ``[key_dim, value_dim]``, which begins with zeros. At every position, with unit vectors q and k,

    S = decay · S;  S += k ⊗ (beta · (v - Sᵀ k));  out = Sᵀ q

The decay is one number for a head, or one for each dimension of its keys (Kimi Linear, arXiv
2510.26692). Then, as in the paper's block, an RMSNorm over each head and a gate. Positions come one
after another and heads share nothing, so the sums are the same whatever the number of threads and
however a prompt is cut.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from mlxedge.fallback.activations import activate
from mlxedge.fallback.frame import (
    BUFFER,
    BUFFER_ROW,
    COUNTERS,
    KV,
    START,
    STEP_SIGNATURE,
    THREADS,
    N,
)
from mlxedge.fallback.lanes import LANES, inline, spread
from mlxedge.fallback.linear import compile_c
from mlxedge.fallback.memory import get_f32, get_i64, load_f32, put_f32, store_f32
from mlxedge.fallback.team import fetch_add
from mlxedge.fallback.tiles import fma, keep_lanes, total, zeros

#: What is added to the squares of q and of k, in all implementations.
EPSILON = 1e-6

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)

#: Fields of the step that makes unit vectors and decays, after the function's address.
_PART, _FROM, _HEADS, _SIZE, _SCALE, _EPSILON = (8 * i for i in range(1, 7))
_A, _B, _RATE, _BIAS, _COUNT, _BETAS, _MOST = (8 * i for i in range(1, 8))
#: Fields of the recurrence.
(
    _NUMBER, _Q, _K, _V, _DECAY, _BETA, _GATE, _OUT, _SLOT, _KEY_HEADS, _VALUE_HEADS, _KEY_DIM,
    _VALUE_DIM, _EACH, _Q_FROM, _K_FROM, _V_FROM, _NORM, _NORM_EPSILON, _ACTIVATION,
) = (8 * i for i in range(1, 21))  # fmt: skip


def _unit(step: int, frame: int, thread: int) -> None:
    """x · scale / sqrt(Σ x² + ε) of every head, in place."""
    buffer = frame + get_i64(step + _PART)
    x, x_row = get_i64(buffer + BUFFER) + get_i64(step + _FROM), get_i64(buffer + BUFFER_ROW)
    heads, size = get_i64(step + _HEADS), get_i64(step + _SIZE)
    scale, epsilon = get_f32(step + _SCALE), get_f32(step + _EPSILON)
    for unit in range(thread, get_i64(frame + N) * heads, get_i64(frame + THREADS)):
        p = x + unit // heads * x_row + 4 * size * (unit % heads)
        squares = zeros()
        for d in range(0, size, LANES):
            v = keep_lanes(load_f32(p + 4 * d), 0, size - d, _ZERO)
            squares = fma(v, v, squares)
        factor = scale / np.sqrt(total(squares) + epsilon)
        for d in range(size):
            put_f32(p + 4 * d, get_f32(p + 4 * d) * factor)


def _decay(step: int, frame: int, thread: int) -> None:
    """a = exp(rate · softplus(a + bias)) and b = most · sigmoid(b), in place; there may be several
    of a to one rate, each with a bias of its own."""
    buffer, other = frame + get_i64(step + _A), frame + get_i64(step + _B)
    a, a_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    b, b_row = get_i64(other + BUFFER), get_i64(other + BUFFER_ROW)
    rate, bias = get_i64(step + _RATE), get_i64(step + _BIAS)
    count, betas = get_i64(step + _COUNT), get_i64(step + _BETAS)
    most = float(get_f32(step + _MOST))
    n, threads = get_i64(frame + N), get_i64(frame + THREADS)
    each = count // betas
    for unit in range(thread, n * count, threads):
        i, d = unit // count, unit % count
        p = a + i * a_row + 4 * d
        x = float(get_f32(p)) + float(get_f32(bias + 4 * d))
        soft = max(x, 0.0) + math.log1p(math.exp(-abs(x)))
        put_f32(p, np.float32(math.exp(float(get_f32(rate + 4 * (d // each))) * soft)))
    for unit in range(thread, n * betas, threads):
        p = b + unit // betas * b_row + 4 * (unit % betas)
        put_f32(p, np.float32(most / (1.0 + math.exp(-float(get_f32(p))))))


@inline
def _four(
    s: int, row: int, size: int, q: int, k: int, decay: int, each: int, beta: float, v: int
) -> tuple[Any, Any, Any, Any]:
    """Take 64 columns of the state at ``s`` one position on, and give what is read from them."""
    m0, m1, m2, m3 = zeros(), zeros(), zeros(), zeros()
    for d in range(size):
        p = s + d * row
        x = spread(get_f32(k + 4 * d) * get_f32(decay + each * d))
        m0, m1 = fma(load_f32(p), x, m0), fma(load_f32(p + 64), x, m1)
        m2, m3 = fma(load_f32(p + 128), x, m2), fma(load_f32(p + 192), x, m3)
    m0, m1 = (load_f32(v) - m0) * beta, (load_f32(v + 64) - m1) * beta
    m2, m3 = (load_f32(v + 128) - m2) * beta, (load_f32(v + 192) - m3) * beta
    o0, o1, o2, o3 = zeros(), zeros(), zeros(), zeros()
    for d in range(size):
        p, g = s + d * row, spread(get_f32(decay + each * d))
        x, y = spread(get_f32(k + 4 * d)), spread(get_f32(q + 4 * d))
        s0, s1 = fma(m0, x, load_f32(p) * g), fma(m1, x, load_f32(p + 64) * g)
        s2, s3 = fma(m2, x, load_f32(p + 128) * g), fma(m3, x, load_f32(p + 192) * g)
        store_f32(p, s0)
        store_f32(p + 64, s1)
        store_f32(p + 128, s2)
        store_f32(p + 192, s3)
        o0, o1, o2, o3 = fma(s0, y, o0), fma(s1, y, o1), fma(s2, y, o2), fma(s3, y, o3)
    return o0, o1, o2, o3


@inline
def _one(
    s: int, row: int, size: int, q: int, k: int, decay: int, each: int, beta: float, v: int
) -> Any:
    """The same of 16 columns."""
    m = zeros()
    for d in range(size):
        x = spread(get_f32(k + 4 * d) * get_f32(decay + each * d))
        m = fma(load_f32(s + d * row), x, m)
    m = (load_f32(v) - m) * beta
    o = zeros()
    for d in range(size):
        p, g = s + d * row, spread(get_f32(decay + each * d))
        made = fma(m, spread(get_f32(k + 4 * d)), load_f32(p) * g)
        store_f32(p, made)
        o = fma(made, spread(get_f32(q + 4 * d)), o)
    return o


@inline
def _put(p: int, v: Any, at: int, lanes: int) -> None:
    """Store the first ``lanes`` of a vector: what follows may be another thread's."""
    if lanes >= LANES:
        store_f32(p, v)
        return
    store_f32(at, v)
    for d in range(lanes):
        put_f32(p + 4 * d, get_f32(at + 4 * d))


def _recur(step: int, frame: int, thread: int) -> None:
    """All positions of a head after another, some columns of its state at a time; then its norm and
    its gate, where there are some."""
    key_heads, value_heads = get_i64(step + _KEY_HEADS), get_i64(step + _VALUE_HEADS)
    size, width, each = (
        get_i64(step + _KEY_DIM),
        get_i64(step + _VALUE_DIM),
        get_i64(step + _EACH),
    )
    n, start = get_i64(frame + N), get_i64(frame + START)
    buffer = frame + get_i64(step + _Q)
    qs, q_row = get_i64(buffer + BUFFER) + get_i64(step + _Q_FROM), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _K)
    ks, k_row = get_i64(buffer + BUFFER) + get_i64(step + _K_FROM), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _V)
    vs, v_row = get_i64(buffer + BUFFER) + get_i64(step + _V_FROM), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _DECAY)
    decays, decay_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _BETA)
    betas, beta_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _GATE)
    gates, gate_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _OUT)
    outs, out_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    states = get_i64(get_i64(frame + KV) + 16 * get_i64(step + _SLOT))
    norm, epsilon = get_i64(step + _NORM), get_f32(step + _NORM_EPSILON)
    kind = get_i64(step + _ACTIVATION)
    counter = get_i64(frame + COUNTERS) + 8 * get_i64(step + _NUMBER)
    # After the columns of a state a vector to cut others in.
    row = 4 * ((width + LANES - 1) // LANES * LANES)
    whole = size * row + 64
    apart = 4 * size if each else 4
    while True:
        head = fetch_add(counter, 1)
        if head >= value_heads:
            break
        state = states + head * whole
        at = state + size * row
        if start == 0:
            for p in range(state, at, 64):
                store_f32(p, zeros())
        shared = 4 * size * (head // (value_heads // key_heads))
        c = 0
        while c < width:
            wide = c + 4 * LANES <= width
            for i in range(n):
                q, k = qs + i * q_row + shared, ks + i * k_row + shared
                v = vs + i * v_row + 4 * (head * width + c)
                decay = decays + i * decay_row + apart * head
                beta = get_f32(betas + i * beta_row + 4 * head)
                to, s = outs + i * out_row + 4 * (head * width + c), state + 4 * c
                if wide:
                    o0, o1, o2, o3 = _four(s, row, size, q, k, decay, each, beta, v)
                    store_f32(to, o0)
                    store_f32(to + 64, o1)
                    store_f32(to + 128, o2)
                    store_f32(to + 192, o3)
                else:
                    o = _one(s, row, size, q, k, decay, each, beta, v)
                    _put(to, o, at, width - c)
            c += 4 * LANES if wide else LANES
        for i in range(n):
            p = outs + i * out_row + 4 * head * width
            gate = gates + i * gate_row + 4 * head * width
            squares = zeros()
            for d in range(0, width, LANES):
                x = keep_lanes(load_f32(p + 4 * d), 0, width - d, _ZERO)
                squares = fma(x, x, squares)
            factor = _ONE / np.sqrt(total(squares) / np.float32(width) + epsilon)
            for d in range(0, width, LANES):
                x = load_f32(norm + 4 * d) * (load_f32(p + 4 * d) * factor)
                x = x * activate(kind, load_f32(gate + 4 * d), 0)
                _put(p + 4 * d, x, at, width - d)


_STEPS = {"unit": _unit, "decay": _decay, "recur": _recur}


@cache
def delta_kernel(name: str) -> Any:
    """The compiled function of a step, of ``frame.STEP_SIGNATURE``."""
    return compile_c(STEP_SIGNATURE, _STEPS[name])


def state_cells(heads: int, key_dim: int, value_dim: int) -> int:
    """f32 that ``heads`` of values keep, with a vector each to work in."""
    return heads * (key_dim * -(-value_dim // LANES) * LANES + LANES)
