"""The report in a real browser: it draws, sorts and filters, says nothing on the console, asks for
nothing, and is readable on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracles.bench_records import record, speeds
from oracles.browser import browser

from mlxedge.bench.compare import compare
from mlxedge.bench.report import page
from mlxedge.bench.results import Result

HOSTILE = '</script><script>document.title="owned"</script><b>x</b>'


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = []
    for cpu, cores, bandwidth, speed in (
        ("Apple M2 Max", 38, 400.0, 66.0),
        ("Apple M4", 10, 120.0, 24.0),
        ("Apple M3 Ultra", 80, 819.0, 92.0),
    ):
        device = {"cpu": cpu, "gpu_cores": cores, "bandwidth_gb_s": bandwidth}
        made = record(
            [100 / s for s in speeds(10 * speed, 0.02)],
            [20 / s for s in speeds(speed, 0.04)],
            device=device,
            joules=5.0 if cores == 10 else None,
            model={"bytes_per_token": 4_000_000_000, "name": HOSTILE},
        )
        results.append(Result(cpu, made))
    results.append(Result("other", record(engine={"name": "mlx"}, device={"cpu": "AMD EPYC"})))
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(results, compare(results), reference=True), encoding="utf-8")
    return path


@pytest.fixture
def tab(running: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The report in a tab; anything on the console and any request but its own fail the test."""
    options = getattr(request, "param", {})
    context = running.new_context(**options)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda sent: asked.append(sent.url))
    tab.goto(report.as_uri())
    yield tab
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    context.close()


def column(tab: Any, name: str) -> list[str]:
    """What the rows that are shown have in a column."""
    found: list[str] = tab.evaluate(
        """name => {
          const heads = [...document.querySelectorAll("#table th")];
          const at = heads.findIndex((head) => head.textContent.trim() === name);
          const rows = [...document.querySelectorAll("#table tbody tr")];
          return rows.filter((row) => !row.hidden).map((row) => row.cells[at].textContent.trim());
        }""",
        name,
    )
    return found


def test_it_draws(tab: Any) -> None:
    assert tab.title() == "Benchmark report"  # and not what the name of a model wanted
    assert len(column(tab, "device")) == 8
    charts = tab.locator("figure svg")
    assert charts.count() == 7  # of two groups bars, scatter and drift, and the published results
    for number in range(charts.count()):
        box = charts.nth(number).bounding_box()
        assert box["width"] > 300
        assert box["height"] > 60
    assert tab.locator("figure svg circle").count() == 3 + 1 + 32
    assert tab.locator("figure svg path.whisker").count() == 6


def test_it_sorts_by_number_and_back(tab: Any) -> None:
    tab.get_by_role("button", name="tokens/s").click()
    speed = [float(text.split()[0]) for text in column(tab, "tokens/s")]
    assert speed == sorted(speed)
    head = tab.get_by_role("columnheader", name="tokens/s")
    assert head.get_attribute("aria-sort") == "ascending"
    tab.get_by_role("button", name="tokens/s").click()
    assert [float(text.split()[0]) for text in column(tab, "tokens/s")] == speed[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    tab.get_by_role("button", name="device").click()
    assert column(tab, "device") == sorted(column(tab, "device"))
    assert head.get_attribute("aria-sort") is None
    # What is not available comes last either way.
    for _ in range(2):
        tab.get_by_role("button", name="tokens/J").click()
        assert column(tab, "tokens/J")[-1] == "not available"
        assert column(tab, "tokens/J")[0] != "not available"


def test_it_filters(tab: Any) -> None:
    tab.get_by_label("Search").fill("m2 max tg20")
    assert len(column(tab, "device")) == 1
    assert tab.locator("#count").inner_text() == "1 of 8 rows"
    tab.get_by_label("Search").fill("")
    tab.get_by_role("combobox", name="Test").select_option("pp100")
    assert set(column(tab, "test")) == {"pp100"}
    tab.get_by_role("combobox", name="Sort by").select_option(label="tokens/s")
    speed = [float(text.split()[0]) for text in column(tab, "tokens/s")]
    assert speed == sorted(speed, reverse=True)


def test_names_for_those_who_do_not_see_it(tab: Any) -> None:
    for role, name in (
        ("region", "Table of results"), ("searchbox", "Search"), ("combobox", "Test"),
        ("combobox", "Sort by"), ("heading", "Results"), ("table", None),
    ):  # fmt: skip
        assert tab.get_by_role(role, **({"name": name} if name else {})).first.is_visible(), name
    images = tab.get_by_role("img")
    assert images.count() == 7
    for number in range(images.count()):
        assert images.nth(number).get_attribute("aria-label")
    unnamed = tab.evaluate(
        """[...document.querySelectorAll("button, input, select")].filter((control) =>
          !control.textContent.trim() && !control.labels?.length).length"""
    )
    assert unnamed == 0


PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True}


@pytest.mark.parametrize("tab", [PHONE], indirect=True)
def test_on_a_phone(tab: Any) -> None:
    """Nothing makes the page wider than the screen, and every cell says what it is."""
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    row = tab.locator("#table tbody tr").first
    assert row.evaluate("row => getComputedStyle(row).display") == "block"
    label = row.locator("td").nth(3).evaluate("cell => getComputedStyle(cell, '::before').content")
    assert label == '"tokens/s"'
    size = row.locator("td").nth(3).evaluate("cell => parseFloat(getComputedStyle(cell).fontSize)")
    assert size > 12


CONTRAST = """() => {
  const luminance = (text) => {
    const parts = text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
    const linear = parts.map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const page = luminance(getComputedStyle(document.querySelector("figure")).backgroundColor);
  const ratio = (ink) => {
    const other = luminance(ink);
    return (Math.max(page, other) + 0.05) / (Math.min(page, other) + 0.05);
  };
  const found = [...document.querySelectorAll("figure text, p, td, th, caption, label")]
    .map((e) => ratio(getComputedStyle(e)[e.tagName === "text" ? "fill" : "color"]));
  return Math.min(...found);
}"""


@pytest.mark.parametrize(
    "tab", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True, ids=str
)
def test_in_the_light_and_in_the_dark(tab: Any) -> None:
    """Texts stand out as WCAG AA asks: 4.5 to 1."""
    assert tab.evaluate(CONTRAST) >= 4.5
