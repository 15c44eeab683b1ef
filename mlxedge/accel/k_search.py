"""The searches for scales and minimums inside ggml's K-quants, on ``[position, sub-block]``.

After ``make_qkx2_quants``, ``make_qx_quants`` and ``make_q3_quants`` in
``ggml/src/ggml-quants.c`` (llama.cpp as vendored by llama-cpp-python 0.3.36), without weights
from an importance matrix.

The functions whose names begin with an underscore are stages: long chains of elementwise
operations on all weights, which ``mx.compile`` may fuse into one kernel each. A compiler may then
contract a product and the addition after it into one rounding. ``one``, an array that holds 1.0
when the kernel runs, prevents this: ``(a * b) * one + c`` is the same number with or without
contraction, and no compiler that keeps IEEE arithmetic can drop the factor. Constants come in as
arrays too, since fused kernels are printed with seven digits of a constant.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlxedge.accel.arrays import MAGIC, MAGIC_MANTISSA, MANTISSA, first_absmax

#: Blocks whose largest magnitude is below this are stored as zeros.
GROUP_MAX_EPS = 1e-15

#: How many terms of a sum one fused kernel adds.
RUN = 8

Arrays = tuple[mx.array, ...]


def _add_run(total: mx.array, *terms: mx.array) -> mx.array:
    for term in terms:
        total = total + term
    return total


def _scaled(x: mx.array, iscale: mx.array, magic: mx.array, one: mx.array) -> mx.array:
    return (iscale * x) * one + magic


def _scaled_above(
    x: mx.array, low: mx.array, iscale: mx.array, magic: mx.array, one: mx.array
) -> mx.array:
    return (iscale * (x - low)) * one + magic


def _levels(bits: mx.array, low: mx.array, high: mx.array) -> mx.array:
    """The nearest integers left in ``bits`` by adding MAGIC, clipped; as f32."""
    levels = (bits & MANTISSA) - MAGIC_MANTISSA
    return mx.minimum(mx.maximum(levels, low), high).astype(mx.float32)


def _affine_terms(
    bits: mx.array, x: mx.array, w: mx.array, low: mx.array, high: mx.array
) -> Arrays:
    levels = _levels(bits, low, high)
    wl = w * levels
    return levels, wl, wl * levels, wl * x


def _linear_terms(
    bits: mx.array, wx: mx.array, w: mx.array, low: mx.array, high: mx.array
) -> Arrays:
    levels = _levels(bits, low, high)
    return levels, wx * levels, w * levels * levels


def _absolute_errors(
    x: mx.array, w: mx.array, levels: mx.array, scale: mx.array, low: mx.array, one: mx.array
) -> mx.array:
    return w * mx.abs((scale * levels) * one + low - x)


def _squared_errors(
    x: mx.array, w: mx.array, levels: mx.array, scale: mx.array, low: mx.array, one: mx.array
) -> mx.array:
    diff = (scale * levels) * one + low - x
    return w * (diff * diff)


def _without_one(
    x: mx.array,
    wx: mx.array,
    w: mx.array,
    level: mx.array,
    sum_lx: mx.array,
    sum_l2: mx.array,
    magic: mx.array,
    one: mx.array,
) -> Arrays:
    """The sums without one weight, and the best level for it given the others (plus MAGIC)."""
    rest_lx = sum_lx - (wx * level) * one
    rest_l2 = sum_l2 - (w * level * level) * one
    return rest_lx, rest_l2, x * rest_l2 / rest_lx + magic


def _moved(
    bits: mx.array,
    wx: mx.array,
    w: mx.array,
    level: mx.array,
    rest_lx: mx.array,
    rest_l2: mx.array,
    sum_lx: mx.array,
    sum_l2: mx.array,
    low: mx.array,
    high: mx.array,
    one: mx.array,
) -> Arrays:
    """The level and sums after moving one weight where that improves the fit."""
    new = _levels(bits, low, high)
    new_lx = rest_lx + (wx * new) * one
    new_l2 = rest_l2 + (w * new * new) * one
    better = (
        (rest_lx > 0)
        & (new != level)
        & (new_l2 > 0)
        & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
    )
    return (
        mx.where(better, new, level),
        mx.where(better, new_lx, sum_lx),
        mx.where(better, new_l2, sum_l2),
    )


class KSearch:
    """The three searches, with stages that run as they are or fused by ``mx.compile``."""

    def __init__(self, *, compiled: bool) -> None:
        def fuse(stage: Callable) -> Callable:
            return mx.compile(stage) if compiled else stage

        self._add_run = fuse(_add_run)
        self._scaled = fuse(_scaled)
        self._scaled_above = fuse(_scaled_above)
        self._affine_terms = fuse(_affine_terms)
        self._linear_terms = fuse(_linear_terms)
        self._errors = {True: fuse(_absolute_errors), False: fuse(_squared_errors)}
        self._without_one = fuse(_without_one)
        self._moved = fuse(_moved)

    def sum(self, terms: mx.array) -> mx.array:
        """Sum ``[n, M]`` over the first axis as C does: from 0, in order, rounding at each step.

        n is a multiple of RUN.
        """
        total = mx.zeros(terms.shape[1:])
        for start in range(0, terms.shape[0], RUN):
            total = self._add_run(total, *(terms[i] for i in range(start, start + RUN)))
        return total

    def scale_and_min(
        self,
        x: mx.array,
        w: mx.array,
        *,
        nmax: int,
        rmin: float,
        rdelta: float,
        nstep: int,
        absolute: bool,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Fit x ≈ scale · level - minimum with weights w (``make_qkx2_quants``).

        ``x`` and ``w`` are f32 ``[n, M]``. Returns levels 0 … nmax ``[n, M]``, scale ``[M]`` and
        minimum ``[M]`` (of opposite sign to the smallest weight). Later candidates start from the
        minimum that earlier ones accepted, as in C.
        """
        one, magic = mx.array(1.0), mx.array(MAGIC)
        bounds = mx.array(0), mx.array(nmax)

        high = x.max(axis=0)
        low = mx.minimum(x.min(axis=0), 0.0)
        flat, first_low = high == low, low
        sum_w, sum_x = self.sum(w), self.sum(w * x)

        def terms(iscale: mx.array) -> Arrays:
            bits = self._scaled_above(x, low, iscale, magic, one).view(mx.int32)
            return tuple(self._affine_terms(bits, x, w, *bounds))

        def error(levels: mx.array, scale: mx.array, low: mx.array) -> mx.array:
            return self.sum(self._errors[absolute](x, w, levels, scale, low, one))

        iscale = float(nmax) / (high - low)
        scale = 1.0 / iscale
        levels = terms(iscale)[0]
        best = error(levels, scale, low)
        for step in range(nstep + 1):
            span = np.float32(rmin) + np.float32(rdelta) * np.float32(step) + np.float32(nmax)
            trial, *products = terms(float(span) / (high - low))
            sum_l, sum_l2, sum_xl = (self.sum(p) for p in products)
            det = sum_w * sum_l2 - sum_l * sum_l
            trial_scale = (sum_w * sum_xl - sum_x * sum_l) / det
            trial_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
            positive = trial_low > 0
            trial_scale = mx.where(positive, sum_xl / sum_l2, trial_scale)
            trial_low = mx.where(positive, 0.0, trial_low)
            trial_error = error(trial, trial_scale, trial_low)
            better = (det > 0) & (trial_error < best)
            levels = mx.where(better, trial, levels)
            best = mx.where(better, trial_error, best)
            scale = mx.where(better, trial_scale, scale)
            low = mx.where(better, trial_low, low)
            mx.eval(levels, best, scale, low)
        return (
            mx.where(flat, 0.0, levels),
            mx.where(flat, 0.0, scale),
            -mx.where(flat, first_low, low),
        )

    def scale(self, x: mx.array, nmax: int) -> tuple[mx.array, mx.array]:
        """Fit x ≈ scale · (level - nmax) with weights x² (``make_qx_quants``, rmse_type 1).

        ``x`` is f32 ``[n, M]``. Returns levels 0 … 2 nmax - 1 ``[n, M]`` and scale ``[M]``; both
        are 0 where all weights are below GROUP_MAX_EPS.
        """
        one, magic = mx.array(1.0), mx.array(MAGIC)
        bounds = mx.array(-nmax), mx.array(nmax - 1)
        amax, extreme = (v[0] for v in first_absmax(x, axis=0))
        w = x * x
        wx = w * x

        def attempt(numerator: float) -> Arrays:
            bits = self._scaled(x, numerator / extreme, magic, one).view(mx.int32)
            levels, lx, l2 = self._linear_terms(bits, wx, w, *bounds)
            return levels, self.sum(lx), self.sum(l2)

        levels, sum_lx, sum_l2 = attempt(float(-nmax))
        scale = mx.where(sum_l2 == 0, 0.0, sum_lx / sum_l2)
        best = scale * sum_lx
        for step in (*range(-9, 0), *range(1, 10)):
            span = np.float32(nmax) + np.float32(0.1) * np.float32(step)
            trial, sum_lx, sum_l2 = attempt(float(-span))
            better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
            trial_scale = sum_lx / sum_l2
            levels = mx.where(better, trial, levels)
            scale = mx.where(better, trial_scale, scale)
            best = mx.where(better, trial_scale * sum_lx, best)
            mx.eval(levels, scale, best)
        tiny = amax < GROUP_MAX_EPS
        return mx.where(tiny, 0.0, levels + float(nmax)), mx.where(tiny, 0.0, scale)

    def scale_by_descent(self, x: mx.array, nmax: int) -> tuple[mx.array, mx.array]:
        """As :meth:`scale`, by at most five sweeps of coordinate descent (``make_q3_quants``).

        C stops after a sweep that changes nothing; further sweeps would change nothing either.
        """
        one, magic = mx.array(1.0), mx.array(MAGIC)
        bounds = mx.array(-nmax), mx.array(nmax - 1)
        amax, extreme = (v[0] for v in first_absmax(x, axis=0))
        w = x * x
        wx = w * x
        bits = self._scaled(x, float(-nmax) / extreme, magic, one).view(mx.int32)
        start, lx, l2 = self._linear_terms(bits, wx, w, *bounds)
        sum_lx, sum_l2 = self.sum(lx), self.sum(l2)
        levels = list(start)
        for _ in range(5):
            for i, level in enumerate(levels):
                sums = sum_lx, sum_l2
                *rest, wanted = self._without_one(x[i], wx[i], w[i], level, *sums, magic, one)
                levels[i], sum_lx, sum_l2 = self._moved(
                    wanted.view(mx.int32), wx[i], w[i], level, *rest, *sums, *bounds, one
                )
            mx.eval(levels, sum_lx, sum_l2)
        tiny = amax < GROUP_MAX_EPS
        scale = mx.where(sum_l2 > 0, sum_lx / sum_l2, 0.0)
        return mx.where(tiny, 0.0, mx.stack(levels) + float(nmax)), mx.where(tiny, 0.0, scale)
