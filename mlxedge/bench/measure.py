"""How fast a model runs, by llama-bench's definitions (tools/llama-bench of llama.cpp).

*Prefill*: ``p`` tokens in one go on an empty context. *Decode*: ``n`` tokens one by one, from an
empty context. Neither counts tokenization, sampling or detokenization: the tokens are random ones
that are fixed beforehand. One warm-up of each comes first; every later run is kept.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mlxedge.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from mlxedge.sources.checkpoint import Checkpoint

PROMPT_TOKENS = 512
GENERATED_TOKENS = 128
REPEATS = 5
_WARMUPS = 1
_SEED = 0

#: Called with runs done, runs in all, and what runs now.
ProgressHook = Callable[[int, int, str], None]


class Stepper(Protocol):
    """What is timed. Each call returns when its logits have been computed."""

    def reset(self) -> None:
        """Begin with an empty context."""

    def feed(self, tokens: list[int]) -> None:
        """Run ``tokens`` after those that went before, and compute the logits of the last."""


@dataclass(frozen=True)
class Series:
    """Runs of one test: ``tokens`` in each of ``seconds``."""

    tokens: int
    seconds: tuple[float, ...]

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of every run."""
        return [self.tokens / s for s in self.seconds]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.speeds)

    @property
    def stddev(self) -> float | None:
        """Of the sample (n - 1); ``None`` for a single run."""
        return statistics.stdev(self.speeds) if len(self.seconds) > 1 else None

    @property
    def median(self) -> float:
        return statistics.median(self.speeds)

    @property
    def drift(self) -> float:
        """The last run's speed over the first's, less one: below zero when it slows down."""
        return self.speeds[-1] / self.speeds[0] - 1


@dataclass(frozen=True)
class Measurement:
    """What one model's runs gave; ``prefill`` or ``decode`` is ``None`` if it was not asked for."""

    engine: str
    threads: int | None
    prompt_tokens: int
    generated_tokens: int
    repeats: int
    warmups: int
    load_seconds: float
    peak_memory_bytes: int | None
    prefill: Series | None
    decode: Series | None


def measure(
    source: str | Path | Checkpoint,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    generated_tokens: int = GENERATED_TOKENS,
    repeats: int = REPEATS,
    engine: str | None = None,
    threads: int | None = None,
    progress: ProgressHook | None = None,
) -> Measurement:
    """Load ``source`` and time it. With 0 ``prompt_tokens`` or ``generated_tokens`` that test is
    left out. Raises UsageError for a test longer than the model's context."""
    from mlxedge.bench.memory import PeakMemory
    from mlxedge.bench.stepper import stepper_of
    from mlxedge.generate import load

    if prompt_tokens <= 0 and generated_tokens <= 0:
        raise UsageError("nothing to measure: ask for prompt tokens or generated tokens")
    memory = PeakMemory()
    started = time.perf_counter()
    with load(source, engine=engine, threads=threads) as model:
        load_seconds = time.perf_counter() - started
        longest = max(prompt_tokens, generated_tokens)
        if longest > model.context_length:
            raise UsageError(
                f"{model.name} has a context of {model.context_length} tokens: it cannot run "
                f"{longest}; use smaller -p and -n"
            )
        stepper = stepper_of(model)
        vocab = model.config["vocab_size"]
        runs = _Runs(stepper, vocab, repeats, progress)
        return Measurement(
            engine=model.engine,
            threads=stepper.threads,
            prompt_tokens=prompt_tokens,
            generated_tokens=generated_tokens,
            repeats=repeats,
            warmups=_WARMUPS,
            load_seconds=load_seconds,
            prefill=runs.prefill(prompt_tokens) if prompt_tokens else None,
            decode=runs.decode(generated_tokens) if generated_tokens else None,
            peak_memory_bytes=memory.read(),
        )


class _Runs:
    """Repeats tests; every run has its own random tokens, so that no cache of prompts can help."""

    def __init__(
        self, stepper: Stepper, vocab: int, repeats: int, progress: ProgressHook | None
    ) -> None:
        self._stepper = stepper
        self._vocab = vocab
        self._repeats = repeats
        self._progress = progress
        self._random = random.Random(_SEED)

    def prefill(self, count: int) -> Series:
        return self._repeat(count, "prefill", self._stepper.feed)

    def decode(self, count: int) -> Series:
        def one_by_one(tokens: list[int]) -> None:
            for token in tokens:
                self._stepper.feed([token])

        return self._repeat(count, "decode", one_by_one)

    def _repeat(self, count: int, name: str, test: Callable[[list[int]], None]) -> Series:
        seconds = []
        runs = _WARMUPS + self._repeats
        for run in range(runs):
            tokens = self._random.choices(range(self._vocab), k=count)
            self._stepper.reset()
            if self._progress:
                self._progress(run, runs, name)
            started = time.perf_counter()
            test(tokens)
            elapsed = time.perf_counter() - started
            if run >= _WARMUPS:
                seconds.append(elapsed)
        if self._progress:
            self._progress(runs, runs, name)
        return Series(count, tuple(seconds))
