"""Which results may be ranked, what their differences support, and what compare says of both."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from oracles.bench_records import record, speeds

from mlxedge.bench.compare import Row, compare, differences, share_of_roofline
from mlxedge.bench.record import save_records, versions
from mlxedge.bench.regression import Change, against
from mlxedge.bench.results import Result
from mlxedge.cli import main
from mlxedge.errors import UsageError


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def of_speed(mean: float, spread: float = 0.01, **changes: Any) -> dict[str, Any]:
    """A record whose five decode runs are about so fast."""
    return record((), [20 / speed for speed in speeds(mean, spread)], **changes)


def test_the_same_thing_on_two_devices_is_ranked() -> None:
    slow = Result("m2", of_speed(10.0))
    fast = Result("m4", of_speed(13.0, device={"cpu": "Apple M4 Max", "gpu_cores": 40}))
    (group,) = compare([slow, fast])
    (ranking,) = group.rankings
    assert [row.result.name for row in ranking.rows] == ["m4", "m2"]
    assert ranking.ties == (False, False)
    assert differences([slow, fast]) == []


def test_no_difference_is_shown_where_intervals_overlap() -> None:
    results = [Result("a", of_speed(10.0, 0.05)), Result("b", of_speed(10.2, 0.05))]
    (group,) = compare(results)
    assert group.rankings[0].ties == (False, True)
    few = [Result("a", record((), (2.0,))), Result("b", record((), (1.0,)))]
    assert compare(few)[0].rankings[0].ties == (False, True)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model": {"sha256": "cd" * 32}}, "model hash"),
        ({"model": {"sha256": None}}, "model hash"),
        ({"model": {"quantization": "Q8_0"}}, "quantization"),
        ({"engine": {"name": "mlx"}}, "engine"),
        ({"engine": {"build": "mlxedge 9"}}, "engine build"),
        ({"engine": {"processor": "gpu"}}, "processor"),
        ({"engine": {"neural_accelerators": True}}, "neural accelerators"),
        ({"engine": {"versions": {**versions("numpy"), "numba": "0.0"}}}, "versions"),
    ],
)
def test_what_is_not_ranked(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    one, other = record(), record(**change)
    assert what in [d.what for d in differences([Result("a", one), Result("b", other)])]
    paths = [*save_records([one], tmp_path / "a.json"), *save_records([other], tmp_path / "b.json")]
    apart = run(*paths)
    assert apart.exit_code == 0
    assert f"not ranked together, since they differ in {what}" in apart.stderr
    assert apart.stdout.count("pp100") == 2
    # Each is the first of its own group.
    rows = [line.split() for line in apart.stdout.splitlines() if "tg20" in line]
    assert [row[-3] for row in rows] == ["1.00", "1.00"]
    groups = json.loads(run(*paths, "--json").stdout)["groups"]
    assert [len(group["results"]) for group in groups] == [1, 1]
    forced = run(*paths, "--force")
    assert forced.exit_code == 0
    assert f"warning: ranked by force, though they differ in {what}" in forced.stderr
    assert len(json.loads(run(*paths, "--force", "--json").stdout)["groups"]) == 1


def test_a_model_is_known_by_its_hash_and_not_by_its_name() -> None:
    renamed = record(model={"name": "mine"})
    assert len(compare([Result("a", record()), Result("b", renamed)])) == 1
    unknown = record(model={"sha256": None})
    assert len(compare([Result("a", unknown), Result("b", copy.deepcopy(unknown))])) == 2


def test_other_tests_of_a_group_are_rankings_of_their_own() -> None:
    deep = record()
    for test in deep["tests"]:
        test["depth"] = 4096
        test["name"] += " @ d4096"
    (group,) = compare([Result("a", record()), Result("b", deep)])
    assert [(r.test, len(r.rows)) for r in group.rankings] == [
        ("pp100", 1), ("pp100 @ d4096", 1), ("tg20", 1), ("tg20 @ d4096", 1),
    ]  # fmt: skip


def test_share_of_the_roofline() -> None:
    made = of_speed(50.0, model={"bytes_per_token": 4_000_000_000})
    (test,) = made["tests"]
    assert share_of_roofline(made, test) == pytest.approx(0.5, rel=1e-3)
    assert Row(Result("a", record()), record()["tests"][0]).roofline is None  # prefill
    unknown = of_speed(50.0, device={"bandwidth_gb_s": None})
    assert share_of_roofline(unknown, unknown["tests"][0]) is None


def test_compare_shows_a_table(tmp_path: Path) -> None:
    save_records([of_speed(10.0)], tmp_path / "a.json")
    save_records(
        [of_speed(20.0, device={"cpu": "Apple M4", "gpu_cores": None})], tmp_path / "b.json"
    )
    done = run(tmp_path)
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    about, header, first, second = done.stdout.splitlines()
    assert about == "m, Q4_K_M, numpy, mlxedge 0.1.0, model abababababab"
    assert header.split() == [
        *("test", "result", "device", "threads", "tokens/s", "95%", "interval"),
        *("ratio", "roofline", "drift"),
    ]  # fmt: skip
    assert first.split()[:2] == ["tg20", "b"]
    assert "Apple M4, 12 processors, 32 GiB" in first
    assert second.split()[:2] == ["tg20", "a"]
    assert "Apple M2 Max, 30 GPU cores, 32 GiB" in second
    assert " 0.50 " in second


def test_published_results_stand_apart_with_what_they_are_from(tmp_path: Path) -> None:
    save_records([record()], tmp_path / "a.json")
    done = run(tmp_path, "--reference")
    _, table = done.stdout.split("published results of llama-2-7b Q4_0")
    assert "not of these builds, so not ranked" in table
    for chip in ("M1 ", "M3 Ultra", "M4 Max", "M5 Max"):
        assert f"\n{chip}" in table
    assert "8e672ef" in table
    assert "secondary copy" in table


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Any]:
    return against([Result("old", before)], [Result("new", now)])


@pytest.mark.parametrize(
    ("now", "spread", "slower"),
    [
        (100.0, 0.01, False), (97.0, 0.005, False), (92.0, 0.01, True), (110.0, 0.01, False),
        (92.0, 0.25, False),
    ],
)  # fmt: skip
def test_a_slowdown_must_be_large_and_supported(now: float, spread: float, slower: bool) -> None:
    (change,) = changes(of_speed(100.0, 0.01), of_speed(now, spread))
    assert change.ratio == pytest.approx(now / 100, rel=2e-2)
    assert change.worse_by(0.05) == slower


def test_builds_may_differ_from_the_baseline_and_devices_may_not() -> None:
    newer = of_speed(80.0, engine={"build": "mlxedge 2", "versions": {"numpy": "9"}})
    (change,) = changes(of_speed(100.0), newer)
    assert change.worse_by(0.05)
    elsewhere = of_speed(80.0, device={"cpu": "Apple M4"})
    with pytest.raises(UsageError, match="on another device"):
        changes(of_speed(100.0), elsewhere)
    assert against([Result("o", of_speed(100.0))], [Result("n", elsewhere)], force=True)
    with pytest.raises(UsageError, match="has no test of the same model"):
        changes(of_speed(100.0), of_speed(80.0, model={"sha256": "cd" * 32}))


def test_the_exit_status_of_a_regression(tmp_path: Path) -> None:
    (old,) = save_records([of_speed(100.0)], tmp_path / "old.json")
    (same,) = save_records([of_speed(99.5)], tmp_path / "same.json")
    (slow,) = save_records([of_speed(85.0)], tmp_path / "slow.json")
    fine = run(same, "--baseline", old, "--fail-below", "5%")
    assert (fine.exit_code, fine.stderr) == (0, "")
    assert "no difference shown" in fine.stdout
    failed = run(slow, "--baseline", old, "--fail-below", "5%")
    assert failed.exit_code == 1
    assert "slower: tg20 of slow is at 85.0% of what it was" in failed.stderr
    assert run(slow, "--baseline", old).exit_code == 0  # it is only shown
    assert run(slow, "--baseline", old, "--fail-below", "20").exit_code == 0
    (told,) = json.loads(run(slow, "--baseline", old, "--fail-below", "5%", "--json").stdout)
    assert told["worse"]
    assert told["interval"][1] < 0.9
    for wrong in ("x", "150%", "-1"):
        assert run(slow, "--baseline", old, "--fail-below", wrong).exit_code == 2
    assert run(slow, "--fail-below", "5%").exit_code == 2


def test_a_baseline_of_several_records_is_searched_whole() -> None:
    """One has the prefill test, another that of decode: both are compared."""
    whole = record([0.5] * 5, [0.2] * 5)
    kinds = {test["kind"] for test in whole["tests"]}
    parts = [
        Result(kind, whole | {"tests": [t for t in whole["tests"] if t["kind"] == kind]})
        for kind in sorted(kinds)
    ]
    found = against(parts, [Result("now", whole)])
    assert len(found) == len(kinds) == 2


def test_a_figure_that_became_nothing_is_no_error() -> None:
    assert not Change("a", "b", "s", "lower", 1.0, 0.0, 0.0, None).worse_by(0.05)


def test_a_wide_row_between_two_makes_no_tie_of_them(tmp_path: Path) -> None:
    """Ties are with the fastest, as ratios are."""
    results = [
        Result("fast", of_speed(200.0)),
        Result("wide", of_speed(150.0, spread=0.9)),
        Result("slow", of_speed(100.0)),
    ]
    for result in results:
        result.record["device"] = dict(result.record["device"], cpu=result.name)
    [group] = compare(results)
    for ranking in group.rankings:
        told = {row.result.name: tie for row, tie in zip(ranking.rows, ranking.ties, strict=True)}
        assert not told["slow"]


@pytest.mark.parametrize("option", ["--html", "--svg", "--csv", "--reference"])
def test_what_a_baseline_has_no_place_for_is_refused(tmp_path: Path, option: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(of_speed(100.0)))
    value = [tmp_path / "page"] if option in ("--html", "--svg") else []
    done = run(file, "--baseline", file, option, *value)
    assert done.exit_code == 2
    assert "only --json and --md" in done.stderr


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    record = json.dumps(of_speed(100.0))
    assert '"mean": 100.0' in record
    file.write_text(record.replace('"mean": 100.0', f'"mean": {text}', 1))
    done = run(file, "--json")
    assert done.exit_code == 1
    assert "no number of JSON's" in done.stderr


@pytest.mark.parametrize("address", ["http://localhost:abc/x", "http://[::1", "http://a b/x"])
def test_an_address_that_is_none(address: str) -> None:
    done = run(address)
    assert done.exit_code == 2
    assert "is no address" in done.stderr


def test_of_a_folder_other_json_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(of_speed(100.0)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert run(tmp_path).exit_code == 0
    (tmp_path / "a.json").unlink()
    (tmp_path / "other.json").write_text("{}")
    done = run(tmp_path)
    assert done.exit_code == 1
    assert "no results" in done.stderr
