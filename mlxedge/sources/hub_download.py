"""Files of one commit of a Hub repository, into the Hub client's own cache.

Every request is the client's (huggingface_hub). What is added: hashes are checked, a plain HTTP
download continues where an earlier run stopped (the client itself resumes only within a run), and
the first failure stops the other downloads.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import (
    are_symlinks_supported,
    get_hf_file_metadata,
    http_get,
    repo_folder_name,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from mlxedge.errors import CorruptFileError, DiskFullError
from mlxedge.version import VERSION

#: Called with a file's name, the bytes that are there and its size, by one thread at a time.
Progress = Callable[[str, int, int], None]

_WORKERS = 8
_TRIES = 5
#: Base of the client's transport errors, whichever httpx it is built on.
TransportError: type[Exception] = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it: ``sha256`` for large files, ``git_oid`` for the others.

    A mirror may leave out the size and the hashes; then they are not checked.
    """

    name: str
    size: int | None
    sha256: str | None
    git_oid: str | None


class Cancelled(Exception):
    """Another file failed, so this download stopped."""


class Downloader:
    """Downloads files of ``repo`` at ``commit`` (a full hash)."""

    def __init__(self, repo: str, commit: str, progress: Progress | None = None) -> None:
        self.repo = repo
        self.commit = commit
        self.storage = storage_folder(repo)
        self._progress = progress
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def snapshot(self) -> Path:
        return self.storage / "snapshots" / self.commit

    def check_disk(self, files: Iterable[RemoteFile]) -> None:
        """Raise DiskFullError if the files that are not there yet cannot fit."""
        needed = sum((f.size or 0) - self._present(f) for f in files)
        parent = next(p for p in (self.storage, *self.storage.parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise DiskFullError(
                f"{self.repo}: {needed / 1e9:.2f} GB to download, {free / 1e9:.2f} GB free in "
                f"{self.storage.parent}; free some space or set HF_HOME to another disk"
            )

    def fetch_all(self, files: list[RemoteFile]) -> None:
        """Fetch several files at once; the first error stops them all."""
        with ThreadPoolExecutor(min(_WORKERS, max(1, len(files)))) as pool:
            futures = [pool.submit(self.fetch, file) for file in files]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # Also on Ctrl-C: without it, leaving the pool would wait for whole files.
                unfinished = [f for f in futures if not f.done()]
                if unfinished:
                    self._stop.set()
                    for future in unfinished:
                        future.cancel()
        errors = [e for f in futures if not f.cancelled() and (e := f.exception())]
        for error in sorted(errors, key=lambda e: isinstance(e, Cancelled)):
            raise error

    def fetch(self, file: RemoteFile) -> Path:
        """One file, checked if it was downloaded now; returns its place in the snapshot."""
        pointer = self._cached(file)
        if pointer is not None and file.size in (None, pointer.stat().st_size):
            return pointer
        if pointer is not None:
            self._discard(pointer)
        fresh = not self._blob(file).exists()
        if fresh and file.sha256 and self._resumable(file):
            self._fetch_blob(file)
            fresh = False
        pointer = Path(
            hf_hub_download(
                self.repo,
                file.name,
                revision=self.commit,
                tqdm_class=self._bar(file),
                library_name="mlxedge",
                library_version=VERSION,
            )
        )
        if fresh and not self._intact(pointer, file):
            self._discard(pointer)
            raise self._wrong_hash(file)
        return pointer

    def _cached(self, file: RemoteFile) -> Path | None:
        found = try_to_load_from_cache(self.repo, file.name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def _blob(self, file: RemoteFile) -> Path:
        return self.storage / "blobs" / (file.sha256 or file.git_oid or "unknown")

    def _partial(self, file: RemoteFile) -> Path:
        return self._blob(file).with_name(f"{file.sha256}.incomplete")

    def _present(self, file: RemoteFile) -> int:
        size = file.size or 0
        if self._cached(file) or self._blob(file).exists():
            return size
        partial = self._partial(file)
        return min(size, partial.stat().st_size) if partial.exists() else 0

    def _resumable(self, file: RemoteFile) -> bool:
        """Whether the file comes by plain HTTP into a blob named by its hash."""
        url = hf_hub_url(self.repo, file.name, revision=self.commit)
        remote = get_hf_file_metadata(url)
        has_xet = not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
        # Without symlinks the client keeps no blobs.
        links = are_symlinks_supported(constants.HF_HUB_CACHE)
        by_xet = has_xet and remote.xet_file_data is not None
        return remote.etag == file.sha256 and not by_xet and links

    def _fetch_blob(self, file: RemoteFile) -> None:
        """Download into ``<hash>.incomplete``, which outlives the run; rename once it is right."""
        blob, partial = self._blob(file), self._partial(file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock = self.storage.parent / ".locks" / self.storage.name / f"{blob.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists():
                return
            self._fill(file, partial)
            if not self._intact(partial, file):
                partial.unlink()
                raise self._wrong_hash(file)
            partial.replace(blob)

    def _fill(self, file: RemoteFile, partial: Path) -> None:
        tries = _TRIES
        while True:
            have = partial.stat().st_size if partial.exists() else 0
            if file.size is not None and have > file.size:
                partial.unlink()
                have = 0
            try:
                with partial.open("ab") as out:
                    http_get(
                        hf_hub_url(self.repo, file.name, revision=self.commit),
                        out,
                        resume_size=have,
                        # Compressed bytes could not be continued in the middle.
                        headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                        expected_size=file.size,
                        displayed_filename=file.name,
                        tqdm_class=self._bar(file),
                    )
                    out.flush()
                    os.fsync(out.fileno())
                return
            except HfHubHTTPError:
                raise
            except TransportError:
                # The client retries most of these itself, but not a reset in the body.
                tries = _TRIES if partial.stat().st_size > have else tries - 1
                if tries == 0:
                    raise
            except OSError as error:
                # Without a number it is the client's: the bytes do not add up to the size, as when
                # a server ignores ranges and an older client appends the whole file.
                tries -= 1
                if error.errno is not None or tries == 0:
                    raise
                partial.unlink()

    def _intact(self, path: Path, file: RemoteFile) -> bool:
        """Whether the bytes have the hash that the Hub lists."""
        with path.open("rb") as stream:
            if file.sha256:
                return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
            # A small file's name is that of its git object.
            blob = b"blob %d\0" % path.stat().st_size + stream.read()
            return file.git_oid in (None, hashlib.sha1(blob, usedforsecurity=False).hexdigest())

    def _wrong_hash(self, file: RemoteFile) -> CorruptFileError:
        return CorruptFileError(
            f"{self.repo}/{file.name}",
            "what arrived has another hash than the Hub lists; it was removed, so run again "
            "(a proxy or a mirror may have changed it)",
        )

    def _discard(self, pointer: Path) -> None:
        blob = pointer.resolve()
        pointer.unlink(missing_ok=True)
        if blob.parent == (self.storage / "blobs").resolve():
            blob.unlink(missing_ok=True)

    def _bar(self, file: RemoteFile) -> Any:
        """What the client takes for a tqdm class: it reports, stops, and shows nothing."""
        downloader = self

        class Bar:
            def __init__(
                self, *args: Any, initial: int = 0, total: int | None = None, **options: Any
            ) -> None:
                self.n = initial
                self.total = total or file.size or 0
                self.update(0)

            def update(self, n: float | None = 1) -> None:
                if downloader._stop.is_set():
                    raise Cancelled(file.name)
                self.n += int(n or 0)
                if downloader._progress:
                    with downloader._lock:
                        downloader._progress(file.name, self.n, self.total)

            def quiet(self, *args: Any, **options: Any) -> None:
                pass

            # Bytes on the network beside bytes of the file: only the latter are reported.
            update_transfer = set_postfix_str = set_transfer_postfix_str = quiet
            set_description = set_description_str = refresh = close = quiet

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *error: object) -> None:
                pass

        return Bar


def storage_folder(repo: str) -> Path:
    """Where the client's cache keeps ``repo``."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
