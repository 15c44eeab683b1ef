"""Tokenizers: run them, and carry them between Hugging Face's files and GGUF's metadata.

    tokenizer = load(spec)
    ids = tokenizer.chat([{"role": "user", "content": "Hello"}])

The names below are loaded when first used: the library beneath them is not needed to convert
weights.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlxedge.tokenizer.spec import TokenizerSpec

if TYPE_CHECKING:
    from mlxedge.tokenizer.gguf_export import to_gguf
    from mlxedge.tokenizer.gguf_import import from_gguf
    from mlxedge.tokenizer.runtime import Tokenizer, load

_HOME = {
    "Tokenizer": "mlxedge.tokenizer.runtime",
    "from_gguf": "mlxedge.tokenizer.gguf_import",
    "load": "mlxedge.tokenizer.runtime",
    "to_gguf": "mlxedge.tokenizer.gguf_export",
}

__all__ = ["Tokenizer", "TokenizerSpec", "from_gguf", "load", "to_gguf"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
