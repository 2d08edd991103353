"""The panels of images: what they show, and when they are made, kept and left out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_STUDENT
from PIL import Image

from pipelines import config
from pipelines.methods import checked
from pipelines.reports import panels
from pipelines.stages import report


def test_panels_show_what_was_scored(reported: Path) -> None:
    """Wrong pixels of a sheet against the counts of the record, and the images against the rule."""
    folder = reported / "reports" / "streets" / "panels"
    index = json.loads((folder / "panels.json").read_text())
    with np.load(reported / f"runs/streets/{TINY_STUDENT}/cwd/0/confusion.npz") as file:
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
    reported: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(reported, tmp_path / "suite"))
    params = checked(config.load(copy / "params.yaml"))
    before = {path.name: path.read_bytes() for path in (copy / "reports/streets/panels").iterdir()}
    assert sum(map(len, before.values())) <= panels.MOST
    page = (copy / "reports/index.html").read_bytes()
    for weights in (copy / "runs").rglob("weights.safetensors"):
        weights.unlink()
    report.report(params, copy)
    assert {p.name: p.read_bytes() for p in (copy / "reports/streets/panels").iterdir()} == before
    assert (copy / "reports/index.html").read_bytes() == page
    best = json.loads(before["panels.json"])["chosen"]["best"]  # by which the images were chosen
    damaged, gone = [key for key in ("cwd", "at", "kd") if key != best and f"{key}.webp" in before][:2]
    for method in ("none", damaged):
        (copy / f"reports/streets/panels/{method}.webp").write_bytes(b"another picture")
    shutil.rmtree(copy / f"runs/streets/{TINY_STUDENT}/{gone}/0")
    report.report(params, copy)
    left = {path.stem for path in (copy / "reports/streets/panels").glob("*.webp")}
    assert not {"none", damaged, gone} & left and best in left
    text = (copy / "reports/index.html").read_text()
    assert f"as their weights are not here: none and {damaged}" in text
    assert {*re.findall(r'id="show-streets-([\w-]+)"', text)} == left - {"photos", "truth", "teacher"}


def test_panels_ahead_of_the_report_are_those_of_the_report(reported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(reported, tmp_path / "suite"))
    before = {path.name: path.read_bytes() for path in (copy / "reports/streets/panels").iterdir()}
    shutil.rmtree(copy / "reports")
    report.make_panels(checked(config.load(copy / "params.yaml")), "streets", copy)
    assert {path.name: path.read_bytes() for path in (copy / "reports/streets/panels").iterdir()} == before
