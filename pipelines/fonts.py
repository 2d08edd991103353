"""Fonts for names in any script: DejaVu Sans, and what this machine has for the rest."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def covering(text: str) -> list[str]:
    """Files of fonts that have the characters of ``text`` together, DejaVu Sans first. A warning names what
    none on this machine has."""
    import matplotlib
    from matplotlib import font_manager

    first = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    chosen, left = [first], {character for character in text if character.isprintable()} - _characters(first)
    others = {file: left & _characters(file) for file in font_manager.findSystemFonts()} if left else {}
    for file in sorted(others, key=lambda file: (-len(others[file]), file)):
        if others[file] & left:
            chosen.append(file)
            left -= others[file]
    if left:
        _warn("".join(sorted(left)))
    return chosen


def best(text: str) -> str:
    """The font that has most of the characters of ``text``."""
    return max(covering(text), key=lambda file: len(_characters(file) & set(text)))


def style(text: str) -> dict[str, Any]:
    """What Matplotlib needs to write ``text``: nothing where its own font has all of it."""
    from matplotlib import font_manager

    more = covering(text)[1:]
    for file in more:
        font_manager.fontManager.addfont(file)
    names = [font_manager.FontProperties(fname=file).get_name() for file in more]
    return {"font.family": ["sans-serif", *names]} if names else {}


@functools.cache
def _characters(file: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError, ValueError):  # bitmaps and damaged files
        return frozenset()


@functools.cache
def _warn(characters: str) -> None:
    log.warning(
        "No font on this machine has %s: boxes stand for them in figures. Install one that has them, such as "
        "fonts-noto-cjk, and run the same command again.",
        characters,
    )
