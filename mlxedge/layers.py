"""A model run one layer at a time, so that no more of it than that is in memory.

    with LayerRunner(checkpoint, ids) as runner:
        for logits in runner.logits(results):
            ...

All sequences go through a layer before the next one is read. Between layers only their hidden
states are kept, in memory or, when they are many, in a file without a name. Every sequence is
computed just as :class:`mlxedge.models.decoder.Decoder` does it, bit for bit, whatever the number
of threads.
"""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxedge.errors import BadWeightsError, DiskFullError, OutputError, UsageError
from mlxedge.models.decoder import CHUNK
from mlxedge.models.graph import POSITIONS, Graph, tables
from mlxedge.models.shape import shape_of
from mlxedge.models.weights import Weights
from mlxedge.ops import load_forward

if TYPE_CHECKING:
    from mlxedge.sources.checkpoint import Checkpoint

#: Called with the names of the weights that share an input, some rows of it (f32 ``[n, width]``,
#: overwritten as soon as the call returns), and which expert of how many sees them: 0 of 1 where
#: there are none.
Watch = Callable[[tuple[str, ...], np.ndarray, int, int], None]
#: Called with steps done, steps in all (the layers of every sequence), and what runs now.
ProgressHook = Callable[[int, int, str], None]

#: Hidden states up to this size stay in memory.
MEMORY_BYTES = 1 << 30
#: Rows of the embedding that are read together: few, where the tokens lie far apart.
_NEAR = 16
_SLAB_BYTES = 8 << 20


class HiddenStates:
    """f32 ``[length, width]`` of each of ``count`` sequences; in a file beyond ``memory_bytes``.

    Raises DiskFullError or OutputError if ``folder`` (by default the system's for temporary files)
    does not take them.
    """

    def __init__(
        self, count: int, length: int, width: int, folder: Path | None, memory_bytes: int
    ) -> None:
        self.count, self._shape = count, (length, width)
        self._bytes = 4 * length * width
        self._array: np.ndarray | None = None
        self._file: Any = None
        if count * self._bytes <= memory_bytes:
            self._array = np.zeros((count, length, width), np.float32)
        else:
            with self._os_errors():
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def read(self, index: int) -> np.ndarray:
        """A copy of one sequence's states."""
        if self._array is not None:
            return self._array[index].copy()
        states = np.empty(self._shape, np.float32)
        self._file.seek(index * self._bytes)
        view = states.data.cast("B")
        while view:
            view = view[self._file.readinto(view) :]
        return states

    def write(self, index: int, states: np.ndarray) -> None:
        if self._array is not None:
            self._array[index] = states
            return
        self._file.seek(index * self._bytes)
        view = np.ascontiguousarray(states, np.float32).data.cast("B")
        with self._os_errors():
            while view:
                view = view[self._file.write(view) :]

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (DiskFullError if full else OutputError)(
                f"{self.count * self._bytes} bytes of hidden states cannot be kept among the "
                f"temporary files: {error.strerror}; use fewer tokens, or set TMPDIR"
            ) from error

    def close(self) -> None:
        self._array = None
        if self._file is not None:
            self._file.close()


class LayerRunner(AbstractContextManager["LayerRunner"]):
    """Runs ``ids`` (int ``[sequences, length]``), each sequence on its own from position 0.

    ``checkpoint`` is a prepared one (``mlxedge.prepare``) and stays open as long as the runner.
    ``threads`` defaults to the processors that this process may use; ``folder`` is where hidden
    states go that ``memory_bytes`` do not hold. ``done`` counts the layers that all sequences have
    been through.

    Raises UsageError for ids beyond the vocabulary and sequences that are empty or exceed the
    context, CorruptFileError for a tensor that is missing or has another shape, and BadWeightsError
    when activations are not finite.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: np.ndarray,
        threads: int | None = None,
        *,
        folder: Path | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.shape = shape = shape_of(checkpoint.config)
        self.checkpoint, self._ops = checkpoint, load_forward()
        self._ids = np.ascontiguousarray(ids, np.int64)
        _check(self._ids, shape.vocab, shape.context)
        self.sequences, self.length = self._ids.shape
        self._weights = Weights(checkpoint, self._ops)
        self._rows = min(CHUNK, shape.context)
        self.done = 0
        self.states = HiddenStates(self.sequences, self.length, shape.stream, folder, memory_bytes)
        self.threads = threads or self._ops.available_threads()
        self._team = self._ops.Team(self.threads)
        self._embedded = False

    def restore(self, done: int, states: Callable[[int], np.ndarray]) -> None:
        """Go on after ``done`` layers, from hidden states f32 ``[length, columns]`` of the stream,
        by sequence."""
        for index in range(self.sequences):
            self.states.write(index, states(index))
        self.done, self._embedded = done, True

    def step(self, watch: Watch | None = None, progress: ProgressHook | None = None) -> None:
        """Take all sequences through the next layer."""
        self._embed(watch)
        graph = Graph(self.shape, self._weights, self._ops, tapped=watch is not None)
        graph.block(self.done)

        def told(index: int) -> None:
            if progress:
                steps = self.done * self.sequences + index
                progress(steps, self.shape.layers * self.sequences, f"layer {self.done}")

        self._advance(graph, watch, told)
        self.done += 1

    def _advance(
        self, graph: Graph, watch: Watch | None, told: Callable[[int], None] = lambda index: None
    ) -> None:
        """Take all sequences through what a graph holds; ``told`` is called before each."""
        runner, cache = graph.runner(self._team, self._rows), graph.cache()
        for index in range(self.sequences):
            told(index)
            states = self.states.read(index)
            for first in range(0, self.length, self._rows):
                runner.advance(states[first : first + self._rows], first, cache, watch)
            if not np.isfinite(states).all():
                raise BadWeightsError(
                    f"{self.checkpoint.origin.path}: the activations of layer {self.done} are "
                    "not finite, so its weights are damaged or out of range"
                )
            self.states.write(index, states)

    def run(self, watch: Watch | None = None, progress: ProgressHook | None = None) -> None:
        """Take all sequences through the layers that are left."""
        self._embed()
        while self.done < self.shape.layers:
            self.step(watch, progress)
        if progress:
            progress(self.done * self.sequences, self.done * self.sequences, "")

    def logits(
        self, results: int, *, most: int | None = None, progress: ProgressHook | None = None
    ) -> Iterator[np.ndarray]:
        """Logits of the last ``results`` positions of each sequence, after the last layer.

        One array f32 ``[results, vocab]`` a sequence, in order; with ``most`` (two at least)
        several of up to that many positions, so that a large vocabulary needs no large buffer. The
        head is held in memory meanwhile.
        """
        if not 0 < results <= self.length:
            raise UsageError(f"{results} results of {self.length} positions")
        self.run(progress=progress)
        graph = Graph(self.shape, self._weights, self._ops)
        result = graph.head()
        pieces = self._pieces(self.length - results, most or self._rows)
        runner = graph.runner(self._team, max(stop - first for first, stop in pieces), result)
        for index in range(self.sequences):
            states = self.states.read(index)
            found = (runner.project(states[first:stop]) for first, stop in pieces)
            if most is not None:
                yield from found
            else:
                yield next(found) if len(pieces) == 1 else np.concatenate(list(found))

    def _pieces(self, first: int, most: int) -> list[tuple[int, int]]:
        """The positions from ``first`` on, cut where a pass over the whole model would be, and
        there evenly: one position alone is summed in another order than several."""
        pieces: list[tuple[int, int]] = []
        while first < self.length:
            stop = min(first // self._rows * self._rows + self._rows, self.length)
            cuts = np.linspace(first, stop, -(-(stop - first) // most) + 1).astype(int).tolist()
            pieces += pairwise(cuts)
            first = stop
        return pieces

    def watch_head(self, watch: Watch) -> None:
        """Show the input of the head, of all positions, after the last layer."""
        self.run()
        graph = Graph(self.shape, self._weights, self._ops, tapped=True)
        graph.final_norm()
        runner = graph.runner(self._team, self._rows)
        for index in range(self.sequences):
            states = self.states.read(index)
            for first in range(0, self.length, self._rows):
                runner.project(states[first : first + self._rows], watch)

    def close(self) -> None:
        """End the threads and free the hidden states."""
        self._team.close()
        self.states.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _embed(self, watch: Watch | None = None) -> None:
        """The rows of the tokens, and what the first layer sees of them."""
        if self._embedded:
            return
        used = np.unique(self._ids)
        kinds = [
            (columns, self._rows_of(name, columns, used, factor))
            for name, columns, factor in tables(self.shape)
        ]
        positions: np.ndarray | float = 0.0
        if POSITIONS in self._weights:
            hidden = self.shape.hidden
            tensor = self._weights.tensor(POSITIONS, (self.shape.context, hidden))
            parts = tensor.read_rows(0, self.length)
            positions = self._ops.Matrix(parts, tensor.encoding, self.length, hidden).decode()
        for index, tokens in enumerate(self._ids):
            places = np.searchsorted(used, tokens)
            states = np.zeros((self.length, self.shape.stream), np.float32)
            for columns, rows in kinds:
                start, width = self.shape.columns[columns]
                states[:, start : start + width] = rows[places]
            states[:, : self.shape.hidden] += positions
            self.states.write(index, states)
        graph = Graph(self.shape, self._weights, self._ops, tapped=watch is not None)
        graph.prelude()
        if graph.tape.length:
            self._advance(graph, watch)
        self._embedded = True

    def _rows_of(self, name: str, columns: str, used: np.ndarray, factor: float) -> np.ndarray:
        """Rows ``used`` of a table, read where they stand: it is never held."""
        _, width = self.shape.columns[columns]
        rows = self._weights.tensor(name).rows if columns != "x" else self.shape.vocab
        tensor = self._weights.tensor(name, (rows, width))
        own = np.where(used < tensor.rows, used, 0)  # as the step "embed" does
        used, places = np.unique(own, return_inverse=True)
        slab = max(1, _SLAB_BYTES // max(1, tensor.nbytes // tensor.rows))
        # A group ends where the next token is far, or where the slab is full.
        cuts = [0]
        for i in range(1, len(used)):
            if used[i] - used[i - 1] > _NEAR or used[i] - used[cuts[-1]] >= slab:
                cuts.append(i)
        found = np.empty((len(used), width), np.float32)
        for start, stop in zip(cuts, [*cuts[1:], len(used)], strict=True):
            first, last = int(used[start]), int(used[stop - 1]) + 1
            parts = tensor.read_rows(first, last)
            matrix = self._ops.Matrix(parts, tensor.encoding, last - first, width)
            found[start:stop] = matrix.decode()[used[start:stop] - first]
        found *= np.float32(factor)
        return found[places]


def _check(ids: np.ndarray, vocab: int, context: int) -> None:
    if ids.ndim != 2 or not ids.size:
        raise UsageError(f"ids are {list(ids.shape)}: they must be [sequences, length], not empty")
    if ids.shape[1] > context:
        raise UsageError(f"{ids.shape[1]} tokens do not fit the model's context of {context}")
    if ids.min() < 0 or ids.max() >= vocab:
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise UsageError(f"token {wrong} is not in the model's vocabulary of {vocab}")
