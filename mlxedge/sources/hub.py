"""Models on the Hugging Face Hub: which files are needed, at which commit, from where.

HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET are obeyed; the client reads
them when it is imported.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxedge.errors import (
    AccessDeniedError,
    DiskFullError,
    MlxedgeError,
    NetworkError,
    OutputError,
    SourceNotFoundError,
    UnsafeFileError,
)
from mlxedge.sources import folder as common
from mlxedge.sources.gguf_names import first_parts, part_names
from mlxedge.version import VERSION

if TYPE_CHECKING:
    from mlxedge.sources.hub_download import Downloader, Progress, RemoteFile

Warn = Callable[[str], None]
#: Raises SourceNotFoundError for a folder that lacks files of what it should hold.
Check = Callable[[Path], object]

_NAME = r"[A-Za-z0-9][\w.-]*"
_SPEC = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DEFAULT_REVISION = "main"
_SIDE_FILES = {
    common.CONFIG,
    common.GENERATION_CONFIG,
    common.MODELOPT_CONFIG,
    common.MODEL_CARD,
    common.INDEX,
    *common.TOKENIZER_FILES,
}


@dataclass(frozen=True)
class HubSpec:
    """``org/name[/file.gguf][@revision]``, taken apart."""

    repo: str
    revision: str | None = None
    file: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """Files of ``repo`` at ``commit``. ``path`` is the folder, or the GGUF file asked for."""

    path: Path
    repo: str
    commit: str


def parse_spec(text: str) -> HubSpec | None:
    """A Hub id, or ``None`` if ``text`` cannot be one."""
    match = _SPEC.fullmatch(text)
    return HubSpec(match["repo"], match["revision"], match["file"]) if match else None


def download(
    repo: str,
    *,
    revision: str | None = None,
    gguf: str | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Snapshot:
    """Make a model available locally, and say where.

    ``revision`` (a branch, a tag or a commit) is resolved first, and every file is taken at that
    commit. Only what is needed is fetched: config, tokenizer, model card and safetensors, or with
    ``gguf`` the GGUF file of that name (or the only one whose name contains it) and, if it is a
    part of a model, all parts. ``offline`` uses the cache alone; so does HF_HUB_OFFLINE. If the Hub
    does not answer, a cached copy is used and ``warn`` is told (``warnings.warn`` without it).

    Raises SourceNotFoundError, AccessDeniedError, NetworkError, UnsafeFileError (only pickles),
    CorruptFileError (a wrong hash; the file is removed) and DiskFullError.
    """
    found = look_up(repo, revision, gguf=gguf, offline=offline, progress=progress, warn=warn)
    if isinstance(found, Snapshot):
        return found
    with translated(repo, revision):
        chosen = choose(found, gguf)
        fetch_chosen(found, chosen, revision)
    folder = found.loader.snapshot
    path = folder / chosen[0].name if gguf is not None else folder
    return Snapshot(path, repo, found.loader.commit)


@dataclass(frozen=True)
class Listing:
    """The files that a repository has at one commit, and what fetches them."""

    loader: Downloader
    files: dict[str, RemoteFile]


def look_up(
    repo: str,
    revision: str | None,
    *,
    gguf: str | None,
    offline: bool | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
    check: Check | None = None,
) -> Listing | Snapshot:
    """What the Hub has, or the cached copy if it cannot be asked; see :func:`download`. ``check``
    tells whether a cached copy is whole, where that is not a model."""
    if revision is not None and not _is_revision(revision):
        raise SourceNotFoundError(f"{repo}: {revision!r} cannot be the name of a revision")
    from huggingface_hub import HfApi, constants

    if offline or constants.HF_HUB_OFFLINE:
        return _cached(repo, revision, gguf, check or _check_model, "working offline")
    api = HfApi(library_name="mlxedge", library_version=VERSION)
    try:
        with translated(repo, revision):
            info = api.model_info(
                repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
    except NetworkError as error:
        snapshot = _cached(repo, revision, gguf, check or _check_model, str(error))
        (warn or warnings.warn)(f"{error}; using the cached copy of commit {snapshot.commit[:12]}")
        return snapshot
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise NetworkError(f"{repo}: the Hub named no commit; check HF_ENDPOINT")

    from mlxedge.sources.hub_download import Downloader, RemoteFile

    files = {
        s.rfilename: RemoteFile(s.rfilename, s.size, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in info.siblings or []
    }
    return Listing(Downloader(repo, commit, progress), files)


def choose(found: Listing, gguf: str | None) -> list[RemoteFile]:
    """The weight files to load, after everything small beside them has been fetched."""
    loader, files = found.loader, found.files
    if gguf is not None:
        parts = part_names(_choose_gguf(loader.repo, list(files), gguf))
        if missing := [name for name in parts if name not in files]:
            raise SourceNotFoundError(
                f"{loader.repo}: part {missing[0]} of the model is not in the repository"
            )
        return [files[name] for name in parts]
    _check_loadable(loader.repo, list(files))
    loader.fetch_all([f for name, f in files.items() if _is_side_file(name)])
    return [files[name] for name in _weight_files(loader, files)]


def fetch_chosen(found: Listing, chosen: list[RemoteFile], revision: str | None) -> None:
    """Download ``chosen``, and note which commit ``revision`` was."""
    found.loader.check_disk(chosen)
    found.loader.fetch_all(chosen)
    _remember(found.loader, revision)


@contextlib.contextmanager
def translated(repo: str, revision: str | None) -> Iterator[None]:
    """Raise the client's errors as this package's."""
    try:
        yield
    except MlxedgeError:
        raise
    except Exception as error:
        raise _translated(error, repo, revision) from error


def _is_side_file(name: str) -> bool:
    template = re.fullmatch(rf"{common.TEMPLATE_FOLDER}/[\w.-]+\.jinja", name)
    return name in _SIDE_FILES or template is not None


def _check_loadable(repo: str, names: list[str]) -> None:
    """Before anything is downloaded: are there weights that mlxedge would load?"""
    if common.ADAPTER_CONFIG in names and common.CONFIG not in names:
        raise SourceNotFoundError(common.only_adapter(repo))
    if any(name.endswith(".safetensors") and "/" not in name for name in names):
        if common.CONFIG not in names:
            raise SourceNotFoundError(f"{repo}: the repository has no {common.CONFIG}")
        return
    if ggufs := first_parts(name for name in names if name.endswith(".gguf")):
        raise SourceNotFoundError(
            f"{repo} holds only GGUF files; name one, for example {repo}/{ggufs[0]} "
            f"(there are: {', '.join(ggufs[:20])})"
        )
    if pickles := [name for name in names if common.PICKLES.fullmatch(name)]:
        raise UnsafeFileError(common.only_pickles(repo, pickles))
    raise SourceNotFoundError(f"{repo}: the repository holds no safetensors files")


def _weight_files(loader: Downloader, files: dict[str, RemoteFile]) -> list[str]:
    """As ``folder.find_shards`` will choose, so that nothing is fetched in vain."""
    if common.WEIGHTS in files:
        return [common.WEIGHTS]
    if common.INDEX in files:
        names = sorted(set(common.read_index(loader.snapshot / common.INDEX).values()))
        if missing := [name for name in names if name not in files]:
            raise SourceNotFoundError(
                f"{loader.repo}: shard {missing[0]} is named by {common.INDEX}, "
                "but is not in the repository"
            )
        return names
    found = sorted(n for n in files if n.endswith(".safetensors") and "/" not in n)
    return [n for n in found if n.startswith("model")] or found


def _choose_gguf(repo: str, names: list[str], wanted: str) -> str:
    ggufs = [name for name in names if name.endswith(".gguf")]
    if wanted in ggufs:
        return wanted
    ggufs = first_parts(ggufs)
    matches = [name for name in ggufs if wanted.lower() in name.lower()]
    if len(matches) == 1:
        return matches[0]
    if not ggufs:
        raise SourceNotFoundError(f"{repo}: the repository holds no GGUF files")
    state = f"{len(matches)} GGUF files match" if matches else "no GGUF file matches"
    raise SourceNotFoundError(
        f"{repo}: {state} {wanted!r}; there are: {', '.join((matches or ggufs)[:20])}"
    )


def _is_revision(revision: str) -> bool:
    """A name that stays inside the cache's ``refs`` folder."""
    parts = revision.split("/")
    return all(parts) and ".." not in parts and not set(revision) & set("\\:\0 ")


def _remember(loader: Downloader, revision: str | None) -> None:
    """Note the commit of a branch or tag, where the client looks for it when offline."""
    name = revision or _DEFAULT_REVISION
    if _COMMIT.fullmatch(name):
        return
    ref = loader.storage / "refs" / name
    ref.parent.mkdir(parents=True, exist_ok=True)
    new = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
    new.write_text(loader.commit)
    new.replace(ref)


def _check_model(folder: Path) -> None:
    common.find_shards(folder)
    common.read_json(folder / common.CONFIG)


def _cached(repo: str, revision: str | None, gguf: str | None, check: Check, why: str) -> Snapshot:
    """The copy in the cache; raises NetworkError if there is none that is whole."""
    from mlxedge.sources.hub_download import storage_folder

    storage, name = storage_folder(repo), revision or _DEFAULT_REVISION
    ref = storage / "refs" / name
    commit = name if _COMMIT.fullmatch(name) else ref.read_text().strip() if ref.is_file() else ""
    folder = storage / "snapshots" / commit
    if not commit or not folder.is_dir():
        at = f" at revision {revision}" if revision else ""
        raise NetworkError(
            f"there is no file or folder {repo} here, and as a repository{at} it is not in the "
            f"cache {storage.parent} ({why})"
        )
    if gguf is not None:
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*.gguf")]
        chosen = part_names(_choose_gguf(f"{repo} (cached copy)", names, gguf))
        return Snapshot(folder / chosen[0], repo, commit)
    try:
        check(folder)
    except SourceNotFoundError as error:
        raise NetworkError(f"{repo}: the cached copy is incomplete: {error} ({why})") from error
    return Snapshot(folder, repo, commit)


def _translated(error: Exception, repo: str, revision: str | None) -> MlxedgeError:
    """The client's error in this package's terms; anything unknown is raised as it is."""
    from huggingface_hub import constants, errors

    from mlxedge.sources.hub_download import TransportError

    endpoint = constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        return AccessDeniedError(
            f"{repo} is gated: accept its licence at {endpoint}/{repo}, then set HF_TOKEN to a "
            "token of that account (or run: hf auth login)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceNotFoundError(
            f"{repo}: no such repository at {endpoint}, or it is private: check the name; "
            "for a private one set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceNotFoundError(f"{repo}: no revision {revision!r} in this repository")
    if isinstance(error, errors.HFValidationError):
        return SourceNotFoundError(f"{repo}: not a Hub id (org/name): {error}")
    if status in (401, 403):
        return AccessDeniedError(
            f"{repo}: the Hub refused access ({status}): check that HF_TOKEN is valid and may "
            "read this repository"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return SourceNotFoundError(f"{repo}: a listed file is not there: {_first_line(error)}")
    if status is not None:
        return NetworkError(f"{repo}: the Hub at {endpoint} answered with status {status}")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error):  # Xet reports it as text
        return DiskFullError(
            f"{repo}: the disk of {constants.HF_HUB_CACHE} is full; free some space or set HF_HOME "
            "to another disk, then run again"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return OutputError(f"cannot write the cache {constants.HF_HUB_CACHE}: {error}")
    if isinstance(error, (TransportError, OSError, RuntimeError)):
        return NetworkError(
            f"{repo}: {endpoint} did not deliver ({type(error).__name__}: {_first_line(error)})"
        )
    raise error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
