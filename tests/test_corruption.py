"""Flipped bytes, truncated, emptied and deleted files of every kind that we write: one clear sentence, or the
file is rebuilt; never a traceback, never a wrong table.

A few cases run with the other tests; with ACFD_TORTURE every file is damaged at many random places.
"""

from __future__ import annotations

import csv
import logging
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TALLY, read_params, write_params
from suites import TORTURE, lockfile, varied

from pipelines import config
from pipelines.config import ConfigError, Params
from pipelines.datasets import folder, transforms
from pipelines.engine import checkpoint, machine, train
from pipelines.engine.pack import run_cell
from pipelines.engine.teacher import forget_teacher
from pipelines.methods import checked
from pipelines.runs import budget, counts, exports, fingerprint, records, tracking
from pipelines.runs.records import Cell, teacher_cell
from pipelines.stages import report
from pipelines.stages.fetch import fetch
from pipelines.suite import dvc
from pipelines.tools import readme, tune, verify

pytestmark = varied
MANY = 80 if TORTURE else 8  # damages of a file that is read at once
FEW = 10 if TORTURE else 4  # where every one costs a report or more
NONE, KD = (Cell("streets", "pspnet-resnet18", method, 0) for method in ("none", "kd"))
TRAINED = ("weights.safetensors", "metrics.json", "confusion.npz", "history.csv")


@pytest.fixture(scope="session")
def whole(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny benchmark with two finished students, the log of a search and reports. Do not change it."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny_root, root, dirs_exist_ok=True)
    (root / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    raw = read_params(root)
    raw["tuning"].update(benchmark="streets", student="pspnet-resnet18", methods=["kd"], trials=1, steps=2)
    write_params(root, raw)
    tune.tune(checked(config.load(root / "params.yaml")), root)
    for cell in (NONE, KD):
        run_cell(cell, load(root), root)
    report.report(load(root), root)
    readme.write(load(root), root, root)
    assert set(verify.problems(load(root), root)) == {NO_LOCK}
    return root


NO_LOCK = "dvc.lock is missing or empty: restore it with git, or run `dvc commit`."


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path


def load(root: Path) -> Params:
    return config.load(root / "params.yaml")


def damages(path: Path, count: int) -> Iterator[str]:
    """Damage a file in so many ways, one after the other, and say how; at the end it is as it was."""
    content, draw = path.read_bytes(), random.Random(path.name)
    try:
        for number in range(count):
            broken = bytearray(content)
            if number == 2:
                path.write_bytes(b"")
                yield "empty"
            elif number == 3:
                path.unlink()
                yield "deleted"
            elif number % 2:
                at = draw.randrange(1, len(content))
                path.write_bytes(content[:at])
                yield f"cut off at {at}"
            else:
                places = draw.sample(range(len(content)), min(draw.choice((1, 1, 2, 16)), len(content)))
                for at in places:
                    broken[at] ^= draw.randrange(1, 256)
                path.write_bytes(broken)
                yield f"flipped {places}"
    finally:
        path.write_bytes(content)


def sentence(run: Callable[[], Any]) -> str | None:
    """The one sentence that ``run`` ends with, None when it succeeds; every other error is a failure."""
    try:
        run()
    except ConfigError as error:
        text = str(error)
        assert "\n" not in text and 20 < len(text) < 1500, text
        return text
    return None


def texts(root: Path, target: Path) -> dict[str, bytes]:
    """All tables, made from the records below ``root``."""
    params = load(root)
    found = report.finished(params, root)
    shutil.rmtree(target, ignore_errors=True)
    report.write_texts(params, report.gather_all(params, root, found), root, target)
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def trained(root: Path) -> dict[str, bytes]:
    return {name: (KD.folder(root) / name).read_bytes() for name in TRAINED}


def tally(kind: str, cases: int, outcome: str) -> None:
    TALLY.append(f"corruption, {kind}: {cases} damages: {outcome}")


# ---- records


@pytest.mark.parametrize("name", records.RECORD_FILES if TORTURE else ("run.json", "confusion.npz"))
def test_a_damaged_record_is_one_sentence_and_never_a_number(name: str, root: Path, tmp_path: Path) -> None:
    before, count = texts(root, tmp_path / "out"), 0
    for how in damages(KD.folder(root) / name, 3 * FEW if TORTURE else FEW):
        count += 1
        said = sentence(lambda: texts(root, tmp_path / "out"))
        if how == "deleted":  # no record: its row says so
            assert said is None
            rows = (tmp_path / "out/reports/streets/comparison.csv").read_text().splitlines()
            table = {row["method"]: row for row in csv.DictReader(rows)}
            assert table["kd"]["status"] == "not run" and table["none"]["status"] == "complete"
            assert table["kd"]["n"] == "0" and table["none"]["n"] == "1"
        elif said is None:  # space between the values of run.json, say
            assert texts(root, tmp_path / "out") == before, how
        else:
            assert f"{KD.path}/{name} is damaged" in said and "run `make repro`" in said, how
        if how == "deleted" or said:
            assert set(verify.problems(load(root), root)) - {NO_LOCK}, how
    assert texts(root, tmp_path / "out") == before
    tally(name, count, "one sentence each, no wrong table")


@pytest.mark.parametrize("name", ["weights.safetensors", *(["confusion.npz", "run.json"] if TORTURE else [])])
def test_a_cell_with_a_damaged_file_is_trained_again_to_the_same_bits(name: str, root: Path) -> None:
    before, count = trained(root), 0
    for how in damages(KD.folder(root) / name, 4 if TORTURE else 1):
        count += 1
        if name == "weights.safetensors" and how != "deleted":
            wanted = f"{KD.path}: weights.safetensors is not the file of the record."
            assert wanted in verify.problems(load(root), root)
        run_cell(KD, checked(config.load(root / "params.yaml")), root)
        assert trained(root) == before, how
    tally(f"{name}, then `make repro`", count, "rebuilt to the same bits")


def test_what_has_a_record_but_no_weights_is_trained_again_to_the_same_bits(root: Path) -> None:
    before, params = trained(root), checked(config.load(root / "params.yaml"))
    teacher = teacher_cell(params, "streets")
    taught = (teacher.folder(root) / "weights.safetensors").read_bytes()
    for cell in (KD, teacher):
        (cell.folder(root) / "weights.safetensors").unlink()
    for cell in (teacher, KD):
        run_cell(cell, params, root)
    assert (teacher.folder(root) / "weights.safetensors").read_bytes() == taught
    assert trained(root) == before


@pytest.mark.parametrize("name", ["weights.safetensors", "metrics.json", "run.json"])
def test_nothing_learns_from_a_damaged_teacher(name: str, root: Path) -> None:
    params, count = checked(config.load(root / "params.yaml")), 0
    teacher = teacher_cell(params, "streets").folder(root)
    shutil.rmtree(KD.folder(root))
    for how in damages(teacher / name, FEW if TORTURE else 2):
        forget_teacher()  # that a process keeps
        said = sentence(lambda: run_cell(KD, params, root))
        if said is None:  # a flip that changed no value
            assert name == "run.json" and how.startswith("flipped"), how
            shutil.rmtree(KD.folder(root))
            continue
        count += 1
        assert "teacher" in said and ("damaged" in said or "Train it again" in said), (how, said)
        assert records.read(KD, root) is None
    tally(f"the teacher's {name}", count, "one sentence each")


def test_a_damaged_record_of_an_export_is_one_sentence(root: Path) -> None:
    name = "runs/streets/exports/pspnet-resnet18.json"
    exports.write(
        {"benchmark": "streets", "student": "pspnet-resnet18", "methods": {"none": {"ms": 1.5}}}, root
    )
    before, count = exports.read("streets", "pspnet-resnet18", root), 0
    for how in damages(root / name, MANY):
        count += 1
        found = list[Any]()
        said = sentence(lambda found=found: found.append(exports.read("streets", "pspnet-resnet18", root)))
        if how == "deleted":
            assert found == [None]
        elif said is None:  # space between the values
            assert found == [before], how
        else:
            assert f"{name} is damaged" in said and "git checkout" in said, how
    tally("the record of an export", count, "one sentence each, no other number")


def test_damaged_counts_of_networks_are_counted_again(root: Path) -> None:
    params, place = config.load(), root / counts.COUNTS
    shutil.copy(ROOT / counts.COUNTS, place)
    before, count = counts.read(root)["networks"], 0
    assert before and not counts.missing(params, root)
    for how in damages(place, MANY):
        count += 1
        found = counts.read(root)["networks"]
        assert found in ({}, before), how
        if not found:
            assert counts.missing(params, root)
    tally("the counts of networks", count, "taken as not there, the next run counts again; no other number")


# ---- resume state


def interrupted(root: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Stop the training of a cell in the middle; what is in its resume file."""
    state, real = KD.scratch(root) / "state.pt", transforms.training_batch

    def batch(*args: Any, **kwargs: Any) -> Any:
        if state.is_file():
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    shutil.rmtree(KD.folder(root))
    shutil.rmtree(KD.scratch(root), ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(train, "SAVE_EVERY", 0.0)
        patch.setattr(train, "SAVE_SHARE", 0.0)
        patch.setattr(transforms, "training_batch", batch)
        with pytest.raises(KeyboardInterrupt):
            run_cell(KD, params, root)
    return state.read_bytes()


@pytest.mark.parametrize(
    "what", ["teacher", "libraries", *(["params", "data", "code"] if TORTURE else ["code"])]
)
def test_an_old_resume_file_is_ignored_with_a_message(
    what: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    content = interrupted(root, checked(config.load(root / "params.yaml")), monkeypatch)
    raw = read_params(root)
    if what == "params":
        raw["methods"]["kd"]["temperature"] += 1
    elif what == "data":
        raw["benchmarks"]["streets"]["data"]["seed"] += 1
    elif what == "code":
        (tmp_path / "code" / "baselines").mkdir(parents=True)
        text = (ROOT / "baselines" / "kd.py").read_text()
        (tmp_path / "code" / "baselines" / "kd.py").write_text(text + "\nCHANGED = 1\n")
        monkeypatch.setattr(fingerprint, "ROOT", tmp_path / "code")
    elif what == "libraries":
        monkeypatch.setattr(machine, "versions", lambda: {"timm": "another"})
    else:
        raw["benchmarks"]["streets"]["teacher"]["seed"] += 1
    write_params(root, raw)
    params = checked(config.load(root / "params.yaml"))
    if what == "data":
        fetch(root / "data", "streets", params.benchmark("streets"))
    if what in ("data", "teacher"):
        run_cell(teacher_cell(params, "streets"), params, root)
    run_cell(KD, params, root)
    fresh = trained(root)
    shutil.rmtree(KD.folder(root))
    (KD.scratch(root) / "state.pt").write_bytes(content)
    caplog.clear()
    run_cell(KD, params, root)
    assert "(settings, method, data, teacher or libraries): starting from step 0" in caplog.text
    assert trained(root) == fresh
    TALLY.append(f"stale state, {what} changed: the old resume file is ignored with a message")


def test_removing_a_method_removes_its_rows(root: Path, tmp_path: Path) -> None:
    assert any(
        b"kd" in content for name, content in texts(root, tmp_path / "out").items() if "streets" in name
    )
    raw = read_params(root)
    raw["methods"], raw["official"] = {"none": raw["methods"]["none"]}, {}
    raw["suite"]["methods"] = ["none"]
    raw["tuning"]["methods"] = ["acfd-full"]
    write_params(root, raw)
    budget.path(load(root), root).unlink()
    found = texts(root, tmp_path / "out")
    found.pop("reports/index.html")  # which shows published claims about it, too
    assert found and not [name for name, content in found.items() if re.search(rb"\bkd\b", content)]
    records_ = report.finished(load(root), root)
    frames = tracking.collect(root, records_)
    assert set(frames["streets"]["method"]) == {"none", "teacher"}


def test_a_damaged_resume_file_is_a_new_start(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    params, before = checked(config.load(root / "params.yaml")), trained(root)
    state, content, count = KD.scratch(root) / "state.pt", interrupted(root, params, monkeypatch), 0
    for how in damages(state, 4 if TORTURE else 1):
        caplog.clear()
        broken = state.read_bytes() if state.is_file() else None
        run_cell(KD, params, root)
        assert trained(root) == before
        assert ("is damaged" in caplog.text) == (broken is not None), how
        shutil.rmtree(KD.folder(root))  # so that it trains again
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_bytes(content)
        count += 1
    for _ in damages(state, MANY // 2):
        assert checkpoint.load(state, "any") is None
        count += 1
    assert checkpoint.load(state, "any") is None and "belongs to other inputs" in caplog.text
    tally("resume state", count, "a message and a new start each, the same bits at the end")


# ---- data


@pytest.mark.parametrize(
    "name", ["train/00001.png", "testannot/00002.png", "val.txt", "train.txt", folder.DESCRIPTION]
)
def test_damaged_data_are_never_trained_on(name: str, root: Path, tmp_path: Path) -> None:
    data, count = root / "data" / "streets", 0
    wanted = folder.describe(data).sha256

    def read() -> None:
        for split in folder.SPLITS:
            folder.load(data, split)
        if folder.describe(data).sha256 != wanted:
            assert name == folder.DESCRIPTION
            run_cell(KD, checked(config.load(root / "params.yaml")), root)

    for how in damages(data / name, MANY):
        count += 1
        said = sentence(read)
        assert said is not None, how
        assert "data/streets" in said or "other data" in said or "data set has" in said, (how, said)
    tally(f"data, {name}", count, "one sentence each")


def test_a_teacher_of_other_data_teaches_nothing(root: Path) -> None:
    """A change that the description cannot show by itself."""
    place = root / "data" / "streets" / folder.DESCRIPTION
    place.write_text(place.read_text().replace('"name": "streets"', '"name": "street"'))
    folder.check(place.parent)
    shutil.rmtree(KD.folder(root))
    said = sentence(lambda: run_cell(KD, checked(config.load(root / "params.yaml")), root))
    assert said is not None and "was trained on other data" in said


# ---- the stores


def mirrored(whole: Path, target: Path) -> Path:
    """A copy of what MLflow is made from, and of its store; in its own place, as MLflow keeps files open."""
    for path in (whole / "runs").rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            (target / path.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / path.relative_to(whole))
    for name in ("params.yaml", "mlflow.db"):
        shutil.copy(whole / name, target / name)
    return target


def test_a_damaged_mlflow_store_is_rebuilt(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rebuilt = noticed = count = 0
    content, draw = (whole / "mlflow.db").read_bytes(), random.Random(7)
    for number in range(20 if TORTURE else 2):
        root = mirrored(whole, tmp_path / str(number))
        broken = bytearray(content)
        if number == 0:
            broken[: len(broken) // 2] = b""
        elif number % 3 == 1:
            del broken[draw.randrange(1, len(broken)) :]
        else:
            for _ in range(draw.choice((1, 50, 2000))):
                broken[draw.randrange(len(broken))] ^= draw.randrange(1, 256)
        (root / "mlflow.db").write_bytes(broken)
        found = report.finished(load(root), root)
        caplog.clear()
        frames = tracking.collect(root, found)
        assert frames["streets"].equals(tracking.frame(map(tracking.entry, found["streets"])))
        noticed += "MLflow could not be used" in caplog.text
        if (root / "mlflow.db.damaged").is_file():
            assert "mlflow.db is damaged: it is kept as mlflow.db.damaged" in caplog.text
            rebuilt += 1
        count += 1
    assert rebuilt
    tally("mlflow.db", count, f"{rebuilt} times built anew, {noticed} times left out with a warning")


def test_another_number_in_mlflow_never_gets_into_a_table(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = mirrored(whole, tmp_path)
    found = report.finished(load(root), root)
    tracking.collect(root, found)
    with sqlite3.connect(root / "mlflow.db") as store:
        for table in ("metrics", "latest_metrics"):
            changed = store.execute(f"update {table} set value = value + 1 where key = 'test/miou'").rowcount
            assert changed
    frames = tracking.collect(root, found)
    assert "MLflow could not be used" not in caplog.text
    assert frames["streets"].equals(tracking.frame(map(tracking.entry, found["streets"])))
    assert tracking.query(tracking.connect(root), "streets").equals(frames["streets"])


# ---- text files


def test_a_damaged_log_of_tuning_is_one_sentence(root: Path, tmp_path: Path) -> None:
    count = refused = 0
    params = load(root)
    chosen = budget.untuned(params, root)
    for how in damages(budget.path(params, root), 5 * MANY):
        count += 1
        said = sentence(lambda: (budget.trials(params, root), budget.untuned(params, root)))
        refused += said is not None
        if how == "empty":
            assert said is not None and "run `make tune`" in said
    assert refused > count // 4 and chosen == budget.untuned(params, root)
    for how in damages(budget.path(params, root), 3):
        said = [text for text in verify.problems(params, root) if "tuning.csv is damaged" in text]
        assert said or how != "empty", how
    tally("tuning.csv", count, f"{refused} refused by one sentence, the others read as a log")


def test_a_damaged_params_yaml_is_one_sentence_or_another_setting(root: Path) -> None:
    before, count, refused = load(root), 0, 0
    for how in damages(root / "params.yaml", MANY):
        count += 1
        said = sentence(lambda: load(root))
        refused += said is not None
        if how in ("empty", "deleted"):
            assert said is not None and "params.yaml" in said
    assert refused and load(root) == before
    tally("params.yaml", count, f"{refused} refused by one sentence, the others are valid settings")


def test_a_damaged_dvc_lock_is_among_the_problems(root: Path) -> None:
    (root / "dvc.lock").write_bytes(lockfile(12))
    count = refused = 0
    for how in damages(root / "dvc.lock", MANY):
        count += 1
        refused += (said := sentence(lambda: dvc.locked(root))) is not None
        assert said is None or ("dvc.lock" in said), how
    assert refused
    (root / "dvc.lock").write_text("stages: [")
    said_too = verify.problems(load(root), root)
    assert any("dvc.lock is not valid YAML" in text for text in said_too)
    tally("dvc.lock", count, f"{refused} refused by one sentence, no traceback")


def test_a_damaged_readme_and_figure_are_problems(root: Path) -> None:
    figure = root / "reports/streets/scores.png"
    for how in damages(figure, FEW if TORTURE else 2):
        if not how.startswith("flipped"):
            assert any("scores.png" in text for text in verify.problems(load(root), root)), how
    (root / "README.md").write_bytes(b"\xff<!-- results:begin -->")
    assert any("README.md is damaged" in text for text in verify.problems(load(root), root))
    assert "README.md is damaged" in (sentence(lambda: readme.write(load(root), root, root)) or "")


def test_a_stage_ends_with_the_sentence_and_status_1(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Through the front door that every stage has."""
    logging.getLogger().setLevel(logging.WARNING)
    (KD.folder(root) / "metrics.json").write_text("{")
    script = (
        "import sys; from pathlib import Path; from pipelines import cli, config\n"
        "from pipelines.stages import report\n"
        "root = Path(sys.argv[1]); params = config.load(root / 'params.yaml')\n"
        "cli.run(lambda: report.report(params, root))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: runs/{KD.path}/metrics.json is damaged")
    assert len(done.stderr.splitlines()) == 1
