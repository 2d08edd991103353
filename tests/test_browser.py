"""The page of the reports in a real browser, from disk and without a network: `make browser`.

The suite is tiny but real, so that its panels come from networks; what stands on the page is compared with
the tables beside it.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_params, write_params
from PIL import Image

from pipelines import config
from pipelines.engine.pack import run_pack
from pipelines.methods import checked
from pipelines.reports import panels
from pipelines.runs.records import Cell
from pipelines.stages import report

STUDENT = "pspnet-resnet18"
METHODS = ["none", "kd", "cwd", "at", "fitnet", "sp"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser_needed = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: install `chromium`.")
VISIBLE = "#board-streets tbody tr"


@pytest.fixture(scope="module")
def root(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a finished tiny suite and its reports."""
    place = Path(shutil.copytree(tiny_root, tmp_path_factory.mktemp("page") / "suite"))
    raw = read_params(place)
    raw["suite"] |= {"methods": METHODS, "seeds": [0, 1], "controls": [1.5, 2]}
    write_params(place, raw)
    shutil.copytree(config.ROOT / "reports", place / "reports", ignore=shutil.ignore_patterns("camvid*"))
    (place / "runs").mkdir(exist_ok=True)
    for name in ("networks", "speed", "spread"):
        shutil.copy(config.ROOT / "runs" / f"{name}.json", place / "runs")
    params = checked(config.load(place / "params.yaml"))
    for seed in params.suite.seeds:
        cells = [Cell("streets", STUDENT, method, seed) for method in params.suite_methods]
        assert not any(run_pack(cells, params, place).values())
    report.report(params, place)
    return place


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(root: Path, browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened from disk; a message on the console or a request to anywhere fails the test."""
    look = {"viewport": {"width": 1280, "height": 900}} | getattr(request, "param", {})
    context, said, asked = browser.new_context(offline=True, **look), [], []
    context.set_default_timeout(10_000)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda wanted: asked.append(wanted.url))
    page.goto(f"file://{root}/reports/index.html")
    yield page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []


def texts(page: Any, column: str) -> list[str]:
    """What a column of the leaderboard shows, from top to bottom."""
    place = page.locator("#board-streets thead tr:first-child th").evaluate_all(
        "(heads, name) => heads.findIndex(head => head.classList.contains(name))", column
    )
    return [row.strip() for row in page.locator(f"{VISIBLE} > :nth-child({place + 1})").all_inner_texts()]


def comparison(root: Path) -> dict[str, dict[str, str]]:
    with (root / "reports" / "streets" / "comparison.csv").open(newline="", encoding="utf-8") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@browser_needed
def test_the_page_shows_what_the_table_says(opened: Any, root: Path) -> None:
    rows = comparison(root)
    shown = dict(zip(texts(opened, "method"), texts(opened, "score"), strict=True))
    assert shown == {
        name: f"{float(row['miou_mean']):.2f} ± {float(row['miou_sd']):.2f}" for name, row in rows.items()
    }
    first = opened.locator(".answer .first").inner_text()
    assert first.startswith(("Yes, at equal steps, for ", "Not shown: none of 6 methods"))
    assert "Exploratory: n = 2" in opened.locator(".answer").inner_text()


@browser_needed
def test_heads_sort_and_filters_choose_rows(opened: Any) -> None:
    means = [float(text.split()[0]) for text in texts(opened, "score")]
    assert means == sorted(means, reverse=True)  # the best first
    opened.locator("#board-streets th.cost .dt-column-order").click()
    costs = [float(text) for text in texts(opened, "cost")]
    assert costs == sorted(costs) and len(set(costs)) > 2
    opened.get_by_role("combobox", name="Family").select_option("student alone")
    assert sorted(texts(opened, "method")) == ["none", "none ×1.5", "none ×2"]
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


@browser_needed
def test_a_method_opens_by_mouse_and_by_keyboard(opened: Any) -> None:
    method = opened.locator("#streets-pspnet-resnet18-cwd")
    assert not method.is_visible()
    opened.get_by_role("button", name="cwd", exact=True).click()
    text = method.inner_text()
    for part in (
        "Shu et al.",
        "tau² / (N * C)",
        "Differences from the authors' code",
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
    opened.get_by_role("button", name="What is Group?").click()
    assert "not told apart" in opened.locator("#board-streets-group").inner_text()


@browser_needed
def test_panels_switch(opened: Any) -> None:
    area = opened.locator("#panels-streets")
    tiles = area.locator(".strip").first.locator(".tile")
    shown = [tile for tile in tiles.all_inner_texts() if tile]
    assert [text.split(" · ")[0] for text in shown[:4]] == ["image", "ground truth", "teacher", "none"]
    assert area.locator(".strip").count() == 4  # the tiny set has no more
    area.get_by_label("sp", exact=True).check()
    before = area.screenshot()
    area.get_by_label("fitnet", exact=True).check()
    assert area.locator(".of-fitnet").first.is_visible()
    assert not area.locator(".of-sp").first.is_visible()
    area.get_by_label("where it is wrong").check()
    assert area.screenshot() != before


@browser_needed
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


@browser_needed
def test_on_paper_every_method_is_there(opened: Any) -> None:
    opened.emulate_media(media="print")
    assert opened.locator("#streets-pspnet-resnet18-cwd").is_visible()
    assert not opened.locator(".bar").first.is_visible()


def test_panels_show_what_was_scored(root: Path) -> None:
    """Wrong pixels of a sheet against the counts of the record, and the images against the rule."""
    folder = root / "reports" / "streets" / "panels"
    index = json.loads((folder / "panels.json").read_text())
    with np.load(root / f"runs/streets/{STUDENT}/cwd/0/confusion.npz") as file:
        counts, names = file["test"], [str(name) for name in file["test_names"]]
    assert sorted(index["chosen"]["images"]) == sorted(names)  # there are fewer than six
    with Image.open(folder / "cwd.webp") as image:
        sheet = np.asarray(image.convert("RGBA"))
    height, width = index["tile"][1], index["tile"][0]
    assert sheet.shape[:2] == (height * len(names), 2 * width)
    for row, name in enumerate(index["chosen"]["images"]):
        errors = sheet[row * height : (row + 1) * height, width:]
        wrong = (errors == panels.WRONG).all(axis=2).sum()
        own = counts[names.index(name)]
        labelled = (errors != panels.UNLABELLED).any(axis=2).sum()
        assert wrong / labelled == pytest.approx(1 - np.trace(own) / own.sum(), abs=1e-6)


def test_panels_are_kept_without_weights_and_left_out_when_their_records_change(
    root: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "suite"))
    params = checked(config.load(copy / "params.yaml"))
    before = {path.name: path.read_bytes() for path in (copy / "reports/streets/panels").iterdir()}
    assert sum(map(len, before.values())) <= panels.MOST
    page = (copy / "reports/index.html").read_bytes()
    for weights in (copy / "runs").rglob("weights.safetensors"):
        weights.unlink()
    report.report(params, copy)
    assert {p.name: p.read_bytes() for p in (copy / "reports/streets/panels").iterdir()} == before
    assert (copy / "reports/index.html").read_bytes() == page
    (copy / "reports/streets/panels/cwd.webp").write_bytes(b"another picture")
    shutil.rmtree(copy / f"runs/streets/{STUDENT}/at/0")
    report.report(params, copy)
    left = {path.stem for path in (copy / "reports/streets/panels").glob("*.webp")}
    assert not {"cwd", "at"} & left and "kd" in left
    assert "as their weights are not here: cwd" in (copy / "reports/index.html").read_text()
