"""llama.cpp itself, through ctypes on the library inside the ``xllamacpp`` wheel.

    with LlamaCpp(path, vocab_only=True) as llama:
        llama.tokenize("Hello")

The parameter structs change between llama.cpp releases. They are taken by value from the library's
own ``*_default_params`` functions, and a field is set only after the defaults around it have been
found where the declarations below place them; otherwise ``OSError`` says that the layout moved.
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

# Passed and returned by value: a tail longer than any release's struct makes reading and passing
# too much harmless.
_TAIL = ("tail", c.c_uint8 * 512)
_LAYER_SPLIT, _F32, _F16, _ERROR = 1, 0, 1, 4


class _ModelParams(c.Structure):
    _fields_ = (
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int32),
        ("load_mode", c.c_int32),
        ("lazy_mode", c.c_int32),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("load_mtp", c.c_bool),
        _TAIL,
    )


class _ContextParams(c.Structure):
    _fields_ = (
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int32),
        ("rope_scaling_type", c.c_int32),
        ("pooling_type", c.c_int32),
        ("attention_type", c.c_int32),
        ("flash_attn_type", c.c_int32),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        _TAIL,
    )


class _Batch(c.Structure):
    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


#: Defaults that stand at their place only while the layout is the one declared above.
_MODEL_DEFAULTS = {
    "n_gpu_layers": -1,
    "split_mode": _LAYER_SPLIT,
    "load_mode": -1,
    "main_gpu": 0,
    "kv_overrides": None,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "flash_attn_type": -1,
    "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0,
    "type_k": _F16,
    "type_v": _F16,
}

_LogCallback = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_log: list[str] = []


@_LogCallback
def _keep_errors(level: int, text: bytes, _user: int) -> None:
    if level == _ERROR:
        _log.append(text.decode(errors="replace").strip())


_INT32S = c.POINTER(c.c_int32)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [_LogCallback, c.c_void_p]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, _ModelParams]),
    "llama_model_free": (None, [c.c_void_p]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_model_meta_val_str": (c.c_int32, [c.c_void_p, c.c_char_p, c.c_char_p, c.c_size_t]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, _ContextParams]),
    "llama_free": (None, [c.c_void_p]),
    "llama_get_memory": (c.c_void_p, [c.c_void_p]),
    "llama_memory_clear": (None, [c.c_void_p, c.c_bool]),
    "llama_decode": (c.c_int32, [c.c_void_p, _Batch]),
    "llama_get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_vocab_bos": (c.c_int32, [c.c_void_p]),
    "llama_vocab_eos": (c.c_int32, [c.c_void_p]),
    "llama_vocab_get_add_bos": (c.c_bool, [c.c_void_p]),
    "llama_vocab_get_add_eos": (c.c_bool, [c.c_void_p]),
    "llama_vocab_is_eog": (c.c_bool, [c.c_void_p, c.c_int32]),
    "llama_tokenize": (
        c.c_int32,
        [c.c_void_p, c.c_char_p, c.c_int32, _INT32S, c.c_int32, c.c_bool, c.c_bool],
    ),
    "llama_detokenize": (
        c.c_int32,
        [c.c_void_p, _INT32S, c.c_int32, c.c_char_p, c.c_int32, c.c_bool, c.c_bool],
    ),
}


@functools.cache
def library() -> c.CDLL:
    """llama.cpp's library with its functions' signatures set (ggml's symbols are in it too).

    Raises ``OSError`` if xllamacpp is not installed or lays its structs out in another way.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise OSError("xllamacpp is not installed: pip install 'mlxedge[test]'")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))
    if not found:
        raise OSError(f"no xllamacpp*.so in {spec.submodule_search_locations[0]}")
    lib = c.CDLL(str(found[0]))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    for params, expected in (
        (lib.llama_model_default_params(), _MODEL_DEFAULTS),
        (lib.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        for field, value in expected.items():
            if getattr(params, field) != value:
                raise OSError(
                    f"{type(params).__name__[1:]}.{field} is {getattr(params, field)!r} by default "
                    f"in this xllamacpp, not {value!r}: its layout has changed"
                )
    lib.llama_log_set(_keep_errors, None)
    lib.llama_backend_init()
    return lib


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
        _log.clear()
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise OSError(f"llama.cpp does not load {path}: {' | '.join(_log)}")
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
        settings.type_k = settings.type_v = {"f16": _F16, "f32": _F32}[cache]
        if cache == "f32":
            settings.flash_attn_type = 0
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if not self._context:
            problem = " | ".join(_log)
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
        count = len(tokens)
        if not 0 < count <= self.context - position:
            raise ValueError(f"{position} + {count} tokens do not fit a context of {self.context}")
        sequence = (c.c_int32 * 1)(0)
        wanted = [1] * count if every else [0] * (count - 1) + [1]
        batch = _Batch(
            count,
            (c.c_int32 * count)(*tokens),
            None,
            (c.c_int32 * count)(*range(position, position + count)),
            (c.c_int32 * count)(*[1] * count),
            (_INT32S * count)(*[c.cast(sequence, _INT32S)] * count),
            (c.c_int8 * count)(*wanted),
        )
        _log.clear()
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answered {status}: {' | '.join(_log)}")
        outputs = sum(wanted)
        flat = np.ctypeslib.as_array(
            self._lib.llama_get_logits(self._context), shape=(outputs * self.n_vocab,)
        )
        return flat.reshape(outputs, self.n_vocab).copy()
