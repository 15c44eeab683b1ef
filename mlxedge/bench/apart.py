"""Measures in a process of its own, so that memory, caches and threads of one measurement do not
touch the next, and what loads is loaded anew.

The child is ``python -m mlxedge.bench.apart``: it gets a job as JSON on stdin, and says on stdout,
a line of JSON each, how far it is and what it found.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mlxedge import errors
from mlxedge.bench.measure import Measurement, ProgressHook, Run, Settings, Test, measure
from mlxedge.bench.sensors import Conditions

#: Begins the lines that are ours: what an engine prints has none.
_MARK = "\x1emlxedge "


@dataclass(frozen=True)
class Job:
    """What to measure: a local path."""

    source: str
    engine: str
    threads: int | None
    settings: Settings


def measure_apart(job: Job, progress: ProgressHook | None = None) -> Measurement:
    """:func:`~mlxedge.bench.measure.measure` in a new process; raises what it raises there, and
    BackendError if it dies."""
    # A pipe that nobody reads would stop a child that has much to complain of.
    with tempfile.TemporaryFile() as complaints:
        found, status = _watch(job, progress, complaints)
        complaints.seek(0)
        lines = complaints.read().decode("utf-8", "replace").splitlines()
    if found is None:
        said = [line for line in lines if line.strip()][-1:]
        raise errors.BackendError(
            f"engine {job.engine} ended with status {status} while it was measured"
            + (f": {said[0][:300]}" if said else "")
        )
    return found


def _watch(
    job: Job, progress: ProgressHook | None, complaints: IO[bytes]
) -> tuple[Measurement | None, int]:
    """What the child found, if it did, and its status."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "mlxedge.bench.apart"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it died; its status tells
            child.stdin.write(json.dumps(asdict(job)))
            child.stdin.close()
        found: Measurement | None = None
        for line in child.stdout:
            if not line.startswith(_MARK):
                continue
            said = json.loads(line.removeprefix(_MARK))
            if "progress" in said and progress is not None:
                progress(*said["progress"])
            elif "error" in said:
                raise _error(said["error"])
            elif "found" in said:
                found = _measurement(said["found"])
        status = child.wait()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        child.stdout.close()
    return found, status


def _error(said: dict[str, str]) -> errors.MlxedgeError:
    kind = getattr(errors, said["kind"], errors.BackendError)
    # Of the message alone, whatever its own constructor takes.
    made: errors.MlxedgeError = kind.__new__(kind, said["message"])
    Exception.__init__(made, said["message"])
    return made


def _measurement(said: dict[str, Any]) -> Measurement:
    settings = said["settings"] | {"depths": tuple(said["settings"]["depths"])}
    tests = tuple(
        Test(
            test["kind"],
            test["tokens"],
            test["depth"],
            tuple(
                Run(r["seconds"], r["started"], tuple(r["token_seconds"]), r["joules"])
                for r in test["runs"]
            ),
        )
        for test in said["tests"]
    )
    return Measurement(
        **said
        | {
            "settings": Settings(**settings),
            "before": Conditions(**said["before"]),
            "after": Conditions(**said["after"]),
            "tests": tests,
        }
    )


def _say(**what: Any) -> None:
    sys.stdout.write(f"{_MARK}{json.dumps(what)}\n")
    sys.stdout.flush()


def _work() -> None:
    job = json.loads(sys.stdin.read())
    settings = Settings(**job["settings"] | {"depths": tuple(job["settings"]["depths"])})
    try:
        found = measure(
            Path(job["source"]),
            settings,
            engine=job["engine"],
            threads=job["threads"],
            progress=lambda done, total, name: _say(progress=[done, total, name]),
        )
    except errors.MlxedgeError as error:
        _say(error={"kind": type(error).__name__, "message": str(error)})
        return
    _say(found=asdict(found))


if __name__ == "__main__":
    _work()
