"""Records in a dataset on the Hub: ``hf://datasets/ORG/NAME[@REVISION]``.

Every record is a file of its own under ``records/``, whose name ends with its hash: publishing one
twice changes nothing, and two people who publish at once do not meet.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlxedge.bench.record import Record, file_name
from mlxedge.errors import UsageError

FOLDER = "records"
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?/?")


def parse(address: str) -> tuple[str, str | None]:
    """The dataset's id and revision. Raises UsageError for another kind of address."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise UsageError(
            f"{address}: results on the Hub are in datasets: hf://datasets/ORG/NAME[@REVISION]"
        )
    return found[1], found[2]


def path_in_dataset(record: Record) -> str:
    """``records/NAME-HASH.json``, the hash that of its content."""
    digest = hashlib.sha256(_bytes(record)).hexdigest()[:16]
    return f"{FOLDER}/{Path(file_name(record)).stem}-{digest}.json"


def _bytes(record: Record) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def download(address: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a dataset's records. Raises SourceNotFoundError for no such dataset or
    one without records, AccessDeniedError and NetworkError."""
    from huggingface_hub import HfApi, hf_hub_download

    from mlxedge.errors import SourceNotFoundError
    from mlxedge.sources.hub import translated

    repo, revision = parse(address)
    with translated(f"dataset {repo}", revision):
        listed = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
        names = sorted(n for n in listed if n.startswith(f"{FOLDER}/") and n.endswith(".json"))
        if not names:
            raise SourceNotFoundError(f"{address}: this dataset has no {FOLDER}/*.json")
        for name in names:
            local = hf_hub_download(repo, name, repo_type="dataset", revision=revision)
            yield name, Path(local).read_bytes()


def publish(records: Sequence[Record], address: str, *, pull_request: bool = False) -> str:
    """Add records to a dataset in one commit, as a pull request where one may not write; returns
    the address of the commit or the pull request. Raises what ``download`` does."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from mlxedge.errors import AccessDeniedError
    from mlxedge.sources.hub import translated

    repo, revision = parse(address)
    operations = [CommitOperationAdd(path_in_dataset(r), _bytes(r)) for r in records]
    what = sorted({r["model"]["name"] if "model" in r else r["title"] for r in records})
    with translated(f"dataset {repo}", revision):
        try:
            made = HfApi().create_commit(
                repo,
                operations,
                commit_message=f"Add {len(records)} benchmark records of {', '.join(what)}"[:200],
                repo_type="dataset",
                revision=revision,
                create_pr=pull_request,
            )
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403) or _is_missing(error):
                raise
            raise AccessDeniedError(
                f"dataset {repo} takes nothing from you: log in (hf auth login, or HF_TOKEN) as "
                "somebody who may write to it, or add --pr to propose the records"
            ) from error
    return str(made.pr_url or made.commit_url)


def _is_missing(error: Exception) -> bool:
    from huggingface_hub.errors import RepositoryNotFoundError

    return isinstance(error, RepositoryNotFoundError)
