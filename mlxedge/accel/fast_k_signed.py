"""The search "fast" for Q3_K, Q6_K and IQ4_XS, on ``[position, sub-block]``.

The bytes of ``fallback.fast_k_signed``, which says what is searched and is their definition: every
sum has its order. As in ``k_search``, stages that ``mx.compile`` may fuse guard products against
contraction by ``one``, and constants come in as arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxedge.accel.arrays import MAGIC, combine_bits, join_fields, nearest_int
from mlxedge.accel.casts import f16_bytes, round_through
from mlxedge.accel.k_search import KSearch
from mlxedge.encodings import Encoding
from mlxedge.ops import Parts

SUPER_BLOCK = 256
#: Super-blocks in one evaluation: its temporaries, a dozen at most, stay below 200 MiB.
AT_ONCE = 1 << 14
_HUGE = 3e38
_F16_MAX, _F16_LEAST = 65504.0, 2.0**-24

#: The levels of IQ4_XS (``kvalues_iq4nl`` of ggml), and the level of every half integer from _START
#: on until the next: a number belongs to the nearest level, half-way to the upper one.
_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
_START, _END = -120, 105
_CODES = np.searchsorted(
    (_LEVELS[1:] + _LEVELS[:-1]) / 2, np.arange(_START, _END + 1, 0.5), "right"
)


@dataclass(frozen=True)
class Plan:
    """How one format is searched; see the fallback's ``Form`` and ``Plan``."""

    size: int
    most: int
    low: int
    high: int
    table: bool
    spans: tuple[float, ...]
    divisors: tuple[float, ...]
    scan: int
    reach: float
    rounds: int


def _range(first: float, last: float, count: int) -> tuple[float, ...]:
    step = (last - first) / (count - 1)
    return tuple(first + step * i for i in range(count))


PLANS = {
    "q3_k": Plan(
        *(16, 31, -4, 3, False),
        (*_range(-4.5, -2.0, 8), *_range(3.5, 1.5, 8)),
        (-32.0,),
        12,
        7.0,
        2,
    ),
    "q6_k": Plan(
        *(16, 127, -32, 31, False),
        _range(-56.0, -18.0, 72),
        (-128.0, -126.0, -124.0, -122.0),
        0,
        1.0,
        1,
    ),
    "iq4_xs": Plan(
        *(32, 31, -127, 113, True),
        (*_range(-200.0, -60.0, 18), *_range(190.0, 50.0, 18)),
        (-33.0, -32.0, -30.0),
        0,
        1.0,
        1,
    ),
}


def _clamp(v: mx.array, low: mx.array | float, high: mx.array | float) -> mx.array:
    v = mx.where(v < low, low, v)
    return mx.where(v > high, high, v)


def _round(v: mx.array, low: float, high: float) -> mx.array:
    """The nearest integer of low…high, ties to even."""
    return (_clamp(v, low, high) + MAGIC) - MAGIC


def _inverse(v: mx.array) -> mx.array:
    return mx.where(v != 0, 1.0 / v, 0.0)


def _even_levels(
    x: mx.array, inverse: mx.array, low: mx.array, high: mx.array, magic: mx.array, one: mx.array
) -> mx.array:
    return _clamp((inverse * x) * one, low, high) + magic - magic


def _table_index(scaled: mx.array) -> mx.array:
    """Where ``_CODES`` has a number; NaN counts as the greatest."""
    bounded = mx.where(scaled < _END, scaled, _END)
    bounded = mx.where(bounded < _START, _START, bounded)
    return mx.floor(bounded * 2.0).astype(mx.int32) - 2 * _START


def _table_levels(x: mx.array, inverse: mx.array, table: mx.array) -> mx.array:
    return mx.take(table, _table_index(inverse * x))


def _products(x: mx.array, w: mx.array, level: mx.array) -> tuple[mx.array, mx.array]:
    wl = w * level
    return wl * x, wl * level


def _squares(x: mx.array, w: mx.array, level: mx.array, step: mx.array, one: mx.array) -> mx.array:
    difference = x - (step * level) * one
    return w * (difference * difference)


def _by_position(blocks: mx.array, size: int) -> mx.array:
    """Super-blocks ``[N, 256]`` as ``[size, N · 256 / size]``: one column a sub-block."""
    return mx.contiguous(blocks.reshape(-1, size).T)


def _normalize(columns: mx.array, subs: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Super-blocks of about 1; the greatest magnitude of each sub-block after; the power of two of
    each super-block and its inverse."""
    largest = mx.abs(columns).max(axis=0)
    exponent = mx.clip(_greatest(largest, subs).view(mx.int32) >> 23, 1, 253)
    unit, factor = (exponent << 23).view(mx.float32), ((254 - exponent) << 23).view(mx.float32)
    return columns * factor, largest * factor, unit, factor


def _greatest(v: mx.array, subs: int) -> mx.array:
    """Of ``[M]`` the greatest of each super-block, in each of its sub-blocks."""
    return mx.repeat(v.reshape(-1, subs).max(axis=1), subs)


def _total(v: mx.array, subs: int) -> mx.array:
    """As :func:`_greatest`, the sum: halves are added to each other."""
    rows = v.reshape(-1, subs)
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return mx.repeat(rows.reshape(-1), subs)


def _weigh(importance: mx.array, subs: int) -> tuple[mx.array, mx.array]:
    """The weights of errors; for each sub-block 1 or, if it has no importance, 0."""
    w, largest, *_ = _normalize(importance, subs)
    dead = largest == 0
    ignored = dead & (_greatest(largest, subs) > 0)
    return mx.where(dead, 1.0, w), mx.where(ignored, 0.0, 1.0)


def _through_half(v: mx.array) -> mx.array:
    """Rounded to f16, beyond its range to the greatest or the least number; 0 stays."""
    size = round_through(_clamp(mx.abs(v), _F16_LEAST, _F16_MAX), "f16")
    return mx.where(v == 0, 0.0, mx.where(v < 0, -size, size))


class Search:
    """The search of one format, with stages that run as they are or fused by ``mx.compile``."""

    def __init__(self, plan: Plan, *, compiled: bool) -> None:
        def fuse(stage: Callable) -> Callable:
            return mx.compile(stage) if compiled else stage

        self.plan = plan
        self.subs = SUPER_BLOCK // plan.size
        self._sum = KSearch(compiled=compiled).sum
        self._products, self._squares = fuse(_products), fuse(_squares)
        self._one = mx.array(1.0)
        if plan.table:
            self._levels = fuse(_table_levels)
            self._constants: tuple[mx.array, ...] = (mx.array(_LEVELS[_CODES]),)
        else:
            self._levels = fuse(_even_levels)
            bounds = (mx.array(float(v)) for v in (plan.low, plan.high, MAGIC, 1.0))
            self._constants = tuple(bounds)

    def encode(self, blocks: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """Super-blocks f32 ``[N, 256]``, and their importance, as u8 ``[N, block bytes]``."""
        x = _by_position(mx.array(blocks), self.plan.size)
        x, largest, unit, factor = _normalize(x, self.subs)
        w, alive = mx.array(1.0), mx.array(1.0)
        if importance is not None:
            w, alive = _weigh(_by_position(mx.array(importance), self.plan.size), self.subs)
        mx.eval(x, w, largest, unit, factor, alive)
        d, scales = self._search(x, w, alive, largest, unit, factor)
        step = d * factor * scales
        levels = _clamp(
            x / mx.where(step == 0, 1.0, step), float(self.plan.low), float(self.plan.high)
        )
        levels = mx.where(step == 0, 0.0, levels).T.reshape(-1, self.subs, self.plan.size)
        # d is the same in all sub-blocks of a super-block.
        d = d.reshape(-1, self.subs)[:, :1]
        stored = scales.astype(mx.int32).reshape(-1, self.subs)
        return np.array(_PACKERS[self.plan.size, self.plan.most](levels, stored, f16_bytes(d)))

    def _fit(self, x: mx.array, w: mx.array, inverse: mx.array) -> tuple[mx.array, mx.array]:
        """Σ w · x · level and Σ w · level² for the levels that ``inverse`` gives."""
        xl, ll = self._products(x, w, self._levels(x, inverse, *self._constants))
        return self._sum(xl), self._sum(ll)

    def _error(self, x: mx.array, w: mx.array, step: mx.array) -> mx.array:
        """Σ w · (x - step · level)² for the best levels."""
        level = self._levels(x, _inverse(step), *self._constants)
        return self._sum(self._squares(x, w, level, step, self._one))

    def _scales(self, x: mx.array, w: mx.array, largest: mx.array) -> tuple[mx.array, mx.array]:
        """The best scale of every sub-block, and the best of the other sign."""
        extreme = mx.zeros_like(largest)
        for row in x:
            extreme = mx.where(mx.abs(row) == largest, row, extreme)
        extreme = mx.where(largest == 0, 1.0, extreme)
        zero = mx.zeros_like(largest)
        found = []
        for sign in (-1.0, 1.0):
            scale, best = zero, zero
            for span in self.plan.spans:
                if span * sign < 0:
                    continue
                sum_xl, sum_ll = self._fit(x, w, mx.array(span) / extreme)
                fitted = sum_xl / sum_ll
                gain = sum_xl * fitted
                better = gain > best
                scale, best = mx.where(better, fitted, scale), mx.where(better, gain, best)
                mx.eval(scale, best)
            found.append((scale, best))
        (other, other_best), (scale, best) = found
        first = best > other_best
        return mx.where(first, scale, other), mx.where(first, other, scale)

    def _search(
        self,
        x: mx.array,
        w: mx.array,
        alive: mx.array,
        largest: mx.array,
        unit: mx.array,
        factor: mx.array,
    ) -> tuple[mx.array, mx.array]:
        """d (f16, of the weights as they were) and the integer scales, of every sub-block."""
        plan, subs = self.plan, self.subs
        bounds = float(-plan.most - 1), float(plan.most)
        scale, other = self._scales(x, w, largest)
        top, bottom = _greatest(scale * alive, subs), _greatest(0.0 - scale * alive, subs)
        greatest = mx.where(top > bottom, top, 0.0 - bottom)
        best_error = mx.full(largest.shape, _HUGE)
        best_d = best_scales = mx.zeros_like(largest)
        for t in range(len(plan.divisors) + plan.rounds):
            first = t < len(plan.divisors)
            if first:
                stored = _through_half(greatest / plan.divisors[t] * unit)
                inverse = _inverse(stored * factor)
                middle = _round(scale * inverse, *bounds)
            else:
                step = best_d * factor * best_scales
                sum_xl, sum_ll = self._fit(x, w, _inverse(step))
                sum_xl = _total(best_scales * sum_xl * alive, subs)
                sum_ll = _total(best_scales * best_scales * sum_ll * alive, subs)
                fitted = mx.where(sum_ll > 0, sum_xl / sum_ll, 0.0)
                stored = _through_half(fitted * unit)
                inverse = _inverse(stored * factor)
                middle = best_scales
            d = stored * factor
            candidates = [middle - 1.0, middle + 1.0, other * inverse]
            if first:
                least = _round(largest * mx.abs(inverse) / plan.reach, 0.0, bounds[1])
                for i in range(plan.scan):
                    candidates += [least + float(i), 0.0 - (least + float(i))]
            scales, error = middle, self._error(x, w, d * middle)
            for candidate in candidates:
                rounded = _round(candidate, *bounds)
                trial = self._error(x, w, d * rounded)
                better = trial < error
                scales, error = mx.where(better, rounded, scales), mx.where(better, trial, error)
                mx.eval(scales, error)
            total = _total(error * alive, subs)
            better = total < best_error
            best_error = mx.where(better, total, best_error)
            best_d = mx.where(better, stored, best_d)
            best_scales = mx.where(better, scales, best_scales)
            mx.eval(best_error, best_d, best_scales)
        return best_d, best_scales


def _integers(levels: mx.array, low: int, high: int) -> mx.array:
    """The nearest integers, counted from ``low``."""
    return mx.clip(nearest_int(levels), low, high) - low


def _high_scale_bits(stored: mx.array) -> mx.array:
    """Bits 4 and 5 of scales ``[N, k, m]`` as m bytes; bits 2 i of a byte are those of ``[i]``."""
    return combine_bits([(stored[:, i] >> 4) for i in range(stored.shape[1])], shift=2)


def _two_bit_fields(codes: mx.array) -> mx.array:
    """Two low bits of 256 codes as 64 bytes; byte 32 h + l holds weights 128 h + l + 32 i."""
    rows = (codes & 3).reshape(-1, 2, 4, 32)
    return combine_bits([rows[:, :, i] for i in range(4)], shift=2).reshape(-1, 64)


def _pack_q3_k(levels: mx.array, scales: mx.array, d: mx.array) -> mx.array:
    codes = _integers(levels, -4, 3)
    third = (codes >> 2).reshape(-1, 8, 32)
    top = combine_bits([third[:, i] for i in range(8)], shift=1)
    stored = scales + 32
    low, high = stored & 15, _high_scale_bits(stored.reshape(-1, 4, 4))
    return join_fields([top, _two_bit_fields(codes), low[:, :8] | (low[:, 8:] << 4), high, d])


def _pack_q6_k(levels: mx.array, scales: mx.array, d: mx.array) -> mx.array:
    codes = _integers(levels, -32, 31)
    low = (codes & 15).reshape(-1, 2, 4, 32)
    nibbles = (low[:, :, :2] | (low[:, :, 2:] << 4)).reshape(-1, 128)
    return join_fields([nibbles, _two_bit_fields(codes >> 4), scales & 0xFF, d])


def _pack_iq4_xs(levels: mx.array, scales: mx.array, d: mx.array) -> mx.array:
    codes = mx.take(mx.array(_CODES, mx.int32), _table_index(levels))
    nibbles = (codes[:, :, :16] | (codes[:, :, 16:] << 4)).reshape(-1, 128)
    stored = scales + 32
    low, high = stored & 15, _high_scale_bits(mx.swapaxes(stored.reshape(-1, 2, 4), 1, 2))
    return join_fields([d, high, low[:, ::2] | (low[:, 1::2] << 4), nibbles])


#: By size of sub-blocks and greatest scale.
_PACKERS: dict[tuple[int, int], Callable[[mx.array, mx.array, mx.array], mx.array]] = {
    (16, 31): _pack_q3_k,
    (16, 127): _pack_q6_k,
    (32, 31): _pack_iq4_xs,
}


@functools.cache
def _searcher(name: str, compiled: bool) -> Search:
    return Search(PLANS[name], compiled=compiled)


def search(
    weights: np.ndarray,
    encoding: Encoding,
    importance: np.ndarray | None,
    *,
    compiled: bool | None = None,
) -> Parts:
    """Encode ``weights``, f32 ``[rows, cols]`` in C order, with ``importance`` f32 ``[cols]``.

    ``compiled``: whether stages are fused by ``mx.compile``; None: where the device is a GPU.
    """
    if compiled is None:
        compiled = mx.default_device().type == mx.DeviceType.gpu
    searcher = _searcher(encoding.name, compiled)
    rows, cols = weights.shape
    out = np.empty((rows, encoding.nbytes((cols,))), np.uint8)
    blocks = weights.reshape(-1, SUPER_BLOCK)
    by_block = out.reshape(len(blocks), -1)
    columns = None if importance is None else importance.reshape(-1, SUPER_BLOCK)
    for start in range(0, len(blocks), AT_ONCE):
        piece = slice(start, min(start + AT_ONCE, len(blocks)))
        counts = None
        if columns is not None:
            counts = columns[np.arange(piece.start, piece.stop) % len(columns)]
        by_block[piece] = searcher.encode(blocks[piece], counts)
    mx.clear_cache()
    return {"weight": out}
