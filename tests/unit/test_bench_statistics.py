"""What a handful of runs say: intervals that hold what they promise, and alarms that are right."""

from __future__ import annotations

import numpy as np
import pytest
from oracles.bench_records import record

from mlxedge.bench.regression import against
from mlxedge.bench.results import Result
from mlxedge.bench.statistics import (
    Interval,
    drift,
    mean_interval,
    percentile,
    ratio_interval,
    summarise,
)


def test_plain_statistics() -> None:
    found = summarise([200.0, 250.0, 100.0])
    assert found["mean"] == pytest.approx(550 / 3)
    assert found["median"] == 200.0
    assert found["stddev"] == pytest.approx(76.376, abs=1e-3)
    assert summarise([2.0]) == {
        "mean": 2.0, "stddev": None, "median": 2.0, "low": None, "high": None,
    }  # fmt: skip
    assert drift([200.0, 250.0, 100.0]) == -0.5
    assert drift([1.0]) is None
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5


def test_intervals_of_few_or_equal_runs() -> None:
    assert mean_interval([1.0, 2.0]) is None
    assert ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0]) is None
    assert mean_interval([5.0] * 3) == Interval(5.0, 5.0)
    assert ratio_interval([5.0] * 3, [4.0] * 3) == Interval(1.25, 1.25)
    assert Interval(1, 2).overlaps(Interval(2, 3))
    assert not Interval(1, 2).overlaps(Interval(2.1, 3))


def test_intervals_are_the_same_every_time() -> None:
    values = [10.0, 11.0, 9.5, 10.2, 10.1]
    assert mean_interval(values) == mean_interval(values)
    found = mean_interval(values)
    assert found is not None
    assert found.low < np.mean(values) < found.high


@pytest.mark.parametrize("runs", [3, 5, 10])
def test_intervals_hold_the_truth_as_often_as_they_promise(runs: int) -> None:
    """95 % of the time; over 300 samples, so within three standard errors of that."""
    rng = np.random.default_rng(runs)
    held = held_ratio = 0
    for _ in range(300):
        ours, theirs = (rng.normal(100.0, 3.0, runs).tolist() for _ in range(2))
        mean, ratio = mean_interval(ours), ratio_interval(ours, theirs)
        assert mean is not None
        assert ratio is not None
        held += mean.low <= 100.0 <= mean.high
        held_ratio += ratio.low <= 1.0 <= ratio.high
    assert 0.91 <= held / 300 <= 0.99
    assert 0.91 <= held_ratio / 300 <= 0.99


def laptop(rng: np.random.Generator, mean: float) -> Result:
    """Five decode runs as a laptop gives them: each 2 % off, the session as a whole 1 %, and 2 %
    slower at the end than at the start."""
    session = mean * (1 + rng.normal(0, 0.01))
    speed = [session * (1 + rng.normal(0, 0.02)) * (1 - 0.02 * i / 4) for i in range(5)]
    return Result("laptop", record((), [20 / s for s in speed]))


@pytest.mark.parametrize(("slower", "least", "most"), [(0.0, 0.0, 0.05), (0.10, 0.90, 1.0)])
def test_a_regression_is_caught_and_noise_is_not(slower: float, least: float, most: float) -> None:
    """Of 200 pairs, with --fail-below 5%: of equal speed fewer than one in twenty raise the alarm,
    and of those that became a tenth slower nine in ten do."""
    rng = np.random.default_rng(11)
    alarms = 0
    for _ in range(200):
        before, now = laptop(rng, 30.0), laptop(rng, 30.0 * (1 - slower))
        (change,) = against([before], [now])
        alarms += change.worse_by(0.05)
    assert least <= alarms / 200 <= most
