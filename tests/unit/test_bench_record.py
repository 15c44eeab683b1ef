"""Records: every run is kept, what is written can be read, and what is none is told apart."""

from __future__ import annotations

import getpass
import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from oracles.bench_records import record
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.bench.figures import Figure, figures_record
from mlxedge.bench.record import (
    check_record,
    file_name,
    model_sha256,
    save_records,
    schema,
    source_sha256,
    versions,
)
from mlxedge.bench.results import Result, read_results
from mlxedge.bench.sensors import Conditions
from mlxedge.bench.tables import to_csv, to_markdown
from mlxedge.errors import CorruptFileError, OutputExistsError, SourceNotFoundError, UsageError


def read(*paths: Path) -> list[Result]:
    return read_results([str(path) for path in paths])


def test_a_record_keeps_every_run() -> None:
    made = json.loads(json.dumps(record(joules=4.0)))
    assert (made["kind"], made["schema"]) == ("mlxedge-bench", 2)
    prefill, decode = made["tests"]
    assert prefill["name"] == "pp100"
    assert [run["seconds"] for run in prefill["runs"]] == [0.5, 0.4]
    assert [run["tokens_per_second"] for run in prefill["runs"]] == [200.0, 250.0]
    assert [run["started"] for run in prefill["runs"]] == [0.0, 1.0]
    assert (prefill["drift"], prefill["drifted"]) == (0.25, True)
    assert prefill["ttft_seconds"] == {"median": 0.45, "p95": 0.495}
    assert prefill["inter_token_seconds"] is None
    assert decode["tokens_per_second"] == {
        "mean": 10.0, "stddev": None, "median": 10.0, "low": None, "high": None,
    }  # fmt: skip
    assert decode["inter_token_seconds"] == {"median": 0.1, "p95": 0.1}
    assert (decode["drift"], decode["drifted"]) == (None, False)
    assert (decode["joules"], decode["tokens_per_joule"]) == (4.0, 5.0)
    assert made["model"]["bits_per_weight"] == 4.5
    assert made["engine"]["versions"]["numpy"] == versions("numpy")["numpy"]
    assert made["peak_memory_bytes"] is None


def test_energy_that_cannot_be_read_is_none() -> None:
    made = record()
    assert made["energy_source"] is None
    for test in made["tests"]:
        assert (test["joules"], test["tokens_per_joule"]) == (None, None)


def test_the_published_schema() -> None:
    Draft202012Validator.check_schema(schema())
    validator = Draft202012Validator(schema())
    figures = figures_record(
        "t", [Figure("f", "us", "GB/s", "higher", (1.0, 2.0))], {}, Conditions(None, None, None)
    )
    for made in (record(), record(()), figures):
        validator.validate(json.loads(json.dumps(made)))
        assert check_record("here", made) == made
    described = schema()["$defs"]["mlxedge-bench"]["properties"]
    assert set(described) == set(record())
    for section in ("model", "engine", "settings"):
        assert set(described[section]["properties"]) == set(record()[section])
    assert set(schema()["$defs"]["device"]["properties"]) == set(record()["device"])


def test_a_record_can_be_shared_as_it_is(tmp_path: Path) -> None:
    """It names no host, no user, and no folder."""
    from click.testing import CliRunner

    from mlxedge.cli import main

    folder = write_tiny_llama(tmp_path / "tiny")
    done = CliRunner().invoke(
        main, ["bench", str(folder), "-p", "4", "-n", "2", "-r", "1", "--engine", "numpy", "--json"]
    )
    assert done.exit_code == 0, done.stderr
    text = done.stdout.casefold()
    private = [socket.gethostname(), str(tmp_path), str(Path.home()), str(Path.cwd())]
    if getpass.getuser() != "root":
        private.append(getpass.getuser())
    for word in private:
        assert len(word) < 3 or word.casefold() not in text, word
    (made,) = json.loads(done.stdout)
    assert made["model"]["file"] == "tiny"


def test_versions_are_those_of_the_engine() -> None:
    assert {"python", "numpy", "numba"} <= set(versions("numpy"))
    assert "mlx" not in versions("numpy")
    assert {"python", "mlx", "mlx-lm"} <= set(versions("mlx"))
    assert versions("llama.cpp")["xllamacpp"]


def test_hash_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m", shards=2)
    shards = sorted(folder.glob("*.safetensors"))
    digests = [hashlib.sha256(s.read_bytes()).hexdigest() for s in shards]
    lines = "".join(f"{d}  {s.name}\n" for d, s in zip(digests, shards))
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert model_sha256(folder) == expected
    (folder / "README.md").write_text("other")
    assert model_sha256(folder) == expected
    assert model_sha256(shards[0]) == digests[0]
    assert file_name(record()).startswith("m-q4_k_m-numpy-20")
    # What is converted from it knows it by the same hash.
    mlxedge.convert(folder, ["gguf:q8_0", "mlx:4bit"], tmp_path / "out", calibrate=False)
    made = [path for path in (tmp_path / "out").iterdir() if path.suffix != ".json"]
    assert [source_sha256(path) for path in made] == [expected, expected]
    assert source_sha256(folder) is None


def test_save_and_read(tmp_path: Path) -> None:
    one, other = record(), record(())
    assert save_records([], tmp_path / "new" / "a.json") == []
    assert not (tmp_path / "new").exists()
    (path,) = save_records([one], tmp_path / "new" / "a.json")
    assert read(path) == [Result("a", one)]
    with pytest.raises(OutputExistsError, match="exists"):
        save_records([], path)
    save_records([one, other], tmp_path / "both.json")
    assert read(tmp_path / "both.json") == [Result("both[0]", one), Result("both[1]", other)]
    first, second = save_records([one, other], tmp_path / "folder")
    assert first != second
    assert [result.record for result in read(first, second)] == [one, other]
    assert len(read(tmp_path / "folder")) == 2


@pytest.mark.parametrize(
    ("content", "error", "problem"),
    [
        (b"{", CorruptFileError, "neither JSON"),
        (b"\xff\xfe", CorruptFileError, "not UTF-8"),
        (b"[" * 100_000, CorruptFileError, "neither JSON"),
        (b"[]", CorruptFileError, "holds no record"),
        (b"3", CorruptFileError, "not a record"),
        (b'{"build_commit": "x"}', CorruptFileError, "not a record"),
        (b'{"kind": "mlxedge-bench", "schema": 99}', UsageError, "schema 99"),
        (b'{"kind": "mlxedge-bench", "schema": 2}', CorruptFileError, "required property"),
        (b'{"kind": "mlxedge-figures", "schema": 2}', CorruptFileError, "required property"),
    ],
)
def test_what_is_no_record(
    tmp_path: Path, content: bytes, error: type[Exception], problem: str
) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(error, match=problem) as raised:
        read(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500 + len(str(path))


@pytest.mark.parametrize("mean", [None, 0, -1, "fast", True, [1]])
def test_a_speed_that_makes_no_sense(tmp_path: Path, mean: Any) -> None:
    bad = record()
    bad["tests"][1]["tokens_per_second"]["mean"] = mean
    path = tmp_path / "r.json"
    path.write_text(json.dumps(bad))
    with pytest.raises(CorruptFileError, match="tests/1/tokens_per_second/mean makes no sense"):
        read(path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no such file"):
        read(tmp_path / "none.json")
    with pytest.raises(SourceNotFoundError, match="in this folder"):
        read(tmp_path)
    with pytest.raises(UsageError, match="are in datasets"):
        read_results(["hf://models/org/name"])


def test_an_address(tmp_path: Path) -> None:
    """Over HTTP, from this machine."""
    import functools
    import http.server
    import threading

    from mlxedge.errors import NetworkError

    save_records([record()], tmp_path / "a.json")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            assert read_results([f"{base}/a.json"]) == [Result("a", record_of(tmp_path))]
            with pytest.raises(SourceNotFoundError, match="404"):
                read_results([f"{base}/b.json"])
        finally:
            server.shutdown()
            thread.join()
    with pytest.raises(NetworkError, match="cannot be read"):
        read_results([f"{base}/a.json"])


def record_of(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "a.json").read_text("utf-8"))
    return made


def test_csv_has_every_run_and_markdown_escapes() -> None:
    lines = to_csv([record()]).splitlines()
    assert len(lines) == 1 + 3
    head = lines[0].split(",")
    assert [line.split(",")[head.index("tokens_per_second")] for line in lines[1:]] == [
        "200.0", "250.0", "10.0",
    ]  # fmt: skip
    made = to_markdown((["a"], [["x | y\n\\z"]]))
    assert made == "| a |\n| --- |\n| x \\| y \\\\z |\n"
