"""The step of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): from what the latents of
keys and values are projected to, and the one rotary key of all heads, the keys and values of each.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from mlxedge.fallback.frame import BUFFER, BUFFER_ROW, STEP_SIGNATURE, THREADS, N
from mlxedge.fallback.lanes import inline
from mlxedge.fallback.linear import compile_c
from mlxedge.fallback.memory import get_f32, get_i64, put_f32

# Fields of the step, after the function's address.
_KV, _ROTARY, _KEYS, _VALUES, _HEADS, _PLAIN, _TURNED, _VALUE = (8 * i for i in range(1, 9))


@inline
def _copy(source: int, target: int, count: int) -> None:
    for d in range(count):
        put_f32(target + 4 * d, get_f32(source + 4 * d))


def _unfold(step: int, frame: int, thread: int) -> None:
    """Of each head: its key is the first part of its piece and then the rotary key, its value the
    rest of the piece."""
    buffer = frame + get_i64(step + _KV)
    kv, kv_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _ROTARY)
    rotary, rotary_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _KEYS)
    keys, keys_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    buffer = frame + get_i64(step + _VALUES)
    values, values_row = get_i64(buffer + BUFFER), get_i64(buffer + BUFFER_ROW)
    heads, plain = get_i64(step + _HEADS), get_i64(step + _PLAIN)
    turned, value = get_i64(step + _TURNED), get_i64(step + _VALUE)
    for unit in range(thread, get_i64(frame + N) * heads, get_i64(frame + THREADS)):
        i, h = unit // heads, unit % heads
        piece = kv + i * kv_row + 4 * (plain + value) * h
        key = keys + i * keys_row + 4 * (plain + turned) * h
        _copy(piece, key, plain)
        _copy(rotary + i * rotary_row, key + 4 * plain, turned)
        _copy(piece + 4 * plain, values + i * values_row + 4 * value * h, value)


@cache
def unfold_kernel() -> Any:
    """The compiled function, of ``frame.STEP_SIGNATURE``."""
    return compile_c(STEP_SIGNATURE, _unfold)
