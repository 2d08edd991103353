"""The page of the reports in a real browser, from disk and without a network: `make browser`.

The suite is tiny but real, so that its panels come from networks; what stands on the page is compared with
the tables beside it.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines import config
from pipelines.config import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: `apt-get install chromium`."),
]
VISIBLE = "#board-streets tbody tr"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(reported: Path, browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened from disk; a message on the console or a request to anywhere fails the test."""
    look = {"viewport": {"width": 1280, "height": 900}} | getattr(request, "param", {})
    context, said, asked = browser.new_context(offline=True, **look), [], []
    context.set_default_timeout(60_000)  # a busy machine is slow
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda wanted: asked.append(wanted.url))
    page.goto(f"file://{reported}/reports/index.html")
    yield page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []


def texts(page: Any, column: str) -> list[str]:
    """What a column of the leaderboard shows, from top to bottom; of a method, its name."""
    place = page.locator("#board-streets thead tr:first-child th").evaluate_all(
        "(heads, name) => heads.findIndex(head => head.classList.contains(name))", column
    )
    return [
        row.strip().split("\n")[0]
        for row in page.locator(f"{VISIBLE} > :nth-child({place + 1})").all_inner_texts()
    ]


def comparison(root: Path) -> dict[str, dict[str, str]]:
    with (root / "reports" / "streets" / "comparison.csv").open(newline="", encoding="utf-8") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_the_page_shows_what_the_table_says(opened: Any, reported: Path) -> None:
    rows = comparison(reported)
    shown = dict(zip(texts(opened, "method"), texts(opened, "score"), strict=True))
    assert shown == {
        name: f"{float(row['miou_mean']):.2f} ± {float(row['miou_sd']):.2f}" for name, row in rows.items()
    }
    first = opened.locator(".answer .first").inner_text()
    assert first.startswith("At equal steps, ")
    assert "Exploratory: with 2 seeds" in opened.locator(".answer").inner_text()


def test_heads_sort_and_filters_choose_rows(opened: Any) -> None:
    means = [float(text.split()[0]) for text in texts(opened, "score")]
    assert means == sorted(means, reverse=True)  # the best first
    opened.locator("#board-streets th.cost .dt-column-order").click()
    opened.locator("#board-streets th.cost[aria-sort=ascending]").wait_for()  # it sorts in a task of its own
    costs = [float(text) for text in texts(opened, "cost")]
    assert costs == sorted(costs) and len(set(costs)) > 2
    opened.get_by_role("combobox", name="Family").select_option("student alone")
    assert sorted(texts(opened, "method")) == ["none", "none ×1.5", "none ×2"]
    opened.get_by_role("combobox", name="Family").select_option("features")
    assert texts(opened, "method") == ["at"]
    assert opened.locator(f"{VISIBLE} th small").all_inner_texts() == ["features"]
    opened.get_by_role("combobox", name="Family").select_option("")
    opened.get_by_label("Search").first.fill("cwd")
    assert texts(opened, "method") == ["cwd"]
    assert not opened.locator("#board-streets th.maxt").is_visible()
    opened.get_by_label("more columns").first.check()
    assert opened.locator("#board-streets th.maxt").is_visible()
    verdicts = opened.locator("#claims-table tbody tr")
    every = verdicts.count()
    opened.get_by_role("combobox", name="Data set").select_option("camvid")
    assert 0 < verdicts.count() < every


def test_the_committed_page_opens_with_the_tuned_student_and_fits_paper(browser: Any) -> None:
    """On the committed page, which has two students."""
    page = browser.new_page()
    page.goto(f"file://{ROOT}/reports/index.html")
    board, params = page.locator("#board-camvid-half tbody tr"), config.load()
    tuned, every = board.filter(has_text=params.tuning.student), board.count()
    assert every == tuned.count() > len(params.methods)
    page.locator("[data-bar=board-camvid-half]").get_by_role("combobox", name="Student").select_option("")
    assert board.count() > every == tuned.count()
    page.set_viewport_size({"width": 1046, "height": 718})  # A4, landscape, without its margins
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.close()


def test_a_method_opens_by_mouse_and_by_keyboard(opened: Any) -> None:
    method = opened.locator("#streets-pspnet-resnet18-cwd")
    assert not method.is_visible()
    opened.get_by_role("button", name="cwd", exact=True).click()
    text = method.inner_text()
    for part in (
        "Shu et al.",
        "tau² / (N * C)",
        "Differences from published code",
        "weight: ",
        "Every seed",
    ):
        assert part in text
    assert method.locator("svg.chart polyline").count() == 4  # two seeds, and those of the student alone
    opened.keyboard.press("Escape")
    assert not method.is_visible()
    opened.get_by_role("button", name="cwd", exact=True).focus()
    opened.keyboard.press("Enter")
    assert method.is_visible()
    opened.keyboard.press("Escape")
    opened.get_by_role("button", name="What is Rank?").click()
    assert "differ clearly" in opened.locator("#board-streets-rank").inner_text()


def test_panels_switch(opened: Any) -> None:
    area = opened.locator("#panels-streets")
    tiles = area.locator(".strip").first.locator(".tile")
    shown = [tile for tile in tiles.all_inner_texts() if tile]
    assert [text.split(" · ")[0] for text in shown[:4]] == ["image", "ground truth", "teacher", "none"]
    assert area.locator(".strip").count() == 4  # the tiny set has no more
    area.get_by_label("kd", exact=True).check()
    before = area.screenshot()
    area.get_by_label("at", exact=True).check()
    assert area.locator(".of-at").first.is_visible()
    assert not area.locator(".of-kd").first.is_visible()
    area.get_by_label("errors", exact=True).check()
    assert area.screenshot() != before


@pytest.mark.parametrize(
    "opened",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"viewport": {"width": 375, "height": 800}, "has_touch": True},
    ],
    ids=["light", "dark", "phone"],
    indirect=True,
)
def test_the_page_is_accessible_and_fits(opened: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    def faults() -> list[str]:
        found = Axe().run(opened).response["violations"]
        return [f"{fault['id']}: {fault['nodes'][0]['html'][:150]}" for fault in found]

    assert faults() == []
    for box in opened.get_by_label("more columns").all():
        box.check()
    opened.get_by_role("button", name="kd", exact=True).click()
    assert faults() == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.evaluate("innerWidth")
    opened.keyboard.press("Escape")
    for area in (opened, opened.locator("#board-streets"), opened.locator("#panels-streets")):
        with Image.open(io.BytesIO(area.screenshot())) as image:
            assert len(image.convert("RGB").getcolors(2**24) or []) > 50  # it is not blank


def test_on_paper_every_method_is_there(opened: Any) -> None:
    opened.emulate_media(media="print")
    assert opened.locator("#streets-pspnet-resnet18-cwd").is_visible()
    assert not opened.locator(".bar").first.is_visible()
