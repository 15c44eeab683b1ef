"""Threads that walk a list of compiled steps together.

Every thread runs the same loop (:func:`_walk`) without the GIL: call the step's function, wait
until all threads have, go on. A step's function shares out its work itself. The loop is compiled
once; the steps are addresses.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from queue import SimpleQueue
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from mlxedge.errors import UsageError
from mlxedge.fallback.frame import BARRIER, STEP_BYTES, TEAM_FIELDS, THREADS, YIELD
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.memory import ADDRESS, I64, NOTHING, VOID, get_i64, op

_SPINS = 2000


@op(types.int64, ADDRESS, types.int64)
def fetch_add(b: Any, p: Any, value: Any) -> Any:
    """Add to an i64 atomically; gives what it was."""
    return b.atomic_rmw("add", b.inttoptr(p, I64.as_pointer()), value, "acq_rel")


@op(types.int64, ADDRESS)
def get_atomic(b: Any, p: Any) -> Any:
    return b.load_atomic(b.inttoptr(p, I64.as_pointer()), "acquire", 8)


def _make_call(arguments: int) -> Any:
    @op(NOTHING, ADDRESS, *[types.int64] * arguments)
    def call(b: Any, function: Any, *values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * arguments)
        b.call(b.inttoptr(function, kind.as_pointer()), values)
        return VOID

    return call


#: Call a C function of n int64 arguments by its address.
call_0, call_3, call_6 = _make_call(0), _make_call(3), _make_call(6)


@kernel
def _walk(steps: int, count: int, frame: int, thread: int) -> None:
    threads, barrier = get_i64(frame + THREADS), get_i64(frame + BARRIER)
    for i in range(count):
        step = steps + i * STEP_BYTES
        call_3(get_i64(step), step, frame, thread)
        if threads > 1:
            fetch_add(barrier, 1)
            spins = 0
            while get_atomic(barrier) < threads * (i + 1):
                spins += 1
                if spins > _SPINS:
                    call_0(get_i64(frame + YIELD))


def _yield_address() -> int:
    if sys.platform == "win32":
        function = ctypes.WinDLL("kernel32").SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def available_threads() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Team:
    """``threads`` threads, the caller's among them. One walk at a time; none after ``close``."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._lock = threading.Lock()
        self._yield = _yield_address()
        self._jobs: list[SimpleQueue[Any]] = []
        for number in range(1, threads):
            jobs: SimpleQueue[Any] = SimpleQueue()
            self._jobs.append(jobs)
            threading.Thread(
                target=_serve, args=(jobs, number), name=f"mlxedge-{number}", daemon=True
            ).start()
        # The threads hold their queues only, so that a forgotten team ends too.
        self._end = weakref.finalize(self, _dismiss, self._jobs)

    def walk(self, steps: np.ndarray, frame: np.ndarray, counters: int) -> None:
        """Run ``steps`` (int64 ``[count, STEP_FIELDS]``) on ``frame`` (int64).

        The team's fields of the frame are filled in here; steps are numbered below ``counters``.
        """
        count = len(steps)
        with self._lock:
            if not self._end.alive:
                raise UsageError("the model is closed")
            counts = np.zeros(counters + 8, np.int64)
            frame[:TEAM_FIELDS] = (
                self.threads,
                counts.ctypes.data,
                counts.ctypes.data + 64,
                self._yield,
            )
            job = (steps.ctypes.data, count, frame.ctypes.data)
            for jobs in self._jobs:
                # The arrays go along: a thread may return after the caller has.
                jobs.put((job, (steps, frame, counts)))
            _walk(*job, 0)

    def close(self) -> None:
        """End the threads."""
        with self._lock:
            self._end()


def _dismiss(queues: list[SimpleQueue[Any]]) -> None:
    for jobs in queues:
        jobs.put(None)


def _serve(jobs: SimpleQueue[Any], number: int) -> None:
    while (item := jobs.get()) is not None:
        job, _kept = item
        _walk(*job, number)
        del item, job, _kept
