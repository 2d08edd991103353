"""A suite whose records are published, in the hands of somebody else: a method of their own is trained and
nothing else, weights come from a remote; and every method of params.yaml runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_params
from PIL import Image
from suites import STUDENT, change, comparison, due, finished_suite, git, python, repro, run_dvc, scores

pytestmark = pytest.mark.smoke

# the method that the README adds
NEW = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the maintainer commits and pushes: records, the teacher; a remote of DVC."""
    clone = finished_suite(tmp_path_factory.mktemp("clone"), exports=False)
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


def test_every_method_of_params_yaml_runs(published: Path) -> None:
    """In one run. The last test here: it changes the suite."""
    change(published, lambda raw: raw["suite"].update(methods=list(raw["methods"]), official=["kd"]))
    before = scores(published)
    repro(published)
    assert before.items() < scores(published).items()
    rows = comparison(published)
    methods = [key for key in read_params(published)["methods"] if key != "none"]
    assert {*methods, "kd (authors' weight)"} <= set(rows)
    assert {rows[name]["status"] for name in (*methods, "kd (authors' weight)")} == {"complete"}
    assert due(published) == set() and not json.loads(run_dvc(published, "status", "--json").stdout)
