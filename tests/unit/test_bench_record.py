"""Series, records, their comparison; nothing is timed here."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from oracles.tiny import write_tiny_llama

from mlxedge.bench.compare import differences, ratio
from mlxedge.bench.measure import Measurement, Series
from mlxedge.bench.record import (
    file_name,
    make_record,
    model_sha256,
    read_records,
    save_records,
    versions,
)
from mlxedge.cli import main
from mlxedge.errors import CorruptFileError, OutputExistsError, SourceNotFoundError, UsageError
from mlxedge.inspect import Inspection, TensorInfo

DEVICE = {"cpu": "Apple M2 Max", "gpu_cores": 30, "memory_bytes": 32 << 30}


def record(
    prefill: tuple[float, ...] | None = (0.5, 0.4), decode: tuple[float, ...] | None = (2.0,)
) -> dict[str, Any]:
    found = Inspection(
        name="m",
        kind="gguf",
        files={"m-q4_k_m.gguf": 160},
        tensors=[TensorInfo("a", (2, 256), "q4_k", 288)],
        metadata={},
        quantization="Q4_K_M",
        path=Path("m-q4_k_m.gguf"),
    )
    measured = Measurement(
        engine="numpy",
        processor="cpu",
        threads=2,
        prompt_tokens=100,
        generated_tokens=20,
        repeats=2,
        warmups=1,
        load_seconds=0.25,
        peak_memory_bytes=None,
        prefill=None if prefill is None else Series(100, prefill),
        decode=None if decode is None else Series(20, decode),
    )
    return make_record(found, measured, DEVICE, "ab" * 32)


def test_statistics() -> None:
    series = Series(100, (0.5, 0.4, 1.0))
    assert series.speeds == [200.0, 250.0, 100.0]
    assert series.mean == pytest.approx(550 / 3)
    assert series.median == 200.0
    assert series.stddev == pytest.approx(76.376, abs=1e-3)
    assert series.drift == -0.5
    assert Series(1, (2.0,)).stddev is None


def test_a_record_keeps_every_run() -> None:
    made = json.loads(json.dumps(record()))
    assert made["kind"] == "mlxedge-bench"
    assert made["schema"] == 1
    assert made["prefill"]["seconds"] == [0.5, 0.4]
    assert made["prefill"]["tokens_per_second"] == [200.0, 250.0]
    assert made["prefill"]["drift"] == 0.25
    assert made["decode"] == {
        "tokens": 20, "seconds": [2.0], "tokens_per_second": [10.0],
        "mean": 10.0, "stddev": None, "median": 10.0, "drift": 0.0,
    }  # fmt: skip
    assert made["model"]["bits_per_weight"] == 4.5
    assert made["engine"]["versions"]["numpy"] == versions("numpy")["numpy"]
    assert made["peak_memory_bytes"] is None


def test_versions_are_those_of_the_engine() -> None:
    assert {"python", "numpy", "numba"} <= set(versions("numpy"))
    assert "mlx" not in versions("numpy")
    assert {"python", "mlx", "mlx-lm"} <= set(versions("mlx"))


def test_hash_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m", shards=2)
    shards = sorted(folder.glob("*.safetensors"))
    digests = [hashlib.sha256(s.read_bytes()).hexdigest() for s in shards]
    lines = "".join(f"{d}  {s.name}\n" for d, s in zip(digests, shards))
    assert model_sha256(folder) == hashlib.sha256(lines.encode()).hexdigest()
    (folder / "README.md").write_text("other")
    assert model_sha256(folder) == hashlib.sha256(lines.encode()).hexdigest()
    assert model_sha256(shards[0]) == digests[0]
    assert file_name(record()).startswith("m-q4_k_m-numpy-20")


def test_save_and_read(tmp_path: Path) -> None:
    one, other = record(), record(prefill=None)
    assert save_records([], tmp_path / "new" / "a.json") == []
    assert not (tmp_path / "new").exists()
    (path,) = save_records([one], tmp_path / "new" / "a.json")
    assert read_records([path]) == [("a", one)]
    with pytest.raises(OutputExistsError, match="exists"):
        save_records([], path)
    save_records([one, other], tmp_path / "both.json")
    assert read_records([tmp_path / "both.json"]) == [("both[0]", one), ("both[1]", other)]
    first, second = save_records([one, other], tmp_path / "folder")
    assert first != second
    assert [r for _, r in read_records([first, second])] == [one, other]
    assert len(read_records([tmp_path / "folder"])) == 2


@pytest.mark.parametrize(
    ("content", "error", "problem"),
    [
        ("{", CorruptFileError, "not JSON"),
        ("[]", CorruptFileError, "holds no record"),
        ("3", CorruptFileError, "not a record"),
        ('{"build_commit": "x"}', CorruptFileError, "not a record"),
        ('{"kind": "mlxedge-bench", "schema": 99}', UsageError, "schema 99"),
        ('{"kind": "mlxedge-bench", "schema": 1}', CorruptFileError, "has no device"),
    ],
)
def test_what_is_no_record(
    tmp_path: Path, content: str, error: type[Exception], problem: str
) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(error, match=problem):
        read_records([path])


@pytest.mark.parametrize("mean", [None, 0, -1, "fast", True, float("nan"), float("inf")])
def test_a_speed_that_makes_no_sense(tmp_path: Path, mean: Any) -> None:
    bad = record()
    bad["decode"]["mean"] = mean
    path = tmp_path / "r.json"
    path.write_text(json.dumps(bad))
    with pytest.raises(CorruptFileError, match="decode"):
        read_records([path])


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no such file"):
        read_records([tmp_path / "none.json"])
    with pytest.raises(SourceNotFoundError, match="in this folder"):
        read_records([tmp_path])


def _changed(**sections: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(record())
    for section, values in sections.items():
        made[section] |= values
    return made


def test_the_same_thing_on_two_devices_compares() -> None:
    other = _changed(device={"cpu": "Apple M4"}, engine={"threads": 8})
    other["created"], other["prefill"] = "2030-01-01T00:00:00+00:00", {"mean": 675.0}
    assert differences([record(), other]) == []
    assert ratio(other, record(), "prefill") == 3.0
    assert ratio(record(decode=None), record(), "decode") is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model": {"sha256": "cd" * 32}}, "model hash"),
        ({"model": {"sha256": None}}, "model hash"),
        ({"model": {"quantization": "Q8_0"}}, "quantization"),
        ({"settings": {"prompt_tokens": 7}}, "prompt and generation"),
        ({"settings": {"generated_tokens": 7}}, "prompt and generation"),
        ({"engine": {"name": "mlx"}}, "engine"),
        ({"engine": {"processor": "gpu"}}, "processor"),
        ({"engine": {"versions": {**versions("numpy"), "numba": "0.0"}}}, "numba"),
        ({"engine": {"versions": {"numpy": versions("numpy")["numpy"]}}}, "numba"),
    ],
)
def test_what_does_not_compare(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    one, other = record(), _changed(**change)
    assert what in [d.what for d in differences([one, other])]
    paths = [*save_records([one], tmp_path / "a.json"), *save_records([other], tmp_path / "b.json")]
    arguments = ["compare", *map(str, paths)]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert what in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    forced = CliRunner().invoke(main, [*arguments, "--force"])
    assert forced.exit_code == 0
    assert f"warning: differs: {what}" in forced.stderr
    assert "ratio" not in forced.stdout
    assert forced.stdout.count("pp100") == 2
    as_json = CliRunner().invoke(main, [*arguments, "--force", "--json"])
    assert what in [d["what"] for d in json.loads(as_json.stdout)["differences"]]


def test_unknown_hashes_never_agree() -> None:
    unknown = _changed(model={"sha256": None})
    assert [d.what for d in differences([unknown, unknown])] == ["model hash"]
    assert differences([unknown]) == []


def test_compare_shows_a_table(tmp_path: Path) -> None:
    faster = _changed(device={"cpu": "Apple M4", "gpu_cores": None, "memory_bytes": None})
    faster["prefill"] |= {"mean": 450.0}
    save_records([record()], tmp_path / "a.json")
    save_records([faster], tmp_path / "b.json")
    done = CliRunner().invoke(main, ["compare", str(tmp_path)])
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    header, *rows = [line.split("  ") for line in done.stdout.splitlines()]
    cells = [[c.strip() for c in row if c.strip()] for row in rows]
    assert [c.strip() for c in header if c.strip()][-3:] == ["tokens/s", "drift", "ratio"]
    assert cells[0] == [
        "a", "Apple M2 Max, 30 GPU cores, 32 GiB", "m", "Q4_K_M", "numpy, 2 threads", "pp100",
        "225.00 ± 35.36", "+25.0 %", "1.00",
    ]  # fmt: skip
    assert cells[1][5:] == ["tg20", "10.00", "+0.0 %", "1.00"]
    assert cells[2][:2] == ["b", "Apple M4"]
    assert cells[2][-1] == "2.00"
    loaded = json.loads(CliRunner().invoke(main, ["compare", str(tmp_path), "--json"]).stdout)
    assert [r["ratio"]["prefill"] for r in loaded["records"]] == [1.0, 2.0]
