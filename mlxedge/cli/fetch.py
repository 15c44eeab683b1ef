"""``mlxedge fetch``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("repo")
@click.option("--revision", metavar="REV", help="Branch, tag or commit.  [default: main]")
@click.option(
    "--file", "gguf", metavar="NAME.gguf",
    help="A GGUF file of the repository, by its name or by a part of it that no other has.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(repo: str, revision: str | None, gguf: str | None, as_json: bool) -> None:
    """Download REPO from the Hub and print where it is.

    REPO is org/name, org/name@revision or org/name/file.gguf. Only the files that mlxedge needs
    are downloaded, at one commit, into the Hub's cache (HF_HOME); what is there already is kept,
    and an interrupted download goes on where it stopped.
    """
    from mlxedge.cli import ui
    from mlxedge.sources import fetch

    with ui.file_progress() as progress:
        path = fetch(repo, revision=revision, gguf=gguf, progress=progress, warn=ui.warn)
    snapshot = _snapshot(path)
    files = sorted(p for p in snapshot.rglob("*") if p.is_file()) if path.is_dir() else [path]
    sizes = {file.relative_to(snapshot).as_posix(): file.stat().st_size for file in files}
    if as_json:
        ui.print_json(
            {
                "path": str(path),
                "commit": snapshot.name,
                "bytes": sum(sizes.values()),
                "files": [{"name": name, "bytes": size} for name, size in sizes.items()],
            }
        )
        return
    click.echo(path)
    files_word = "file" if len(sizes) == 1 else "files"
    ui.note(f"commit {snapshot.name}, {len(sizes)} {files_word}, {ui.size(sum(sizes.values()))}")


def _snapshot(path: Path) -> Path:
    """The folder of the commit: ``…/snapshots/COMMIT`` in the Hub's cache."""
    return next(p for p in (path, *path.parents) if p.parent.name == "snapshots")
