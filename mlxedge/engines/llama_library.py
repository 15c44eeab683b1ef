"""llama.cpp's library, through ctypes on what the ``xllamacpp`` wheel carries.

The parameter structs change between llama.cpp releases. They are taken by value from the library's
own ``*_default_params`` functions, and a field is set only after the defaults around it have been
found where the declarations below place them; otherwise ``BackendError`` says that the layout
moved.
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from mlxedge.errors import BackendError

# Passed and returned by value: a tail longer than any release's struct makes reading and passing
# too much harmless.
_TAIL = ("tail", c.c_uint8 * 512)
_LAYER_SPLIT = 1
F32, F16 = 0, 1
_ERROR = 4


class ModelParams(c.Structure):
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


class ContextParams(c.Structure):
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


class Batch(c.Structure):
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
    "type_k": F16,
    "type_v": F16,
}

_LogCallback = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
#: What llama.cpp complained of since the list was last cleared.
complaints: list[str] = []


@_LogCallback
def _keep_errors(level: int, text: bytes, _user: int) -> None:
    if level == _ERROR:
        complaints.append(text.decode(errors="replace").strip())


INT32S = c.POINTER(c.c_int32)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [_LogCallback, c.c_void_p]),
    "llama_backend_init": (None, []),
    "llama_supports_gpu_offload": (c.c_bool, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, ModelParams]),
    "llama_model_free": (None, [c.c_void_p]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_model_meta_val_str": (c.c_int32, [c.c_void_p, c.c_char_p, c.c_char_p, c.c_size_t]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, ContextParams]),
    "llama_free": (None, [c.c_void_p]),
    "llama_get_memory": (c.c_void_p, [c.c_void_p]),
    "llama_memory_clear": (None, [c.c_void_p, c.c_bool]),
    "llama_memory_seq_rm": (c.c_bool, [c.c_void_p, c.c_int32, c.c_int32, c.c_int32]),
    "llama_decode": (c.c_int32, [c.c_void_p, Batch]),
    "llama_synchronize": (None, [c.c_void_p]),
    "llama_get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_vocab_bos": (c.c_int32, [c.c_void_p]),
    "llama_vocab_eos": (c.c_int32, [c.c_void_p]),
    "llama_vocab_get_add_bos": (c.c_bool, [c.c_void_p]),
    "llama_vocab_get_add_eos": (c.c_bool, [c.c_void_p]),
    "llama_vocab_is_eog": (c.c_bool, [c.c_void_p, c.c_int32]),
    "llama_tokenize": (
        c.c_int32,
        [c.c_void_p, c.c_char_p, c.c_int32, INT32S, c.c_int32, c.c_bool, c.c_bool],
    ),
    "llama_detokenize": (
        c.c_int32,
        [c.c_void_p, INT32S, c.c_int32, c.c_char_p, c.c_int32, c.c_bool, c.c_bool],
    ),
}


def is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


@functools.cache
def library() -> c.CDLL:
    """llama.cpp's library with its functions' signatures set (ggml's symbols are in it too).

    Raises BackendError if xllamacpp is not installed or lays its structs out in another way.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise BackendError("engine llama.cpp needs xllamacpp: pip install 'mlxedge[llama.cpp]'")
    folder = Path(spec.submodule_search_locations[0])
    found = sorted(path for path in folder.glob("xllamacpp*") if path.suffix in (".so", ".pyd"))
    if not found:
        raise BackendError(f"there is no xllamacpp library in {folder.name}: install it again")
    try:
        lib = c.CDLL(str(found[0]))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise BackendError(f"this xllamacpp cannot be used: {error}") from error
    for params, expected in (
        (lib.llama_model_default_params(), _MODEL_DEFAULTS),
        (lib.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        for field, value in expected.items():
            if getattr(params, field) != value:
                raise BackendError(
                    f"{type(params).__name__}.{field} is {getattr(params, field)!r} by default "
                    f"in this xllamacpp, not {value!r}: its layout has changed; install "
                    "xllamacpp 2026.10"
                )
    lib.llama_log_set(_keep_errors, None)
    lib.llama_backend_init()
    return lib


def build() -> str:
    """The wheel's version, whose last number is llama.cpp's build."""
    return f"xllamacpp {importlib.metadata.version('xllamacpp')}"


def decode(lib: c.CDLL, context: Any, tokens: list[int], position: int, *, every: bool) -> int:
    """Append tokens to sequence 0 at a position; returns of how many there are logits: of all, or
    of the last. Raises BackendError with llama.cpp's own words."""
    count = len(tokens)
    sequence = (c.c_int32 * 1)(0)
    wanted = [1] * count if every else [0] * (count - 1) + [1]
    batch = Batch(
        count,
        (c.c_int32 * count)(*tokens),
        None,
        (c.c_int32 * count)(*range(position, position + count)),
        (c.c_int32 * count)(*[1] * count),
        (INT32S * count)(*[c.cast(sequence, INT32S)] * count),
        (c.c_int8 * count)(*wanted),
    )
    complaints.clear()
    status = lib.llama_decode(context, batch)
    if status != 0:
        raise BackendError(f"llama.cpp cannot decode ({status}): {' | '.join(complaints)}")
    return sum(wanted)
