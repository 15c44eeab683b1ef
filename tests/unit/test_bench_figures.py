"""Records of figures in compare: what stands beside what, what a baseline finds, and the report."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from oracles.bench_records import CONDITIONS, DEVICE, record, speeds

from mlxedge.bench.compare_figures import compare_figures
from mlxedge.bench.figures import Better, Figure, figures_record
from mlxedge.bench.record import check_record, save_records
from mlxedge.bench.regression import against
from mlxedge.bench.report import page
from mlxedge.bench.results import Result
from mlxedge.bench.tables import device_folder, figures_beside
from mlxedge.cli import main
from mlxedge.errors import UsageError

OTHER = {"cpu": "Apple M4", "gpu_cores": 10, "memory_bytes": 16 << 30}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def of(
    values: list[float],
    *,
    name: str = "convert",
    unit: str = "s",
    better: Better = "lower",
    title: str = "converting",
    device: dict[str, Any] | None = None,
    versions: dict[str, str | None] | None = None,
) -> dict[str, Any]:
    """A record of one figure."""
    figure = Figure(name, "mlxedge", unit, better, tuple(values))
    return figures_record(
        title, [figure], versions or {"numpy": "2"}, CONDITIONS, device=DEVICE | (device or {})
    )


def test_values_that_have_no_interval() -> None:
    """A divergence may be 0, or a little below by rounding."""
    for values in ([0.0, 0.0, 0.0], [-1e-9, 1e-9, 2e-9], [1.0, 2.0]):
        made = of(values, unit="nats")
        check_record("here", made)
        (figure,) = made["figures"]
        assert (figure["low"], figure["high"]) == (None, None)
        assert figure["values"] == values


def test_one_title_is_one_table() -> None:
    results = [
        Result("a", of(speeds(2.0, 0.01))),
        Result("b", of(speeds(3.0, 0.01), device=OTHER)),
        Result("c", of([1.0], title="other")),
        Result("d", of(speeds(2.0, 0.02), device={"cpu": "Apple M3"})),
    ]
    first, second = compare_figures(results)
    assert [first.title, second.title] == ["converting", "other"]
    (row,) = first.rows
    a, b, d = row.cells
    assert a is not None
    assert b is not None
    assert d is not None
    assert (a.ratio, a.tied) == (None, False)
    assert b.ratio == pytest.approx(1.5, rel=1e-3)
    assert not b.tied
    assert d.tied
    headers, rows = figures_beside(first)
    assert headers[4:] == [
        "Apple M2 Max, 30 GPU cores, 32 GiB",
        "Apple M4, 10 GPU cores, 16 GiB",
        "Apple M3, 30 GPU cores, 32 GiB",
    ]
    assert rows == [
        ["convert", "mlxedge", "s", "lower", "2", "3 (× 1.50)", "2 (× 1.00, no difference shown)"]
    ]


def test_figures_that_only_some_records_have() -> None:
    group, *rest = compare_figures(
        [Result("a", of([1.0])), Result("b", of([4.0], name="load")), Result("c", of([2.0]))]
    )
    assert not rest
    headers, rows = figures_beside(group)
    assert headers[4:] == ["a", "b", "c"]  # of one device
    assert rows == [
        ["convert", "mlxedge", "s", "lower", "1", "-", "2 (× 2.00, no difference shown)"],
        ["load", "mlxedge", "s", "lower", "-", "4", "-"],
    ]


def test_units_are_never_mixed() -> None:
    group, *_ = compare_figures([Result("a", of([1.0])), Result("b", of([1e3], unit="ms"))])
    assert [row.unit for row in group.rows] == ["s", "ms"]


def test_versions_that_differ_are_named(tmp_path: Path) -> None:
    one = of([1.0], versions={"numpy": "2.0", "numba": "0.61", "mlx": None})
    other = of([1.0], versions={"numpy": "2.1", "numba": "0.61"}, device=OTHER)
    other["mlxedge"] = "0.0.9"
    paths = [*save_records([one], tmp_path / "a.json"), *save_records([other], tmp_path / "b.json")]
    done = run(*paths)
    assert done.exit_code == 0, done.stderr
    assert f"figures of converting differ in mlxedge: {one['mlxedge']} / 0.0.9" in done.stderr
    assert "figures of converting differ in numpy: 2.0 / 2.1" in done.stderr
    assert "numba" not in done.stderr
    assert "mlx:" not in done.stderr


def test_models_and_figures_stand_apart(tmp_path: Path) -> None:
    save_records([record()], tmp_path / "m.json")
    save_records([of([1.0, 1.1, 1.2]), of([5.0], title="other")], tmp_path / "f.json")
    done = run(tmp_path)
    assert done.exit_code == 0, done.stderr
    of_models, figures = done.stdout.split("converting\n")
    assert "tg20" in of_models
    assert "convert" not in of_models
    assert "other\n" in figures
    found = json.loads(run(tmp_path, "--json").stdout)
    assert len(found["groups"]) == 1
    assert [group["title"] for group in found["figures"]] == ["converting", "other"]
    (row,) = found["figures"][0]["rows"]
    assert row["values"][0]["mean"] == pytest.approx(1.1)
    assert found["figures"][1]["rows"][0]["values"][0]["interval"] is None
    assert "**converting**\n\n| figure |" in run(tmp_path, "--md").stdout
    assert run(tmp_path, "--csv").exit_code == 2
    lines = list(csv.DictReader(io.StringIO(run(tmp_path / "f.json", "--csv").stdout)))
    assert [line["value"] for line in lines] == ["1.0", "1.1", "1.2", "5.0"]
    assert run(tmp_path / "f.json", "--svg", tmp_path / "x.svg").exit_code == 2


@pytest.mark.parametrize(
    ("unit", "better", "now", "verdict", "worse"),
    [
        ("s", "lower", 1.20, "worse", True), ("s", "lower", 0.80, "better", False),
        ("s", "lower", 1.03, "worse", False), ("GB/s", "higher", 0.80, "worse", True),
        ("GB/s", "higher", 1.20, "better", False), ("GB/s", "higher", 0.97, "worse", False),
        ("s", "lower", 1.0, "same", False),
    ],
)  # fmt: skip
def test_a_figure_against_a_baseline(
    unit: str, better: Better, now: float, verdict: str, worse: bool
) -> None:
    old, new = (of(speeds(v, 0.005), unit=unit, better=better) for v in (1.0, now))
    (change,) = against([Result("old", old)], [Result("new", new)])
    assert change.ratio == pytest.approx(now, rel=1e-3)
    assert (change.verdict, change.worse_by(0.05)) == (verdict, worse)


def test_the_same_bound_either_way() -> None:
    """A twentieth more of the time is a little less than a twentieth of the speed lost."""
    old, new = of(speeds(1.0, 0.0001)), of(speeds(1.0501, 0.0001))
    (change,) = against([Result("old", old)], [Result("new", new)])
    assert not change.worse_by(0.05)
    (change,) = against([Result("old", old)], [Result("new", of(speeds(1.06, 0.0001)))])
    assert change.worse_by(0.05)


def test_what_a_baseline_must_share() -> None:
    one = Result("old", of([1.0] * 3))
    with pytest.raises(UsageError, match="no figures of the same title"):
        against([one], [Result("new", of([1.0] * 3, title="other"))])
    with pytest.raises(UsageError, match="no figures of the same title"):
        against([one], [Result("new", record())])
    elsewhere = Result("new", of([1.0] * 3, device=OTHER))
    with pytest.raises(UsageError, match="on another device"):
        against([one], [elsewhere])
    assert against([one], [elsewhere], force=True)
    (few,) = against([one], [Result("new", of([9.0]))])
    assert (few.verdict, few.worse_by(0.05)) == ("few", False)
    with pytest.raises(UsageError, match="no figures"):  # of zero there is no ratio
        against([Result("zero", of([0.0] * 3))], [one])


def test_the_exit_status_of_figures(tmp_path: Path) -> None:
    save_records([of(speeds(2.0, 0.01)), record()], tmp_path / "old.json")
    save_records([of(speeds(2.6, 0.01)), record()], tmp_path / "new.json")
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    fine = run(old, "--baseline", old, "--fail-below", "5%")
    assert (fine.exit_code, fine.stderr) == (0, "")
    failed = run(new, "--baseline", old, "--fail-below", "5%")
    assert failed.exit_code == 1
    assert "worse: convert, mlxedge of new[0] is at 130.0% of what it was" in failed.stderr
    assert "2.6 s" in failed.stdout
    assert run(new, "--baseline", old).exit_code == 0
    told = json.loads(run(new, "--baseline", old, "--fail-below", "5%", "--json").stdout)
    assert [(t["unit"], t["better"], t["worse"]) for t in told] == [
        ("s", "lower", True), ("tokens/s", "higher", False), ("tokens/s", "higher", False),
    ]  # fmt: skip


def test_the_report_has_a_table_of_figures() -> None:
    hostile = "<script>alert(1)</script>"
    results = [Result("a", of([1.0] * 3, title=hostile, name=hostile)), Result("b", record())]
    titled = compare_figures(results[:1])
    made = page([], [], titled)
    assert '<h2 id="figures">Figures</h2>' in made
    assert '<h2 id="results">' not in made
    assert "<script" not in made
    assert made.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
    assert 'id="figures"' not in page([results[1]], [])


def test_the_folder_of_a_device() -> None:
    assert device_folder(DEVICE) == "apple-m2-max-30-gpu-cores-32-gib"
    assert device_folder({"cpu": "AMD EPYC 9/../7", "memory_bytes": 24 << 30}) == (
        "amd-epyc-9-7-24-gib"
    )
    assert device_folder({}) == "not-available"
