"""Results from wherever they are: files, folders, a URL, a dataset on the Hub."""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxedge.bench import hub
from mlxedge.bench.foreign import read_foreign
from mlxedge.bench.record import Record, check_record
from mlxedge.errors import CorruptFileError, NetworkError, SourceNotFoundError, UsageError

_LARGEST = 1 << 26
_TIMEOUT = 30.0
#: In a folder, what is read: records, and what mlx_lm.benchmark printed.
_SUFFIXES = (".json", ".txt")


@dataclass(frozen=True)
class Result:
    """A record, and the name to show it under."""

    name: str
    record: Record


def read_results(places: Sequence[str]) -> list[Result]:
    """Records of mlxedge, llama-bench, LocalScore and mlx_lm.benchmark: files that hold one or a
    list of them, folders of such files, ``http(s)://`` addresses of a file, and
    ``hf://datasets/ORG/NAME[@REVISION]``.

    Raises SourceNotFoundError, NetworkError, CorruptFileError for what is no record, and UsageError
    for a record of another schema.
    """
    found: list[Result] = []
    for place in places:
        found += _read(place)
    return found


def _read(place: str) -> Iterator[Result]:
    if place.startswith("hf://"):
        for name, raw in hub.download(place):
            yield from _parse(f"{place}/{name}", Path(name).stem, raw)
        return
    if place.startswith(("http://", "https://")):
        yield from _parse(place, Path(place.partition("?")[0]).stem, _fetch(place))
        return
    path = Path(place)
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES and f.is_file())
        if not files:
            raise SourceNotFoundError(f"{path}: no results (.json) in this folder")
    found = False
    for file in files:
        # Of a folder, what is nothing of the kind is not meant.
        for result in _parse(file, file.stem, _load(file), sure=len(files) == 1):
            found = True
            yield result
    if not found:
        raise SourceNotFoundError(f"{path}: no results (.json) in this folder")


def _load(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST:
            raise CorruptFileError(path, "too large for benchmark results")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise SourceNotFoundError(f"{path}: {error.strerror or error}") from error


def _fetch(url: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"Accept": "application/json"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            raw: bytes = answer.read(_LARGEST + 1)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise SourceNotFoundError(f"{url}: there is nothing there ({error.code})") from error
        raise NetworkError(f"{url} answered {error.code} {error.reason}") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise UsageError(f"{url} is no address: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise NetworkError(f"{url} cannot be read: {error!r}") from error
    if len(raw) > _LARGEST:
        raise CorruptFileError(url, "too large for benchmark results")
    return raw


def _parse(where: str | Path, stem: str, raw: bytes, sure: bool = True) -> Iterator[Result]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFileError(where, "not UTF-8 text") from error
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        records = read_foreign(where, text)
        if records is None and not sure and Path(where).suffix != ".json":
            return
        if records is None:
            raise CorruptFileError(
                where, f"neither JSON ({error}) nor what mlx_lm.benchmark prints"
            ) from error
    else:
        kind = str(value.get("kind")) if isinstance(value, dict) else "mlxedge"
        if not sure and not kind.startswith("mlxedge") and read_foreign(where, value) is None:
            return
        records = _records(where, value)
    for i, record in enumerate(records):
        yield Result(stem if len(records) == 1 else f"{stem}[{i}]", record)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON's")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _records(where: str | Path, value: Any) -> list[Record]:
    foreign = read_foreign(where, value)
    if foreign is not None:
        return foreign
    values = value if isinstance(value, list) else [value]
    if not values:
        raise CorruptFileError(where, "holds no record")
    return [check_record(where, record) for record in values]


__all__ = ["Result", "read_results"]
