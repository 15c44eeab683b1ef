"""mlxedge's own forward pass: any checkpoint, on any machine, straight from its blocks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxedge.engines.base import About, check_tokens, sampled
from mlxedge.models.decoder import Decoder
from mlxedge.sampling import Sampling
from mlxedge.version import VERSION

if TYPE_CHECKING:
    from mlxedge.sources.checkpoint import Checkpoint


@dataclass
class NumpyState:
    """``cache`` holds ``length`` positions; what it holds beyond is overwritten in time."""

    cache: Any
    length: int = 0


class NumpyEngine:
    """Implements ``Engine``. The checkpoint is read whole and may be closed afterwards."""

    name = "numpy"

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None) -> None:
        self._decoder = Decoder(checkpoint, threads)
        self.threads: int | None = self._decoder.threads
        self.weight_bytes = self._decoder.weight_bytes

    def state(self) -> NumpyState:
        return NumpyState(self._decoder.cache())

    def truncate(self, state: NumpyState, length: int) -> None:
        if length < state.length:
            state.length = 0 if self._decoder.recurrent else length

    def run(self, tokens: Sequence[int], state: NumpyState, results: int) -> np.ndarray:
        shape = self._decoder.shape
        check_tokens(tokens, shape.vocab, state.length, shape.context)
        ids = np.asarray(tokens, np.int64)
        first_result = len(ids) - results
        found = []
        for first in range(0, len(ids), self._decoder.rows):
            piece = ids[first : first + self._decoder.rows]
            wanted = min(max(first + len(piece) - first_result, 0), len(piece))
            logits = self._decoder.run(piece, state.length, state.cache, wanted)
            state.length += len(piece)
            if wanted:
                found.append(logits)
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty((0, shape.vocab), np.float32)

    def generate(
        self, tokens: Sequence[int], state: NumpyState, sampling: Sampling, most: int
    ) -> Generator[int, None, None]:
        return sampled(self, tokens, state, sampling, most)

    def about(self) -> About:
        return About("cpu", f"mlxedge {VERSION}")

    def close(self) -> None:
        self._decoder.close()
