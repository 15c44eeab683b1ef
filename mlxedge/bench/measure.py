"""How fast a model runs, by llama-bench's definitions (tools/llama-bench of llama.cpp).

*Prefill*: ``p`` random tokens in one go on an empty context, until the next one is known. *Decode*:
``n`` tokens one by one, from an empty context. There is no text, so neither tokenization nor
detokenization counts, nor does sampling: the likeliest token is taken, which costs next to nothing.
One warm-up of each comes first; every later run is kept.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxedge.errors import BackendError, UsageError
from mlxedge.sampling import Sampling

if TYPE_CHECKING:
    from pathlib import Path

    from mlxedge.generate import Model
    from mlxedge.sources.checkpoint import Checkpoint

PROMPT_TOKENS = 512
GENERATED_TOKENS = 128
REPEATS = 5
_WARMUPS = 1
_SEED = 0

#: Called with runs done, runs in all, and what runs now.
ProgressHook = Callable[[int, int, str], None]


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
    """What one model's runs gave; ``prefill`` or ``decode`` is ``None`` if it was not asked for.

    ``processor`` is "cpu" or "gpu", whatever MLX may be able to use elsewhere.
    """

    engine: str
    processor: str
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
        runs = _Runs(model, repeats, progress)
        return Measurement(
            engine=model.engine,
            processor=_processor(model.engine),
            threads=model.threads,
            prompt_tokens=prompt_tokens,
            generated_tokens=generated_tokens,
            repeats=repeats,
            warmups=_WARMUPS,
            load_seconds=load_seconds,
            prefill=runs.prefill(prompt_tokens) if prompt_tokens else None,
            decode=runs.decode(generated_tokens) if generated_tokens else None,
            peak_memory_bytes=memory.read(),
        )


def _processor(engine: str) -> str:
    if engine != "mlx":
        return "cpu"
    import mlx.core as mx

    return "gpu" if mx.default_device().type == mx.gpu else "cpu"


class _Runs:
    """Repeats tests; every run has its own random tokens, so that no cache of prompts can help."""

    def __init__(self, model: Model, repeats: int, progress: ProgressHook | None) -> None:
        self._runner = model.runner
        self._vocab = range(int(model.config["vocab_size"]))
        self._repeats = repeats
        self._progress = progress
        self._random = random.Random(_SEED)

    def prefill(self, count: int) -> Series:
        return self._repeat("prefill", fed=count, counted=count, generated=1)

    def decode(self, count: int) -> Series:
        return self._repeat("decode", fed=1, counted=count, generated=count)

    def _repeat(self, name: str, *, fed: int, counted: int, generated: int) -> Series:
        seconds = []
        runs = _WARMUPS + self._repeats
        for run in range(runs):
            if self._progress:
                self._progress(run, runs, name)
            tokens = self._random.choices(self._vocab, k=fed)
            state = self._runner.state()
            steps = self._runner.generate(tokens, state, Sampling(), generated)
            started = time.perf_counter()
            made = sum(1 for _ in steps)
            elapsed = time.perf_counter() - started
            if made != generated:
                raise BackendError(f"engine {self._runner.name} made {made} of {generated} tokens")
            if run >= _WARMUPS:
                seconds.append(elapsed)
        if self._progress:
            self._progress(runs, runs, name)
        return Series(counted, tuple(seconds))
