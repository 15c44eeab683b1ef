"""mlxedge: take a Hugging Face model to checked MLX and GGUF files, run them, measure them.

The names below are loaded when first used, so that ``import mlxedge`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlxedge.version import VERSION as __version__

if TYPE_CHECKING:
    from mlxedge.conversion import convert
    from mlxedge.errors import MlxedgeError
    from mlxedge.generate import Model, load
    from mlxedge.sampling import Sampling
    from mlxedge.sources import fetch, open_source

_HOME = {
    "MlxedgeError": "mlxedge.errors",
    "Model": "mlxedge.generate",
    "Sampling": "mlxedge.sampling",
    "convert": "mlxedge.conversion",
    "fetch": "mlxedge.sources",
    "load": "mlxedge.generate",
    "open_source": "mlxedge.sources",
}

__all__ = [
    "MlxedgeError",
    "Model",
    "Sampling",
    "__version__",
    "convert",
    "fetch",
    "load",
    "open_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
