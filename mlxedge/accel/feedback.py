"""Error feedback on MLX: the rule of ``fallback.feedback``, the same columns in the same order.

The sums are matrix products here, and devices add in orders of their own. Where a weight lies half
way between two levels, a last bit decides the code, and that decides what follows in its row; so
the codes cannot be held to the fallback's. What is: tr(E H Eᵀ) of a matrix is within 1e-4 of the
fallback's, relatively (tested on CPUs), and no row's is above that of the search's codes.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlxedge import grids
from mlxedge.encodings import Encoding
from mlxedge.errors import UsageError
from mlxedge.ops import Feedback, Parts

#: As in the fallback.
SWEEPS = 2
#: Columns whose errors wait to be pushed on together.
_BLOCK = 64
#: Weights in flight, each in about ten arrays of f32.
_WEIGHTS_AT_ONCE = 1 << 22

_Nearest = Callable[[mx.array], mx.array]


def encode(weights: np.ndarray, parts: Parts, encoding: Encoding, feedback: Feedback) -> Parts:
    """``parts`` with the same scales and codes chosen anew for ``weights``, f32 ``[rows, cols]``.

    As ``fallback.feedback.encode``. Raises UsageError if the feedback is for another number of
    columns.
    """
    if not grids.has_grid(encoding):
        return parts
    rows, cols = weights.shape
    if len(feedback.order) != cols:
        raise UsageError(
            f"the feedback is for {len(feedback.order)} columns, the weights have {cols}"
        )
    grid = grids.grid(parts, encoding)
    levels = grid.levels[grid.ranked]
    nearest = _nearest(levels)
    codes = grids.codes(parts, encoding)
    column = feedback.order // grid.group
    at_once = max(1, _WEIGHTS_AT_ONCE // max(1, cols))
    for first in range(0, rows, at_once):
        piece = slice(first, first + at_once)
        scale, offset = grid.scale[piece][:, column].T, grid.offset[piece][:, column].T
        before = grid.levels[codes[piece][:, feedback.order]].T
        work = _Rows(weights[piece][:, feedback.order].T, scale, offset, before, nearest)
        work.feed_back(feedback.factor)
        for _ in range(SWEEPS):
            if not work.sweep(feedback.hessian):
                break
        chosen = np.empty_like(codes[piece])
        chosen[:, feedback.order] = grid.ranked[np.searchsorted(levels, work.chosen())].T
        better = work.total < work.total_before
        codes[piece][better] = chosen[better]
    mx.clear_cache()
    return grids.with_codes(parts, encoding, codes)


def _nearest(levels: np.ndarray) -> _Nearest:
    """A function to the nearest of rising ``levels``."""
    if np.all(np.diff(levels) == 1):
        low, high = float(levels[0]), float(levels[-1])

        def round_(u: mx.array) -> mx.array:
            u = mx.where(u > low, u, low)  # of NaN the lowest
            return mx.round(mx.where(u < high, u, high))

        return round_
    middles = (levels[1:] + levels[:-1]) * np.float32(0.5)
    depth = len(middles).bit_length()
    padded = mx.array(np.pad(middles, (0, (1 << depth) - 1 - len(middles)), constant_values=np.inf))
    by_rank = mx.array(levels)

    def bisect(u: mx.array) -> mx.array:
        rank = mx.zeros(u.shape, mx.int32)
        for power in reversed(range(depth)):
            above = u > mx.take(padded, rank + ((1 << power) - 1))
            rank = rank + above.astype(mx.int32) * (1 << power)
        return mx.take(by_rank, rank)

    return bisect


class _Rows:
    """Some rows of a matrix as arrays ``[cols, rows]``, their columns in the order of feedback.

    ``total``, ``total_before``: tr(E H Eᵀ) of each row with the codes as they are and with those of
    the search, float64.
    """

    def __init__(
        self,
        weights: np.ndarray,
        scale: np.ndarray,
        offset: np.ndarray,
        levels: np.ndarray,
        nearest: _Nearest,
    ) -> None:
        self._w, self._scale, self._offset, self._level = (
            mx.array(np.ascontiguousarray(a)) for a in (weights, scale, offset, levels)
        )
        self._inverse = mx.where(self._scale == 0, 0.0, 1.0 / self._scale)
        self._nearest = nearest
        self._errors = self._w - (self._scale * self._level + self._offset)
        cols, rows = weights.shape
        self._blocks = [slice(first, min(first + _BLOCK, cols)) for first in range(0, cols, _BLOCK)]
        self.total, self.total_before = np.zeros(rows), np.zeros(rows)

    def chosen(self) -> np.ndarray:
        """The levels chosen, ``[cols, rows]``."""
        return np.array(self._level)

    def feed_back(self, factor: np.ndarray) -> None:
        """Choose, column by column, what makes up for the errors before."""
        levels, errors = self._level[:0], self._errors[:0]
        for block in self._blocks:
            panel = mx.array(np.ascontiguousarray(factor[: block.stop, block]))
            before = panel.T @ self._errors[: block.stop]
            squares = mx.zeros(before.shape[1])
            sums = panel[: block.start].T @ errors if block.start else mx.zeros(before.shape)
            new_levels, new_errors = [], []
            for c in range(block.stop - block.start):
                j, line = block.start + c, panel[block.start + c]
                level, value = self._nearest_to(j, self._w[j] + sums[0] / line[c])
                error = self._w[j] - value
                left = sums[0] + error * line[c]
                squares = squares + left * left
                sums = sums[1:] + line[c + 1 :, None] * error
                new_levels.append(level)
                new_errors.append(error)
            levels = mx.concatenate([levels, mx.stack(new_levels)])
            errors = mx.concatenate([errors, mx.stack(new_errors)])
            mx.eval(levels, errors)
            self.total += np.array(squares, np.float64)
            self.total_before += np.array(mx.sum(before * before, axis=0), np.float64)
        self._level, self._errors = levels, errors

    def sweep(self, hessian: np.ndarray) -> bool:
        """Make each code the best for all others; whether any changed."""
        levels, changed = self._level[:0], False
        for block in self._blocks:
            panel = mx.array(np.ascontiguousarray(hessian[:, block]))
            slopes = panel.T @ self._errors
            gains = mx.zeros(slopes.shape[1])
            new_levels, new_errors = [], []
            for c in range(block.stop - block.start):
                j, line = block.start + c, panel[block.start + c]
                old, slope = self._level[j], slopes[0]
                value = self._scale[j] * old + self._offset[j]
                level, other = self._nearest_to(j, value + slope / line[c])
                step = other - value
                gain = step * (2 * slope - step * line[c])
                better = gain > 0
                step, level = mx.where(better, step, 0.0), mx.where(better, level, old)
                gains = gains + mx.where(better, gain, 0.0)
                slopes = slopes[1:] - line[c + 1 :, None] * step
                new_levels.append(level)
                new_errors.append(self._w[j] - (self._scale[j] * level + self._offset[j]))
            levels = mx.concatenate([levels, mx.stack(new_levels)])
            self._errors = mx.concatenate(
                [self._errors[: block.start], mx.stack(new_errors), self._errors[block.stop :]]
            )
            mx.eval(levels, self._errors)
            gained = np.array(gains, np.float64)
            self.total -= gained
            changed = changed or bool((gained > 0).any())
        self._level = levels
        return changed

    def _nearest_to(self, j: int, target: mx.array) -> tuple[mx.array, mx.array]:
        """The level in column ``j`` whose value is nearest to ``target``, and that value."""
        level = self._nearest((target - self._offset[j]) * self._inverse[j])
        return level, self._scale[j] * level + self._offset[j]
