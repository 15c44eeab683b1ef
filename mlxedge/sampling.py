"""Choosing the next token from logits.

The order is that of llama.cpp's and mlx-lm's samplers: top-k, top-p and min-p cut the model's own
distribution, and temperature then reshapes what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxedge.errors import BadWeightsError, UsageError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How to choose. ``temperature`` 0 takes the likeliest token and ignores the rest.

    ``top_k`` keeps that many of the likeliest (0: all), ``top_p`` the likeliest that add up to this
    probability, ``min_p`` those at least this part as likely as the likeliest (Nguyen et al., 2024,
    arXiv 2407.01082). The same ``seed`` gives the same choices. Raises UsageError for values that
    make no sense.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for ok, problem in (
            (self.temperature >= 0, f"temperature {self.temperature} is below 0"),
            (self.top_k >= 0, f"top-k {self.top_k} is below 0"),
            (0 < self.top_p <= 1, f"top-p {self.top_p} is not in (0, 1]"),
            (0 <= self.min_p <= 1, f"min-p {self.min_p} is not in [0, 1]"),
            (self.seed is None or self.seed >= 0, f"seed {self.seed} is below 0"),
        ):
            if not ok:
                raise UsageError(problem)


class Sampler:
    """Chooses tokens one after the other."""

    def __init__(self, sampling: Sampling) -> None:
        import numpy as np

        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: np.ndarray) -> int:
        """A token id for logits f32 ``[vocab]``; among equals greedy takes the lowest.

        Raises BadWeightsError for NaN.
        """
        import numpy as np

        best = int(logits.argmax())
        if np.isnan(logits[best]):
            raise BadWeightsError("the model's logits are NaN: its weights are broken")
        if self.sampling.temperature == 0:
            return best
        ids = candidates(logits, self.sampling)
        heights = logits[ids].astype(np.float64) - float(logits[best])
        cumulative = np.cumsum(np.exp(heights / self.sampling.temperature))
        drawn = self._random.random() * cumulative[-1]
        at = min(int(np.searchsorted(cumulative, drawn, side="right")), len(ids) - 1)
        return int(ids[at])


def candidates(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The ids that top-k, top-p and min-p leave."""
    import numpy as np

    ids = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        ids = np.argpartition(-logits, sampling.top_k - 1)[: sampling.top_k]
    if sampling.top_p < 1:
        weights = np.exp(logits[ids].astype(np.float64) - float(logits.max()))
        weights /= weights.sum()
        # Tokens this unlikely add up to less than what may be cut: they need no sorting.
        likely = weights >= (1 - sampling.top_p) / len(weights)
        ids, weights = ids[likely], weights[likely]
        order = np.argsort(-weights, kind="stable")
        enough = int(np.searchsorted(np.cumsum(weights[order]), sampling.top_p)) + 1
        ids = ids[order[:enough]]
    if sampling.min_p > 0:
        ids = ids[logits[ids] >= logits.max() + np.log(sampling.min_p)]
    return ids
