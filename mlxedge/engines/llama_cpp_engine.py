"""llama.cpp: GGUF files in the library that the ``xllamacpp`` wheel carries."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxedge.engines.base import About, check_tokens, sampled
from mlxedge.errors import BackendError, UsageError
from mlxedge.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.sources.checkpoint import Checkpoint

#: llama.cpp's own logical and physical batch.
_BATCH, _MICRO_BATCH = 2048, 512
#: What one context holds unless told otherwise: its cache is there from the start.
_CONTEXT = 4096
_ALL_LAYERS = -1


@dataclass
class LlamaState:
    """The one sequence of the context; a newer one takes its place."""

    number: int
    length: int = 0


class LlamaCppEngine:
    """Implements ``Engine`` for GGUF files. All layers go to a GPU where the wheel has one.

    There is one sequence at a time: asking for a new one ends the last. ``context`` tokens fit.
    Raises BackendError if xllamacpp is not installed or cannot load the file, UsageError for a
    checkpoint that is no GGUF file.
    """

    name = "llama.cpp"

    def __init__(
        self, checkpoint: Checkpoint, context: int, threads: int | None, wanted: int | None = None
    ) -> None:
        from mlxedge.engines.llama_library import complaints, library

        origin = checkpoint.origin
        if origin.kind != "gguf":
            raise UsageError(
                f"engine llama.cpp runs GGUF files, not {origin.path}: convert it first "
                "(mlxedge convert … --to gguf:q4_k_m), or use another engine"
            )
        self._lib = lib = library()
        self._model: Any = None
        self._context: Any = None
        self._vocab = int(checkpoint.config["vocab_size"])
        self._size = min(context, wanted or _CONTEXT)
        self.threads: int | None = threads or _processors()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = _ALL_LAYERS
        complaints.clear()
        path = origin.files[0] if len(origin.files) > 1 else origin.path
        self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise BackendError(f"llama.cpp cannot load {path}: {' | '.join(complaints)}")
        settings = lib.llama_context_default_params()
        settings.n_ctx = self._size
        settings.n_batch = min(_BATCH, self._size)
        settings.n_ubatch = min(_MICRO_BATCH, self._size)
        settings.n_outputs_max_per_seq = 0  # as many as the batch holds
        settings.n_threads = settings.n_threads_batch = self.threads
        self._context = lib.llama_init_from_model(self._model, settings)
        if not self._context:
            problem = " | ".join(complaints)
            self.close()
            raise BackendError(f"llama.cpp makes no context for {path}: {problem}")
        vocab = lib.llama_model_get_vocab(self._model)
        self._rows = int(lib.llama_vocab_n_tokens(vocab))
        self._number = 0

    def state(self) -> LlamaState:
        self._number += 1
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return LlamaState(self._number)

    def truncate(self, state: LlamaState, length: int) -> None:
        self._check(state)
        if length >= state.length:
            return
        memory = self._lib.llama_get_memory(self._context)
        if self._lib.llama_memory_seq_rm(memory, 0, length, -1):
            state.length = length
        else:  # recurrent models and windows that have moved on
            self._lib.llama_memory_clear(memory, True)
            state.length = 0

    def run(self, tokens: Sequence[int], state: LlamaState, results: int) -> np.ndarray:
        import numpy as np

        self._check(state)
        check_tokens(tokens, self._vocab, state.length, self._size)
        first_result = len(tokens) - results
        found = [np.empty((0, self._rows), np.float32)]
        for first in range(0, len(tokens), _BATCH):
            piece = list(tokens[first : first + _BATCH])
            wanted = min(max(first + len(piece) - first_result, 0), len(piece))
            found.append(self._decode(piece, state, wanted))
        return np.concatenate(found)

    def _decode(self, tokens: list[int], state: LlamaState, results: int) -> np.ndarray:
        """Logits of the last ``results`` of one batch."""
        import numpy as np

        from mlxedge.engines.llama_library import decode

        outputs = decode(self._lib, self._context, tokens, state.length, every=results > 1)
        state.length += len(tokens)
        self._lib.llama_synchronize(self._context)
        if not results:
            return np.empty((0, self._rows), np.float32)
        flat = np.ctypeslib.as_array(
            self._lib.llama_get_logits(self._context), shape=(outputs * self._rows,)
        )
        return flat.reshape(outputs, self._rows)[outputs - results :].copy()

    def generate(
        self, tokens: Sequence[int], state: LlamaState, sampling: Sampling, most: int
    ) -> Generator[int, None, None]:
        return sampled(self, tokens, state, sampling, most)

    def about(self) -> About:
        from mlxedge.engines.llama_library import build

        gpu = bool(self._lib.llama_supports_gpu_offload())
        return About("gpu" if gpu else "cpu", build())

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def _check(self, state: LlamaState) -> None:
        if state.number != self._number or self._context is None:
            raise UsageError("engine llama.cpp has one sequence at a time, and this one has ended")


def _processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 4
