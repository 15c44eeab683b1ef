"""Hidden states after some layers of a model, in files ``states-K.bin``, so that a run can go on.

f32 ``[sequences, length, columns of the stream]``, little-endian, K the layers that they have been
through.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Set
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlxedge.models.graph import prelude_groups

if TYPE_CHECKING:
    from mlxedge.layers import LayerRunner

#: Seconds of work that may be lost: a model that takes less is run again.
EVERY_SECONDS = 15.0
#: How many files stay: the tensors of the last layer may not be written yet.
_KEPT = 2


def states_files(folder: Path, nbytes: int) -> dict[int, Path]:
    """Files of ``nbytes``, by the layers that they have been through, the last first."""
    found = {int(p.stem.rpartition("-")[2]): p for p in folder.glob("states-*.bin")}
    whole = {done: path for done, path in found.items() if path.stat().st_size == nbytes}
    return dict(sorted(whole.items(), reverse=True))


def states_bytes(runner: LayerRunner) -> int:
    return 4 * runner.sequences * runner.length * runner.shape.stream


def write_states(folder: Path, runner: LayerRunner, keep: int = 1) -> None:
    """Of a runner between two layers. The last ``keep`` files stay, once this one is on disk."""
    path = folder / f"states-{runner.done}.bin"
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        for index in range(runner.sequences):
            file.write(runner.states.read(index).astype("<f4", copy=False).data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    for old in list(states_files(folder, states_bytes(runner)).values())[keep:]:
        old.unlink()


def restore_states(folder: Path, runner: LayerRunner, done: int) -> None:
    """Let a runner go on after ``done`` layers."""
    shape = runner.length, runner.shape.stream
    with (folder / f"states-{done}.bin").open("rb") as file:

        def states(index: int) -> np.ndarray:
            values = np.fromfile(file, "<f4", shape[0] * shape[1])
            return values.reshape(shape).astype(np.float32, copy=False)

        runner.restore(done, states)


class KeptStates:
    """Those of a run that encodes on the way, in ``folder``.

    ``wanted`` are the tensors that are still to be encoded, and ``sync`` puts on disk what is
    written of the others. Where states cannot be kept, a run that is interrupted starts anew.
    """

    def __init__(self, folder: Path, wanted: Set[str], sync: Callable[[], None]) -> None:
        self._folder, self._wanted, self._sync = folder, wanted, sync
        self._last = time.monotonic()

    def restore(self, runner: LayerRunner) -> None:
        """Go on as late as the tensors that are wanted allow."""
        first = self._first(runner)
        for done in states_files(self._folder, states_bytes(runner)):
            if done <= first:
                restore_states(self._folder, runner, done)
                return

    def keep(self, runner: LayerRunner) -> None:
        """Between two layers."""
        if runner.done == 0 or time.monotonic() - self._last < EVERY_SECONDS:
            return
        self._sync()
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            write_states(self._folder, runner, _KEPT)
        self._last = time.monotonic()

    def _first(self, runner: LayerRunner) -> int:
        """The first layer that has something to encode; the number of layers for the head."""
        layers = (re.search(r"\.layers\.(\d+)\.", name) for name in self._wanted)
        numbers = [int(found[1]) for found in layers if found]
        if any(self._wanted & {*group} for group in prelude_groups(runner.shape)):
            numbers.append(0)
        return min(numbers, default=runner.shape.layers)
