"""Walking a tape: passes over some positions of a sequence, with a cache of those before."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from mlxedge.fallback import attention
from mlxedge.fallback import frame as fr
from mlxedge.fallback.experts import Choice, ExpertProduct
from mlxedge.fallback.lanes import LANES
from mlxedge.fallback.linear import Matrix
from mlxedge.fallback.tape import (
    Arrays,
    Buffer,
    KeyValues,
    Product,
    Segment,
    State,
    Tape,
    Watch,
    aligned,
)
from mlxedge.fallback.team import Team, available_threads

__all__ = [
    "Buffer",
    "Cache",
    "Choice",
    "ExpertProduct",
    "Matrix",
    "Product",
    "Runner",
    "Tape",
    "Team",
    "Watch",
    "available_threads",
]


class Cache:
    """What the slots of a tape hold of one sequence: keys and values of the positions so far, which
    grow as positions come (see attention's layout), and the states of recurrent layers."""

    def __init__(self, tape: Tape, limit: int) -> None:
        self.capacity, self.limit = 0, limit
        self._slots = tape.slots
        self._arrays: list[list[np.ndarray]] = [[] for _ in tape.slots]
        self.addresses = np.zeros((len(tape.slots), 2), np.int64)
        for number, slot in enumerate(tape.slots):
            if isinstance(slot, State):
                self._hold(number, [aligned((slot.cells,))])

    def _hold(self, number: int, arrays: list[np.ndarray]) -> None:
        self._arrays[number] = arrays
        self.addresses[number, : len(arrays)] = [a.ctypes.data for a in arrays]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for pair in self._arrays for a in pair)

    def reserve(self, positions: int) -> None:
        """Make room for ``positions`` in all; by half as much again at least, up to ``limit``."""
        if positions <= self.capacity:
            return
        wanted = max(positions, min(self.capacity * 3 // 2, self.limit))
        capacity = -(-wanted // _GROWTH) * _GROWTH
        old = self.capacity
        for number, slot in enumerate(self._slots):
            if not isinstance(slot, KeyValues):
                continue
            padded = -(-slot.value_dim // LANES) * LANES
            keys = aligned((slot.heads, capacity // LANES, slot.key_dim, LANES))
            values = aligned((slot.heads, capacity, padded))
            if old:
                keys[:, : old // LANES] = self._arrays[number][0]
                values[:, :old] = self._arrays[number][1]
            self._hold(number, [keys, values])
        self.capacity = capacity


#: Positions by which a cache grows at least.
_GROWTH = 4 * attention.SPAN


class Runner:
    """Walks a tape. Safe to call from several threads, one pass at a time.

    ``ropes`` are the rotary embeddings that attention names by number: frequencies f64 ``[pairs]``
    (radians per position) and an amplitude (of cosine and sine). ``rows`` is the most positions of
    one pass, ``result`` the buffer of results, ``None`` for a tape that ends with hidden states.
    """

    def __init__(
        self, tape: Tape, team: Team, hidden: Buffer, result: Buffer | None,
        ropes: Sequence[tuple[np.ndarray, float]], rows: int,
    ) -> None:  # fmt: skip
        self.tape, self.team, self.rows = tape, team, rows
        self._hidden, self._result = hidden, result
        self._body, self._tail = tape.segments()
        self._ropes, self._rotated = ropes, 0
        self._tables: list[np.ndarray] = []
        self._table_addresses = np.zeros((max(1, len(ropes)), 2), np.int64)
        self._scratch = np.zeros(0, np.uint8)
        self._lock = threading.Lock()
        self._columns = [b for b in tape.buffers if b.within is not None]
        # A tile reads whole rows of positions and of heads beyond the last.
        self._memory = {
            b.number: aligned((rows * b.slots + _PADDING, b.stored))
            for b in tape.buffers
            if b != result and b.within is None
        } | {c.number: np.zeros(c.cells(rows), np.int64) for c in tape.choices}

    def run(self, tokens: np.ndarray, start: int, cache: Cache, results: int) -> np.ndarray:
        """One pass over ``tokens`` (int64 ``[n]``, 0 < n <= ``rows``) at positions ``start``….

        Returns the results of the last ``results`` positions (at most n): f32 ``[results, width]``.
        """
        n = len(tokens)
        out = self._results(results)
        with self._lock:
            frame = self._frame(n, start, tokens, cache)
            arrays = self._with(out)
            self._walk(self._body, frame, arrays, tokens)
            if results:
                hidden = arrays[self._hidden.number][n - results :]
                frame[fr.N // 8] = results
                self._walk(self._tail, frame, arrays | {self._hidden.number: hidden}, tokens)
        return out[:results]

    def advance(
        self, hidden: np.ndarray, start: int, cache: Cache, watch: Watch | None = None
    ) -> None:
        """One pass over ``hidden`` states (f32 ``[n, width]``, 0 < n <= ``rows``), which are
        replaced by what the steps before the tape's head make of them."""
        with self._lock:
            frame = self._frame(len(hidden), start, _NO_TOKENS, cache)
            own = self._memory[self._hidden.number][: len(hidden), : self._hidden.width]
            own[:] = hidden
            self._walk(self._body, frame, self._memory, _NO_TOKENS, watch)
            hidden[:] = own

    def project(self, hidden: np.ndarray, watch: Watch | None = None) -> np.ndarray:
        """The results that the steps after the tape's head make of ``hidden`` states (f32
        ``[n, width]``, 0 < n <= ``rows``): f32 ``[n, width of the results]``."""
        n = len(hidden)
        out = self._results(n)
        with self._lock:
            frame = self._frame(n, 0, _NO_TOKENS, None)
            arrays = self._with(out)
            arrays[self._hidden.number][:n, : self._hidden.width] = hidden
            self._walk(self._tail, frame, arrays, _NO_TOKENS, watch)
        return out[:n]

    def _results(self, count: int) -> np.ndarray:
        width = 0 if self._result is None else self._result.width
        return np.empty((count + _PADDING if count else 0, width), np.float32)

    def _with(self, out: np.ndarray) -> Arrays:
        return self._memory if self._result is None else self._memory | {self._result.number: out}

    def _frame(self, n: int, start: int, tokens: np.ndarray, cache: Cache | None) -> np.ndarray:
        capacity = addresses = 0
        if cache is not None:
            cache.reserve(start + n)
            capacity, addresses = cache.capacity, cache.addresses.ctypes.data
        self._prepare(capacity)
        frame = np.zeros(self._result_offset(self.tape.places) // 8, np.int64)
        for field, value in (
            (fr.N, n), (fr.START, start), (fr.TOKENS, tokens.ctypes.data),
            (fr.KV, addresses), (fr.CAPACITY, capacity),
            (fr.ROPES, self._table_addresses.ctypes.data),
            (fr.SCRATCH, self._scratch.ctypes.data + -self._scratch.ctypes.data % 64),
            (fr.SCRATCH_BYTES, (self._scratch.nbytes - 64) // self.team.threads),
        ):  # fmt: skip
            frame[field // 8] = value
        return frame

    @staticmethod
    def _result_offset(number: int) -> int:
        return fr.BUFFERS + 8 * fr.BUFFER_FIELDS * number

    def _place(self, frame: np.ndarray, arrays: Arrays) -> None:
        for number, array in arrays.items():
            at_field = self._result_offset(number) // 8
            frame[at_field : at_field + 2] = array.ctypes.data, array.strides[0]

    def _prepare(self, capacity: int) -> None:
        if self._rotated < capacity:
            self._rotated = capacity
            self._tables = [_rotations(*rope, capacity) for rope in self._ropes]
            for row, table in zip(self._table_addresses, self._tables, strict=False):
                row[:] = table[0].ctypes.data, table[1].ctypes.data
        each = -(-self.tape.scratch_bytes(capacity) // 64) * 64
        if self._scratch.nbytes < each * self.team.threads + 64:
            self._scratch = np.zeros(each * self.team.threads + 64, np.uint8)

    def _walk(
        self, segments: list[Segment], frame: np.ndarray, arrays: Arrays,
        tokens: np.ndarray, watch: Watch | None = None,
    ) -> None:  # fmt: skip
        n = int(frame[fr.N // 8])
        arrays = arrays | {
            b.number: arrays[b.within][:, b.start : b.start + b.stored]
            for b in self._columns
            if b.within is not None
        }
        self._place(frame, arrays)
        for segment in segments:
            if len(segment.steps):
                self.team.walk(segment.steps, frame, self.tape.length)
            for hosted in segment.hosted:
                hosted.run(arrays, tokens, n, watch)


def _rotations(frequencies: np.ndarray, amplitude: float, positions: int) -> np.ndarray:
    """Cosines and sines: f32 ``[2, positions, pairs]``."""
    angles = np.outer(np.arange(positions), frequencies)
    return (np.stack([np.cos(angles), np.sin(angles)]) * amplitude).astype(np.float32)


_NO_TOKENS = np.zeros(0, np.int64)
#: Rows that a tile may read beyond the last position.
_PADDING = 4
