"""Blocks of remote files: what is read is right whatever room there is, and whoever reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mlxedge.errors import CorruptFileError, NetworkError
from mlxedge.sources.block_cache import CONNECTIONS, BlockCache, CachedFile, Fetch

BLOCK = 1 << 10
DATA = np.random.default_rng(0).bytes(200 * BLOCK + 17)


class Remote:
    """``DATA`` in pieces, counted; the first ``failures`` requests break off in the middle."""

    def __init__(self, failures: int = 0) -> None:
        self.fetched, self.failures = 0, failures
        self._guard = threading.Lock()

    def __call__(self, start: int, end: int, stop: threading.Event) -> Iterator[bytes]:
        with self._guard:
            self.failures -= 1
            broken = self.failures >= 0
        for at in range(start, end, 300):
            if broken and at > start:
                raise NetworkError("it broke off")
            piece = DATA[at : min(at + 300, end)]
            with self._guard:
                self.fetched += len(piece)
            yield piece


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[Fetch, int], CachedFile]]:
    caches = []

    def make(fetch: Fetch, blocks: int) -> CachedFile:
        caches.append(BlockCache(tmp_path / "cache", blocks * BLOCK, BLOCK))
        return CachedFile(Path("org/m/w"), len(DATA), DATA[:100], fetch, caches[-1])

    yield make
    for cache in caches:
        cache.close()


Open = Callable[[Fetch, int], CachedFile]


@pytest.mark.parametrize("blocks", [1, 8, 64, 1000])
def test_many_readers(opened: Open, blocks: int) -> None:
    remote = Remote()
    file = opened(remote, blocks)

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            start = int(rng.integers(0, len(DATA)))
            size = int(rng.integers(0, min(20 * BLOCK, len(DATA) - start) + 1))
            assert file.read(size, start) == DATA[start : start + size]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read, range(6)))
    file._cache.close()  # waits for what is still read ahead
    # Beyond the limit only what is read or fetched at this moment.
    assert file._cache.kept_bytes <= (blocks + 6 + CONNECTIONS) * BLOCK
    assert file._cache.fetched_bytes == remote.fetched
    if blocks == 1000:
        assert remote.fetched <= len(DATA)


def test_what_is_read_again_is_not_fetched_again(opened: Open) -> None:
    remote = Remote()
    file = opened(remote, 40)
    for start in range(0, 150 * BLOCK, 30 * BLOCK):  # a layer that fits, several times each
        for _ in range(3):
            for at in range(start, start + 30 * BLOCK, 700):
                file.read(700, at)
    assert 150 * BLOCK <= remote.fetched <= 155 * BLOCK


def test_the_beginning_is_not_fetched(opened: Open) -> None:
    remote = Remote()
    file = opened(remote, 8)
    assert file.read(100, 0) == DATA[:100]
    assert file.read(0, len(DATA)) == b""
    assert remote.fetched == 0
    with pytest.raises(CorruptFileError, match="ends 1 bytes early"):
        file.read(2, len(DATA) - 1)


def test_a_failure_is_told_and_not_kept(opened: Open) -> None:
    file = opened(Remote(failures=1), 8)
    with pytest.raises(NetworkError, match="broke off"):
        file.read(BLOCK, 5 * BLOCK)
    assert file.read(BLOCK, 5 * BLOCK) == DATA[5 * BLOCK : 6 * BLOCK]


def test_cancelling_lets_go_of_who_waits(opened: Open) -> None:
    asked, late = threading.Event(), threading.Event()

    def silent(start: int, end: int, stop: threading.Event) -> Iterator[bytes]:
        asked.set()
        late.wait(30)
        yield from Remote()(start, end, stop)

    file = opened(silent, 8)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(file.read, BLOCK, 3 * BLOCK)
        assert asked.wait(30)
        file._cache.cancel()
        with pytest.raises(CancelledError):
            reading.result(30)
        late.set()


def test_it_takes_the_room_that_there_is(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 100 * BLOCK, BLOCK)
    cache.fit(1 << 40)
    assert cache.limit == 100 * BLOCK
    cache.fit(50 * BLOCK)
    assert cache.limit == 50 * BLOCK
    cache.fit(0)
    assert cache.limit == cache.least
    assert list(tmp_path.iterdir()) == []
    cache.close()
