"""The page in a real browser without a network: every chart draws, the switches work, narrow screens and dark ones."""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from blaq.report.page import Report, build, write_page
from blaq.report.read import read_runs

WriteRun = Callable[..., Path]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chrome or Chromium on this machine: install chromium to test the page"
)


@dataclass
class Opened:
    """A page in the browser, and what it complained about or asked the network for."""

    page: Any
    report: Report
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def drawn(self) -> None:
        """Wait until every chart is drawn."""
        self.page.wait_for_selector("html[data-drawn]", timeout=30_000)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Iterator[Opened]:
    from playwright.sync_api import sync_playwright

    folder = tmp_path_factory.mktemp("browser")
    for seed in range(2):
        for method, rate in (("float", 0.5), ("laq", 0.3), ("blaq", 0.4)):
            loss = [math.exp(-rate * epoch) * (1 + 0.1 * seed) for epoch in range(1, 11)]
            zigzag = None if method == "float" else 0.3 * rate
            write_run(folder / f"{method}-{seed}", method=method, seed=seed, loss=loss, zigzag_rate=zigzag)
    for a in (0.7, 0.8):
        for period in (1, 5):
            write_run(folder / f"{a}-{period}", method="blaq", bits=2, a=a, period=period)
    report = build(read_runs([folder]))
    write_page(report, folder / "report.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        found = Opened(page, report)
        page.on("console", lambda message: found.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: found.complaints.append(str(error)))
        page.on("request", lambda sent: found.requests.append(sent.url))
        page.goto((folder / "report.html").as_uri())
        found.drawn()
        yield found
        browser.close()


def test_every_chart_draws(opened: Opened) -> None:
    slugs = [figure.slug for figure in opened.report.figures]
    assert len(slugs) == 7  # two panels of curves, zig-zag, layers, paths of LAQ and BLAQ, a heat map
    for slug in slugs:
        marks = opened.page.locator(
            f"[id='{slug}'] svg :is(path.js-line, path.js-fill, path.point, g.hm image, g.hm path)"
        )
        assert marks.count() > 0, slug
        box = opened.page.locator(f"[id='{slug}'] svg.main-svg").first.bounding_box()
        assert box["width"] > 300 and box["height"] > 100, slug


def test_the_charts_show_the_numbers(opened: Opened) -> None:
    shown = opened.page.evaluate(
        "() => document.getElementById('1-bit-binary-convergence').calcdata.map(of => of.map(point => [point.x, point.y]))"
    )
    for index, rate in enumerate((0.5, 0.3, 0.4)):
        line = shown[2 * index + 1]
        assert [x for x, _ in line] == [6 * epoch for epoch in range(1, 11)]
        expected = [math.exp(-rate * epoch) * 1.05 for epoch in range(1, 11)]
        assert [y for _, y in line] == pytest.approx(expected, rel=1e-5)


def test_nothing_is_asked_of_a_network(opened: Opened) -> None:
    assert all(url.startswith(("file:", "data:", "blob:")) for url in opened.requests)
    assert sum(url.startswith("file:") for url in opened.requests) == 1


def test_the_switch_changes_the_axis(opened: Opened) -> None:
    page = opened.page

    def axis(slug: str = "1-bit-binary-convergence") -> tuple[str, float]:
        found = page.evaluate(
            "slug => { const of = document.getElementById(slug); return [of.layout.xaxis.title.text, "
            "Math.max(...of.calcdata.at(-1).map(point => point.x))] }",
            slug,
        )
        return found[0], found[1]

    title = page.locator("[id='1-bit-binary-convergence-title']")
    assert axis() == ("steps", 60)
    assert "at equal steps" in title.inner_text()
    page.get_by_label("per gradient evaluation").check()
    opened.drawn()
    assert axis() == ("gradient evaluations", 120)  # of BLAQ, two a step
    assert axis("1-bit-binary-zigzag") == ("gradient evaluations", 120)
    assert "at equal gradient evaluations" in title.inner_text()
    page.get_by_label("per step").check()
    opened.drawn()
    assert axis() == ("steps", 60)


def test_the_measure_can_be_chosen(opened: Opened) -> None:
    page = opened.page
    page.locator("select[data-figure='1-bit-binary-convergence']").select_option("validation_error")
    page.wait_for_function(
        "() => document.getElementById('1-bit-binary-convergence').layout.yaxis.title.text === 'validation error (%)'"
    )
    highest = page.evaluate("() => document.getElementById('1-bit-binary-convergence').calcdata[1][0].y")
    assert highest == pytest.approx(20 * math.exp(-0.5) * 1.05, rel=1e-5)
    label = page.locator("[id='1-bit-binary-convergence']").get_attribute("aria-label")
    assert label.startswith("Chart: Validation error against LAQ")


def luminance(colour: str) -> float:
    """Of rgb(...), 0 to 255."""
    red, green, blue = (float(part) for part in colour.strip("rgba()").split(",")[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_dark_by_the_system_and_by_hand(opened: Opened) -> None:
    page = opened.page

    def colours() -> tuple[float, float]:
        opened.drawn()
        background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        ticks = page.evaluate("() => getComputedStyle(document.querySelector('.xtick text')).fill")
        return luminance(background), luminance(ticks)

    def is_dark() -> bool:
        background, ticks = colours()
        assert abs(background - ticks) > 150  # to be read on it
        return background < ticks

    assert not is_dark()
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(50)
    assert is_dark()
    page.get_by_label("Theme").select_option("light")
    assert not is_dark()
    page.emulate_media(color_scheme="light")
    page.get_by_label("Theme").select_option("dark")
    assert is_dark()
    page.get_by_label("Theme").select_option("")
    assert not is_dark()


@pytest.mark.parametrize("width", [375, 1280])
def test_no_width_scrolls_sideways(width: int, opened: Opened) -> None:
    page = opened.page
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_timeout(300)  # plotly follows
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    for slug in (figure.slug for figure in opened.report.figures):
        box = page.locator(f"[id='{slug}'] svg.main-svg").first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, slug


def test_there_was_nothing_to_complain_about(opened: Opened) -> None:
    assert opened.complaints == []
