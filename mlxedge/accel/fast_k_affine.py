"""The search for ggml's affine super-blocks on MLX: the bytes of ``fallback.fast_k_affine``.

That module says what is searched and why. Here arrays are ``[position, sub-block, super-block]``,
so that sums over weights, and then over sub-blocks, run in its order; stages over all weights are
fused where that helps, as in ``k_search``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxedge.accel.arrays import join_fields
from mlxedge.accel.casts import f16_bytes, round_through
from mlxedge.accel.ggml_k import (
    _high_bits,
    _nibble_fields,
    _pack_six_bit_pairs,
    _two_bit_fields,
)
from mlxedge.encodings import Encoding
from mlxedge.ops import Parts

SUPER_BLOCK = 256
#: Weights in one evaluation: a dozen arrays of them are 200 MB.
WEIGHTS_AT_ONCE = 1 << 22
#: How many terms of a sum one fused kernel adds.
RUN = 8

_GREATEST = 3e38
_GREATEST_HALF = 65504.0
_DEAD = 2.0**-23
_SINGULAR = 1e-5

Arrays = tuple[mx.array, ...]


@dataclass(frozen=True)
class Layout:
    """``size`` weights a sub-block; the largest code, and the largest scale and minimum; the
    places of either end of a grid, and what the greatest scale is in units of d: first, last,
    how many."""

    size: int
    top: int
    limit: int
    ends: tuple[float, float, int]
    levels: tuple[float, float, int]


LAYOUTS = {
    "q2_k": Layout(16, 3, 15, (-0.5, 1.3, 6), (11.75, 15.75, 17)),
    "q4_k": Layout(32, 15, 63, (-1.0, 2.0, 7), (50.0, 66.0, 17)),
    "q5_k": Layout(32, 31, 63, (-1.0, 2.0, 7), (50.0, 66.0, 17)),
}
MOVES = ((0, 0), (-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
ROUNDS = 2


def _grids(layout: Layout) -> list[tuple[float, float]]:
    """Of each trial: codes a range, and the code of its low end, both f32."""
    ends = np.linspace(*layout.ends) / layout.top
    low, high = (ends_of.ravel() for ends_of in np.meshgrid(ends, ends, indexing="ij"))
    widths = layout.top / (1.0 - low - high)
    shifts = layout.top // 2 - layout.top - low * widths
    return [(w, s) for w, s in np.array([widths, shifts], np.float32).T.tolist()]


def _factors(layout: Layout) -> np.ndarray:
    made: np.ndarray = (1.0 / np.linspace(*layout.levels)).astype(np.float32)
    return made


def _column_weights(importance: np.ndarray | None, cols: int) -> np.ndarray:
    """What errors count, f32 ``[cols / 256, 256]``, scaled by powers of two; never 0."""
    if importance is None:
        return np.ones((cols // SUPER_BLOCK, SUPER_BLOCK), np.float32)
    blocks = importance.reshape(-1, SUPER_BLOCK)
    blocks = np.where(blocks.max(axis=1, keepdims=True) > 0, blocks, np.float32(1.0))
    mantissa, exponent = np.frexp(blocks.max(axis=1, keepdims=True))
    floor = np.ldexp(mantissa, -24)
    weights: np.ndarray = np.maximum(np.ldexp(blocks, -exponent), floor).astype(np.float32)
    return weights


def search(weights: np.ndarray, encoding: Encoding, importance: np.ndarray | None) -> Parts:
    """Encode ``weights`` f32 ``[rows, cols]``; errors in a column count ``importance`` f32
    ``[cols]``, alike if None."""
    rows, cols = weights.shape
    blocks = weights.reshape(-1, SUPER_BLOCK)
    columns = _column_weights(importance, cols)
    out = np.empty((len(blocks), encoding.nbytes((SUPER_BLOCK,))), np.uint8)
    encoder = _encoder(encoding.name, mx.default_device().type == mx.DeviceType.gpu)
    step = WEIGHTS_AT_ONCE // SUPER_BLOCK
    for start in range(0, len(blocks), step):
        x = blocks[start : start + step]
        of_column = (start + np.arange(len(x))) % len(columns)
        out[start : start + step] = np.array(encoder(mx.array(x), mx.array(columns[of_column])))
    mx.clear_cache()
    return {"weight": out.reshape(rows, -1)}


@functools.cache
def _encoder(name: str, compiled: bool) -> Callable[[mx.array, mx.array], mx.array]:
    return KAffineSearch(name, compiled=compiled).encode


def _add_run(total: mx.array, *terms: mx.array) -> mx.array:
    for term in terms:
        total = total + term
    return total


def _nearest(v: mx.array, low: float, high: float) -> mx.array:
    """The nearest integer, ties to even, from ``low`` to ``high``; ``low`` for NaN."""
    v = mx.where(v > low, v, low)
    return mx.round(mx.where(v < high, v, high))


def _inverse(v: mx.array) -> mx.array:
    return mx.where(v > 0, 1.0 / v, 0.0)


def _through_half(value: mx.array, scale: mx.array, back: mx.array) -> mx.array:
    """``value`` as f16 can store it once multiplied by ``back``, times ``scale``."""
    value = value * back
    return round_through(mx.where(value < _GREATEST_HALF, value, _GREATEST_HALF), "f16") * scale


# Fused stages: see k_search for what ``one`` is for.


def _level_terms(low: float, high: float) -> Callable[..., Arrays]:
    def stage(
        x: mx.array, w: mx.array, wx: mx.array, inverse: mx.array, shift: mx.array, one: mx.array
    ) -> Arrays:
        q = _nearest((x * inverse) * one + shift, low, high)
        wq = w * q
        return wq, wq * q, wx * q

    return stage


def _stored_terms(top: float) -> Callable[..., Arrays]:
    def stage(x: mx.array, w: mx.array, inverse: mx.array, minimum: mx.array) -> Arrays:
        wq_of = _nearest((x + minimum) * inverse, 0.0, top)
        wq = w * wq_of
        return wq, wq * wq_of, wq * x

    return stage


def _squared_errors(top: float) -> Callable[..., mx.array]:
    def stage(
        x: mx.array,
        w: mx.array,
        scale: mx.array,
        inverse: mx.array,
        minimum: mx.array,
        one: mx.array,
    ) -> mx.array:
        above = x + minimum
        rest = (scale * _nearest(above * inverse, 0.0, top)) * one - above
        return w * (rest * rest)

    return stage


@dataclass
class _Found:
    """Of each sub-block, f32 ``[sub-blocks, N]``; see ``fallback.fast_k_affine``."""

    sum_w: mx.array
    sum_x: mx.array
    scale: mx.array
    minimum: mx.array
    slope: mx.array
    curve: mx.array


class KAffineSearch:
    """The search for one of Q2_K, Q4_K and Q5_K, with stages as they are or fused."""

    def __init__(self, name: str, *, compiled: bool) -> None:
        def fuse(stage: Callable) -> Callable:
            return mx.compile(stage) if compiled else stage

        self._name = name
        self._layout = LAYOUTS[name]
        top = self._layout.top
        self._subs = SUPER_BLOCK // self._layout.size
        self._add_run = fuse(_add_run)
        self._level_terms = fuse(_level_terms(float(top // 2 - top), float(top // 2)))
        self._stored_terms = fuse(_stored_terms(float(top)))
        self._squared_errors = fuse(_squared_errors(float(top)))

    def encode(self, x: mx.array, importance: mx.array) -> mx.array:
        """Super-blocks f32 ``[N, 256]`` and what their errors count, as bytes ``[N, …]``."""
        ls, lm, d, dmin = self._search(x, importance)
        scales, minimums = (d * ls).T, (dmin * lm).T
        above = x.reshape(-1, self._subs, self._layout.size) + minimums[..., None]
        codes = _nearest(above * _inverse(scales)[..., None], 0.0, float(self._layout.top))
        codes = codes.astype(mx.int32)
        integers = ls.T.astype(mx.int32), lm.T.astype(mx.int32)
        steps = [f16_bytes(d[:, None]), f16_bytes(dmin[:, None])]
        if self._name == "q2_k":
            return join_fields([integers[0] | integers[1] << 4, _two_bit_fields(codes), *steps])
        fifth = [_high_bits(codes, 4)] if self._name == "q5_k" else []
        return join_fields([*steps, _pack_six_bit_pairs(*integers), *fifth, _nibble_fields(codes)])

    def _search(self, x: mx.array, importance: mx.array) -> Arrays:
        """Scales and minimums ``[sub-blocks, N]``, d and dmin ``[N]``; all f32."""
        exponent = mx.clip(mx.abs(x).max(axis=1).view(mx.int32) >> 23, 1, 253)
        scale, back = ((e << 23).view(mx.float32) for e in (254 - exponent, exponent))
        x = self._by_position(x) * scale
        w = self._by_position(importance)
        mx.eval(x, w, scale, back)
        found = self._fit(x, w)
        d, dmin = self._choose_steps(found, scale, back)
        ls, lm = self._integers(found, d, dmin)
        mx.eval(d, dmin, ls, lm)
        best = mx.full(d.shape, _GREATEST)
        kept_ls, kept_lm = mx.zeros_like(ls), mx.zeros_like(lm)
        kept_d, kept_dmin = d, dmin
        for turn in range(ROUNDS):
            if turn > 0:
                steps = self._refit(x, w, found, ls, lm, d, dmin)
                d, dmin = (_through_half(step, scale, back) for step in steps)
            ls, lm, error = self._move(x, w, d, dmin, ls, lm)
            better = error < best
            best = mx.where(better, error, best)
            kept_d, kept_dmin = mx.where(better, d, kept_d), mx.where(better, dmin, kept_dmin)
            kept_ls, kept_lm = mx.where(better, ls, kept_ls), mx.where(better, lm, kept_lm)
            mx.eval(ls, lm, d, dmin, best, kept_ls, kept_lm, kept_d, kept_dmin)
        return kept_ls, kept_lm, kept_d * back, kept_dmin * back

    def _by_position(self, blocks: mx.array) -> mx.array:
        """``[N, 256]`` as ``[position, sub-block, N]``."""
        return mx.contiguous(blocks.reshape(-1, self._subs, self._layout.size).transpose(2, 1, 0))

    def _sum(self, terms: mx.array) -> mx.array:
        """Over the first axis, from 0, in order, rounding at each step."""
        total = mx.zeros(terms.shape[1:])
        for start in range(0, terms.shape[0], RUN):
            total = self._add_run(total, *(terms[i] for i in range(start, start + RUN)))
        return total

    def _fit(self, x: mx.array, w: mx.array) -> _Found:
        """The best scale and minimum of each sub-block."""
        top = self._layout.top
        one, zero = mx.array(1.0), float(top - top // 2)
        live = w > _DEAD
        live_high = mx.where(live, x, -_GREATEST).max(axis=0)
        some_live = live_high > -_GREATEST
        live_low = mx.where(live, x, _GREATEST).min(axis=0)
        low = mx.minimum(mx.where(some_live, live_low, x.min(axis=0)), 0.0)
        span = mx.maximum(mx.where(some_live, live_high, x.max(axis=0)), low) - low
        over_span = _inverse(span)
        wx = w * x
        sum_w, sum_x = self._sum(w), self._sum(wx)
        over_w = 1.0 / sum_w
        mean = sum_x * over_w

        best = mx.full(span.shape, -_GREATEST)
        scale, minimum = span / float(top), 0.0 - low
        slope, curve = mx.zeros_like(span), sum_w
        for grid in (*_grids(self._layout), None):
            if grid is None:
                inverse = _inverse(scale)
                shift = minimum * inverse - zero
            else:
                inverse = over_span * grid[0]
                shift = grid[1] - low * inverse
            terms = self._level_terms(x, w, wx, inverse, shift, one)
            sum_q, sum_qq, sum_qx = (self._sum(t) for t in terms)
            cross = sum_w * sum_qx - sum_x * sum_q
            det = sum_w * sum_qq - sum_q * sum_q
            from_zero = sum_q + zero * sum_w
            free = (det > _SINGULAR * (sum_w * sum_qq)) & (cross * from_zero > sum_x * det)
            alone_qx = sum_qx + zero * sum_x
            alone_qq = sum_qq + (2.0 * zero) * sum_q + (zero * zero) * sum_w
            divisor = mx.where(free, det, alone_qq)
            trial = mx.where(free, cross, alone_qx) / divisor
            trial_slope = from_zero * over_w
            gain = mx.where(free, trial * cross * over_w, trial * alone_qx - sum_x * mean)
            better = (divisor > 0) & (trial > 0) & (gain > best)
            free_minimum = mx.where(free, trial * trial_slope - mean, 0.0)
            best = mx.where(better, gain, best)
            scale = mx.where(better, trial, scale)
            minimum = mx.where(better, free_minimum, minimum)
            slope = mx.where(better, mx.where(free, trial_slope, 0.0), slope)
            curve = mx.where(better, mx.where(free, det * over_w, alone_qq), curve)
            mx.eval(best, scale, minimum, slope, curve)
        return _Found(sum_w, sum_x, scale, minimum, slope, curve)

    def _scales(self, found: _Found, d: mx.array) -> Arrays:
        """The nearest scales for ``d``, the minimums that then suit, and the errors of scales."""
        ls = _nearest(found.scale * _inverse(d), 0.0, float(self._layout.limit))
        change = d * ls - found.scale
        return ls, found.minimum + found.slope * change, found.curve * (change * change)

    def _integers(self, found: _Found, d: mx.array, dmin: mx.array) -> Arrays:
        ls, wanted, _ = self._scales(found, d)
        return ls, _nearest(wanted * _inverse(dmin), 0.0, float(self._layout.limit))

    def _choose_steps(self, found: _Found, scale: mx.array, back: mx.array) -> Arrays:
        """(d, dmin) ``[N]`` of least error as far as the codes found tell."""
        factors = mx.array(_factors(self._layout))[:, None]
        limit = float(self._layout.limit)
        live = found.sum_w > _DEAD * self._layout.size
        all_d, all_dmin = (
            _through_half(mx.where(live, v, 0.0).max(axis=0) * factors, scale, back)
            for v in (found.scale, found.minimum)
        )
        inverses = _inverse(all_dmin)
        best = mx.full(scale.shape, _GREATEST)
        best_d, best_dmin = mx.zeros_like(scale), mx.zeros_like(scale)
        for a in range(factors.shape[0]):
            _, wanted, errors = self._scales(found, all_d[a])
            # Of every dmin at once: [dmin, N].
            error = mx.broadcast_to(self._sum(errors), all_dmin.shape)
            for j in range(self._subs):
                lm = _nearest(wanted[j] * inverses, 0.0, limit)
                rest = all_dmin * lm - wanted[j]
                error = error + found.sum_w[j] * (rest * rest)
            for b in range(factors.shape[0]):
                better = error[b] < best
                best = mx.where(better, error[b], best)
                best_d = mx.where(better, all_d[a], best_d)
                best_dmin = mx.where(better, all_dmin[b], best_dmin)
            mx.eval(best, best_d, best_dmin)
        return best_d, best_dmin

    def _move(
        self, x: mx.array, w: mx.array, d: mx.array, dmin: mx.array, ls: mx.array, lm: mx.array
    ) -> Arrays:
        """The integers of least error next to ``ls`` and ``lm``, and the error of each block."""
        one, limit = mx.array(1.0), float(self._layout.limit)
        best = mx.full(ls.shape, _GREATEST)
        best_ls, best_lm = ls, lm
        for by_s, by_m in MOVES:
            trial_ls = mx.clip(ls + float(by_s), 0.0, limit)
            trial_lm = mx.clip(lm + float(by_m), 0.0, limit)
            scale = d * trial_ls
            errors = self._squared_errors(x, w, scale, _inverse(scale), dmin * trial_lm, one)
            error = self._sum(errors)
            better = error < best
            best = mx.where(better, error, best)
            best_ls = mx.where(better, trial_ls, best_ls)
            best_lm = mx.where(better, trial_lm, best_lm)
            mx.eval(best, best_ls, best_lm)
        return best_ls, best_lm, self._sum(best)

    def _refit(
        self,
        x: mx.array,
        w: mx.array,
        found: _Found,
        ls: mx.array,
        lm: mx.array,
        d: mx.array,
        dmin: mx.array,
    ) -> Arrays:
        """(d, dmin) by least squares for these integers and the codes that d and dmin give."""
        terms = self._stored_terms(x, w, _inverse(d * ls), dmin * lm)
        sum_q, sum_qq, sum_qx = (self._sum(t) for t in terms)
        qq = self._sum(ls * ls * sum_qq)
        qm = self._sum(ls * lm * sum_q)
        mm = self._sum(lm * lm * found.sum_w)
        qx = self._sum(ls * sum_qx)
        mx_ = self._sum(lm * found.sum_x)
        det = qq * mm - qm * qm
        new_d = (qx * mm - mx_ * qm) / det
        new_dmin = (qx * qm - mx_ * qq) / det
        both = (det > _SINGULAR * (qq * mm)) & (new_d > 0) & (new_dmin > 0)
        alone = (qx + qm * dmin) / qq
        new_d = mx.where(both, new_d, mx.where(alone > 0, alone, d))
        return new_d, mx.where(both, new_dmin, dmin)
