"""The peak of this process's resident memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_CLEAR, _PEAK = "5", re.compile(r"^VmHWM:\s*(\d+) kB", re.MULTILINE)


class PeakMemory:
    """``read()`` gives the peak in bytes since this object was made.

    Linux can start the count anew (``/proc/self/clear_refs``). Elsewhere the peak is that of the
    whole life of the process, so ``read`` gives ``None`` when that peak was reached before; on
    Windows it always does.
    """

    def __init__(self) -> None:
        self._before = _life_peak() if not _restart() else 0

    def read(self) -> int | None:
        if self._before == 0:
            return _linux_peak()
        peak = _life_peak()
        return (
            peak if peak is not None and self._before is not None and peak > self._before else None
        )


def _restart() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(_CLEAR)
    except OSError:
        return False
    return _linux_peak() is not None


def _linux_peak() -> int | None:
    try:
        match = _PEAK.search(Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _life_peak() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
