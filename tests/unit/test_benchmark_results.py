"""What the benchmark scripts record, and the results that are kept of them."""

from __future__ import annotations

import argparse
import getpass
import importlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlxedge.bench.record import FIGURES, check_record
from mlxedge.bench.tables import device_folder

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RECORDS = sorted(BENCHMARKS.glob("results/*/*.json"))


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for part in value.items() for text in strings(list(part)))
    elif isinstance(value, list):
        yield from (text for part in value for text in strings(part))


def test_the_summary_is_that_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    summarise = script("summarise", monkeypatch)
    made = summarise.page(summarise.read(summarise.RESULTS))
    kept = (summarise.RESULTS / "README.md").read_text(encoding="utf-8")
    assert kept == made, "run: python benchmarks/summarise.py"


def test_there_are_records() -> None:
    titles = {json.loads(path.read_text(encoding="utf-8"))["title"] for path in RECORDS}
    assert {title.partition(":")[0].partition(",")[0] for title in titles} >= {
        "kernels", "convert_gguf", "convert_mlx", "generate",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_a_kept_record(path: Path) -> None:
    """It fits the schema, lies where its device does, and names no host, user or folder."""
    record = check_record(path, json.loads(path.read_text(encoding="utf-8")))
    assert record["kind"] == FIGURES
    assert device_folder(record["device"]) == path.parent.name
    folder = re.compile(r"(^|\s)(~|[A-Za-z]:\\|/\w|\\\\)|/(home|Users|tmp|root|work|var)/")
    for text in strings(record):
        assert not folder.search(text), text
        for name in {socket.gethostname(), getpass.getuser()}:
            assert name not in re.split(r"[^\w.-]", text), text


def test_a_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = script("common", monkeypatch)
    recording = common.Recording(tmp_path, ["numba", "no-such-package"], {"peer": "9"})
    runs = {
        "ours": [common.Run(1.0, 100.0), common.Run(2.0, 100.0)],
        "theirs": [common.Run(3.0, 400.0), common.Run(3.0, 400.0)],
    }
    common.report("a script: what", runs, argparse.Namespace(json=True), recording)
    (path,) = tmp_path.glob("*/*.json")
    record = check_record(path, json.loads(path.read_text(encoding="utf-8")))
    assert path.parent.name == device_folder(record["device"])
    assert path.name.startswith("a-script-what-")
    found = {(f["name"], f["side"]): f for f in record["figures"]}
    assert {key: f["values"] for key, f in found.items()} == {
        ("time", "ours"): [1.0, 2.0],
        ("time", "theirs"): [3.0, 3.0],
        ("time", "ours : theirs"): [3.0, 1.5],
        ("peak memory", "ours"): [100.0, 100.0],
        ("peak memory", "theirs"): [400.0, 400.0],
        ("peak memory", "ours : theirs"): [4.0, 4.0],
    }
    ratio = found["time", "ours : theirs"]
    assert (ratio["unit"], ratio["better"]) == ("×", "higher")
    assert (record["versions"]["peer"], record["versions"]["no-such-package"]) == ("9", None)
    assert record["versions"]["numba"]


def test_ratios_say_how_many_times_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    common = script("common", monkeypatch)
    recording = common.Recording(None)
    recording.sides("speed", "GB/s", {"a": [6.0], "b": [2.0], "c": [12.0]}, "higher")
    assert {f.side: f.values for f in recording.figures} == {
        "a": (6.0,), "b": (2.0,), "a : b": (3.0,), "c": (12.0,), "a : c": (0.5,),
    }  # fmt: skip
    recording.sides("errors", "", {"d": [0.0], "e": [1.0]})
    assert [f.side for f in recording.figures][-2:] == ["d", "e"]  # no ratio to nothing
    recording.write("not written")


@pytest.mark.parametrize(
    "path", sorted(p for p in BENCHMARKS.glob("*.py") if p.stem not in ("common", "summarise")),
    ids=lambda path: path.stem,
)  # fmt: skip
def test_every_script_records(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "arguments(__doc__" in text
    assert "Recording(options.record" in text
    assert ".write(" in text or "report(" in text


def test_only_the_newest_of_a_title_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summarise = script("summarise", monkeypatch)
    old = json.loads(RECORDS[0].read_text(encoding="utf-8")) | {"title": "a | title"}
    new = old | {"created": "2099-01-01T00:00:00+00:00"}
    folder = tmp_path / device_folder(old["device"])
    folder.mkdir()
    for name, record in (("a", new), ("b", old)):
        (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    ((kept,),) = summarise.read(tmp_path).values()
    assert kept["created"] == new["created"]
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="another device"):
        summarise.read(tmp_path)
