"""Where models come from: Hugging Face folders, MLX folders, GGUF files, the Hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from mlxedge.errors import SourceNotFoundError, UnsafeFileError, UsageError

if TYPE_CHECKING:
    from mlxedge.sources.checkpoint import Checkpoint
    from mlxedge.sources.hub import HubSpec, Warn
    from mlxedge.sources.hub_download import Progress

__all__ = ["fetch", "open_source"]


def open_source(
    spec: str | Path,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
    stream: bool = False,
) -> Checkpoint:
    """Open a model, wherever it is. Close the result, or use it in a ``with``.

    ``spec`` is a folder (Hugging Face or MLX), a GGUF file, or a Hub id: ``org/name``,
    ``org/name@revision``, ``org/name/file.gguf``. What exists on disk goes first. ``revision``,
    ``offline``, ``progress(file, done, total)`` (bytes) and ``warn(message)`` are for the Hub; see
    :func:`mlxedge.sources.hub.download`, which also lists what is raised. No weights are read.

    ``stream`` leaves the weights of a Hub repository where they are: parts of them are fetched when
    tensors are read (``mlxedge.sources.hub_stream``). Where that cannot be they are downloaded, and
    ``warn`` is told why; what is in the Hub's cache is read from there.
    """
    path = Path(spec).expanduser()
    if spec and path.exists():
        if revision is not None:
            raise UsageError(f"{spec} is on this disk: a revision is for a Hub repository")
        if stream:
            raise UsageError(f"{spec} is on this disk: streaming is for a Hub repository")
        return _open_path(path)
    from mlxedge.sources.hub import download, parse_spec

    hub = None if isinstance(spec, Path) else parse_spec(spec)
    if hub is None:
        raise SourceNotFoundError(
            f"{spec}: no such file or folder, and not a Hub id (org/name, org/name@revision or "
            "org/name/file.gguf)"
        )
    revision = one_revision(hub.revision, revision)
    if stream and not offline:
        opened = _streamed(hub, revision, progress, warn)
        if opened is not None:
            return opened
    snapshot = download(
        hub.repo,
        revision=revision,
        gguf=hub.file,
        offline=offline,
        progress=progress,
        warn=warn,
    )
    return _open_path(snapshot.path, snapshot.repo, snapshot.commit)


def _streamed(
    hub: HubSpec, revision: str | None, progress: Progress | None, warn: Warn | None
) -> Checkpoint | None:
    """The checkpoint, or ``None`` where it has to be downloaded."""
    from mlxedge.sources.hub import Snapshot
    from mlxedge.sources.hub_stream import NoRangesError, open_stream

    try:
        found = open_stream(
            hub.repo, revision=revision, gguf=hub.file, progress=progress, warn=warn
        )
    except NoRangesError as error:
        (warn or warnings.warn)(f"{error}, so it cannot be streamed: it is downloaded first")
        return None
    if isinstance(found, Snapshot):
        return _open_path(found.path, found.repo, found.commit)
    return found


def fetch(
    repo: str,
    *,
    revision: str | None = None,
    gguf: str | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Path:
    """Download a model from the Hub into its cache, and return the folder (or the GGUF file).

    ``repo`` may be written as for :func:`open_source`; ``gguf`` selects a GGUF file by its name or
    by a part of it that no other has ("q4_k_m").
    """
    from mlxedge.sources.hub import download, parse_spec

    hub = parse_spec(repo)
    if hub is None:
        raise SourceNotFoundError(f"{repo}: not a Hub id (org/name or org/name@revision)")
    return download(
        hub.repo,
        revision=one_revision(hub.revision, revision),
        gguf=gguf or hub.file,
        progress=progress,
        warn=warn,
    ).path


def one_revision(in_spec: str | None, argument: str | None) -> str | None:
    """The revision of ``org/name@revision`` or of an argument; raises UsageError if they differ."""
    if in_spec and argument and in_spec != argument:
        raise UsageError(f"two revisions: {in_spec!r} in the source and {argument!r} beside it")
    return in_spec or argument


def _open_path(path: Path, repo: str | None = None, commit: str | None = None) -> Checkpoint:
    if path.is_dir():
        from mlxedge.sources.hf_dir import open_folder

        return open_folder(path, repo=repo, revision=commit)
    if path.suffix == ".safetensors":
        raise UsageError(f"{path}: give its folder, which also holds config.json: {path.parent}")
    from mlxedge.sources.folder import PICKLE_ADVICE, PICKLES

    if PICKLES.fullmatch(path.name):
        raise UnsafeFileError(f"{path}: a pickle: {PICKLE_ADVICE}")
    from mlxedge.sources.gguf_model import open_gguf

    return open_gguf(path, repo=repo, revision=commit)
