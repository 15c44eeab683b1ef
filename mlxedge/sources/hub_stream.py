"""Open a repository on the Hub without its weights on disk.

Config, tokenizer and index come as for a download. Weight files are read by byte ranges, through a
cache of blocks, when and where a tensor is asked for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.errors import CorruptFileError, NetworkError
from mlxedge.sources.block_cache import BLOCK_BYTES, BlockCache, CachedFile
from mlxedge.sources.checkpoint import Checkpoint, Listed
from mlxedge.sources.hub import Snapshot, choose, look_up, translated
from mlxedge.sources.hub_peek import HEAD_BYTES, is_there, shards_of
from mlxedge.sources.hub_ranges import HubPath, answered_range

if TYPE_CHECKING:
    from mlxedge.sources.checkpoint import SourceTensor
    from mlxedge.sources.hub import Warn
    from mlxedge.sources.hub_download import Progress, RemoteFile

#: What a cache may take; more only where a layer needs it.
CACHE_BYTES = 4 << 30
_WORKERS = 8


class NoRangesError(NetworkError):
    """Why the files of a repository cannot be read by ranges."""


def open_stream(
    repo: str,
    *,
    revision: str | None = None,
    gguf: str | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
    cache_bytes: int | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Checkpoint | Snapshot:
    """The checkpoint of a repository, its weights still on the Hub; or its copy in the Hub's cache,
    if that is whole or the Hub cannot be asked.

    ``cache_bytes`` is the most that is kept of them, by default enough for a layer. It stands where
    a download would. Raises NoRangesError where they cannot be read like this, and what
    :func:`mlxedge.sources.hub.download` does.
    """
    found = look_up(repo, revision, gguf=gguf, progress=progress, warn=warn)
    if isinstance(found, Snapshot):
        return found
    with translated(repo, revision):
        chosen = choose(found, gguf)
    folder, commit = found.loader.snapshot, found.loader.commit
    places = {folder / file.name: file for file in chosen}
    if all(is_there(path, file) for path, file in places.items()):
        return Snapshot(folder / chosen[0].name if gguf else folder, repo, commit)
    sizes = {file.name: _size(repo, file) for file in chosen}
    with translated(repo, revision), ThreadPoolExecutor(_WORKERS) as pool:
        hub_paths = [HubPath(repo, commit, name) for name in sizes]
        heads = list(pool.map(_head, hub_paths, sizes.values()))
    cache = BlockCache(found.loader.storage, cache_bytes or CACHE_BYTES, block_bytes)
    with contextlib.ExitStack() as stack:
        stack.callback(cache.close)
        files = {
            path: CachedFile(Path(repo, at.name), sizes[at.name], head, at.pieces, cache)
            for path, at, head in zip(places, hub_paths, heads, strict=True)
        }
        checkpoint = _opened(folder, repo, commit, files, gguf is not None)
        listed = {path: Listed(sizes[f.name], f.sha256) for path, f in places.items()}
        origin = replace(checkpoint.origin, listed=listed)
        if cache_bytes is None:
            cache.limit = max(CACHE_BYTES, largest_layer(checkpoint.tensors.values()) * 5 // 4)
        kept = stack.pop_all()
        return replace(checkpoint, origin=origin, cache=cache, on_close=kept.close)


def _opened(
    folder: Path, repo: str, commit: str, files: dict[Path, CachedFile], gguf: bool
) -> Checkpoint:
    if gguf:
        from mlxedge.sources.gguf_model import open_gguf

        return open_gguf(next(iter(files)), repo=repo, revision=commit, open_file=files.__getitem__)
    from mlxedge.sources.hf_dir import open_folder

    return open_folder(
        folder,
        repo=repo,
        revision=commit,
        shards=shards_of(folder, tuple(files)),
        open_file=files.__getitem__,
    )


def largest_layer(tensors: Iterable[SourceTensor]) -> int:
    """Bytes of the largest layer, or of a tensor outside the layers that is larger."""
    layers: dict[str, int] = {}
    for tensor in tensors:
        before, _, after = tensor.name.rpartition(".layers.")
        layer = after.partition(".")[0] if before else tensor.name
        layers[layer] = layers.get(layer, 0) + tensor.nbytes
    return max(layers.values(), default=0)


def _size(repo: str, file: RemoteFile) -> int:
    if file.size is None:
        raise NoRangesError(f"the Hub does not say the size of {repo}/{file.name}")
    return file.size


def _head(file: HubPath, size: int) -> bytes:
    """The beginning of a file, if its server shows that it sends ranges."""

    def check(response: Any) -> None:
        answered = answered_range(response)
        if answered is None:
            raise NoRangesError(f"the server of {file} does not send parts of files")
        if answered[1] != size:
            raise CorruptFileError(
                str(file), f"the Hub lists {size} bytes, and its server has {answered[1]}"
            )

    return b"".join(file.pieces(0, min(HEAD_BYTES, size), threading.Event(), check))
