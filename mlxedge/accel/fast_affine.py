"""The searching encoder of groups that store w ≈ scale · code + bias, as ``fallback.fast_affine``
defines it: the same numbers by the same operations, on ``[position, row, group]``.

The functions that ``mx.compile`` may fuse follow the rules of ``k_search``: no sum of products
that a compiler could contract, constants as arrays.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np

from mlxedge.accel import backend
from mlxedge.accel.arrays import join_fields, pack_stream
from mlxedge.accel.casts import DTYPES, f16_bytes, round_through, store_as
from mlxedge.accel.k_search import Arrays, KSearch
from mlxedge.encodings import Affine, Encoding
from mlxedge.ops import Parts

#: Trials (k, c), by bits.
TRIALS = {
    2: (
        *((1.6, 0.0), (1.6, -0.4), (1.6, 0.4), (1.3, 0.0), (1.7, 0.2), (1.7, -0.2)),
        *((1.3, -0.2), (1.3, 0.2), (1.7, -0.6), (1.7, 0.6), (2.0, 0.0), (2.1, -0.4)),
    ),
    3: (
        *((1.15, 0.0), (1.15, 0.4), (1.15, -0.2), (1.15, 0.2), (1.15, -0.4), (1.05, 0.0)),
        *((1.05, -0.2), (1.05, 0.2), (1.15, -0.6), (1.15, 0.6), (1.05, 0.4), (1.05, -0.4)),
    ),
    4: (
        *((1.03, 0.0), (1.06, -0.4), (1.06, 0.2), (1.03, -0.2), (1.06, 0.4), (1.12, -0.2)),
        *((0.94, 0.4), (1.0, 0.2), (1.15, 0.2), (0.94, -0.4), (1.09, 0.0), (1.15, -0.4)),
    ),
    5: (
        *((1.0, 0.0), (1.0, 0.4), (1.0, -0.2), (1.03, 0.2), (0.97, -0.4), (1.03, -0.4)),
        *((0.94, 0.0), (1.03, 0.0), (0.97, -0.6), (1.0, 0.2)),
    ),
    6: (
        *((1.01, 0.0), (0.995, -0.4), (0.995, 0.2), (0.965, -1.0), (0.98, 0.4), (0.995, -0.2)),
        *((0.95, 0.6), (1.01, 0.4)),
    ),
    8: ((0.996, 0.6), (0.992, -1.0), (1.0, 0.0), (0.988, -0.6), (0.984, -1.0), (0.996, -0.6)),
}
#: How many stored pairs are tried after the first.
ROUNDS = 3
#: The fewest bits at which pairs are searched where all columns count alike.
ALIKE = 4
#: From this many bits on, neighbours of a bf16 pair are tried, moved by this part of themselves.
NEIGHBOURS, NEARBY = 6, float(np.float32(0.7 * 2.0**-7))

_MOST = {"f32": 3.4028235e38, "f16": 65504.0, "bf16": 3.3895314e38}
_GGML_BITS = {"q4_1": 4, "q5_1": 5}
_SINGULAR = 2.0**-16
_LEAST_RANGE, _MOST_RANGE, _LEAST_SCALE = 2.0**-100, 2.0**126, 2.0**-126
_EPSILON = 1e-7
#: Floats from here on are left unrounded by the first pair.
_WHOLE = 2.0**22


def search(
    weights: np.ndarray,
    encoding: Encoding,
    importance: np.ndarray | None,
    *,
    compiled: bool | None = None,
) -> Parts:
    """Encode f32 ``weights`` ``[rows, cols]``; ``importance`` f32 ``[cols]`` or None.

    ``compiled`` as in ``MlxOps``: fused stages, by default on a GPU alone.
    """
    rows, cols = weights.shape
    factors, totals, weighed = _column_weights(importance, cols, encoding.block)
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    engine = _search(on_gpu if compiled is None else compiled)
    parts = {
        name: np.empty(part.shape, DTYPES[part.dtype])
        for name, part in encoding.parts(weights.shape).items()
    }
    w, total = mx.array(np.ascontiguousarray(factors.T)[:, None, :]), mx.array(totals[None])
    count = max(1, backend.WEIGHTS_AT_ONCE // max(1, cols))
    for first in range(0, rows if cols else 0, count):
        piece = weights[first : first + count]
        x = mx.array(piece).reshape(len(piece), -1, encoding.block)
        x = mx.contiguous(x.transpose(2, 0, 1))
        made = engine.encode(x, w, total, mx.array(weighed[None]), encoding)
        mx.eval(*made.values())
        for name, part in made.items():
            out = parts[name][first : first + count]
            out[...] = np.array(part).view(out.dtype).reshape(out.shape)
    mx.clear_cache()
    return parts


def _column_weights(
    importance: np.ndarray | None, cols: int, group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Importance by group, its largest 1: f32 ``[groups, group]``; the sums, added in order; and
    whether there was any."""
    given = np.zeros(cols, np.float32) if importance is None else importance
    given = given.reshape(-1, group)
    most = given.max(axis=1, keepdims=True, initial=0.0)
    one = np.float32(1.0)
    factors: np.ndarray = np.where(most > 0, given, one) / np.where(most > 0, most, one)
    return factors, np.cumsum(factors, axis=1, dtype=np.float32)[:, -1].copy(), most[:, 0] > 0


def _nearest(v: mx.array, low: mx.array, high: mx.array) -> mx.array:
    return mx.minimum(mx.maximum(mx.round(v), low), high)


def _to_steps(
    x: mx.array, w: mx.array, middle: mx.array, per_step: mx.array
) -> tuple[mx.array, mx.array]:
    t = (x - middle) * per_step
    return t, t * w


def _trial_terms(
    t: mx.array,
    w: mx.array,
    k: mx.array,
    c: mx.array,
    low: mx.array,
    high: mx.array,
    one: mx.array,
) -> Arrays:
    level = _nearest((t * k) * one + c, low, high)
    wl = level * w
    return wl, wl * level, wl * t


def _pair_terms(
    x: mx.array, w: mx.array, bias: mx.array, inverse: mx.array, high: mx.array, one: mx.array
) -> Arrays:
    y = (x - bias) * inverse
    level = _nearest(y, one - one, high)
    rest = y * one - level
    wr = rest * w
    wl = level * w
    return wr * rest, wr, wl, wl * level, wr * level


def _fitted(
    total: mx.array,
    sum_x: mx.array,
    sum_l: mx.array,
    sum_ll: mx.array,
    sum_xl: mx.array,
    otherwise: float,
) -> tuple[mx.array, mx.array]:
    """Slope and offset of the weighted fit of x by levels."""
    determinant = total * sum_ll - sum_l * sum_l
    slope = (total * sum_xl - sum_x * sum_l) / determinant
    slope = mx.where(determinant > sum_ll * (total * _SINGULAR), slope, otherwise)
    return slope, (sum_x - slope * sum_l) / total


def _stored(v: mx.array, dtype: str) -> mx.array:
    most = _MOST[dtype]
    return round_through(mx.where(v > most, most, mx.where(v < -most, -most, v)), dtype)


def _inverse(scale: mx.array, otherwise: mx.array | float) -> mx.array:
    usable = mx.abs(scale) > _LEAST_SCALE
    return mx.where(usable, 1.0 / mx.where(usable, scale, 1.0), otherwise)


def _first_pair(low: mx.array, high: mx.array, top: float, affine: bool) -> Arrays:
    """The scale and bias of the reference encoder, unrounded."""
    scale = (high - low) / top
    if not affine:
        return scale, low
    negative = mx.abs(low) > mx.abs(high)
    scale = mx.where(scale > _EPSILON, scale, _EPSILON)
    scale = mx.where(negative, scale, -scale)
    edge = mx.where(negative, low, high)
    steps = edge / scale
    steps = mx.where(mx.abs(steps) < _WHOLE, mx.round(steps), steps)
    some = steps != 0
    return mx.where(some, edge / steps, scale), mx.where(some, edge, 0.0)


def _ggml_block(scale: mx.array, bias: mx.array, codes: mx.array, bits: int) -> mx.array:
    """Blocks u8 of scales and minimums ``[N, 1]`` and codes u32 ``[N, 32]``."""
    fields = [f16_bytes(scale), f16_bytes(bias)]
    if bits == 5:
        fifth = (codes >> 4) << mx.arange(32, dtype=mx.uint32)
        fields.append(fifth.sum(axis=1, keepdims=True).astype(mx.uint32).view(mx.uint8))
    low = codes & 15
    fields.append(low[:, :16] | (low[:, 16:] << 4))
    return join_fields(fields)


class _Search:
    def __init__(self, *, compiled: bool) -> None:
        self._sum = KSearch(compiled=compiled).sum
        self._to_steps = mx.compile(_to_steps) if compiled else _to_steps
        self._trial_terms = mx.compile(_trial_terms) if compiled else _trial_terms
        self._pair_terms = mx.compile(_pair_terms) if compiled else _pair_terms

    def encode(
        self,
        x: mx.array,
        w: mx.array,
        total: mx.array,
        weighed: mx.array,
        encoding: Encoding,
    ) -> dict[str, mx.array]:
        """Encode ``x`` ``[group, rows, groups]`` with weights ``[group, 1, groups]``, their sums
        ``[1, groups]`` and whether they come from importance."""
        affine = isinstance(encoding, Affine)
        bits = encoding.bits if isinstance(encoding, Affine) else _GGML_BITS[encoding.name]
        dtype = encoding.scale_dtype if isinstance(encoding, Affine) else "f16"
        top = float((1 << bits) - 1)
        low, high = x.min(axis=0), x.max(axis=0)
        low, high = mx.where(low == 0, 0.0, low), mx.where(high == 0, 0.0, high)
        scale, bias = (_stored(v, dtype) for v in _first_pair(low, high, top, affine))
        searched = weighed | (bits >= ALIKE)
        if searched.any():
            other = self._best_pair(x, w, total, (low, high), (scale, bias), bits, dtype)
            scale, bias = (mx.where(searched, v, o) for v, o in zip(other, (scale, bias)))
        y = (x - bias) * _inverse(scale, 0.0)
        codes = mx.minimum(mx.maximum(mx.round(y), 0.0), top).astype(mx.uint32)
        codes = mx.contiguous(codes.transpose(1, 2, 0)).reshape(-1, encoding.block)
        if affine:
            return {
                "weight": pack_stream(codes, bits),
                "scales": store_as(scale, dtype),
                "biases": store_as(bias, dtype),
            }
        return {"weight": _ggml_block(scale.reshape(-1, 1), bias.reshape(-1, 1), codes, bits)}

    def _best_pair(
        self,
        x: mx.array,
        w: mx.array,
        total: mx.array,
        edges: tuple[mx.array, mx.array],
        first: tuple[mx.array, mx.array],
        bits: int,
        dtype: str,
    ) -> tuple[mx.array, mx.array]:
        """The stored pair of the least error, from the range of the weights and the first pair."""
        (low, high), (scale, bias) = edges, first
        top = float((1 << bits) - 1)
        spanned = high - low
        usable = (spanned > _LEAST_RANGE) & (spanned < _MOST_RANGE)
        spanned = mx.where(usable, spanned, 1.0)
        step, per_step = spanned / top, top / spanned
        middle = low * 0.5 + high * 0.5
        best, _, _ = self._weigh(x, w, total, scale, bias, step, per_step, top)
        t, wt = self._to_steps(x, w, middle, per_step)
        new_scale, new_bias = self._best_trial(t, w, total, self._sum(wt), bits, TRIALS[bits])
        del t, wt
        center = float((1 << bits) // 2)
        new_bias = middle + step * (new_bias - new_scale * center)
        new_scale = new_scale * step

        def take(new_scale: mx.array, new_bias: mx.array) -> tuple[mx.array, mx.array]:
            """Keep a stored pair where it is better; the pair fitted to its codes."""
            nonlocal best, scale, bias
            error, *fitted = self._weigh(x, w, total, new_scale, new_bias, step, per_step, top)
            better = (error < best) & usable
            best = mx.where(better, error, best)
            scale = mx.where(better, new_scale, scale)
            bias = mx.where(better, new_bias, bias)
            mx.eval(best, scale, bias, *fitted)
            return fitted[0], fitted[1]

        for _ in range(ROUNDS):
            new_scale, new_bias = take(_stored(new_scale, dtype), _stored(new_bias, dtype))
        if dtype == "bf16" and bits >= NEIGHBOURS:
            old_scale, old_bias = scale, bias
            for nearby in (NEARBY, -NEARBY):
                new_scale = _stored(old_scale + old_scale * nearby, dtype)
                new_bias = old_bias + (old_scale - new_scale) * (top * 0.5)
                take(new_scale, _stored(new_bias, dtype))
            old_scale, old_bias = scale, bias
            for nearby in (NEARBY, -NEARBY):
                take(old_scale, _stored(old_bias + old_bias * nearby, dtype))
        return scale, bias

    def _best_trial(
        self,
        t: mx.array,
        w: mx.array,
        total: mx.array,
        sum_t: mx.array,
        bits: int,
        trials: tuple[tuple[float, float], ...],
    ) -> tuple[mx.array, mx.array]:
        """The best fit t ≈ scale · (code - 2^bits / 2) + bias."""
        half, one = float((1 << bits) // 2), mx.array(1.0)
        low, high = mx.array(-half), mx.array(half - 1.0)
        best, scale, bias = (mx.full(t.shape[1:], v) for v in (float("inf"), 1.0, 0.0))
        for k, c in np.array(trials, np.float32):
            moved = mx.array(float(c - np.float32(0.5)))
            terms = self._trial_terms(t, w, mx.array(float(k)), moved, low, high, one)
            sum_l, sum_ll, sum_tl = (self._sum(v) for v in terms)
            slope, offset = _fitted(total, sum_t, sum_l, sum_ll, sum_tl, float(np.float32(1.0) / k))
            error = slope * (slope * sum_ll - sum_tl * 2.0)
            error = error + offset * (offset * total + (slope * sum_l - sum_t) * 2.0)
            better = error < best
            best = mx.where(better, error, best)
            scale = mx.where(better, slope, scale)
            bias = mx.where(better, offset, bias)
            mx.eval(best, scale, bias)
        return scale, bias

    def _weigh(
        self,
        x: mx.array,
        w: mx.array,
        total: mx.array,
        scale: mx.array,
        bias: mx.array,
        step: mx.array,
        per_step: mx.array,
        top: float,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The weighted error, in squares of ``step``, of a stored pair; the pair fitted to its
        codes. A scale without an inverse leaves every weight at the bias."""
        usable = mx.abs(scale) > _LEAST_SCALE
        unit = mx.where(usable, scale, step)
        inverse = _inverse(scale, per_step)
        relative = mx.where(usable, scale * per_step, 1.0)
        high = mx.where(usable, top, 0.0)
        terms = self._pair_terms(x, w, bias, inverse, high, mx.array(1.0))
        error, sum_r, sum_l, sum_ll, sum_rl = (self._sum(v) for v in terms)
        slope, offset = _fitted(total, sum_r, sum_l, sum_ll, sum_rl, 0.0)
        return error * (relative * relative), scale + scale * slope, bias + unit * offset


@functools.cache
def _search(compiled: bool) -> _Search:
    return _Search(compiled=compiled)
