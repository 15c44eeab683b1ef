"""Choosing tokens from logits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mlxedge.errors import BadWeightsError, UsageError
from mlxedge.sampling import Sampler, Sampling, candidates

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + 7


def allowed(logits: np.ndarray = LOGITS, **settings: Any) -> set[int]:
    return set(candidates(logits, Sampling(temperature=1, **settings)).tolist())


def test_greedy_takes_the_likeliest_and_the_lowest_of_equals() -> None:
    assert Sampler(Sampling()).choose(LOGITS) == 1
    assert Sampler(Sampling()).choose(np.array([1, 3, 3, 2], np.float32)) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.75}, {1, 3, 4}),
        ({"top_p": 0.99}, {0, 1, 2, 3, 4}),
        ({"min_p": 1.0}, {1}),
        ({"min_p": 0.3}, {1, 3, 4}),
        # Of the three that top-k leaves, the first has 0.47 of the probability.
        ({"top_k": 3, "top_p": 0.45}, {1}),
        ({"top_k": 3, "top_p": 0.5}, {1, 3}),
        ({"top_p": 0.9, "min_p": 0.5}, {1, 3}),
    ],
)
def test_what_is_left_to_choose_from(settings: dict[str, Any], expected: set[int]) -> None:
    assert allowed(**settings) == expected


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_is_the_shortest_list_that_adds_up(top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=5000).astype(np.float32) * 4
    weights = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-weights)
    count = int(np.searchsorted(np.cumsum(weights[order]) / weights.sum(), top_p)) + 1
    assert allowed(logits, top_p=top_p) == set(order[:count].tolist())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=5))
    counts = Counter(sampler.choose(LOGITS) for _ in range(20_000))
    expected = PROBABILITIES ** (1 / temperature)
    expected /= expected.sum()
    for token, share in enumerate(expected):
        assert counts[token] / 20_000 == pytest.approx(share, abs=0.015)


def test_a_seed_repeats_and_another_differs() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, seed=seed))
        return [sampler.choose(LOGITS) for _ in range(50)]

    assert draw(1) == draw(1) != draw(2)


def test_extreme_logits_are_no_trouble() -> None:
    huge = np.array([-np.inf, 3e38, -3e38, 0], np.float32)
    assert Sampler(Sampling(temperature=0.01, top_p=0.9, min_p=0.1)).choose(huge) == 1
    assert Sampler(Sampling(temperature=100)).choose(huge) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_an_error(temperature: float) -> None:
    with pytest.raises(BadWeightsError, match="NaN"):
        Sampler(Sampling(temperature=temperature)).choose(np.array([1, np.nan], np.float32))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0},
        {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.5}, {"seed": -1},
    ],
)  # fmt: skip
def test_senseless_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings)).replace("_", "-")):
        Sampling(**settings)
