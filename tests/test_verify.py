"""`make verify` on real records: every kind of unsupported number is found and named."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, copy_repository, read_params, rewrite, tiny, write_params
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from suites import slow

from pipelines import config
from pipelines.engine.pack import run_cell, run_pack
from pipelines.methods import checked
from pipelines.reports import figures
from pipelines.runs import records
from pipelines.runs.records import Cell, teacher_cell
from pipelines.stages import count, report
from pipelines.stages.fetch import fetch
from pipelines.suite import dvc, plan
from pipelines.tools import readme, tune, verify

BENCHMARK = "streets"
CELL = f"{BENCHMARK}/pspnet-resnet18/cwd/1"
TABLE = f"reports/{BENCHMARK}/comparison"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with a small suite that was really trained and tuned, in DVC and with its reports. Do not
    change it."""
    root = copy_repository(tmp_path_factory.mktemp("checkout") / "clone")
    for committed in (path for path in (root / "runs").iterdir() if path.is_dir()):
        shutil.rmtree(committed)
    raw = tiny(read_params(root))
    raw["methods"] = {key: raw["methods"][key] for key in ("none", "kd", "cwd")}
    raw["official"] = {}
    raw["students"] = {key: raw["students"][key] for key in ("pspnet-resnet18", "fpn-resnet18")}
    raw["benchmarks"] = {key: raw["benchmarks"][key] for key in (BENCHMARK, "camvid")}
    raw["suite"] |= {"seeds": [0, 1, 2], "controls": [1.5], "methods": ["none", "kd", "cwd"]}
    raw["tuning"] |= {"benchmark": BENCHMARK, "student": "pspnet-resnet18", "methods": ["kd", "cwd"]}
    raw["tuning"] |= {"trials": 2, "steps": 2, "seed": 100}
    write_params(root, raw)
    params = checked(config.load(root / "params.yaml"))
    fetch(root / "data", BENCHMARK, params.benchmark(BENCHMARK))
    run_cell(teacher_cell(params, BENCHMARK), params, root)
    tune.tune(params, root)
    params = checked(config.load(root / "params.yaml"))  # with the weights that were chosen
    for seed in params.suite.seeds:
        pack = [cell for cell in plan.suite_cells(params, BENCHMARK) if cell.seed == seed]
        assert set(run_pack(pack, params, root).values()) == {None}
    count.count(params, root)
    pipeline = dvc.Pipeline(root)
    pipeline.commit(pipeline.stages.keys() - {"report"})
    shutil.rmtree(root / "reports")
    for name in ("claims.yaml", "networks.yaml"):
        (root / "reports").mkdir(exist_ok=True)
        shutil.copy(ROOT / "reports" / name, root / "reports")
    tune.tune(params, root)  # writes its log again: nothing is left to try
    report.report(params, root)
    subprocess.run(["git", "add", "-f", "runs"], cwd=root, check=True)  # committed, as the README wants them
    readme.write(params, root, root)
    for weights in [*(root / "runs").rglob("*.safetensors"), *(root / "data").iterdir()]:
        shutil.rmtree(weights) if weights.is_dir() else weights.unlink()
    shutil.rmtree(root / ".dvc" / "cache")
    return root


@pytest.fixture(scope="module")
def before(checkout: Path) -> set[str]:
    """What there is to say of the clone: nothing."""
    found = problems(checkout)
    assert not found
    return found


def problems(root: Path) -> set[str]:
    return set(verify.problems(config.load(root / "params.yaml"), root))


def change(root: Path, path: str, old: str, new: str) -> None:
    text = (root / path).read_text(encoding="utf-8")
    assert old in text
    (root / path).write_text(text.replace(old, new, 1), encoding="utf-8")


def one_digit(root: Path, path: str, after: str = "") -> None:
    """Raise the last digit of the first number with decimals that follows ``after``."""
    text = (root / path).read_text(encoding="utf-8")
    at = text.index(".", text.index(after) + len(after)) + 1
    while not text[at - 2].isdigit() or not text[at].isdigit():
        at = text.index(".", at) + 1
    while text[at + 1].isdigit():
        at += 1
    (root / path).write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :], encoding="utf-8")


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change run.json as someone would who knows its sums."""
    run = json.loads((root / "runs" / CELL / "run.json").read_text())
    change(run)
    rewrite(root / "runs" / CELL, run)


def resealed(root: Path, name: str, after: str) -> None:
    """A digit of a record's file, with right sums."""
    one_digit(root, f"runs/{CELL}/{name}", after)
    rewrite(root / "runs" / CELL)


def confusion(root: Path) -> None:
    with np.load(root / "runs" / CELL / "confusion.npz") as file:
        arrays = dict(file)
    arrays["test"][0, 0, 0] += 1
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    rewrite(root / "runs" / CELL, confusion=content.getvalue())


def made_up_and_reported(root: Path) -> None:
    """A better score in the record, and the tables made anew from it."""
    metrics = json.loads((root / "runs" / CELL / "metrics.json").read_text())
    metrics["test"]["miou"] += 1
    rewrite(root / "runs" / CELL, metrics=json.dumps(metrics).encode())
    report.report(config.load(root / "params.yaml"), root)


def better_on_validation(root: Path) -> None:
    metrics = json.loads((root / "runs" / CELL / "metrics.json").read_text())
    metrics["best_val"]["miou"] += 0.01
    rewrite(root / "runs" / CELL, metrics=json.dumps(metrics).encode())


def last_line_of_history(root: Path) -> None:
    lines = (root / "runs" / CELL / "history.csv").read_text().splitlines()
    text = "\n".join([*lines[:-1], lines[-1].rpartition(",")[0] + ",77.7"]) + "\n"
    rewrite(root / "runs" / CELL, history=text.encode())


def best_seeds(root: Path) -> None:
    """A seed deleted, and the tables made anew."""
    shutil.rmtree(root / "runs" / f"{CELL[:-1]}2")
    report.report(config.load(root / "params.yaml"), root)


def seed_twice(root: Path) -> None:
    target = root / "runs" / f"{CELL[:-1]}2"
    shutil.copytree(root / "runs" / CELL, target, dirs_exist_ok=True)
    run = json.loads((target / "run.json").read_text())
    rewrite(target, {"cell": run["cell"] | {"seed": 2}})


def painted(root: Path) -> None:
    path = root / f"reports/{BENCHMARK}/scores.png"
    with Image.open(path) as image:
        about = PngInfo()
        for key in (figures.SOURCE, figures.PIXELS):
            about.add_text(key, image.info[key])
        image.putpixel((200, 200), (255, 0, 0, 255))
        image.save(path, pnginfo=about)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a digit in a table": (lambda r: one_digit(r, f"{TABLE}.csv"), f"{TABLE}.csv, line 2: has "),
    "a digit in a Markdown table": (lambda r: one_digit(r, f"{TABLE}.md", "|---|"), f"{TABLE}.md, line "),
    "a digit in a TeX table": (lambda r: one_digit(r, f"{TABLE}.tex", "midrule"), f"{TABLE}.tex, line "),
    "a digit in the README": (lambda r: one_digit(r, "README.md", "results:begin"), "README.md, line "),
    "a digit in the claims": (lambda r: one_digit(r, "reports/claims.csv"), "reports/claims.csv, line "),
    "a table too many": (
        lambda r: shutil.copy(r / f"{TABLE}.csv", r / "reports/best.csv"),
        "reports/best.csv is no table of today's records",
    ),
    "a table too few": (lambda r: (r / f"{TABLE}.tex").unlink(), f"{TABLE}.tex is missing"),
    "a digit in a record": (
        lambda r: one_digit(r, f"runs/{CELL}/metrics.json", '"test"'),
        f"runs/{CELL}/metrics.json is damaged or was changed by hand",
    ),
    "a digit in a score": (
        lambda r: resealed(r, "metrics.json", '"test"'),
        f"{CELL}: metrics.json: test miou does not follow from confusion.npz.",
    ),
    "a digit in a score of validation": (
        better_on_validation,
        f"{CELL}: metrics.json: best_val is ",
    ),
    "a made-up score with its tables": (made_up_and_reported, f"{CELL}: metrics.json: test miou does not"),
    "a changed record": (
        lambda r: resealed(r, "run.json", '"memory_peak_mb"'),
        f"runs/{CELL}/run.json is not the file that dvc.lock has.",
    ),
    "a count": (confusion, f"{CELL}: metrics.json: test miou"),
    "the end of a training": (last_line_of_history, "history.csv ends with another validation mIoU"),
    "a shorter training": (
        lambda r: edit(r, lambda run: run.update(steps=run["steps"] - 1)),
        f"{CELL}: history.csv does not end with a validation at step",
    ),
    "compute": (
        lambda r: edit(r, lambda run: run["compute"].update(flops=run["compute"]["flops"] - 1)),
        f"{CELL}: run.json: compute.flops is not step_flops × steps.",
    ),
    "another teacher": (
        lambda r: edit(r, lambda run: run["teacher"].update(test_miou=99.0)),
        f"{CELL}: its teacher is not the one of runs/{BENCHMARK}/teacher.",
    ),
    "a seed on another machine": (
        lambda r: edit(r, lambda run: run["hardware"].update(device="NVIDIA H100")),
        f"{TABLE}.md, line ",
    ),
    "other data": (
        lambda r: edit(r, lambda run: run.update(data_sha256="0" * 64)),
        f"{BENCHMARK}: the cells were trained on different versions of the data.",
    ),
    "another cell's record": (
        lambda r: shutil.copytree(r / f"runs/{CELL[:-1]}0", r / "runs" / CELL, dirs_exist_ok=True),
        f"{CELL}: run.json belongs to another cell",
    ),
    "a digit of a setting": (
        lambda r: change(r, "params.yaml", "lr: 0.02", "lr: 0.03"),
        f"{CELL}: not of today (training differ).",
    ),
    "a digit of a setting, against dvc.lock": (
        lambda r: change(r, "params.yaml", "tap: logits", "tap: fusion"),
        "distill@streets-pspnet-resnet18-cwd-1: was run with another methods.cwd than params.yaml has now.",
    ),
    "a digit of the data's settings": (
        lambda r: change(r, "params.yaml", "train: 8", "train: 9"),
        "fetch@streets: was run with another benchmarks.streets.data than params.yaml has now.",
    ),
    "the tuning log": (
        lambda r: change(r, "reports/streets/tuning.csv", ",yes,", ",,"),
        "reports/streets/tuning.csv: the chosen trial of ",
    ),
    "a deleted seed with its tables": (
        best_seeds,
        f"runs/{CELL[:-1]}2/run.json is missing, while dvc.lock says that distill@{BENCHMARK}-",
    ),
    "a seed twice": (seed_twice, f"{CELL[:-1]}2: has the same weights as {CELL}, and no two"),
    "other test pixels": (confusion, f"{CELL}: has other labelled test pixels than "),
    "a cheaper step": (
        lambda r: edit(r, lambda run: run["compute"].update(step_flops=1)),
        f"{CELL}: has other FLOPs of a step than ",
    ),
    "another number of trials": (
        lambda r: change(r, "params.yaml", "trials: 2", "trials: 3"),
        "reports/streets/tuning.csv: has not the 3 trials (tuning.trials of params.yaml) of kd.",
    ),
    "the length of the trials": (
        lambda r: change(r, "reports/streets/tuning.csv", ",2,100,", ",2000,100,"),
        "reports/streets/tuning.csv: trials of other lengths or seeds than tuning.steps",
    ),
    "a painted figure": (painted, f"reports/{BENCHMARK}/scores.png was drawn from other records, or changed"),
    "no lock": (lambda r: (r / "dvc.lock").unlink(), "dvc.lock is missing or empty"),
    "a broken record": (
        lambda r: (r / "runs" / CELL / "metrics.json").write_text('{"test": '),
        f"runs/{CELL}/metrics.json is damaged or was changed by hand",
    ),
    "a record of another version": (
        lambda r: edit(r, lambda run: run.update(compute={})),
        f"{CELL}: the record has no 'flops': it is of another version or damaged; rerun its cell.",
    ),
    "broken counts": (
        lambda r: rewrite(r / "runs" / CELL, confusion=b"PK"),
        f"{CELL}: confusion.npz, val (",
    ),
}


QUICK = (  # one of each kind; the others in `make torture`
    "a digit in a table",
    "a digit in the README",
    "a table too many",
    "a digit in a score",
    "a seed on another machine",
    "a digit of a setting",
    "the tuning log",
    "a deleted seed with its tables",
    "a painted figure",
    "a record of another version",
    "broken counts",
)


def test_the_log_of_another_tuning_is_no_table(checkout: Path, before: set[str], tmp_path: Path) -> None:
    shutil.copytree(checkout, tmp_path, dirs_exist_ok=True)
    log = tmp_path / "reports" / "camvid" / "tuning.csv"
    log.parent.mkdir()
    shutil.copy(tmp_path / "reports" / "streets" / "tuning.csv", log)
    assert problems(tmp_path) == before


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=() if name in QUICK else slow) for name in FAULTS]
)
def test_a_fault_is_found_and_named(fault: str, checkout: Path, before: set[str], tmp_path: Path) -> None:
    shutil.copytree(checkout, tmp_path, dirs_exist_ok=True)
    damage, wanted = FAULTS[fault]
    damage(tmp_path)
    new = problems(tmp_path) - before
    assert [text for text in new if text.startswith(wanted) or wanted in text], new


def test_the_data_of_the_lock_has_to_be_that_of_the_cells(
    checkout: Path, before: set[str], tmp_path: Path
) -> None:
    shutil.copytree(checkout, tmp_path, dirs_exist_ok=True)
    lock = yaml.safe_load((tmp_path / "dvc.lock").read_text())
    lock["stages"][f"fetch@{BENCHMARK}"]["outs"][0]["md5"] = "0" * 32 + ".dir"
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    name = f"distill@{BENCHMARK}-pspnet-resnet18-cwd-1"
    wanted = f"{name}: was run with another data/{BENCHMARK} than dvc.lock has now."
    assert wanted in problems(tmp_path) - before


def test_a_figure_of_other_records_is_found(checkout: Path, before: set[str], tmp_path: Path) -> None:
    shutil.copytree(checkout, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / f"runs/{BENCHMARK}/pspnet-resnet18/kd")
    new = problems(tmp_path) - before
    for name in figures.NAMES:
        assert (
            f"reports/{BENCHMARK}/{name}.png was drawn from other records, or changed: run `make tables`."
            in new
        )
    (tmp_path / f"reports/{BENCHMARK}/scores.png").write_bytes(b"\x89PNG")
    assert (
        f"reports/{BENCHMARK}/scores.png was drawn from other records, or changed: run `make tables`."
        in problems(tmp_path)
    )


def test_a_method_whose_authors_weights_are_its_own_ends_alike(checkout: Path) -> None:
    cell = Cell(BENCHMARK, "pspnet-resnet18", "kd", 0)
    own = records.read(cell, checkout)
    assert own is not None
    twin, copied = (replace(own, cell=replace(cell, method=name)) for name in ("kd-official", "cwd"))
    assert not [*verify._alike([own, twin])]
    assert [text.split(":")[0] for text in verify._alike([own, copied])] == [copied.cell.path] * 2


def test_weights_and_data_that_are_there_are_checked(
    checkout: Path, before: set[str], tmp_path: Path
) -> None:
    shutil.copytree(checkout, tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs" / CELL / "weights.safetensors").write_bytes(b"other")
    (tmp_path / "data" / BENCHMARK).mkdir(parents=True)
    (tmp_path / "data" / BENCHMARK / "dataset.json").write_text("{}")
    assert problems(tmp_path) - before == {
        f"{CELL}: weights.safetensors is not the file of the record.",
        f"{BENCHMARK}: data/{BENCHMARK} is not the data of the records.",
    }
