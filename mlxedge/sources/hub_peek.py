"""Look into a repository on the Hub without downloading its weights.

Config and tokenizer come as for a download. Of the weight files only the heads are read, by range
requests, through the same readers as local files.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxedge.errors import CorruptFileError, NetworkError
from mlxedge.sources import folder as common
from mlxedge.sources.files import RandomAccessFile
from mlxedge.sources.hub import Snapshot, choose, look_up, translated

if TYPE_CHECKING:
    from mlxedge.sources.hub import Warn
    from mlxedge.sources.hub_download import Progress, RemoteFile

#: Enough for the header of nearly every safetensors file.
HEAD_BYTES = 1 << 18
_WORKERS = 8


class HubFile(RandomAccessFile):
    """A file of ``repo`` at ``commit``, read over the network; its beginning is kept."""

    def __init__(self, repo: str, commit: str, name: str, size: int) -> None:
        self.path = Path(repo, name)
        self.size = size
        self._repo = repo
        self._commit = commit
        self._name = name
        self._head = b""
        self._lock = threading.Lock()

    def prefetch(self) -> None:
        """Have the beginning at hand."""
        with self._lock:
            if not self._head:
                self._head = self._request(0, min(HEAD_BYTES, self.size))

    def read_into(self, buffer: memoryview, offset: int) -> None:
        end = offset + len(buffer)
        if end > self.size:
            raise CorruptFileError(
                self.path, f"the file ends {end - self.size} bytes early", offset
            )
        self.prefetch()
        if end <= len(self._head):
            buffer[:] = self._head[offset:end]
        else:
            buffer[:] = self._request(offset, end)

    def close(self) -> None:
        pass

    def _request(self, start: int, end: int) -> bytes:
        """Bytes ``start:end``, and no more than the server insists on sending before them."""
        if start == end:
            return b""
        from mlxedge.sources.hub_ranges import HubPath

        data = bytearray()
        with (
            translated(self._repo, self._commit),
            HubPath(self._repo, self._commit, self._name).request(start, end) as response,
        ):
            # A server that ignores ranges sends the file from its first byte.
            skip = 0 if response.status_code == 206 else start
            for piece in response.iter_bytes():
                data += piece
                if len(data) >= skip + end - start:
                    break
        found = bytes(data[skip : skip + end - start])
        if len(found) != end - start:
            raise NetworkError(
                f"{self._repo}/{self._name}: {len(found)} bytes came instead of {end - start}"
            )
        return found


@dataclass(frozen=True)
class Peek:
    """A repository at ``commit``. ``folder`` holds its small files, and is where its weight files
    ``shards`` (or the GGUF file) would be; ``open_file`` opens those over the network."""

    repo: str
    commit: str
    folder: Path
    shards: common.Shards
    files: Mapping[Path, HubFile]

    def open_file(self, path: Path) -> RandomAccessFile:
        return self.files[path]


def peek(
    repo: str,
    *,
    revision: str | None = None,
    gguf: str | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Peek | Snapshot:
    """The repository to look into, or its copy in the cache if that is whole or the Hub cannot be
    asked. Arguments and errors are those of :func:`mlxedge.sources.hub.download`."""
    found = look_up(repo, revision, gguf=gguf, progress=progress, warn=warn)
    if isinstance(found, Snapshot):
        return found
    with translated(repo, revision):
        chosen = choose(found, gguf)
    folder, commit = found.loader.snapshot, found.loader.commit
    if all(is_there(folder / file.name, file) for file in chosen):
        return Snapshot(folder / chosen[0].name if gguf else folder, repo, commit)
    files = {
        folder / file.name: HubFile(repo, commit, file.name, _size(repo, file)) for file in chosen
    }
    with ThreadPoolExecutor(_WORKERS) as pool:
        for _ in pool.map(HubFile.prefetch, files.values()):
            pass
    shards = common.Shards(tuple(files), {}) if gguf else shards_of(folder, tuple(files))
    return Peek(repo, commit, folder, shards, files)


def is_there(path: Path, file: RemoteFile) -> bool:
    """Whether a file of the snapshot is in the cache already."""
    return path.is_file() and file.size in (None, path.stat().st_size)


def _size(repo: str, file: RemoteFile) -> int:
    if file.size is None:
        raise NetworkError(f"{repo}/{file.name}: the Hub does not say its size: fetch it instead")
    return file.size


def shards_of(folder: Path, files: tuple[Path, ...]) -> common.Shards:
    """What is in which of the weight files ``files``, that need not be in ``folder``."""
    index = folder / common.INDEX
    if folder / common.WEIGHTS not in files and index.is_file():
        owner = {name: folder / file for name, file in common.read_index(index).items()}
        return common.Shards(files, owner, index)
    return common.Shards(files, {})
