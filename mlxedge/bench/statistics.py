"""What a handful of runs say, and how sure that is.

Intervals are smoothed, studentized bootstraps (Efron & Tibshirani, An Introduction to the
Bootstrap, 1993, ch. 12.5 and 16.5): resampled means over their own standard errors, whose quantiles
a few runs support better than those of the means alone. Each drawn value gets a little noise, of
the spread over the root of n, for draws of a few runs are often the same ones again and again.
Speeds are taken by their logarithms. What is drawn is always the same, so that a comparison is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_DRAWS = 4000
_SEED = 0
#: A run whose last speed is further from its first than this is marked.
DRIFT_BOUND = 0.05


@dataclass(frozen=True)
class Interval:
    """``low`` and ``high`` of what was estimated, at ``LEVEL``."""

    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high


def drift(values: Sequence[float]) -> float | None:
    """The last over the first, less one: below zero when it slows down; ``None`` for one value, or
    a first of zero."""
    return values[-1] / values[0] - 1 if len(values) > 1 and values[0] else None


def percentile(values: Sequence[float], share: float) -> float:
    """By linear interpolation; ``share`` from 0 to 1."""
    return float(np.quantile(np.asarray(values, np.float64), share))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Of the mean of positive values; ``None`` for fewer than three, which tell too little, or if
    one is not positive."""
    if len(values) < 3 or min(values) <= 0:
        return None
    found = np.log(np.asarray(values, np.float64))
    mean = float(np.mean(np.asarray(values, np.float64)))
    low, high = _interval(found)
    # Around the mean itself, which lies a little above that of the logarithms.
    return Interval(mean * math.exp(low), mean * math.exp(high))


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> Interval | None:
    """Of mean(ours) / mean(theirs), all positive; ``None`` if one has fewer than three values, or
    one that is not positive."""
    if len(ours) < 3 or len(theirs) < 3 or min(*ours, *theirs) <= 0:
        return None
    a, b = (np.asarray(values, np.float64) for values in (ours, theirs))
    low, high = _interval(np.log(a), np.log(b))
    ratio = float(a.mean() / b.mean())
    return Interval(ratio * math.exp(low), ratio * math.exp(high))


def _interval(a: np.ndarray, b: np.ndarray | None = None) -> tuple[float, float]:
    """Of the mean of ``a``, less that of ``b``, about what it is in the sample."""
    samples = [a] if b is None else [a, b]
    error = math.sqrt(sum(v.var(ddof=1) / len(v) for v in samples))
    if error == 0:
        return 0.0, 0.0
    rng = np.random.default_rng(_SEED)
    drawn = [_draw(v, rng) for v in samples]
    moved = drawn[0].mean(axis=1) - a.mean()
    if b is not None:
        moved = moved - (drawn[1].mean(axis=1) - b.mean())
    errors = np.sqrt(np.sum([d.var(axis=1, ddof=1) / d.shape[1] for d in drawn], axis=0))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(moved / errors, [tail, 1 - tail])
    return float(-high * error), float(-low * error)


def _draw(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``[_DRAWS, n]`` of ``n`` values, each with some noise."""
    n = len(values)
    noise = rng.standard_normal((_DRAWS, n)) * values.std(ddof=1) / math.sqrt(n)
    drawn: np.ndarray = values[rng.integers(0, n, (_DRAWS, n))] + noise
    return drawn


def summarise(values: Sequence[float]) -> dict[str, float | None]:
    """mean, stddev (of the sample, n - 1), median, and the interval of the mean."""
    interval = mean_interval(values)
    return {
        "mean": statistics.fmean(values),
        "stddev": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median(values),
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
    }
