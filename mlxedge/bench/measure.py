"""How fast a model runs, by llama-bench's definitions (tools/llama-bench of llama.cpp).

*Prefill*: ``p`` random tokens in one go, until the next one is known; that time is also the time to
first token (TTFT) of a prompt of that length. *Decode*: ``n`` tokens one by one. Both begin after
``depth`` tokens of context, which do not count. There is no text, so neither tokenization nor
detokenization counts, nor does sampling: the likeliest token is taken, which costs next to nothing.
Warm-ups come first and are left out; every later run is kept, with what each token took.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlxedge.bench.sensors import Conditions, Sensors
from mlxedge.errors import BackendError, UsageError
from mlxedge.sampling import Sampling

if TYPE_CHECKING:
    from mlxedge.engines.base import Engine
    from mlxedge.sources.checkpoint import Checkpoint

_SEED = 0

#: Called with runs done, runs in all, and what runs now.
ProgressHook = Callable[[int, int, str], None]
Kind = Literal["prefill", "decode"]
#: The letters of llama-bench.
LETTERS: dict[Kind, str] = {"prefill": "pp", "decode": "tg"}


@dataclass(frozen=True)
class Settings:
    """What is measured. Every depth gets a prefill and a decode test, if they have tokens;
    ``cooldown_seconds`` pass before every run.

    Raises UsageError if there is nothing to measure.
    """

    prompt_tokens: int = 512
    generated_tokens: int = 128
    depths: tuple[int, ...] = (0,)
    repeats: int = 5
    warmups: int = 1
    cooldown_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt_tokens <= 0 and self.generated_tokens <= 0:
            raise UsageError("nothing to measure: ask for prompt tokens or generated tokens")
        if not self.depths or min(self.depths) < 0 or len(set(self.depths)) < len(self.depths):
            raise UsageError("depths are different numbers of tokens, 0 or more")
        if self.repeats < 1 or self.warmups < 0:
            raise UsageError("there must be one repeat at least, and no fewer than 0 warm-ups")

    @property
    def longest(self) -> int:
        """The most tokens of context that a test runs."""
        return max(self.depths) + max(self.prompt_tokens, self.generated_tokens)

    def tests(self) -> list[tuple[Kind, int, int]]:
        """Kind, tokens and depth of each."""
        kinds: list[tuple[Kind, int]] = [
            ("prefill", self.prompt_tokens),
            ("decode", self.generated_tokens),
        ]
        return [(kind, n, depth) for depth in self.depths for kind, n in kinds if n]


@dataclass(frozen=True)
class Run:
    """One run: how long it took, when it ``started`` (s after the first run of all), what each
    generated token took (decode), and the energy of the device meanwhile (J)."""

    seconds: float
    started: float | None
    token_seconds: tuple[float, ...] = ()
    joules: float | None = None


@dataclass(frozen=True)
class Test:
    """The runs of one test, of ``tokens`` each."""

    kind: Kind
    tokens: int
    depth: int
    runs: tuple[Run, ...]

    __test__ = False  # pytest collects what is called so

    @property
    def name(self) -> str:
        """As llama-bench has it: pp512, tg128 @ d4096."""
        return f"{LETTERS[self.kind]}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of every run."""
        return [self.tokens / run.seconds for run in self.runs]


@dataclass(frozen=True)
class Measurement:
    """What one model's runs gave. ``processor`` is "cpu" or "gpu"; ``build`` names the engine's
    build as exactly as it does itself."""

    engine: str
    build: str | None
    processor: str
    threads: int | None
    settings: Settings
    load_seconds: float | None
    peak_memory_bytes: int | None
    peak_gpu_memory_bytes: int | None
    energy_source: str | None
    before: Conditions
    after: Conditions
    tests: tuple[Test, ...]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be timed: its engine, its vocabulary, and the tokens that fit."""

    name: str
    runner: Engine
    vocab: int
    context: int


def measure(
    source: str | Path | Checkpoint,
    settings: Settings | None = None,
    *,
    engine: str | None = None,
    threads: int | None = None,
    sensors: Sensors | None = None,
    progress: ProgressHook | None = None,
) -> Measurement:
    """Load ``source`` and time it in this process. Raises UsageError for tests longer than the
    model's context, and what loading raises."""
    from mlxedge.bench.memory import PeakMemory

    settings = settings or Settings()
    sensors = sensors or Sensors()
    before = sensors.conditions()
    memory = PeakMemory()
    started = time.perf_counter()
    with _load(source, engine, threads, settings.longest) as model:
        load_seconds = time.perf_counter() - started
        if settings.longest > model.context:
            raise UsageError(
                f"{model.name} has a context of {model.context} tokens: it cannot run "
                f"{settings.longest}; use smaller -p, -n and --depth"
            )
        tests = _Tests(model, settings, sensors, progress).run()
        about = model.runner.about()
        return Measurement(
            engine=model.runner.name,
            build=about.build,
            processor=about.processor,
            threads=model.runner.threads,
            settings=settings,
            load_seconds=load_seconds,
            peak_memory_bytes=memory.read(),
            peak_gpu_memory_bytes=about.peak_gpu_bytes,
            energy_source=sensors.energy.source if sensors.energy else None,
            before=before,
            after=sensors.conditions(),
            tests=tuple(tests),
        )


@contextlib.contextmanager
def _load(
    source: str | Path | Checkpoint, engine: str | None, threads: int | None, longest: int
) -> Iterator[Loaded]:
    from mlxedge.engines.onnx_engine import OnnxEngine, is_onnx_folder, read_folder
    from mlxedge.generate import load

    if isinstance(source, (str, Path)) and is_onnx_folder(Path(source)):
        folder = read_folder(Path(source))
        runner = OnnxEngine(folder, threads, longest + 1)
        with contextlib.closing(runner):
            yield Loaded(folder.name, runner, folder.vocab, folder.context)
        return
    with load(source, engine=engine, threads=threads, context=longest) as model:
        vocab = int(model.config["vocab_size"])
        yield Loaded(model.name, model.runner, vocab, model.context_length)


class _Tests:
    """Repeats tests; every run has its own random tokens, so that no cache of prompts can help."""

    def __init__(
        self, model: Loaded, settings: Settings, sensors: Sensors, progress: ProgressHook | None
    ) -> None:
        self._runner = model.runner
        self._vocab = range(model.vocab)
        self._settings = settings
        self._energy = sensors.energy
        self._progress = progress
        self._random = random.Random(_SEED)
        self._began: float | None = None

    def run(self) -> list[Test]:
        return [self._test(*test) for test in self._settings.tests()]

    def _test(self, kind: Kind, tokens: int, depth: int) -> Test:
        settings, runs = self._settings, []
        count = settings.warmups + settings.repeats
        fed, generated = (tokens, 1) if kind == "prefill" else (1, tokens)
        state: Any = None
        for number in range(count):
            if self._progress:
                self._progress(number, count, Test(kind, tokens, depth, ()).name)
            state = self._at(depth, state)
            prompt = self._random.choices(self._vocab, k=fed)
            if settings.cooldown_seconds:
                time.sleep(settings.cooldown_seconds)
            run = self._timed(prompt, state, generated)
            if number >= settings.warmups:
                runs.append(run)
        if self._progress:
            self._progress(count, count, Test(kind, tokens, depth, ()).name)
        return Test(kind, tokens, depth, tuple(runs))

    def _at(self, depth: int, state: Any) -> Any:
        """A sequence of ``depth`` tokens: the last one taken back to them, if it can be."""
        if depth and state is not None:
            self._runner.truncate(state, depth)
            if state.length == depth:
                return state
        state = self._runner.state()
        if depth:
            self._runner.run(self._random.choices(self._vocab, k=depth), state, 0)
        return state

    def _timed(self, prompt: list[int], state: Any, generated: int) -> Run:
        steps = self._runner.generate(prompt, state, Sampling(), generated)
        joules = self._energy.joules() if self._energy else None
        started = last = time.perf_counter()
        token_seconds = []
        for _ in steps:
            now = time.perf_counter()
            token_seconds.append(now - last)
            last = now
        if len(token_seconds) != generated:
            raise BackendError(
                f"engine {self._runner.name} made {len(token_seconds)} of {generated} tokens"
            )
        spent = None
        if self._energy and joules is not None and (now_joules := self._energy.joules()):
            spent = now_joules - joules
        if self._began is None:
            self._began = started
        return Run(
            last - started,
            started - self._began,
            tuple(token_seconds) if generated > 1 else (),
            spent,
        )
