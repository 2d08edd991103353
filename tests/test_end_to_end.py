"""The whole pipeline at a tiny size in a temporary clone: `make repro`, tables, MLflow, nothing twice, every
method; then what somebody else does with it: a clone with a method of their own, weights from a remote."""

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
import yaml
from conftest import ROOT, copy_repository, read_params, tiny, write_params
from PIL import Image
from suites import ATTEMPTS, RUN_CELL, change, environment, git, repro, run_dvc, weights
from test_docs import ELSEWHERE, PAGES, own_data, shell

from pipelines.reports import figures, tables

pytestmark = pytest.mark.smoke

# the method that the README adds
NEW = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
OWN = own_data()
STUDENT = "streets/pspnet-resnet18"


def python(root: Path, *arguments: str, status: int = 0) -> str:
    """What a command of a clone says."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def due(root: Path) -> set[str]:
    """The cells that `make repro` would train."""
    script = (
        "from pipelines import config; from pipelines.suite import plan; params = config.load()\n"
        "for cell in plan.due(params, 'streets').cells: print('due', cell.path)"
    )
    return {line.split()[1] for line in python(root, "-c", script).splitlines()}


def comparison(root: Path) -> dict[str, dict[str, str]]:
    with (root / "reports" / "streets" / "comparison.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert (reader.fieldnames or [])[:5] == ["student", "method", "n", "miou_mean", "miou_sd"]
        return {row["method"]: row for row in reader}


def scores(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in (root / "runs").rglob("metrics.json")}


def drop_exports(root: Path) -> None:
    """They take longer than all the rest."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text())
    stages["stages"].pop("export", None)
    (root / "dvc.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copy_repository(tmp_path_factory.mktemp("clone"))
    (root / "dvc.lock").unlink(missing_ok=True)  # from nothing, without the committed records
    for made in (root / "runs").iterdir():
        if made.is_dir():
            shutil.rmtree(made)
    for made in (root / "reports").iterdir():
        if made.is_dir():
            shutil.rmtree(made)
        elif made.suffix != ".yaml":
            made.unlink()
    raw = tiny(read_params(root))
    raw["suite"] |= {"methods": ["none", "kd"], "controls": [1.5]}
    write_params(root, raw)
    git(root, "add", "-A")
    python(root, "-m", "pipelines.tools.readme")  # its results were those of the removed records
    git(root, "commit", "-qam", "a tiny suite")
    repro(root)
    return root


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


@pytest.fixture(scope="module")
def published(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the maintainer commits and pushes: records, the teacher; a remote of DVC."""
    drop_exports(clone)
    store = tmp_path_factory.mktemp("store")
    python(clone, "-m", "pipelines.tools.keep", "--benchmark", "streets")
    assert run_dvc(clone, "remote", "add", "-d", "store", str(store)).returncode == 0
    assert run_dvc(clone, "push", "-q").returncode == 0
    ignored = (clone / ".gitignore").read_text()  # these records are worth citing
    ignored = ignored.replace("/runs/streets/\n", "").replace("/reports/streets/\n", "")
    (clone / ".gitignore").write_text(ignored)
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "records")
    return clone


def test_a_clone_trains_a_new_method_and_nothing_else(published: Path, tmp_path: Path) -> None:
    root = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(published), str(root))
    assert not (root / "data").exists() and not list((root / "runs").rglob("weights.safetensors"))
    assert due(root) == set()
    before = scores(root)
    assert "done in" not in repro(root) and not (root / "data").exists()

    (root / "baselines" / "mse.py").write_text(NEW)
    change(root, lambda raw: raw["methods"].update(mse={"weight": 0.1}))
    change(root, lambda raw: raw["suite"].update(methods=[*raw["suite"]["methods"], "mse"]))
    assert due(root) == {f"{STUDENT}/mse/0"}
    text = repro(root)
    assert re.findall(r"streets: (\S+) done in", text) == [f"{STUDENT}/mse/0"]
    assert scores(root).keys() - before.keys() == {f"runs/{STUDENT}/mse/0/metrics.json"}
    assert before.items() < scores(root).items()
    old, new = comparison(published), comparison(root)
    assert new["mse"]["status"] == "complete" and new["mse"]["n"] == "1"
    assert {name: row["miou_mean"] for name, row in old.items()} == {
        name: row["miou_mean"] for name, row in new.items() if name != "mse"
    }

    change(root, lambda raw: raw["methods"].pop("mse"))
    change(root, lambda raw: raw["suite"]["methods"].remove("mse"))
    repro(root)
    assert "mse" not in comparison(root)  # its folder is still there, its row is not


def test_a_clone_gets_a_student_from_the_remote(published: Path, tmp_path: Path) -> None:
    root, weights = tmp_path / "other", f"runs/{STUDENT}/kd/0/weights.safetensors"
    git(tmp_path, "clone", "-q", str(published), str(root))
    done = run_dvc(root, "pull", "-q", weights)
    assert done.returncode == 0, done.stderr
    assert (root / weights).read_bytes() == (published / weights).read_bytes()
    (root / "own").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)).save(root / "own/a.png")
    command = ("-m", "pipelines.tools.predict", "--weights", weights, "--images", "own", "--output", "out")
    python(root, *command)
    assert list((root / "out").glob("a*.png")) and not (root / "data").exists()
    assert due(root) == set()


def test_every_method_of_params_yaml_runs(clone: Path) -> None:
    """In one run, without the exports."""
    drop_exports(clone)
    change(clone, lambda raw: raw["suite"].update(methods=list(raw["methods"]), official=["kd"]))
    before = scores(clone)
    repro(clone)
    assert before.items() < scores(clone).items()
    rows = comparison(clone)
    methods = [key for key in read_params(clone)["methods"] if key != "none"]
    assert {*methods, "kd (official weight)"} <= set(rows)
    assert {rows[name]["status"] for name in (*methods, "kd (official weight)")} == {"complete"}
    assert due(clone) == set() and not json.loads(run_dvc(clone, "status", "--json").stdout)


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
