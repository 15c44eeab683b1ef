"""The seam between generation and what computes it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mlxedge.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.sampling import Sampling


@dataclass(frozen=True)
class About:
    """What computes: ``processor`` "cpu" or "gpu", ``build`` as the engine names its own, and the
    most memory that it has had on a GPU so far, ``None`` if there is none or it does not say."""

    processor: str
    build: str | None
    peak_gpu_bytes: int | None = None


class Engine(Protocol):
    """A loaded model.

    A state is what one sequence has left behind: keys and values of its first ``state.length``
    positions. Each engine has a class of its own for it.
    """

    name: str
    #: Processors at work, ``None`` where the engine does not say.
    threads: int | None

    def state(self) -> Any:
        """An empty sequence."""

    def truncate(self, state: Any, length: int) -> None:
        """Forget all positions from ``length`` on, and maybe more: ``state.length`` tells."""

    def run(self, tokens: Sequence[int], state: Any, results: int) -> np.ndarray:
        """Append ``tokens`` (at least one); logits f32 ``[results, vocab]`` of the last ones."""

    def about(self) -> About:
        """What computes, and as which build."""

    def generate(
        self, tokens: Sequence[int], state: Any, sampling: Sampling, most: int
    ) -> Generator[int, None, None]:
        """Append ``tokens``, then yield up to ``most`` sampled ones, appending each in turn.

        The last one yielded is not part of ``state`` yet.
        """

    def close(self) -> None:
        """Free what the engine holds."""


def sampled(
    engine: Engine, tokens: Sequence[int], state: Any, sampling: Sampling, most: int
) -> Generator[int, None, None]:
    """``Engine.generate`` of an engine that has no loop of its own, by its ``run``."""
    from mlxedge.sampling import Sampler

    sampler = Sampler(sampling)
    fed: Sequence[int] = tokens
    for _ in range(most):
        token = sampler.choose(engine.run(fed, state, 1)[0])
        yield token
        fed = [token]


def check_tokens(tokens: Sequence[int], vocab: int, length: int, context: int) -> None:
    """Raise UsageError for no token, ids beyond the vocabulary, or more than the context holds."""
    if not len(tokens):
        raise UsageError("there are no tokens to run: the prompt is empty")
    wrong = next((t for t in tokens if not 0 <= t < vocab), None)
    if wrong is not None:
        raise UsageError(f"token {wrong} is not in the model's vocabulary of {vocab}")
    if length + len(tokens) > context:
        raise UsageError(
            f"{length + len(tokens)} tokens do not fit the model's context of {context}: "
            "shorten the prompt"
        )
