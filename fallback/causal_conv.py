"""A short convolution of each channel over the positions so far, as state-space models have it.

A state keeps the last inputs, ``[width - 1, channels up to whole vectors]`` f32, the oldest first;
before position 0 all inputs are zero. The sums of a position are the same however a prompt is cut.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from mlxedge.fallback.activations import activate
from mlxedge.fallback.frame import (
    BUFFER,
    BUFFER_ROW,
    KV,
    SCRATCH,
    SCRATCH_BYTES,
    START,
    STEP_SIGNATURE,
    THREADS,
    N,
)
from mlxedge.fallback.lanes import LANES
from mlxedge.fallback.linear import compile_c
from mlxedge.fallback.memory import get_i64, load_f32, store_f32
from mlxedge.fallback.tiles import fma, zeros

#: Fields of a step, after the function's address.
_X, _OUT, _SLOT, _VECTORS, _WIDTH, _WEIGHT, _BIAS, _ACTIVATION = (8 * i for i in range(1, 9))
#: In the field of the activation: none.
NO_ACTIVATION = -1


def _convolve(step: int, frame: int, thread: int) -> None:
    """out[i] = activation(Σ_k weight[k] · x[i - width + 1 + k] + bias), a vector of channels at a
    time, from the last position to the first, so that x may be out."""
    buffer, to = frame + get_i64(step + _X), frame + get_i64(step + _OUT)
    x, x_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    out, out_row = get_i64(to + BUFFER), get_i64(to + BUFFER_ROW)
    vectors, kept = get_i64(step + _VECTORS), get_i64(step + _WIDTH) - 1
    weight, bias, kind = (
        get_i64(step + _WEIGHT),
        get_i64(step + _BIAS),
        get_i64(step + _ACTIVATION),
    )
    state, n = get_i64(get_i64(frame + KV) + 16 * get_i64(step + _SLOT)), get_i64(frame + N)
    later = get_i64(frame + SCRATCH) + thread * get_i64(frame + SCRATCH_BYTES)
    row = 64 * vectors
    for unit in range(thread, vectors, get_i64(frame + THREADS)):
        at = 64 * unit
        if get_i64(frame + START) == 0:
            for k in range(kept):
                store_f32(state + k * row + at, zeros())
        # What the state becomes; x may be gone by then.
        for k in range(kept):
            i = n - kept + k
            p = x + i * x_row + at if i >= 0 else state + (i + kept) * row + at
            store_f32(later + 64 * k, load_f32(p))
        for back in range(n):
            i = n - 1 - back
            v = load_f32(bias + at) if bias != 0 else zeros()
            for k in range(kept + 1):
                j = i - kept + k
                p = x + j * x_row + at if j >= 0 else state + (j + kept) * row + at
                v = fma(load_f32(weight + k * row + at), load_f32(p), v)
            if kind >= 0:
                v = activate(kind, v, 0)
            store_f32(out + i * out_row + at, v)
        for k in range(kept):
            store_f32(state + k * row + at, load_f32(later + 64 * k))


@cache
def conv_kernel() -> Any:
    return compile_c(STEP_SIGNATURE, _convolve)


def packed(weight: np.ndarray) -> np.ndarray:
    """Weights ``[channels, width]`` as the step reads them: ``[width, channels up to whole
    vectors]``, f32 in one array."""
    rows = np.pad(weight.T, ((0, 0), (0, -weight.shape[0] % LANES)))
    return np.ascontiguousarray(rows, np.float32).reshape(-1)


def state_cells(channels: int, width: int) -> int:
    return (width - 1) * -(-channels // LANES) * LANES


def scratch_bytes(width: int) -> int:
    """What one thread needs for the inputs that are kept."""
    return 64 * (width - 1)
