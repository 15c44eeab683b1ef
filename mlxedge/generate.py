"""Load a model and generate with it.

with load("model.gguf") as model:
    print(model.generate("What is the capital of France?"))
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mlxedge.engines.base import check_tokens
from mlxedge.errors import TokenizerError, UsageError
from mlxedge.models import known_model_types, spec_for
from mlxedge.models.shape import shape_of
from mlxedge.ops import default_backend
from mlxedge.prepare import check_weights, prepare, text_part
from mlxedge.sampling import Sampling
from mlxedge.sources.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.engines.base import Engine
    from mlxedge.tokenizer import Tokenizer

__all__ = ["Chunk", "Generation", "Model", "Sampling", "Session", "Stats", "load"]

Message = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """One generated token. ``text`` is what it completes: nothing, while a character or a
    multi-byte sequence is unfinished. ``finish`` is set on the last chunk: "stop" (``token`` ends
    the answer and has no text) or "length"."""

    text: str
    token: int
    finish: str | None = None


@dataclass
class Stats:
    """What a generation took.

    Prefill lasts until the first generated token is known, decode from there on.
    ``prompt_tokens`` counts those that were computed, ``reused_tokens`` those before them that a
    session still held.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    generated_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_tps(self) -> float | None:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tps(self) -> float | None:
        """Tokens per second after the first generated one, which belongs to the prefill."""
        if self.generated_tokens < 2 or not self.decode_seconds:
            return None
        return (self.generated_tokens - 1) / self.decode_seconds


class Session:
    """One sequence with what has been computed for it. ``tokens`` are those it holds.

    Streaming tokens that begin with the same ones computes only the rest. Used by one thread.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.state = model.runner.state()
        self.tokens: list[int] = []

    def keep(self, tokens: Sequence[int]) -> int:
        """Forget what does not begin ``tokens``, and at least the last of these; returns how many
        remain."""
        same = 0
        for ours, theirs in zip(self.tokens[: self.state.length], tokens[:-1]):
            if ours != theirs:
                break
            same += 1
        self._model.runner.truncate(self.state, same)
        del self.tokens[self.state.length :]
        return self.state.length

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Append tokens; the logits f32 ``[vocab]`` after the last of them."""
        runner = self._model.runner
        runner.truncate(self.state, self.state.length)
        self.tokens += map(int, tokens)
        # The last token of a generation has not been run yet.
        logits: np.ndarray = runner.run(self.tokens[self.state.length :], self.state, 1)[0]
        return logits

    def reset(self) -> None:
        """Begin again with nothing."""
        self._model.runner.truncate(self.state, 0)
        self.tokens = []


class Generation(Iterator[Chunk]):
    """Chunks as they come. ``stats`` is filled in on the way, ``finish`` at the end."""

    def __init__(
        self, model: Model, tokens: Sequence[int], most: int, sampling: Sampling, session: Session
    ) -> None:
        self.stats = Stats(reused_tokens=session.keep(tokens))
        self.finish: str | None = None
        new = [int(t) for t in tokens[len(session.tokens) :]]
        self.stats.prompt_tokens = len(new)
        self._session = session
        self._ends = model.end_ids
        self._text = model.tokenizer.stream() if model.has_tokenizer else None
        self._most = min(most, model.context_length - len(tokens) + 1)
        session.tokens = [int(t) for t in tokens]
        self._steps = model.runner.generate(new, session.state, sampling, self._most)

    def __next__(self) -> Chunk:
        if self.finish is not None:
            raise StopIteration
        started = time.perf_counter()
        token = next(self._steps)
        took = time.perf_counter() - started
        if self.stats.generated_tokens:
            self.stats.decode_seconds += took
        else:
            self.stats.prefill_seconds = took
        self.stats.generated_tokens += 1
        text = ""
        if token in self._ends:
            self.finish = "stop"
        else:
            text = self._text.add(token) if self._text else ""
            if self.stats.generated_tokens == self._most:
                self.finish = "length"
        self._session.tokens.append(token)
        if self.finish is not None:
            text += self._text.finish() if self._text else ""
            self.close()
        return Chunk(text, token, self.finish)

    def close(self) -> None:
        """Stop generating. What has been generated stays in the session."""
        self._steps.close()


class Model:
    """A model that is ready to run. Close it, or use it in a ``with``.

    ``engine`` is "numpy" (mlxedge's own forward pass) or "mlx" (mlx-lm), ``context_length`` the
    most tokens of a sequence, ``end_ids`` the tokens that end an answer. On engine "numpy" several
    threads may use a model, each with its own session; their passes take turns.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        engine: str,
        threads: int | None,
        context: int | None = None,
    ) -> None:
        self.name = checkpoint.name
        self.config = checkpoint.config
        self.origin = checkpoint.origin
        self.engine = engine
        longest = int(self.config.get("max_position_embeddings") or 2048)
        self.context_length = shape_of(self.config).context if engine == "numpy" else longest
        self._spec = checkpoint.tokenizer
        self._generation_config = checkpoint.generation_config
        self._tokenizer: Tokenizer | None = None
        self.runner: Engine = _ENGINES[engine](checkpoint, self.context_length, threads, context)

    @property
    def threads(self) -> int | None:
        """Processors at work, ``None`` where the engine does not say."""
        return self.runner.threads

    @property
    def has_tokenizer(self) -> bool:
        return self._spec is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError if the checkpoint has none."""
        if self._tokenizer is None:
            if self._spec is None:
                raise TokenizerError(f"{self.origin.path} has no tokenizer: give tokens, not text")
            from mlxedge import tokenizer

            self._tokenizer = tokenizer.load(self._spec, self._generation_config)
        return self._tokenizer

    @property
    def end_ids(self) -> frozenset[int]:
        if self.has_tokenizer:
            return self.tokenizer.end_ids
        ends = self._generation_config.get("eos_token_id", self.config.get("eos_token_id"))
        return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def encode_prompt(self, prompt: str | Sequence[Message], *, raw: bool = False) -> list[int]:
        """The tokens of a prompt.

        Messages go through the chat template. So does text, as one message of the user, unless
        there is no template or ``raw`` is set: then it is continued as it is, after the BOS token
        if the model uses one.
        """
        if not isinstance(prompt, str):
            return self.tokenizer.chat(list(prompt))
        if raw or not self.tokenizer.has_chat_template:
            return self.tokenizer.encode(prompt)
        return self.tokenizer.chat([{"role": "user", "content": prompt}])

    def stream(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        session: Session | None = None,
    ) -> Generation:
        """Continue ``tokens``, a chunk at a time.

        A ``session`` keeps what is computed, so that tokens which extend its own cost only their
        new part. Raises UsageError for an empty prompt, one that does not fit the context, and
        ids that the model has not.
        """
        if max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}: ask for one token at least")
        check_tokens(tokens, int(self.config["vocab_size"]), 0, self.context_length)
        return Generation(
            self, tokens, max_tokens, sampling or Sampling(), session or self.session()
        )

    def generate(self, prompt: str | Sequence[Message], *, raw: bool = False, **kw: Any) -> str:
        """The answer as one text; keywords as for :meth:`stream`."""
        tokens = self.encode_prompt(prompt, raw=raw)
        return "".join(chunk.text for chunk in self.stream(tokens, **kw))

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits after every token of a sequence: f32 ``[len(tokens), vocab]``."""
        return self.runner.run(tokens, self.runner.state(), len(tokens))

    def session(self) -> Session:
        return Session(self)

    def close(self) -> None:
        """Free the model."""
        self.runner.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def load(
    path: str | Path | Checkpoint,
    *,
    backend: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    context: int | None = None,
) -> Model:
    """Load a model for generation.

    ``path`` is whatever ``open_source`` takes, or a checkpoint, which is closed when its weights
    have been read. ``engine`` ("numpy" or "mlx"; ``backend`` means the same) is chosen by itself:
    mlx-lm for folders on Apple silicon, mlxedge's own forward pass for the rest; "llama.cpp" runs
    GGUF files where xllamacpp is installed. ``threads`` is for these two; without it, all
    processors work. ``context`` is how many tokens will be asked for at most, where an engine makes
    room for them at the start (llama.cpp; by default 4096).

    Raises what ``open_source`` does, UnsupportedModelError, BackendError and UsageError.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}: it takes one at least")
    from mlxedge.sources import open_source

    checkpoint = path if isinstance(path, Checkpoint) else open_source(path)
    with checkpoint:
        chosen = _choose(checkpoint, engine or backend)
        if chosen == "numpy":
            # Our forward pass would take any weights with llama's names; mlx-lm knows its own.
            spec, checkpoint = prepare(checkpoint)
            check_weights(spec, checkpoint)
        else:
            checkpoint = text_part(checkpoint)
        return Model(checkpoint, chosen, threads, context)


def _choose(checkpoint: Checkpoint, asked: str | None) -> str:
    if asked is not None:
        if asked not in ENGINES:
            raise UsageError(f"unknown engine {asked!r}: choose from {', '.join(ENGINES)}")
        return asked
    folder = checkpoint.origin.kind in ("hf", "mlx")
    if (
        checkpoint.origin.kind == "hf"
        and checkpoint.config.get("model_type") in known_model_types()
    ):
        folder = spec_for(checkpoint.config).mlx_reads_stored
    return default_backend() if folder else "numpy"


def _numpy(checkpoint: Checkpoint, context: int, threads: int | None, wanted: int | None) -> Engine:
    from mlxedge.engines.numpy_engine import NumpyEngine

    return NumpyEngine(checkpoint, threads)


def _mlx(checkpoint: Checkpoint, context: int, threads: int | None, wanted: int | None) -> Engine:
    from mlxedge.engines.mlx_lm_engine import MlxLmEngine

    return MlxLmEngine(checkpoint, context)


def _llama_cpp(
    checkpoint: Checkpoint, context: int, threads: int | None, wanted: int | None
) -> Engine:
    from mlxedge.engines.llama_cpp_engine import LlamaCppEngine

    return LlamaCppEngine(checkpoint, context, threads, wanted)


_ENGINES = {"numpy": _numpy, "mlx": _mlx, "llama.cpp": _llama_cpp}
ENGINES = tuple(_ENGINES)
