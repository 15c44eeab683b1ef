"""The forward pass that all architectures share.

Blocks of something that mixes positions (attention, or a recurrence) and of an MLP, or a mixture of
experts. What differs between them an architecture declares (``mlxedge.models.wiring``,
``mlxedge.models.mixers``), or it is found in the checkpoint: biases, a head of its own. Names and
layouts are Hugging Face's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxedge.models.graph import Graph
from mlxedge.models.shape import shape_of
from mlxedge.models.weights import Weights
from mlxedge.ops import load_forward

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.sources.checkpoint import Checkpoint

#: The most positions of one pass: longer prompts go in pieces.
CHUNK = 512


class Decoder:
    """A checkpoint's weights, as they are stored, and the tape that computes with them.

    ``threads`` defaults to the processors that this process may use.
    """

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None) -> None:
        self.shape = shape = shape_of(checkpoint.config)
        ops = load_forward()
        weights = Weights(checkpoint, ops)
        self.threads = threads or ops.available_threads()
        self.rows = min(CHUNK, shape.context)
        self._graph = graph = Graph(shape, weights, ops)
        table = graph.embed()
        graph.prelude()
        for layer in range(shape.layers):
            graph.block(layer)
        logits = graph.head(table)
        self._runner = graph.runner(ops.Team(self.threads), self.rows, logits)
        self.weight_bytes = weights.nbytes

    @property
    def recurrent(self) -> bool:
        """Whether a cache cannot be taken back to an earlier position, but for the first."""
        return bool(self._graph.tape.recurrent)

    def cache(self) -> Any:
        """An empty cache of keys and values for one sequence."""
        return self._graph.cache()

    def run(self, tokens: np.ndarray, start: int, cache: Any, results: int) -> np.ndarray:
        """Logits f32 ``[results, vocab]`` of the last ``results`` of ``tokens`` (int64 ``[n]``,
        n <= ``rows``), which stand at positions ``start``… after what ``cache`` holds."""
        logits: np.ndarray = self._runner.run(tokens, start, cache, results)
        return logits

    def close(self) -> None:
        """End the threads."""
        self._runner.team.close()
