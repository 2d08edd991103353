"""The whole pipeline at a tiny size in a temporary clone: `dvc repro`, tables, MLflow, nothing twice, a new
method."""

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

import pytest
from conftest import ROOT, copy_repository, read_params, tiny, write_params

from pipelines.reports import figures, readme

pytestmark = pytest.mark.smoke

# the method that the README adds
NEW = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]


def dvc(root: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "DVC_NO_ANALYTICS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def to_run(root: Path) -> set[str]:
    """The stages that `dvc repro` would run now, apart from the report."""
    found = set(json.loads(dvc(root, "status", "--json")))
    # a stage below a changed one is listed for its changed input too; only own changes count here
    return {name for name in found if name != "report"}


def comparison(root: Path) -> dict[str, dict[str, str]]:
    with (root / "reports" / "streets" / "comparison.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert (reader.fieldnames or [])[:5] == ["student", "method", "n", "miou_mean", "miou_sd"]
        return {row["method"]: row for row in reader}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copy_repository(tmp_path_factory.mktemp("clone"))
    (root / "dvc.lock").unlink()  # from nothing, without the committed records
    for made in (root / "runs").iterdir():
        if made.is_dir():
            shutil.rmtree(made)
    for made in (root / "reports").iterdir():
        if made.is_dir():
            shutil.rmtree(made)
        elif made.suffix != ".yaml":
            made.unlink()
    raw = tiny(read_params(root))
    raw["methods"] = {key: raw["methods"][key] for key in ("none", "none_matched", "kd", "skd", "cwd")}
    write_params(root, raw)
    dvc(root, "repro")
    return root


def test_one_command_makes_cells_tables_and_figures(clone: Path) -> None:
    rows = comparison(clone)
    assert list(rows) == ["none", "none_matched", "kd", "skd", "cwd", "acfd"]
    for method, row in rows.items():
        assert row["n"] == "1", method
        folder = "acfd-full" if method == "acfd" else method
        record = clone / "runs" / "streets" / "pspnet-resnet18" / folder / "0" / "metrics.json"
        measured = json.loads(record.read_text())["test"]["miou"]
        assert float(row["miou_mean"]) == pytest.approx(measured, abs=0.005)
    reports = clone / "reports" / "streets"
    for table in readme.TABLES:
        assert {p.suffix for p in reports.glob(f"{table}.*")} >= {".md", ".csv", ".tex"}
    assert sorted(path.stem for path in reports.glob("*.png")) == sorted(figures.NAMES)
    with (reports / "cost.csv").open(newline="") as file:
        costs = {row["method"]: row for row in csv.DictReader(file)}
    assert {row["onnxruntime_ms"] != "" for row in costs.values()} == {True}  # every student was exported
    assert " published gains " in (clone / "README.md").read_text()


def test_the_control_has_the_compute_of_the_dearest_method(clone: Path) -> None:
    compute = {method: float(row["training_tflop"]) for method, row in comparison(clone).items()}
    control, dearest = compute.pop("none_matched"), max(compute.values())
    assert dearest > 1.2 * compute["none"]
    assert control == pytest.approx(dearest, abs=0.51 * compute["none"] / 6)  # to the nearest step


def test_the_records_of_a_run_are_verified(clone: Path) -> None:
    def verify() -> tuple[int, str]:
        command = [sys.executable, "-m", "pipelines.tools.verify"]
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    code, text = verify()
    assert code == 0 and "follow from the 7 run records" in text, text
    table = clone / "reports" / "streets" / "comparison.md"
    before = table.read_text()
    table.write_text(before.replace("none |", "nome |", 1))
    code, text = verify()
    assert code == 1 and "reports/streets/comparison.md, line " in text and "1 problem: " in text
    table.write_text(before)


def test_mlflow_holds_each_cell_once(clone: Path) -> None:
    with sqlite3.connect(clone / "mlflow.db") as store:
        rows = store.execute("select status from runs where lifecycle_stage = 'active'").fetchall()
    assert [status for (status,) in rows] == ["FINISHED"] * 7  # six cells and the teacher


def test_a_second_repro_runs_nothing(clone: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (clone / "runs").rglob("*.json")}
    out = dvc(clone, "repro")
    assert "Running stage" not in out and "up to date" in out
    assert before == {p: p.stat().st_mtime_ns for p in (clone / "runs").rglob("*.json")}


def test_edits_rerun_exactly_their_cells(clone: Path) -> None:
    cell = "distill@streets-pspnet-resnet18-{}-0"
    file = clone / "baselines" / "cwd.py"
    text = file.read_text()
    file.write_text(text + "\n# edited\n")
    assert to_run(clone) == {cell.format("cwd")}
    file.write_text(text)
    raw = read_params(clone)
    raw["methods"]["kd"]["temperature"] += 1
    write_params(clone, raw)
    assert to_run(clone) == {cell.format("kd")}
    raw["methods"]["kd"]["temperature"] -= 1
    write_params(clone, raw)
    (clone / "baselines" / "unused.py").write_text("")
    assert to_run(clone) == set()
    (clone / "baselines" / "unused.py").unlink()


def test_a_new_method_is_one_file_and_one_entry(clone: Path) -> None:
    (clone / "baselines" / "mse.py").write_text(NEW)
    raw = read_params(clone)
    raw["methods"]["mse"] = {"weight": 0.1}
    write_params(clone, raw)
    assert to_run(clone) == {"distill@streets-pspnet-resnet18-mse-0"}
    out = dvc(clone, "repro")
    ran = [line.split("'")[1] for line in out.splitlines() if line.startswith("Running stage")]
    own = "streets-pspnet-resnet18"
    assert ran == [f"distill@{own}-mse-0", f"export@{own}", "report"]
    assert comparison(clone)["mse"]["n"] == "1"

    del raw["methods"]["mse"]
    write_params(clone, raw)
    dvc(clone, "repro")
    assert "mse" not in comparison(clone)  # its folder is still there, its row is not


def test_tables_come_from_the_records_alone_and_twice_the_same(clone: Path) -> None:
    reports = clone / "reports" / "streets"
    before = {p.name: p.read_bytes() for p in reports.iterdir()}
    for path in clone.rglob("weights.safetensors"):
        path.unlink()
    (clone / "mlflow.db").unlink()
    subprocess.run(
        [sys.executable, "-m", "pipelines.stages.report"], cwd=clone, check=True, capture_output=True
    )
    assert before == {p.name: p.read_bytes() for p in reports.iterdir()}
