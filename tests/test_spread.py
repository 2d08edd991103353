"""Trainings repeated with the same seed: what differs is found, what does not is said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import copy_repository, read_params, tiny, write_params
from suites import slow

from pipelines import config
from pipelines.engine.pack import run_cell
from pipelines.methods import checked
from pipelines.reports import spread_table, statistics
from pipelines.runs import records
from pipelines.runs.fingerprint import settings
from pipelines.runs.records import Cell
from pipelines.tools import spread

KD = Cell("streets", "pspnet-resnet18", "kd", 0)

# Its loss has an operation without a deterministic kernel, and noise that no seed rules.
NOISY = """
import os

from torch.nn import functional as F

from pipelines.method import Distiller, MethodConfig


class Method(Distiller):
    class Config(MethodConfig):
        pass

    student_taps = ("logits",)

    def losses(self, student, teacher, batch):
        pooled, places = F.max_pool2d(student["logits"], 2, return_indices=True)
        return {"noise": os.urandom(1)[0] / 256 * F.max_unpool2d(pooled, places, 2).mean()}
"""


@slow
def test_on_this_machine_repeats_are_the_cell_of_the_tables(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    params = checked(config.load(place / "params.yaml"))
    run_cell(KD, params, place)
    record = records.read(KD, place)
    assert record is not None
    # the first repeat of a search that was killed after it
    first = place / ".scratch" / "spread" / KD.path / "fast-0"
    spread._link(KD, params, first, place)
    spread._apart(KD, spread_table.FAST, first, place)
    capfd.readouterr()
    spread.spread(params, "streets", "kd", 2, place)
    said = capfd.readouterr().err
    assert said.count("has finished before") == 1 and "fast-0" not in said
    (entry,) = spread_table.read(place)
    fast, strict = (
        [again["weights_sha256"] for again in entry["repeats"][mode]] for mode in spread_table.MODES
    )
    assert fast == [record.run["weights_sha256"]] * 2
    assert strict[0] == strict[1] != fast[0]  # other operations round otherwise
    assert {again["test_miou"] for again in entry["repeats"]["fast"]} == {record.metrics["test"]["miou"]}
    assert entry["kernels"] == [] and entry["cell"] == record.run["cell"]
    assert not first.parent.exists() and records.read(KD, place) == record
    row = spread_table.table(params, [], place).data[0]
    assert (row["weights"], row["sd"], row["range"], row["status"]) == (1, 0, 0, "measured")
    # a second time replaces the first
    spread_table.add(entry | {"steps": 1}, place)
    assert [again["steps"] for again in spread_table.read(place)] == [1]


@pytest.mark.parametrize("there", [True, False])
def test_encoder_weights_outside_of_the_checkout_are_left_alone(there: bool, tmp_path: Path) -> None:
    raw, file = tiny(read_params()), tmp_path / "encoder.pth"
    key = next(iter(raw["weights"]))
    raw["weights"][key]["file"] = str(file)
    raw["students"][KD.student]["weights"] = key
    write_params(tmp_path, raw)
    if there:
        file.write_bytes(b"weights")
    params = config.load(tmp_path / "params.yaml")
    spread._link(KD, params, tmp_path / "place", tmp_path)
    assert not file.is_symlink() and file.is_file() == there
    assert (tmp_path / "place" / "data" / "streets").is_symlink()


@slow
def test_what_no_seed_repeats_is_seen(tiny_root: Path, tmp_path: Path) -> None:
    clone = copy_repository(tmp_path)
    shutil.copytree(tiny_root / "data", clone / "data", dirs_exist_ok=True)
    shutil.rmtree(clone / "runs" / "streets", ignore_errors=True)
    shutil.copytree(tiny_root / "runs" / "streets", clone / "runs" / "streets")
    raw = tiny(read_params(clone))
    raw["methods"]["noisy"] = {}
    write_params(clone, raw)
    (clone / "baselines" / "noisy.py").write_text(NOISY)
    usual = {**os.environ, "PYTHONPATH": str(clone)}
    command = [sys.executable, "-m", "pipelines.tools.spread", "--benchmark", "streets"]
    command += ["--method", "noisy", "--repeats", "2"]
    done = subprocess.run(command, cwd=clone, env=usual, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (entry,) = (known for known in spread_table.read(clone) if known["cell"]["method"] == "noisy")
    (clone / spread_table.FILE).unlink()
    spread_table.add(entry, clone)
    params = config.load(clone / "params.yaml")
    table = spread_table.table(params, [], clone)
    assert [row["mode"] for row in table.data] == list(spread_table.MODES)
    for mode, row in zip(spread_table.MODES, table.data, strict=True):
        scores = [repeat["test_miou"] for repeat in entry["repeats"][mode]]
        assert row["weights"] == 2 and row["repeats"] == 2
        assert row["sd"] == pytest.approx(statistics.sd(scores), abs=1e-6)
        assert row["range"] == pytest.approx(abs(scores[0] - scores[1]), abs=1e-6)
    assert any("max_unpool" in name for name in entry["kernels"])
    kernels = [row["kernels"] for row in table.data]
    assert kernels == [None, ", ".join(entry["kernels"])]
    assert [row[4] for row in table.rows] == ["2 in 2", "2 in 2"]


def entry(**changes: Any) -> dict[str, Any]:
    """As a machine would have left it, with the settings of today."""
    params = checked(config.load())
    repeat = {"weights_sha256": "a", "val_miou": 20.0, "test_miou": 20.0, "training_s": 1.0}
    found = {
        "cell": {"benchmark": "streets", "student": "pspnet-resnet18", "method": "kd", "seed": 0},
        "config": settings(params, KD),
        "repeats": {mode: [repeat, repeat | {"test_miou": 21.0}] for mode in spread_table.MODES},
        "kernels": [],
        "hardware": {"device": "a GPU", "processor": "a processor", "threads": 1, "cores": 8},
    }
    return found | changes


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "measured"),
        ({"config": entry()["config"] | {"method": {}}}, "other settings than params.yaml"),
        ({"cell": entry()["cell"] | {"method": "gone"}}, "other settings than params.yaml"),
        ({"cell": entry()["cell"] | {"student": "gone"}}, "other settings than params.yaml"),
        ({"cell": entry()["cell"] | {"benchmark": "gone"}}, "other settings than params.yaml"),
    ],
)
def test_other_settings_are_said(changes: dict[str, Any], status: str, tmp_path: Path) -> None:
    spread_table.add(entry(**changes), tmp_path)
    rows = spread_table.table(checked(config.load()), [], tmp_path).rows
    assert [row[-1] for row in rows] == [status] * 2


def test_it_is_said_that_no_gpu_was_measured_until_one_is(tmp_path: Path) -> None:
    params, processor = checked(config.load()), entry()["hardware"] | {"device": "cpu"}
    spread_table.add(entry(hardware=processor), tmp_path)
    assert any("No GPU" in note for note in spread_table.table(params, [], tmp_path).notes)
    spread_table.add(entry(), tmp_path)
    found = spread_table.table(params, [], tmp_path)
    assert not any("No GPU" in note for note in found.notes) and len(found.rows) == 4


@pytest.mark.parametrize("wrong", [["--repeats", "1"], ["--method", "gone"], ["--benchmark", "gone"]])
def test_wrong_options_are_refused_before_anything_runs(
    wrong: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["spread", "--benchmark", "streets", *wrong])
    monkeypatch.setattr(spread, "_link", None)  # the first that a repeat would do
    with pytest.raises(config.ConfigError, match=r"REPEATS=1 is not allowed|gone"):
        spread.main()


@slow
def test_a_repeat_without_data_is_one_sentence(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "data" / "streets" / "dataset.json").unlink()
    with pytest.raises(config.ConfigError, match=r"A repeat of .*kd/0 did not finish"):
        spread.spread(checked(config.load(place / "params.yaml")), "streets", "kd", 2, place)
    said = capfd.readouterr().err
    assert "dataset.json" in said and "Traceback" not in said
