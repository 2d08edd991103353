"""Names in any script: a font of the machine that has them, or one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from pipelines import fonts
from pipelines.datasets.folder import Meta
from pipelines.reports import table
from pipelines.tools import predict

NAME = "道路"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    fonts._warn.cache_clear()
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])


def made(place: Path) -> str:
    """A font that has these two characters alone, as triangles."""
    pen = TTGlyphPen(None)
    for point in ((0, 0), (500, 700), (900, 0)):
        (pen.moveTo if point == (0, 0) else pen.lineTo)(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "road"])
    builder.setupCharacterMap(dict.fromkeys(map(ord, NAME), "road"))
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "road": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "road": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Roads", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(place / "roads.ttf")
    return str(place / "roads.ttf")


def test_nothing_is_said_of_a_first_look_for_fonts(tmp_path: Path) -> None:
    look = "from pipelines import cli, fonts; cli.run(lambda: print(fonts.covering('a')))"
    fresh = os.environ | {"MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=ROOT, env=fresh, capture_output=True, text=True, check=True
    )
    assert "DejaVuSans.ttf" in done.stdout and not done.stderr
    assert [*tmp_path.glob("fontlist*")]


def test_a_font_that_has_the_names_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = made(tmp_path)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "damaged.ttf"), file])
    (tmp_path / "damaged.ttf").write_bytes(b"-")
    assert fonts.covering(f"Bäume {NAME}")[1:] == [file]
    assert (fonts.best(NAME), fonts.best("Bäume")) == (file, fonts.covering("")[0])
    assert fonts.style(f"Bäume {NAME}") == {"font.family": ["sans-serif", "Roads"]}
    assert fonts.style("Bäume, дорога") == {}
    legend = predict.legend_png(Meta("x", (NAME, "b"), ((0, 0, 0), (9, 9, 9)), 255))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    assert not caplog.text
    assert legend != predict.legend_png(Meta("x", (NAME, "b"), ((0, 0, 0), (9, 9, 9)), 255))


def test_without_one_there_is_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert fonts.style(NAME) == {}
    assert (
        caplog.text.count("No font on this machine has 路道: boxes stand for them in figures. Install") == 1
    )


def test_tex_says_what_names_in_other_scripts_need(tmp_path: Path) -> None:
    for name, wanted in ((NAME, True), ("Bäume ± 1", False)):
        table.render(table.Table("t", "t", [{"a": 1}], [{"a": name}]), tmp_path, "x")
        assert ("% Names in other scripts: XeLaTeX" in (tmp_path / "t.tex").read_text()) == wanted
