"""The whole pipeline at a tiny size in a temporary clone: `make repro`, tables, MLflow, nothing twice, what
an edit makes due, and the commands of the docs."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import read_params, write_params
from PIL import Image
from suites import (
    ATTEMPTS,
    RUN_CELL,
    STUDENT,
    change,
    comparison,
    due,
    environment,
    finished_suite,
    python,
    repro,
    run_dvc,
    weights,
)
from test_docs import ELSEWHERE, PAGES, own_data, shell

from pipelines.reports import figures, tables

pytestmark = pytest.mark.smoke

OWN = own_data()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_suite(tmp_path_factory.mktemp("clone"), exports=True)


def test_one_command_makes_cells_tables_and_figures(clone: Path) -> None:
    rows = comparison(clone)
    assert [method for method, row in rows.items() if row["n"] == "1"] == ["none", "none ×1.5", "kd", "acfd"]
    for method in ("none", "kd", "acfd"):
        folder = "acfd-full" if method == "acfd" else method
        record = clone / "runs" / STUDENT / folder / "0" / "metrics.json"
        measured = json.loads(record.read_text())["test"]["miou"]
        assert float(rows[method]["miou_mean"]) == pytest.approx(measured, abs=0.005)
    reports = clone / "reports" / "streets"
    for table in tables.NAMES:
        assert {p.suffix for p in reports.glob(f"{table}.*")} >= {".md", ".csv", ".tex"}
    assert sorted(path.stem for path in reports.glob("*.png")) == sorted(figures.NAMES)
    with (reports / "cost.csv").open(newline="") as file:
        costs = {row["method"]: row for row in csv.DictReader(file)}
    assert costs["none"]["onnxruntime_ms"] and costs["acfd"]["onnxruntime_ms"]  # the students were exported


def test_the_records_of_a_run_are_verified(clone: Path) -> None:
    command = ("-m", "pipelines.tools.verify")
    assert "follow from 5 run records" in python(clone, *command)
    table = clone / "reports" / "streets" / "comparison.md"
    before = table.read_text()
    table.write_text(before.replace("none |", "nome |", 1))
    text = python(clone, *command, status=1)
    assert "reports/streets/comparison.md, line " in text and "1 problem: " in text
    table.write_text(before)


def test_a_training_alone_gives_the_bytes_of_the_suite(clone: Path, tmp_path: Path) -> None:
    """As two workers trained it in packs; and nobody was called over the network."""
    for name in ("params.yaml", "data", "runs/streets/teacher"):
        source, target = clone / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    python(clone, "-c", RUN_CELL, str(tmp_path), "kd")
    place = f"runs/{STUDENT}/kd/0"
    alone = {name: content for name, content in weights(tmp_path).items() if name.startswith(place)}
    assert len(alone) == 4
    assert alone.items() <= weights(clone).items()
    assert not (clone / ATTEMPTS).exists(), (clone / ATTEMPTS).read_text()


def test_mlflow_holds_each_cell_once(clone: Path) -> None:
    with sqlite3.connect(clone / "mlflow.db") as store:
        rows = store.execute("select status from runs where lifecycle_stage = 'active'").fetchall()
    assert [status for (status,) in rows] == ["FINISHED"] * 5  # four cells and the teacher


def test_nothing_runs_twice(clone: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (clone / "runs").rglob("*.json")}
    assert "done in" not in repro(clone)
    out = run_dvc(clone, "repro").stdout
    assert "Running stage" not in out and "up to date" in out
    assert before == {p: p.stat().st_mtime_ns for p in (clone / "runs").rglob("*.json")}


def test_tables_come_from_the_records_alone_and_twice_the_same(clone: Path) -> None:
    reports = clone / "reports" / "streets"
    before = {p: p.read_bytes() for p in reports.rglob("*") if p.is_file()}
    aside = {path: path.with_name("aside") for path in clone.rglob("weights.safetensors")}
    for path, other in aside.items():
        path.rename(other)
    (clone / "mlflow.db").unlink()
    python(clone, "-m", "pipelines.stages.report")
    assert before == {p: p.read_bytes() for p in reports.rglob("*") if p.is_file()}
    for path, other in aside.items():
        other.rename(path)


def test_edits_make_exactly_their_cells_due(clone: Path) -> None:
    file = clone / "baselines" / "kd.py"
    text = file.read_text()
    assert due(clone) == set()
    file.write_text(text + "\n# edited\n")
    assert due(clone) == set()
    file.write_text(text + "\nEDITED = 1\n")
    assert due(clone) == {f"{STUDENT}/kd/0"}
    file.write_text(text)
    raw = read_params(clone)
    raw["methods"]["kd"]["temperature"] += 1
    write_params(clone, raw)
    assert due(clone) == {f"{STUDENT}/kd/0"}
    raw["methods"]["kd"]["temperature"] -= 1
    raw["engine"] += 1
    write_params(clone, raw)
    assert due(clone) == {f"{STUDENT}/{name}/0" for name in ("none", "none-x1.5", "kd", "acfd-full")}
    raw["engine"] -= 1
    write_params(clone, raw)
    assert due(clone) == set()


def test_the_blocks_of_shell_in_the_docs_run(clone: Path) -> None:
    """As a user types them, with images and masks of their own; those of ELSEWHERE have other tests."""
    ran = []
    (clone / ".venv").symlink_to(Path(sys.executable).parent.parent)
    os.utime(clone / "requirements.lock", (0, 0))  # the environment is there
    for folder in ("photos", "masks"):
        (clone / folder).mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        names = [f"{split}{i}" for i in range(4)]
        (clone / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8)).save(clone / f"photos/{name}.jpg")
            Image.fromarray(rng.integers(0, 3, (32, 48), np.uint8)).save(clone / f"masks/{name}.png")
    change(
        clone,
        lambda raw: raw["benchmarks"].update(mine={**raw["benchmarks"]["streets"], "data": OWN["data"]}),
    )
    change(clone, lambda raw: raw["suite"].update(benchmarks=["mine"], methods=["none"]))
    for page in PAGES:
        for block in shell(page):
            if any(re.fullmatch(pattern, line) for pattern in ELSEWHERE for line in block):
                continue
            script = "\n".join(["set -e", *block])
            done = subprocess.run(
                ["bash", "-c", script], cwd=clone, env=environment(clone), capture_output=True, text=True
            )
            assert done.returncode == 0, (page.name, block, done.stdout[-2000:] + done.stderr[-3000:])
            ran += block
    assert {"make repro", "dvc repro -f fetch@mine"} <= set(ran)
    assert (clone / "masks/legend.png").is_file() and (clone / "deployed/student.onnx").is_file()
    assert (clone / "reports/mine/comparison.md").is_file()
