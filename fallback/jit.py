"""How the inner loops are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any]) -> Any:
    """Compile ``function`` on first call: strict IEEE arithmetic, no GIL, kept on disk.

    Machine code is cached beside the module or in the user's cache folder. Where neither can be
    written (a read-only container), numba refuses to cache; the kernel is then compiled anew by
    every process.
    """
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        return njit(nogil=True, error_model="numpy")(function)
