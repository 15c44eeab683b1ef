"""Write under a temporary name, resume after a kill, rename last.

Beside an output ``NAME`` stands ``.NAME.partial/`` while it is made: the data files at their full
size, ``journal.jsonl`` with a line for each finished tensor, and a lock. A killed run leaves the
folder; the next run with the same plan goes on from the journal, one with another plan starts
clean. Nothing appears under the final name before it is complete and synced. A folder that is
replaced waits as ``.NAME.partial/replaced`` between two renames; a run that finds it there, and
nothing at ``NAME``, puts it back first.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.errors import DiskFullError, OutputError, OutputExistsError

if TYPE_CHECKING:
    from filelock import BaseFileLock

    from mlxedge.plan import OutputPlan

_JOURNAL = "journal.jsonl"
_REPLACED = "replaced"
#: Room is left for ``..partial`` and ``.mlxedge.json``; file systems allow 255 bytes.
_LONGEST_NAME = 230
_MODEL_SUFFIXES = {".safetensors", ".json", ".md", ".model", ".txt", ".jinja", ".tiktoken"}
_MODEL_NAMES = {"LICENSE", "NOTICE", ".gitattributes"}
SYNC_BYTES = 256 << 20


def partial_dir(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def check_target(path: Path, force: bool) -> None:
    """Refuse an existing target unless ``force``, a folder with more than a model in it, a name
    that leaves no room for those beside it, and a parent that cannot be written."""
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise OutputError(f"{path.name} is too long for a name: choose a shorter -o")
    if path.is_symlink() and not path.exists():
        raise OutputError(f"{path} is a link to nothing: remove it, or choose another -o")
    if path.exists() and not force:
        raise OutputExistsError(f"{path} exists: choose another -o, or replace it with --force")
    if path.is_dir() and (other := _not_of_a_model(path)):
        raise OutputExistsError(
            f"{path} holds {other}, which is not part of a model: it is not replaced; "
            "choose another -o"
        )
    parent = path.parent
    probe = parent
    while not probe.exists():
        probe = probe.parent
    if not probe.is_dir():
        raise OutputError(f"{probe} is a file, so {path} cannot be created: choose another -o")
    if not os.access(probe, os.W_OK):
        raise OutputError(f"{probe} is not writable: choose another -o")


def _not_of_a_model(folder: Path) -> str | None:
    """The name of something in a folder that no model folder has, or ``None``."""
    for entry in sorted(folder.iterdir()):
        if not entry.is_file() or (
            entry.suffix not in _MODEL_SUFFIXES and entry.name not in _MODEL_NAMES
        ):
            return entry.name
    return None


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors into ours."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"{path}: the disk is full; free some space and run the same command again: "
                "finished tensors are kept"
            ) from error
        reason = error.strerror or str(error)
        raise OutputError(
            f"{path}: cannot write: {reason}; check the folder or change -o"
        ) from error


def lock_partial(folder: Path, output: Path) -> BaseFileLock:
    """Make ``folder``, the half-written state of ``output``, this run's own until it is released.

    Raises OutputError if another run has it, OSError if it cannot be made.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"{output} is being written by another run: wait for it, or change -o"
        ) from error
    return lock


class Staging:
    """The half-written state of one output."""

    def __init__(self, plan: OutputPlan, fingerprint: str) -> None:
        self.plan = plan
        self.fingerprint = fingerprint
        self.dir = partial_dir(plan.path)
        #: Finished tensors by name, those of an earlier run included: their journal lines.
        self.done: dict[str, dict[str, Any]] = {}
        self.resumed_tensors = 0
        self._made: Path | None = None
        self._files: list[int] = []
        self._unsynced = 0
        self._guard = threading.Lock()
        self._pending: list[dict[str, Any]] = []
        with os_errors(plan.path):
            self._lock = lock_partial(self.dir, plan.path)
            try:
                self._open(fingerprint)
            except BaseException:
                self.release()
                raise

    def _open(self, fingerprint: str) -> None:
        journal = self.dir / _JOURNAL
        lines = _read_journal(journal)
        head = {"fingerprint": fingerprint}
        self._restore()
        if lines[:1] == [head] and self._data_is_whole():
            self.done = {line["tensor"]: line for line in lines[1:] if "tensor" in line}
            self.resumed_tensors = len(self.done)
        else:
            for stale in self.dir.iterdir():
                if stale.name != "lock":
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        self.data_dir.mkdir(exist_ok=True)
        # Written anew, because a kill may have cut the last line short.
        text = "".join(json.dumps(line) + "\n" for line in (head, *self.done.values()))
        journal.write_text(text, encoding="utf-8")
        for file in self.plan.data:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            fd = os.open(self.data_dir / file.name, flags, 0o644)
            self._files.append(fd)
            _reserve(fd, file.size)
            write_at(fd, file.header, 0)
            for offset, data in file.constants:
                write_at(fd, data, offset)
        self._journal = journal.open("a", encoding="utf-8")

    def _restore(self) -> None:
        """Put back a folder that a killed run had moved aside."""
        replaced = self.dir / _REPLACED
        if replaced.exists() and not self.plan.path.exists():
            replaced.rename(self.plan.path)

    def _data_is_whole(self) -> bool:
        """Whether the files that the journal speaks of are still there."""
        files = [(self.data_dir / file.name, file.size) for file in self.plan.data]
        return all(p.is_file() and p.stat().st_size == size for p, size in files)

    @property
    def data_dir(self) -> Path:
        return self.dir / "data"

    def write(self, file: int, offset: int, data: memoryview | bytes) -> None:
        """Write at a place; safe from several threads."""
        with os_errors(self.plan.path):
            write_at(self._files[file], data, offset)

    def finish_tensor(self, line: dict[str, Any], nbytes: int) -> None:
        """Note a tensor as done; on disk once the data before it is."""
        with self._guard, os_errors(self.plan.path):
            self._pending.append(line)
            self.done[line["tensor"]] = line
            self._unsynced += nbytes
            if self._unsynced >= SYNC_BYTES:
                self._sync()

    def sync(self) -> None:
        """Put on disk what is done, and note it."""
        with self._guard, os_errors(self.plan.path):
            self._sync()

    def _sync(self) -> None:
        for fd in self._files:
            os.fsync(fd)
        self._journal.writelines(json.dumps(line) + "\n" for line in self._pending)
        self._journal.flush()
        self._pending.clear()
        self._unsynced = 0

    def complete(self) -> Path:
        """Write the small files and sync everything, once; returns what will get the final name."""
        if self._made is not None:
            return self._made
        with os_errors(self.plan.path):
            with self._guard:
                self._sync()
            for name, data in self.plan.files.items():
                target = self.data_dir / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                _sync_path(target)
            _sync_path(self.data_dir)
        folder = self.plan.target.is_folder
        self._made = self.data_dir if folder else self.data_dir / self.plan.data[0].name
        return self._made

    def publish(self, force: bool) -> None:
        """Give what ``complete`` made its final name."""
        path = self.plan.path
        made = self.complete()
        with os_errors(path):
            self._close_files()
            if path.exists() and not force:
                raise OutputExistsError(f"{path} appeared meanwhile: it was not replaced")
            # Once the data has moved, a journal of it would be a lie.
            self._journal.close()
            (self.dir / _JOURNAL).unlink()
            _sync_path(self.dir)
            if path.exists() and (path.is_dir() or self.plan.target.is_folder):
                path.rename(self.dir / _REPLACED)
            try:
                made.replace(path)
            except OSError:
                self._restore()
                raise
            _sync_path(path.parent)
            self.release()
            shutil.rmtree(self.dir, ignore_errors=True)

    def keep(self) -> None:
        """Stop without publishing; what is done stays for the next run, and room that was only
        taken is given back. No-op once published."""
        if not self.done and not (self.dir / _REPLACED).exists():
            self.discard()
            return
        if self._files:
            with self._guard, contextlib.suppress(OSError):
                self._sync()
        self.release()

    def discard(self) -> None:
        """Stop without publishing, for a reason that the next run would meet again."""
        self.release()
        shutil.rmtree(self.dir, ignore_errors=True)

    def _close_files(self) -> None:
        for fd in self._files:
            os.close(fd)
        self._files = []

    def release(self) -> None:
        self._close_files()
        if journal := getattr(self, "_journal", None):
            with contextlib.suppress(OSError):
                journal.close()
        self._lock.release()


def write_at(fd: int, data: memoryview | bytes, offset: int) -> None:
    """``pwrite`` until everything is written."""
    view = memoryview(data).cast("B")
    while view:
        written = _pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


_seek_guard = threading.Lock()


def _pwrite(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _seek_guard:  # Windows
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def _reserve(fd: int, size: int) -> None:
    """Take the whole space at once, so that a full disk shows before the work and not after it."""
    os.ftruncate(fd, size)
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _sync_path(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    # Windows syncs what is open for writing; a folder can be opened for reading only.
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal; a last line cut off by a kill is dropped."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return [line for line in lines if isinstance(line, dict)]
