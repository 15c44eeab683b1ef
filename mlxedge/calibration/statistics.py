"""What calibration knows of the inputs of a model's matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

#: An expert that fewer tokens reached than this is judged by all experts together: its own sums
#: would say more of those tokens than of the expert.
FEWEST_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of the inputs x of one matrix, or of a stack of them (the experts of a layer).

    ``sums`` f32 ``[experts, cols]``: Σ x² of each column over the tokens that reached the expert;
    ``counts`` int64 ``[experts]``: how many did. A dense matrix is a stack of one.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def experts(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        """Tokens that reached any expert, counted once for each."""
        return int(self.counts.sum())

    @property
    def few(self) -> np.ndarray:
        """Whether an expert is judged by all experts together: bool ``[experts]``."""
        return (self.counts < FEWEST_TOKENS) & (self.experts > 1)

    def importance(self) -> np.ndarray:
        """The mean of x², f32 ``[experts, cols]``.

        An expert that fewer than ``FEWEST_TOKENS`` tokens reached gets the mean over the tokens of
        all experts. Without any token at all every column counts as one.
        """
        if self.total == 0:
            return np.ones_like(self.sums)
        sums, counts = self.sums.astype(np.float64), self.counts[:, None]
        own = sums / np.maximum(counts, 1)
        everyone = sums.sum(0) / self.total
        return np.where(self.few[:, None], everyone, own).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of a model, by the canonical (Hugging Face) name of the matrix.

    Where they came from: ``texts`` are names of the texts, ``text_sha256`` the hash of the text
    where it is known; ``tokens`` in chunks of ``context`` were run.
    """

    tensors: Mapping[str, Statistics]
    texts: tuple[str, ...]
    text_sha256: str | None
    tokens: int
    context: int

    def importance(self, name: str) -> np.ndarray | None:
        """Of the columns of a matrix, f32 ``[cols]`` (``[experts, cols]`` for a stack of several),
        or ``None`` if nothing is known of it."""
        found = self.tensors.get(name)
        if found is None or found.total == 0:
            return None
        importance = found.importance()
        return importance[0] if found.experts == 1 else importance
