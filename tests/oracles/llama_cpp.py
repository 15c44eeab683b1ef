"""llama.cpp itself, through ctypes on the library inside the ``xllamacpp`` wheel.

with LlamaCpp(path, vocab_only=True) as llama:
    llama.tokenize("Hello")
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from mlxedge.engines.llama_library import F16, F32, complaints, decode, library


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU.

    ``context`` is the most tokens that one call may hold; ``cache`` is the type of the key-value
    cache ("f16", llama.cpp's default, or "f32" to take its rounding out of a comparison, and that
    of flash attention, which rounds to f16 whatever the cache is).
    Raises ``OSError`` with llama.cpp's own words if the file does not load.
    """

    def __init__(
        self,
        path: str | Path,
        vocab_only: bool = False,
        threads: int = 1,
        context: int = 512,
        cache: str = "f16",
    ) -> None:
        self._lib = library()
        self._context = None
        self.context = context
        params = self._lib.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = 0
        complaints.clear()
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise OSError(f"llama.cpp does not load {path}: {' | '.join(complaints)}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.bos: int = self._lib.llama_vocab_bos(self._vocab)
        self.eos: int = self._lib.llama_vocab_eos(self._vocab)
        self.add_bos: bool = self._lib.llama_vocab_get_add_bos(self._vocab)
        self.add_eos: bool = self._lib.llama_vocab_get_add_eos(self._vocab)
        if vocab_only:
            return
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_ubatch = min(context, 512)
        settings.n_outputs_max_per_seq = 0  # as many as the batch holds
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = {"f16": F16, "f32": F32}[cache]
        if cache == "f32":
            settings.flash_attn_type = 0
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if not self._context:
            problem = " | ".join(complaints)
            self.close()
            raise OSError(f"llama.cpp makes no context for {path}: {problem}")

    def close(self) -> None:
        """Free the model; calling it again does nothing."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def metadata(self, key: str) -> str | None:
        """A scalar of the file's metadata as text, or ``None``."""
        room = 1024
        while True:
            buffer = c.create_string_buffer(room)
            length = self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, room)
            if length < 0:
                return None
            if length < room:
                return buffer.raw[:length].decode()
            room = length + 1

    def is_end(self, token: int) -> bool:
        """Whether llama.cpp stops generating at this token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def tokenize(
        self, text: str | bytes, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """The ids of a text (str, or UTF-8 bytes that may be invalid)."""
        raw = text.encode() if isinstance(text, str) else text
        room = len(raw) + 16
        while True:
            ids = (c.c_int32 * room)()
            count = self._lib.llama_tokenize(
                self._vocab, raw, len(raw), ids, room, add_special, parse_special
            )
            if count >= 0:
                return list(ids[:count])
            room = -count

    def detokenize(self, ids: Sequence[int], skip_special: bool = False) -> bytes:
        """The text of ids, as bytes: it may end within a character."""
        given = (c.c_int32 * max(len(ids), 1))(*ids)
        room = 16 * len(ids) + 64
        while True:
            buffer = c.create_string_buffer(room)
            count = self._lib.llama_detokenize(
                self._vocab, given, len(ids), buffer, room, skip_special, not skip_special
            )
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits after every token of a fresh sequence: f32 [len(tokens), n_vocab]."""
        self._restart()
        return self._decode(tokens, 0, every=True)

    def greedy(self, tokens: Sequence[int], n: int, stop: bool = False) -> list[int]:
        """The n most likely next tokens (the lowest id among equals), prompt excluded.

        With ``stop``, generation ends after the first end-of-generation token.
        """
        self._restart()
        found: list[int] = []
        fed, position = list(tokens), 0
        while len(found) < n:
            best = int(self._decode(fed, position, every=False)[-1].argmax())
            position += len(fed)
            found.append(best)
            fed = [best]
            if stop and self.is_end(best):
                break
        return found

    def _restart(self) -> None:
        if self._context is None:
            raise ValueError("this model was loaded with vocab_only, or is closed")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, tokens: Sequence[int], position: int, every: bool) -> np.ndarray:
        """Append tokens at a position; logits f32 [outputs, n_vocab] of all or the last of them."""
        if not 0 < len(tokens) <= self.context - position:
            raise ValueError(
                f"{position} + {len(tokens)} tokens do not fit a context of {self.context}"
            )
        outputs = decode(self._lib, self._context, list(tokens), position, every=every)
        flat = np.ctypeslib.as_array(
            self._lib.llama_get_logits(self._context), shape=(outputs * self.n_vocab,)
        )
        return flat.reshape(outputs, self.n_vocab).copy()
