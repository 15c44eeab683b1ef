"""Blocks of remote files, as many on disk as there is room for.

One file without a name holds them, so that nothing is left of it however the process ends. Blocks
are fetched by several threads at once; where the cache is full, the one that was not used for the
longest time makes room.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from mlxedge.errors import CorruptFileError, DiskFullError, OutputError
from mlxedge.sources.files import RandomAccessFile

BLOCK_BYTES = 16 << 20
#: Blocks that are fetched at once.
CONNECTIONS = 4
#: Seconds between two looks at whether a block is still wanted.
_PATIENCE = 0.25
_HAS_PREADV = hasattr(os, "preadv")

#: Yields bytes ``start:end`` of a remote file in pieces, until the event is set.
Fetch = Callable[[int, int, threading.Event], Iterator[bytes]]


@dataclass(eq=False)
class _Block:
    fetched: Future[None] = field(default_factory=Future)
    slot: int = -1
    readers: int = 0


class BlockCache:
    """Blocks of ``block_bytes``, on the disk of ``folder``.

    ``limit`` is the most bytes that are kept; while all of them are in use it takes a few blocks
    more. ``fetched_bytes`` counts what came over the network. Raises OutputError if there cannot be
    a file in ``folder``.
    """

    def __init__(self, folder: Path, limit: int, block_bytes: int = BLOCK_BYTES) -> None:
        self.folder, self.limit, self.block_bytes = folder, limit, block_bytes
        self.fetched_bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot write: {error.strerror or error}; set HF_HOME to another folder"
            ) from error
        self._blocks: OrderedDict[tuple[CachedFile, int], _Block] = OrderedDict()
        self._slots = 0
        self._free: list[int] = []
        self._guard, self._seek_guard = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="mlxedge-fetch")

    @property
    def least(self) -> int:
        """Bytes below which fetching several blocks at once makes no sense."""
        return 2 * CONNECTIONS * self.block_bytes

    @property
    def kept_bytes(self) -> int:
        """What the file takes up now."""
        return self._slots * self.block_bytes

    def fit(self, room: int) -> None:
        """Keep no more than ``room`` bytes, if that is not less than the least."""
        self.limit = max(self.least, min(self.limit, room))

    def read_into(self, file: CachedFile, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` of ``file``; raises what fetching does."""
        size, last = self.block_bytes, (offset + len(buffer) - 1) // self.block_bytes
        while buffer:
            number, at = divmod(offset, size)
            taken = min(size - at, len(buffer))
            block = self._held(file, number, last)
            try:
                self._await(block)
                self._read(buffer[:taken], block.slot * size + at)
            finally:
                with self._guard:
                    block.readers -= 1
            buffer, offset = buffer[taken:], offset + taken

    def cancel(self) -> None:
        """Let go of everyone who waits for a block, whatever the network does."""
        self._stop.set()

    def close(self) -> None:
        """Stop fetching and give the disk space back."""
        self.cancel()
        self._pool.shutdown(cancel_futures=True)
        self._file.close()

    def _await(self, block: _Block) -> None:
        """Raises what fetching the block did, CancelledError once nobody wants it any more."""
        while not wait((block.fetched,), _PATIENCE).done:
            if self._stop.is_set():
                raise CancelledError
        block.fetched.result()

    def _held(self, file: CachedFile, number: int, last: int) -> _Block:
        """A block that stays until its reader lets go of it. Those after it are begun too: up to
        the ``last`` of this read, and further where a file is read from one block to the next."""
        ahead = min(CONNECTIONS, self.limit // self.block_bytes // 16)
        with self._guard:
            block = self._begun(file, number)
            block.readers += 1
            if (file, number - 1) not in self._blocks:
                ahead = min(ahead, last - number)
            for following in range(number + 1, number + 1 + ahead):
                if following * self.block_bytes < file.size:
                    self._begun(file, following)
            self._blocks.move_to_end((file, number))
        return block

    def _begun(self, file: CachedFile, number: int) -> _Block:
        key = (file, number)
        if key not in self._blocks:
            block = self._blocks[key] = _Block()
            block.fetched = self._pool.submit(self._fetch, key, block)
        return self._blocks[key]

    def _fetch(self, key: tuple[CachedFile, int], block: _Block) -> None:
        file, number = key
        start = number * self.block_bytes
        with self._guard:
            block.slot = self._slot()
        at = block.slot * self.block_bytes
        try:
            for piece in file.fetch(start, min(start + self.block_bytes, file.size), self._stop):
                self._write(piece, at)
                at += len(piece)
                with self._guard:
                    self.fetched_bytes += len(piece)
        except BaseException:
            # Whoever waits for it is told; whoever comes later tries again.
            with self._guard:
                del self._blocks[key]
                self._free.append(block.slot)
            raise

    def _slot(self) -> int:
        """A place in the file for one more block."""
        if self.kept_bytes >= self.limit and not self._free:
            for key, old in self._blocks.items():
                if old.readers == 0 and old.fetched.done():
                    del self._blocks[key]
                    return old.slot
        if self._free:
            return self._free.pop()
        self._slots += 1
        return self._slots - 1

    def _read(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            if _HAS_PREADV:
                done = os.preadv(self._file.fileno(), [buffer], offset)
            else:
                with self._seek_guard:
                    self._file.seek(offset)
                    done = self._file.readinto(buffer)
            buffer, offset = buffer[done:], offset + done

    def _write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        try:
            while view:
                if _HAS_PREADV:
                    done = os.pwrite(self._file.fileno(), view, offset)
                else:
                    with self._seek_guard:
                        self._file.seek(offset)
                        done = self._file.write(view)
                view, offset = view[done:], offset + done
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (DiskFullError if full else OutputError)(
                f"{self.folder}: weights on their way cannot be written: {error.strerror}; free "
                "some space or set HF_HOME to another disk, then run again: it goes on"
            ) from error


class CachedFile(RandomAccessFile):
    """A remote file of ``size`` bytes, read through a cache. ``fetch`` brings a range of it, and
    ``head`` is its beginning. The cache is closed by whoever made it."""

    def __init__(self, path: Path, size: int, head: bytes, fetch: Fetch, cache: BlockCache) -> None:
        self.path, self.size, self.fetch = path, size, fetch
        self._head, self._cache = head, cache

    def read_into(self, buffer: memoryview, offset: int) -> None:
        end = offset + len(buffer)
        if end > self.size:
            raise CorruptFileError(
                self.path, f"the file ends {end - self.size} bytes early", offset
            )
        if end <= len(self._head):
            buffer[:] = self._head[offset:end]
        else:
            self._cache.read_into(self, buffer, offset)

    def close(self) -> None:
        pass
