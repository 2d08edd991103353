"""dvc.yaml with every benchmark and every student of params.yaml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import copy_repository, read_params, write_params


def dvc(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with neither records nor data."""
    root = copy_repository(tmp_path_factory.mktemp("stages"))
    subprocess.run(["rm", "-rf", "runs", "dvc.lock"], cwd=root, check=True)
    raw = read_params(root)
    raw["suite"]["seeds"] = [0]
    raw["suite"]["weights"] = list(raw["weights"])
    write_params(root, raw)
    return root


@pytest.mark.parametrize("which", ["every benchmark", "every student"])
def test_every_entry_can_be_selected(root: Path, which: str) -> None:
    raw = read_params(root)
    benchmarks, students = list(raw["benchmarks"]), list(raw["students"])
    if which == "every benchmark":
        students = students[:1]
    else:
        benchmarks = benchmarks[-1:]
    raw["suite"] |= {"benchmarks": benchmarks, "students": students}
    write_params(root, raw)
    planned = {
        line.split("'")[1]
        for line in dvc(root, "repro", "--dry", "--force").splitlines()
        if line.startswith("Running stage")
    }
    wanted = {"report", "count", *(f"fetch_weights@{key}" for key in raw["weights"])}
    for benchmark in benchmarks:
        wanted |= {f"fetch@{benchmark}", f"train_teacher@{benchmark}"}
        for student in students:
            suite = raw["suite"]
            wanted |= {f"distill@{benchmark}-{student}-{method}-0" for method in suite["methods"]}
            wanted |= {f"control@{benchmark}-{student}-{factor}-0" for factor in suite["controls"]}
            wanted |= {f"acfd@{benchmark}-{student}-{variant}-0" for variant in raw["suite"]["variants"]}
            wanted.add(f"export@{benchmark}-{student}")
    assert planned == wanted
