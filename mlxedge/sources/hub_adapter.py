"""LoRA adapters on the Hugging Face Hub: two files of a repository, at one commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxedge.sources.adapter import CONFIG, WEIGHTS, check_files, check_folder
from mlxedge.sources.hub import Snapshot, fetch_chosen, look_up, translated

if TYPE_CHECKING:
    from mlxedge.sources.hub import Warn
    from mlxedge.sources.hub_download import Progress


def download_adapter(
    repo: str,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Snapshot:
    """Make an adapter available locally: its config and its weights, nothing else.

    Arguments are those of :func:`mlxedge.sources.hub.download`, and so is what is raised.
    """
    found = look_up(repo, revision, gguf=None, progress=progress, warn=warn, check=check_folder)
    if isinstance(found, Snapshot):
        return found
    check_files(repo, found.files)
    with translated(repo, revision):
        fetch_chosen(found, [found.files[name] for name in (CONFIG, WEIGHTS)], revision)
    return Snapshot(found.loader.snapshot, repo, found.loader.commit)
