"""The report, end to end on made-up records: MLflow, tables, figures, README, missing and failed cells."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import re
import shutil
import statistics as stdlib
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, rewrite
from PIL import Image

from pipelines import config
from pipelines.config import TEACHER, Params, metric_name
from pipelines.files import json_bytes, write_bytes
from pipelines.reports import (
    answer,
    benchmark_table,
    claims,
    conditions,
    figures,
    network_table,
    published,
    ranks,
    readme,
    spread_table,
    tables,
)
from pipelines.reports import table as table_module
from pipelines.reports.results import COMPUTE, SCORE, STEP, Results, gather
from pipelines.runs import tracking
from pipelines.runs.budget import Choice
from pipelines.runs.confusion import summary
from pipelines.runs.fingerprint import fingerprint, settings
from pipelines.runs.records import Cell, expected_cells, teacher_cell
from pipelines.runs.records import write as write_record
from pipelines.stages import report
from pipelines.tools.readme import write as write_readme

CLASSES = [
    "road",
    "sign_symbol",
    "car & van",
    "pole",
    "sky",
]  # names with what Markdown and TeX would take as their own
SKILL = {
    "none": 0.55,
    "none-x1.5": 0.58,
    "none-x2": 0.61,
    "kd": 0.60,
    "cwd": 0.66,
    "acfd-full": 0.65,
    "acfd-afd": 0.57,
    "teacher": 0.85,
}
STUDENT = "psp_net-r18"
SEEDS = [0, 1, 2]
PROCESSOR = "A Processor (R) 2.0 GHz"


def make_params(**suite: Any) -> Params:
    """The project's parameters, cut down to one student and few methods."""
    base = config.load()
    wanted = {"students": [STUDENT], "seeds": SEEDS, "controls": [1.5, 2], "methods": ["kd", "cwd"]}
    wanted |= {"official": [], "variants": ["full"]} | suite
    streets = base.benchmarks["streets"]
    schedule = streets.training.model_copy(update={"steps": 300})  # of the records below
    streets = streets.model_copy(update={"training": schedule})
    return base.model_copy(
        update={
            "suite": base.suite.model_copy(update=wanted),
            "students": {STUDENT: base.students["pspnet-resnet18"]},
            "benchmarks": dict.fromkeys(("streets", "camvid-small"), streets),
            "methods": {
                "none": {},
                "kd": {"weight": 1.0},
                "cwd": {"weight": 3.0, "tau": 4.0},
            },
            "official": {},
            "acfd": {
                "full": {"weight_afd": 2.0, "weight_ccd": 50.0, "grid": 8},
                "afd": {"weight_afd": 2.0, "weight_ccd": 0.0},
            },
        }
    )


def make_record(
    cell: Cell, root: Path, skill: float | None = None, params: Params | None = None, **changes: Any
) -> None:
    """Write the record of a finished cell with plausible numbers that depend on the cell alone."""
    params = params or make_params()
    key = "teacher" if cell.is_teacher else cell.method
    skill = SKILL[key] if skill is None else skill
    rng = np.random.default_rng([cell.seed, *key.encode()])

    def counts(images: int, quality: float) -> np.ndarray:
        pixels = np.array([400, 30, 90, 25, 200])
        right = np.clip(quality + rng.normal(0, 0.04, (images, 5)) - 0.15 * (pixels < 50), 0.05, 0.98)
        rates = np.tile(((1 - right) / 4)[:, :, None], (1, 1, 5))
        rates[:, range(5), range(5)] = right
        return rng.poisson(rates * pixels[None, :, None]).astype(np.int64)

    test, val = counts(24, skill), counts(5, skill + 0.08)
    metrics = {"val": summary(val, CLASSES), "test": summary(test, CLASSES)}
    best = metrics["val"]["miou"] + 0.5
    rows = []
    for step in range(10, 310, 10):
        row: dict[str, Any] = {
            "step": step,
            "lr": 0.02 * (1 - step / 300) ** 0.9,
            "loss": 2.5 / (1 + step / 60) + rng.normal(0, 0.05),
        }
        row |= {"task": 0.7 * row["loss"], "auxiliary": 0.2 * row["loss"], "pixel": 0.1 * row["loss"]}
        reached = (
            best
            if step == 200
            else metrics["val"]["miou"] * (1 - np.exp(-step / 70)) / (1 - np.exp(-300 / 70))
        )
        rows.append(row | {"val_miou": reached if step % 100 == 0 else ""})
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    arrays = io.BytesIO()
    np.savez_compressed(arrays, test=test, val=val, test_names=np.array([f"{i:03}.png" for i in range(24)]))
    distils = not cell.method.startswith("none") and not cell.is_teacher
    steps = 300 if cell.is_teacher else params.schedule(cell.benchmark, cell.method).steps
    plain = {key: 10**9 for key in ("none", *params.controls)}
    flops = (plain | {"acfd-full": 18 * 10**8}).get(cell.method, 12 * 10**8)
    step = 0.2 + 0.02 * len(key) + 0.003 * cell.seed
    run = {
        "cell": {
            "benchmark": cell.benchmark,
            "student": cell.student,
            "method": cell.method,
            "seed": cell.seed,
        },
        "config": settings(params, cell),
        "engine": params.engine,
        "classes": CLASSES,
        "versions": {"python": "3.12.3", "torch": "2.9.0"},
        "hardware": {"device": "cpu", "processor": PROCESSOR, "cores": 2, "threads": 2},
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "data_sha256": "d" * 64,
        "teacher": {"sha256": "f" * 64, "val_miou": 70.0, "test_miou": 60.0} if distils else None,
        "weights_sha256": ("f" if cell.is_teacher else "e") * 64,
        "fingerprint": fingerprint(params, cell, "d" * 64, "f" * 64),
        "left_out": [],
        "started": "2025-01-02T03:04:05+00:00",
        "seconds": {
            "wall": 3000 * step,  # of a pack of ten
            "preparation": 1.0,
            "training": 300 * step,
            "step_median": step,
            "validation": 5.0,
            "test": 4.0,
        },
        "memory_peak_mb": 900.0 + cell.seed,
        "student": {
            "parameters": 11_979_592,
            "flops": 3_213_456_789,
            "latency_ms": 12.3 + 0.1 * cell.seed,
            "input": [64, 96],
        },
        "method_parameters": 0,
        "steps": steps,
        "images_seen": 8 * steps,
        "compute": {"step_flops": flops, "flops": flops * steps},
    }
    folder = cell.folder(root)
    others = {
        "metrics.json": json_bytes(metrics | {"best_val": {"miou": best, "step": 200}}),
        "history.csv": table.getvalue().encode(),
        "confusion.npz": arrays.getvalue(),
    }
    write_record(folder, run | changes, others)


def make_root(root: Path, params: Params, benchmark: str = "streets") -> Path:
    """A checkout with a teacher, all cells of the comparison but two, and one cell of the ablation."""
    make_record(teacher_cell(params, benchmark), root)
    for cell in expected_cells(params, benchmark):
        if cell.method == "acfd-afd" and cell.seed > 0:
            continue
        if (cell.method, cell.seed) == ("kd", 1):
            write_bytes(
                cell.scratch(root) / "failure.txt",
                f"Term pixel_wise is NaN at step 7.\nSee {root}/runs.\n".encode(),
            )
            continue
        make_record(cell, root)
    return root


def texts(root: Path, *kinds: str) -> dict[str, bytes]:
    """The generated files of a root, by path."""
    found = [
        path
        for path in sorted((root / "reports").rglob("*"))
        if path.suffix in (kinds or (".md", ".csv", ".tex", ".png", ".html"))
    ]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def table(root: Path, name: str, benchmark: str = "streets") -> list[dict[str, str]]:
    with (root / "reports" / benchmark / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read(root: Path, params: Params | None = None) -> Results:
    params = params or make_params()
    records = report.finished(params, root)["streets"]
    frame = tracking.frame(map(tracking.entry, records))
    return gather(params, "streets", frame, root, records)


def write_texts(root: Path) -> None:
    """The tables and the page, without figures."""
    found = report.finished(make_params(), root)
    every = report.gather_all(make_params(), root, found)
    if ranked := ranks.rank(every):
        figures.write_ranks(ranked, every, root / "reports")
    report.write_texts(make_params(), every, root, root)


def row(root: Path, method: str, name: str = "comparison") -> dict[str, str]:
    (found,) = [line for line in table(root, name) if line["method"] == method]
    return found


def row_text(results: Results, method: str) -> list[str]:
    (found,) = [line for line in tables.comparison(results).rows if line[1] == method]
    return found


def miou(root: Path, method: str, seed: int) -> float:
    """mIoU in percent from the counts on disk, by a loop over the classes."""
    with np.load(root / "runs/streets" / STUDENT / method / str(seed) / "confusion.npz") as file:
        counts = file["test"].sum(axis=0).tolist()
    scores = [
        counts[c][c] / (sum(counts[c]) + sum(line[c] for line in counts) - counts[c][c])
        for c in range(len(counts))
    ]
    return 100 * sum(scores) / len(scores)


def runs(root: Path, benchmark: str = "streets") -> list[Any]:
    """The active runs of an experiment, asked for without the code under test."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    return list(client.search_runs([client.get_experiment_by_name(benchmark).experiment_id]))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout after one report; read only."""
    root = make_root(tmp_path_factory.mktemp("suite"), make_params())
    (root / "README.md").write_text(
        "# A\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n", encoding="utf-8"
    )
    report.report(make_params(), root)
    assert "\nold\n" in (root / "README.md").read_text(encoding="utf-8")  # a user's run leaves it alone
    write_readme(make_params(), root, root)
    return root


@pytest.fixture
def root(done: Path, tmp_path: Path) -> Path:
    """A copy of that checkout, in another place, to be changed."""
    copy = Path(shutil.copytree(done, tmp_path / "moved"))
    for note in copy.glob(".scratch/**/failure.txt"):
        note.write_text(note.read_text().replace(str(done), str(copy)))
    return copy


def test_counts_that_were_replaced_since_are_no_others(root: Path) -> None:
    """As by a cell that ends while the report runs: no table mixes old scores with new counts."""
    one, other = (report.finished(make_params(), root)["streets"][index] for index in (0, 1))
    shutil.copy(other.folder / "confusion.npz", one.folder / "confusion.npz")
    with pytest.raises(
        config.ConfigError, match="was replaced while it was read: run the same command again"
    ):
        one.confusion("test")
    other.confusion("test")


def write_tables(params: config.Params, root: Path) -> None:
    """Without MLflow, figures and pages, which take most of a report's time."""
    found = report.finished(params, root)
    for results in report.gather_all(params, root, found):
        tables.write(results, root / "reports" / results.benchmark)


def test_a_teacher_that_failed_is_in_every_table(root: Path) -> None:
    params = make_params()
    note = teacher_cell(params, "streets").scratch(root) / "failure.txt"
    write_bytes(note, b"The term task is not finite at step 3.\n")
    write_tables(params, root)
    for name in ("comparison", "cost", "ablation", "per_class"):
        text = (root / "reports" / "streets" / f"{name}.md").read_text()
        assert "the last training of the teacher failed: The term task is not finite at step 3" in text, name


def test_comparison_holds_what_the_counts_say(done: Path) -> None:
    lines = table(done, "comparison")
    assert list(lines[0])[:5] == ["student", "method", "n", "miou_mean", "miou_sd"]
    assert [line["method"] for line in lines] == ["none", "none ×1.5", "none ×2", "kd", "cwd", "acfd"]
    for name, key, seeds in (
        ("none", "none", SEEDS),
        ("none ×1.5", "none-x1.5", SEEDS),
        ("kd", "kd", [0, 2]),
        ("cwd", "cwd", SEEDS),
        ("acfd", "acfd-full", SEEDS),
    ):
        found, scores = row(done, name), {seed: miou(done, key, seed) for seed in seeds}
        assert found["student"] == STUDENT
        assert int(found["n"]) == len(seeds)
        assert float(found["miou_mean"]) == pytest.approx(np.mean(list(scores.values())), abs=2e-6)
        assert float(found["miou_sd"]) == pytest.approx(np.std(list(scores.values()), ddof=1), abs=2e-6)
        assert found["seeds"] == " ".join(f"{seed}:{score:.2f}" for seed, score in scores.items())
        if name != "none":
            differences = [score - miou(done, "none", seed) for seed, score in scores.items()]
            assert float(found["diff_mean"]) == pytest.approx(np.mean(differences), abs=2e-6)
            assert float(found["diff_sd"]) == pytest.approx(np.std(differences, ddof=1), abs=2e-6)
            assert int(found["diff_n"]) == len(seeds)
    assert row(done, "none")["diff_mean"] == ""


def test_comparison_holds_both_uncertainties(done: Path) -> None:
    """The interval over seeds by Student's table, the exact p by its three seeds, Holm by hand."""
    p = {}
    for name, seeds in (("kd", [0, 2]), ("cwd", SEEDS)):
        found = row(done, name)
        differences = np.array([miou(done, name, seed) - miou(done, "none", seed) for seed in seeds])
        half = {2: 12.7062, 3: 4.30265}[len(seeds)] * differences.std(ddof=1) / len(seeds) ** 0.5
        assert float(found["over_seeds_low"]) == pytest.approx(differences.mean() - half, abs=1e-3)
        assert float(found["over_seeds_high"]) == pytest.approx(differences.mean() + half, abs=1e-3)
        extreme = [
            abs(np.dot(signs, differences)) >= abs(differences.sum()) - 1e-9
            for signs in itertools.product((-1, 1), repeat=len(seeds))
        ]
        assert float(found["p"]) == pytest.approx(np.mean(extreme))
        assert float(found["over_images_low"]) < differences.mean() < float(found["over_images_high"])
        assert float(found["over_both_low"]) < differences.mean() < float(found["over_both_high"])
        p[name] = float(found["p"])
    p["acfd"] = float(row(done, "acfd")["p"])
    assert min(p.values()) == 0.25  # all that three seeds can reach
    for name, value in p.items():
        wanted = max(
            min(1.0, (len(p) - place) * other)
            for place, other in enumerate(sorted(p.values()))
            if other <= value
        )
        assert float(row(done, name)["p_holm"]) == pytest.approx(wanted)
    assert {row(done, "none")[key] for key in ("p", "p_holm", "over_seeds_low", "over_images_low")} == {""}
    controls = [row(done, name) for name in ("none ×1.5", "none ×2")]  # no methods: shown, not tested
    assert {line[key] for line in controls for key in ("p", "p_holm", "p_max_t", "rank_low")} == {""}
    assert all(float(line["over_seeds_low"]) < float(line["diff_mean"]) for line in controls)
    for name in p:
        assert p[name] <= float(row(done, name)["p_max_t"]) <= float(row(done, name)["p_holm"])
    for name in ("none", "kd", "cwd", "acfd"):
        low, high = (int(row(done, name)[f"rank_{end}"]) for end in ("low", "high"))
        above = [m for m in p if name == "none" and row(done, m)["verdict"] == "gain"]
        assert 1 + len(above) <= low <= high <= 4


def test_comparison_holds_the_training_compute(done: Path) -> None:
    for name, tera, ratio in (("none", 0.3, 1.0), ("none ×1.5", 0.45, 1.5), ("kd", 0.36, 1.2)):
        found = row(done, name)
        assert (float(found["training_tflop"]), float(found["compute_ratio"])) == (tera, ratio)


def test_equal_compute_is_the_interpolated_student_alone_seed_by_seed(done: Path) -> None:
    """cwd costs 1.2, acfd 1.8 times the student alone: between two trainings, by the logarithms."""
    for name, key, left, right, share in (
        ("cwd", "cwd", "none", "none-x1.5", np.log(1.2) / np.log(1.5)),
        ("acfd", "acfd-full", "none-x1.5", "none-x2", np.log(1.8 / 1.5) / np.log(2 / 1.5)),
    ):
        found = row(done, name)
        between = [(1 - share) * miou(done, left, s) + share * miou(done, right, s) for s in SEEDS]
        gains = np.array([miou(done, key, seed) for seed in SEEDS]) - between
        half = 4.30265 * gains.std(ddof=1) / 3**0.5
        assert float(found["equal_diff_mean"]) == pytest.approx(gains.mean(), abs=2e-6)
        assert float(found["equal_over_seeds_low"]) == pytest.approx(gains.mean() - half, abs=1e-3)
        assert float(found["equal_over_seeds_high"]) == pytest.approx(gains.mean() + half, abs=1e-3)
        assert float(found["equal_over_images_low"]) < gains.mean() < float(found["equal_over_images_high"])
        assert (found["equal_n"], found["equal_why"]) == ("3", "")
    assert row(done, "kd")["equal_n"] == "2"
    for name in ("none", "none ×1.5", "none ×2"):
        assert (row(done, name)["equal_diff_mean"], row(done, name)["equal_why"]) == ("", "")
    text = (done / "reports/streets/comparison.md").read_text(encoding="utf-8")
    mean, low, high = (
        float(row(done, "cwd")[f"equal_{key}"]) for key in ("diff_mean", "over_seeds_low", "over_seeds_high")
    )
    ends = [float(row(done, "cwd")[f"equal_over_{kind}_low"]) for kind in ("images", "both")]
    above = min(low, *ends) > 0
    assert row(done, "cwd")["equal_verdict"] == ("gain" if above else "undecided")
    assert rf"{mean:+.2f} \[{low:+.2f}, {high:+.2f}\]{' ↑' * above} |" in text
    assert "1.5, 2 times the steps" in (done / "reports/streets/conditions.md").read_text(encoding="utf-8")
    assert "Outside that range the column is empty" in " ".join(
        (ROOT / "docs" / "tables.md").read_text(encoding="utf-8").split()
    )


def test_equal_compute_is_never_extrapolated_nor_taken_from_other_seeds(done: Path) -> None:
    results = read(done)
    scale = {"kd": 2.0, "cwd": 0.5}
    factors = results.cells["method"].map(lambda method: scale.get(method, 1.0))
    far = replace(results, cells=results.cells.assign(**{COMPUTE: results.cells[COMPUTE] * factors}))
    for method, why in (("kd", "more compute than none ×2"), ("cwd", "less compute than none")):
        gain, reason = far.at_equal_compute(STUDENT, method)
        assert (gain.paired.n, gain.over_seeds, gain.over_images, reason) == (0, None, None, why)
    assert "Not known for kd and cwd." in " ".join(answer.sentences(far, STUDENT))
    assert "– (more compute than none ×2)" in row_text(far, "kd")
    gone = (results.cells["method"] == "none-x2") & (results.cells["seed"] == 1)
    gain, reason = replace(results, cells=results.cells[~gone]).at_equal_compute(STUDENT, "cwd")
    assert (list(gain.paired.by_seed), reason) == ([0, 2], "without none ×2 (seed 1)")
    alone = replace(results, controls={})
    assert alone.at_equal_compute(STUDENT, "cwd")[1] == "no controls"
    assert dict(conditions.facts(alone))["student alone"] == "none, not trained longer"


def test_the_compute_figure_has_the_curve_of_the_student_alone(done: Path) -> None:
    figure = figures.compute(read(done))
    (axis,) = figure.axes
    (curve,) = [line for line in axis.get_lines() if len(line.get_xdata()) == 3]
    gains = [
        np.mean([miou(done, key, s) - miou(done, "none", s) for s in SEEDS]) for key in read(done).controls
    ]
    assert curve.get_xdata() == pytest.approx([1, 1.5, 2])
    assert curve.get_ydata() == pytest.approx([0, *gains])
    names = {text.get_text(): text.xyann[1] for text in axis.texts}
    assert set(names) == {"none", "none ×1.5", "none ×2", "kd", "cwd", "acfd"}
    low, high = axis.get_ylim()
    line = (high - low) * 9 / 72 / figure.get_figheight()  # of 9 points
    assert min(np.diff(sorted(names.values()))) > line


def test_official_weights_stand_beside_their_method_and_are_not_tested(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "runs", tmp_path / "runs")
    params = make_params(official=["kd"]).model_copy(update={"official": {"kd": {"weight": 10.0}}})
    for seed in SEEDS:
        make_record(Cell("streets", STUDENT, "kd-official", seed), tmp_path, skill=0.9, params=params)
    before = {name: row(done, name) for name in ("kd", "cwd", "acfd")}
    write_tables(params, tmp_path)
    names = [line["method"] for line in table(tmp_path, "comparison")]
    assert names == ["none", "none ×1.5", "none ×2", "kd", "kd (authors' weight)", "cwd", "acfd"]
    found = row(tmp_path, "kd (authors' weight)")
    assert found["status"] == "complete" and float(found["equal_over_seeds_low"]) > 0
    suite = benchmark_table.overview(config.load(), [read(tmp_path, params)]).splitlines()[-1]
    assert "methods: [none, kd, cwd], official: [kd], variants: [full]" in suite
    assert {found[key] for key in ("p", "p_holm", "p_max_t", "rank_low")} == {""}
    for name, line in before.items():  # the family is the same, and so are the ranks
        kept = ("p_holm", "p_max_t", "rank_low", "rank_high")
        assert {key: row(tmp_path, name)[key] for key in kept} == {key: line[key] for key in kept}
    assert "not tuned" not in (tmp_path / "reports/streets/comparison.md").read_text(encoding="utf-8")


def test_a_control_alone_is_no_result(tmp_path: Path) -> None:
    make_record(Cell("streets", STUDENT, "none-x2", 0), tmp_path)
    found = read(tmp_path)
    unknown = f"Not known yet: no seed of {STUDENT} has finished with a method and without one."
    assert answer.sentences(found, STUDENT) == [unknown] and ranks.rank([found]) is None
    assert row_text(found, "none ×2")[2].endswith("(n = 1)") and row_text(found, "none ×2")[3] == ""


def test_methods_outside_the_suite_have_a_row_only_where_they_have_a_cell(done: Path) -> None:
    assert "skd" not in read(done).methods
    params = make_params(methods=["kd"], variants=[])
    found = read(done, params)
    assert found.methods == ["none", "none-x1.5", "none-x2", "kd", "cwd", "acfd-full"]
    extra = params.model_copy(update={"methods": params.methods | {"skd": {"weight_pair": 1.0}}})
    assert read(done, extra).methods == found.methods


# --- a seed is a block ---


def test_a_row_says_which_seeds_come_from_another_machine(root: Path) -> None:
    params, cell = make_params(), Cell("streets", STUDENT, "cwd", 1)
    run = json.loads((cell.folder(root) / "run.json").read_text())
    before = table(root, "comparison")
    for changes, kind in (
        ({"hardware": run["hardware"] | {"device": "NVIDIA H100"}}, "NVIDIA H100, torch 2.9.0"),
        ({"hardware": run["hardware"] | {"processor": "B"}}, "B, threads: 2, torch 2.9.0"),
        ({"hardware": run["hardware"] | {"threads": 1}}, f"{PROCESSOR}, threads: 1, torch 2.9.0"),
        ({"versions": run["versions"] | {"torch": "2.10.0"}}, f"{PROCESSOR}, threads: 2, torch 2.10.0"),
    ):
        rewrite(cell.folder(root), run | changes)
        write_tables(params, root)
        said = (root / "reports/streets/conditions.md").read_text(encoding="utf-8")
        assert f"seed 1 (cwd): {table_module.escape_markdown(kind)}" in said
        assert "of cwd: trained on another kind of machine than none" in said
        [(old, new)] = (
            both for both in zip(before, table(root, "comparison"), strict=True) if both[0] != both[1]
        )
        assert new == old | {"status": "complete; seed 1 on another kind of machine than none"}
        assert new["method"] == "cwd"
    rewrite(cell.folder(root), run | {"versions": run["versions"] | {"numpy": "9.9"}})  # rounds nothing
    write_tables(params, root)
    assert table(root, "comparison") == before


def test_seeds_from_different_machines_are_fine_and_named(root: Path) -> None:
    for folder in (root / "runs/streets" / STUDENT).glob("*/1"):
        rewrite(folder, {"hardware": {"device": "NVIDIA H100", "processor": "B", "cores": 2, "threads": 2}})
    write_tables(make_params(), root)
    text = (root / "reports/streets/conditions.md").read_text(encoding="utf-8")
    assert r"seed 0, 2: A Processor (R) 2.0 GHz, threads: 2, torch 2.9.0; " in text
    assert r"seed 1: NVIDIA H100, torch 2.9.0" in text
    assert "seeds ran on different machines" in text
    # of a cell that no table counts the machine does not matter
    folder = root / "runs/streets" / STUDENT / "cwd" / "0"
    changed = json.loads((folder / "run.json").read_text())
    changed["config"]["method"]["weight"] = 9.0
    rewrite(folder, changed | {"hardware": changed["hardware"] | {"device": "NVIDIA H100"}})
    write_tables(make_params(), root)


def test_significance_is_said_after_holm_and_whether_it_could_be_reached(done: Path) -> None:
    """3 seeds reach 2 / 2³, 8 seeds 2 / 2⁸: times the number of comparisons."""
    results = read(done)
    methods = ["none", "none-x1.5", "cwd", "acfd-full"]
    text = conditions.significance(results, STUDENT, methods) or ""
    assert text == (
        "sign-flip tests of 2 methods, n = 3: nothing below 0.05 by Holm (smallest possible: 0.5; n = 7 "
        "is needed), nothing below 0.05 by max-T (smallest possible: 0.25)"
    )
    assert conditions.significance(results, STUDENT, ["none"]) is None
    cells = results.cells[results.cells["seed"] == 0]
    more = pd.concat([cells.assign(seed=seed) for seed in range(8)], ignore_index=True)
    more.loc[more["method"] == "cwd", SCORE] += 5 + more["seed"]
    text = conditions.significance(replace(results, cells=more), STUDENT, ["none", "cwd"]) or ""
    assert text == (
        "sign-flip tests of 1 method, n = 8: cwd better below 0.05 by Holm (smallest possible: 0.0078), "
        "cwd better below 0.05 by max-T (smallest possible: 0.0078)"
    )
    assert "sign-flip tests of 3 methods" in (done / "reports/streets/comparison.md").read_text()


def test_times_and_memory_are_compared_within_a_seed(root: Path) -> None:
    """The seeds come from machines of very different speed."""
    for seed, speed in zip(SEEDS, (1.0, 10.0, 100.0), strict=True):
        for method, own in (("none", 1.0), ("cwd", 1.5)):
            folder = Cell("streets", STUDENT, method, seed).folder(root)
            run = json.loads((folder / "run.json").read_text())
            seconds = run["seconds"] | {"step_median": own * speed}
            rewrite(folder, run | {"seconds": seconds, "memory_peak_mb": 100 * own * speed})
    write_tables(make_params(), root)
    found = row(root, "cwd", "cost")
    assert (float(found["step_ratio"]), float(found["memory_ratio"])) == (1.5, 1.5)
    assert float(found["step_ms"]) == pytest.approx(15_000)


def test_whether_short_trials_tell_what_long_trainings_do(done: Path) -> None:
    results = read(done)
    order = sorted(("kd", "cwd", "acfd-full", "none-x2"), key=lambda m: results.mean(STUDENT, m) or 0)
    tuned = results.tuning.model_copy(update={"benchmark": "streets", "student": STUDENT})

    def said(scores: list[float]) -> str:
        chosen = {m: Choice(True, False, False, s, s) for m, s in zip(order, scores, strict=False)}
        own = replace(results, tuning=tuned, choices=chosen, trials=dict.fromkeys(chosen, 6))
        return dict(conditions.facts(own))["tuning"]

    assert "over 4 methods, Spearman's ρ is +1.00 [" in said([1, 2, 3, 4])
    assert "over 4 methods, Spearman's ρ is -0.80 [" in said([3, 4, 2, 1])
    assert "Spearman" not in said([1, 2, 3])
    assert "Spearman" not in dict(conditions.facts(replace(results, choices={})))["tuning"]


def test_what_was_chosen_beside_a_middle_that_failed_has_no_gain(done: Path) -> None:
    failed = Choice(middle=False, at_end=False, outermost=False, score=60.0, first=None)
    results = replace(read(done), trials={"kd": 6, "cwd": 6}, choices={"kd": failed})
    assert conditions.tuning(results).endswith("mIoU.")
    both = replace(results, choices={"kd": failed, "cwd": replace(failed, first=58.0)})
    assert conditions.tuning(both).endswith("mIoU; the others gained on it cwd +2.0.")


def test_the_suite_that_made_the_records_is_said(done: Path) -> None:
    lines = benchmark_table.overview(config.load(), [read(done)]).splitlines()
    assert lines[-1] == (
        f"`benchmarks: [streets], students: [{STUDENT}], seeds: [0, 1, 2], controls: [1.5, 2], "
        "methods: [none, kd, cwd], official: [], variants: [full], weights: []`, and `benchmarks: [streets], "
        f"students: [{STUDENT}], seeds: [0], controls: [], methods: [none], official: [], variants: [afd], "
        "weights: []`."  # the ablation has seeds of its own
    )


def test_a_repeat_stands_beside_the_record_of_another_machine(root: Path) -> None:
    params, cell = make_params(), Cell("streets", STUDENT, "cwd", 1)
    run = json.loads((cell.folder(root) / "run.json").read_text())
    repeat = {"weights_sha256": "a", "val_miou": 20.0, "test_miou": 20.0, "training_s": 1.0}
    entry = {"cell": run["cell"], "config": settings(params, cell), "kernels": []}
    entry["repeats"] = {mode: [repeat, repeat] for mode in spread_table.MODES}
    for hardware, modes in (
        (run["hardware"], ["fast", "strict"]),
        (run["hardware"] | {"processor": "B"}, ["fast", "strict", "in the tables"]),
    ):
        (root / spread_table.FILE).unlink(missing_ok=True)
        spread_table.add(entry | {"hardware": hardware}, root)
        found = spread_table.table(params, [read(root)], root)
        assert [line["mode"] for line in found.data] == modes
    assert found.data[-1]["test_miou"] == pytest.approx(miou(root, "cwd", 1), abs=1e-6)
    assert found.data[-1]["device"].startswith("A Processor") and found.data[0]["device"].startswith("B,")


def test_comparison_holds_what_the_methods_cost(done: Path) -> None:
    found = row(done, "cwd", "cost")
    assert (found["parameters"], found["flops"]) == ("11979592", "3213456789")
    assert found["onnxruntime_ms"] == ""  # no export has measured it
    assert float(found["step_ms"]) == pytest.approx(263.0)
    assert float(found["training_s"]) == pytest.approx(78.9)
    assert float(found["memory_mb"]) == 902.0
    assert (found["steps"], found["step_flops"], found["trials"]) == ("300", "1200000000", "")
    found = row(done, "cwd")
    assert (found["parameters"], found["flops"]) == ("11979592", "3213456789")
    records = [
        json.loads((done / f"runs/streets/{STUDENT}/cwd/{seed}/metrics.json").read_text()) for seed in SEEDS
    ]
    assert float(found["val_miou_mean"]) == pytest.approx(
        stdlib.fmean(r["val"]["miou"] for r in records), abs=2e-6
    )
    assert float(found["best_val_miou_mean"]) == pytest.approx(float(found["val_miou_mean"]) + 0.5, abs=2e-6)


def test_missing_and_failed_cells_are_shown(done: Path) -> None:
    assert row(done, "none")["status"] == "complete"
    status = row(done, "kd")["status"]
    assert status.startswith("2 of 3; seed 1: failed: Term pixel_wise is NaN at step 7.")
    assert str(done) not in status
    assert row(done, "afd", "ablation")["status"] == "complete"  # the suite does not ask for it
    assert "2 of 3; seed 1: failed" in (done / "reports/streets/comparison.md").read_text()
    assert "2 of 3; seed 1: failed" in (done / "README.md").read_text()


def test_an_ablation_that_the_suite_does_not_ask_for_may_have_fewer_seeds(done: Path) -> None:
    results = read(done)
    (key,) = (key for key in results.variants if key != "acfd-full")
    missing = {*results.seeds[STUDENT]} - results.by_seed(STUDENT, key).keys()
    seed = min(missing)
    assert f"seed {seed}: not run" in replace(results, planned={STUDENT: [key]}).status(STUDENT, key)
    alone = replace(results, planned={STUDENT: results.methods}, failures={})
    assert alone.status(STUDENT, key) == "complete"
    failed = replace(alone, failures={Cell("streets", STUDENT, key, seed): "of a full disk"})
    assert failed.status(STUDENT, key).endswith(f"seed {seed}: failed: of a full disk")


def test_any_name_of_a_class_is_a_key_that_mlflow_takes(done: Path) -> None:
    record = read(done).finished[0]
    config = record.run["config"] | {"data": {"classes": {"road & path": [0, 0, 0], "straße (x)": [9, 9, 9]}}}
    entry = tracking.entry(replace(record, run=record.run | {"config": config}))
    keys = {key for key in entry.params if key.startswith("data.classes.")}
    assert keys == {"data.classes.road _ path", "data.classes.straße _x_"}


def test_ablation_begins_with_the_reference_and_names_its_weights(done: Path) -> None:
    lines = table(done, "ablation")
    assert [line["method"] for line in lines] == ["none", "full", "afd"]
    assert [line["n"] for line in lines] == ["3", "3", "1"]
    assert [line["weight_ccd"] for line in lines] == ["", "50.0", "0.0"]
    assert lines[2]["miou_sd"] == ""  # the sd of one seed is unknown, not 0
    assert float(lines[2]["diff_mean"]) == pytest.approx(
        miou(done, "acfd-afd", 0) - miou(done, "none", 0), abs=2e-6
    )
    assert lines[1]["miou_mean"] == row(done, "acfd")["miou_mean"]


def test_per_class_scores(done: Path) -> None:
    lines = {(line["student"], line["method"], line["class"]): line for line in table(done, "per_class")}
    for method, key in (("kd", "kd"), ("acfd", "acfd-full")):
        for name in CLASSES:
            seeds = [0, 2] if key == "kd" else SEEDS
            files = [done / f"runs/streets/{STUDENT}/{key}/{seed}/metrics.json" for seed in seeds]
            scores = [json.loads(file.read_text())["test"]["iou"][name] for file in files]
            line = lines[STUDENT, method, name]
            assert int(line["n"]) == len(seeds)
            assert float(line["iou_mean"]) == pytest.approx(np.mean(scores), abs=2e-6)
            assert float(line["iou_sd"]) == pytest.approx(np.std(scores, ddof=1), abs=2e-6)
    teacher = json.loads((done / "runs/streets/teacher/metrics.json").read_text())["test"]["iou"]
    assert float(lines["teacher", "", "pole"]["iou_mean"]) == teacher["pole"]


def test_headers_say_what_was_measured(done: Path) -> None:
    val = {
        seed: json.loads((done / f"runs/streets/{STUDENT}/none/{seed}/metrics.json").read_text())["val"][
            "miou"
        ]
        for seed in SEEDS
    }
    teacher = json.loads((done / "runs/streets/teacher/metrics.json").read_text())
    lead = teacher["val"]["miou"] - stdlib.fmean(val.values())
    for name in (table_module.CONDITIONS, *(f"{table}.tex" for table in tables.NAMES)):
        text = (done / "reports/streets" / name).read_text(encoding="utf-8")
        assert f"{lead:+.2f} (mean over n = 3)" in text
        assert f"{teacher['val']['miou']:.2f} validation / {teacher['test']['miou']:.2f} test mIoU" in text
        for part in (
            "d" * 12,
            f"for {make_params().benchmark('streets').training.steps} steps of 4 images",
            "A Processor (R) 2.0 GHz",
            "exploratory",
        ):
            assert part in text
        assert "warning" not in text.lower()
        assert "MLflow" not in text


def test_tex_and_markdown_keep_names_as_they_are(done: Path) -> None:
    tex = (done / "reports/streets/per_class.tex").read_text(encoding="utf-8")
    assert r"sign\_symbol &" in tex
    assert r"car \& van &" in tex
    assert r"$\pm$" in tex
    body = tex[tex.index(r"\midrule") : tex.index(r"\bottomrule")].splitlines()[1:]
    columns = len(tex.split(r"\begin{tabular}{ ")[1].split(" }")[0])
    assert {line.replace(r"\&", "").count("&") for line in body} == {columns - 1}
    assert table_module.escape_tex(r"50% #1 a_b {x} ~ ^ $ \n" + "\nnext") == (
        r"50\% \#1 a\_b \{x\} \textasciitilde{} \textasciicircum{} \$ \textbackslash{}n next"
    )
    assert table_module.escape_markdown("a|b_c\n<d>") == r"a\|b\_c \<d\>"


# --- tables that can be read ---

COMMANDS = {
    *("begingroup", "endgroup", "footnotesize", "setlength", "tabcolsep", "noindent", "resizebox", "ifdim"),
    *("width", "linewidth", "else", "fi", "begin", "end", "toprule", "midrule", "bottomrule"),
    *("textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar"),
    *("pm", "approx", "times", "Delta", "uparrow", "downarrow"),
}


def all_tables(root: Path) -> Path:
    """Every table there is, of made-up records and the repository's own counts and measurements."""
    params = make_params()
    target = root / "all"
    for name in ("runs/networks.json", "runs/speed.json", "runs/spread.json", "reports/networks.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for benchmark in ("streets", "camvid-small"):
        make_root(root, params, benchmark)
    found = report.finished(params, root)
    every = report.gather_all(params, root, found)
    report.write_texts(params, every, root, target)
    whole = config.load()
    network_table.write(network_table.load(ROOT / network_table.PUBLISHED), whole, target / "reports")
    claims.write(published.load(ROOT / published.FILE), every, whole, target / "reports")
    return target / "reports"


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_tables(tmp_path_factory.mktemp("everything"))


def test_a_markdown_table_has_eight_columns_and_three_lines_of_notes(everything: Path) -> None:
    pages = sorted(everything.rglob("*.md"))
    assert {"comparison", "cost", "ablation", "per_class", "ranks", "networks", "speed", "spread"} <= {
        page.stem for page in pages
    }
    for made in (path for path in pages if path.name != table_module.CONDITIONS):
        lines = made.read_text(encoding="utf-8").splitlines()
        for head in (lines[i - 1] for i, line in enumerate(lines) if re.match(r"\| ?---", line)):
            assert head.replace(r"\|", "").count("|") - 1 <= table_module.MOST, made
        for _, part in itertools.groupby(lines, key=lambda line: not line.startswith("#")):
            assert sum(line.startswith("- ") for line in part) <= 3, made
        targets = re.findall(r"\]\(([^)]+)\)", made.read_text(encoding="utf-8"))
        assert targets
        for target in targets:
            path, _, anchor = target.replace("\\", "").partition("#")
            here = (made.parent / path).resolve()
            there = ROOT / here.relative_to(everything.parent.resolve())
            assert here.is_file() or there.is_file(), (made, target)
            if anchor:
                headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_a_tex_table_is_sound_and_fits_a_page(everything: Path) -> None:
    """Known commands, balanced braces, letters that pdfLaTeX has, as many cells as columns."""
    files = sorted(everything.rglob("*.tex"))
    assert len(files) >= 2 * len(tables.NAMES) + 3
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        body = "\n".join(line for line in lines if not line.startswith("%"))
        assert {*re.findall(r"\\([A-Za-z]+)", body)} <= COMMANDS, file
        plain = re.sub(r"\\[{}]", "", body)
        assert plain.count("{") == plain.count("}") and body.count("$") % 2 == body.count(r"\$") % 2
        assert all(character < "\u0250" for character in body), file
        for part in body.split(r"\begin{tabular}{ ")[1:]:
            columns = len(part.split(" }")[0])
            rows = [line for line in part.splitlines()[1:] if line.endswith(r" \\")]
            assert {row.replace(r"\&", "").count("&") for row in rows} == {columns - 1}, file
            assert len(rows) <= table_module.LINES + 1 and columns <= table_module.MOST


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_a_tex_table_compiles(everything: Path, tmp_path: Path) -> None:
    files = sorted(everything.rglob("*.tex"))
    inputs = "\n\\clearpage\n".join(f"\\input{{{file}}}" for file in files)
    (tmp_path / "all.tex").write_text(
        "\\documentclass{article}\n\\usepackage{booktabs,graphicx}\n\\begin{document}\n"
        f"{inputs}\n\\end{{document}}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert found.returncode == 0, found.stdout[-2000:]
    assert "Overfull" not in found.stdout and f"({len(files)} pages" in found.stdout, found.stdout[-2000:]


def test_every_run_is_finished_and_complete(done: Path) -> None:
    params = make_params()
    expected = [teacher_cell(params, "streets"), *expected_cells(params, "streets")]
    written = {cell.path: cell for cell in expected if (cell.folder(done) / "run.json").is_file()}
    found = {run.data.tags["cell"]: run for run in runs(done)}
    assert sorted(found) == sorted(written)
    assert len(runs(done)) == len(found)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    run = found[f"streets/{STUDENT}/cwd/2"]
    record = json.loads((done / f"runs/streets/{STUDENT}/cwd/2/metrics.json").read_text())
    assert run.data.metrics["test/miou"] == record["test"]["miou"]  # exact: a double stays a double
    assert run.data.metrics["test/iou/car _ van"] == record["test"]["iou"]["car & van"]
    assert run.data.params["training.steps"] == str(params.benchmark("streets").training.steps)
    tags = {
        key: run.data.tags[key]
        for key in ("student", "method", "seed", "fingerprint", "git.commit", "data_sha256")
    }
    assert tags == {
        "student": STUDENT,
        "method": "cwd",
        "seed": "2",
        "fingerprint": fingerprint(params, Cell("streets", STUDENT, "cwd", 2), "d" * 64, "f" * 64),
        "git.commit": "0123456789abcdef",
        "data_sha256": "d" * 64,
    }
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "confusion.npz",
        "history.csv",
        "metrics.json",
        "run.json",
    ]
    assert folder.is_relative_to(done / "mlartifacts")


def test_history_has_each_point_once(done: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{done}/mlflow.db")
    (run,) = [run for run in runs(done) if run.data.tags["cell"] == f"streets/{STUDENT}/kd/0"]
    with (done / f"runs/streets/{STUDENT}/kd/0/history.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for column in ("loss", "pixel", "val_miou"):
        points = [
            (point.step, point.value)
            for point in client.get_metric_history(run.info.run_id, f"history/{column}")
        ]
        assert points == [(int(line["step"]), float(line[column])) for line in lines if line[column]]


def test_second_report_changes_nothing(done: Path) -> None:
    before, ids = texts(done), {run.info.run_id for run in runs(done)}
    text = (done / "README.md").read_bytes()
    assert len(before) == len(tables.NAMES) * 3 + 1 + len(figures.NAMES) + 1  # and the page
    report.report(make_params(), done)
    assert texts(done) == before
    assert (done / "README.md").read_bytes() == text
    assert {run.info.run_id for run in runs(done)} == ids


def test_runs_follow_the_records(root: Path) -> None:
    """Changed, dropped and half-written runs; in a copy elsewhere, where nothing may go to the old place."""
    params = make_params()
    report.report(params, root)
    before = {run.data.tags["cell"]: run.info.run_id for run in runs(root)}
    changed, cut = Cell("streets", STUDENT, "cwd", 1), Cell("streets", STUDENT, "none", 0)
    make_record(changed, root, skill=0.3)
    tracking.connect(root).update_run(before[cut.path], status="RUNNING")  # what a killed report leaves
    report.report(params.model_copy(update={"methods": {"none": {}, "cwd": params.methods["cwd"]}}), root)
    after = {run.data.tags["cell"]: run.info.run_id for run in runs(root)}
    assert set(before) - set(after) == {f"streets/{STUDENT}/{row}" for row in ("kd/0", "kd/2")}
    assert {key for key in after if before[key] != after[key]} == {changed.path, cut.path}
    assert len(runs(root)) == len(after)
    assert {run.info.status for run in runs(root)} == {"FINISHED"}
    assert f"1:{miou(root, 'cwd', 1):.2f}" in row(root, "cwd")["seeds"]
    assert all(run.info.artifact_uri.startswith(root.as_uri()) for run in runs(root))


def test_only_the_benchmarks_asked_for_are_mirrored(root: Path) -> None:
    (root / "mlflow.db").unlink()
    before = texts(root)
    report.report(make_params(), root, ["camvid"])
    assert not tracking.connect(root).search_experiments(filter_string="name = 'streets'")
    report.report(make_params(), root, ["streets"])
    assert runs(root) and texts(root) == before


@pytest.mark.parametrize(("name", "usable"), [("why?", False), ("100%25", False), ("#1 ü", True)])
def test_no_store_is_made_outside_of_the_checkout(
    name: str, usable: bool, done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params, odd = make_params(), tmp_path / name
    shutil.copytree(done / "runs", odd / "runs")
    found = report.finished(params, odd)
    frames = tracking.collect(odd, found)
    assert [len(frame) for frame in frames.values()] == [len(own) for own in found.values()]
    assert [*tmp_path.iterdir()] == [odd]
    assert usable == ("takes no ? or % in the path" not in caplog.text)
    assert not usable or len(runs(odd)) == sum(map(len, found.values()))


def test_the_tables_do_not_depend_on_the_store(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = texts(root)
    (root / "mlflow.db").unlink()
    (root / "mlflow.db").mkdir()
    shutil.rmtree(root / "reports")
    report.report(make_params(), root)
    said = [record for record in caplog.records if "MLflow could not be used" in record.message]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert texts(root) == before


@pytest.mark.parametrize("cut", ["small", "teacher", "none"])
def test_a_lead_that_is_small_or_missing_is_a_warning(cut: str, tmp_path: Path) -> None:
    params = make_params(seeds=[0])
    for cell in (
        teacher_cell(params, "streets"),
        Cell("streets", STUDENT, "none", 0),
        Cell("streets", STUDENT, "kd", 0),
    ):
        key = "teacher" if cell.is_teacher else cell.method
        if key != cut:
            make_record(cell, tmp_path, skill=0.6)
    records = report.finished(params, tmp_path)["streets"]
    results = gather(params, "streets", tracking.frame(map(tracking.entry, records)), tmp_path)
    tables.write(results, tmp_path / "reports/streets")
    (tmp_path / "README.md").write_text("<!-- results:begin --><!-- results:end -->", encoding="utf-8")
    assert readme.update(tmp_path / "README.md", "results", readme.block([results], params))
    wanted = {
        "small": f"the teacher leads {STUDENT} alone by ",
        "teacher": f"the lead of the teacher over {STUDENT} is unknown, because the teacher has no finished "
        "cell",
        "none": f"the lead of the teacher over {STUDENT} is unknown, because {STUDENT} alone has "
        "no finished cell",
    }[cut].replace("_", r"\_")
    for name in ("comparison", "ablation", "per_class"):
        assert f"**Warning:** {wanted}" in (tmp_path / f"reports/streets/{name}.md").read_text(
            encoding="utf-8"
        )
        assert f"% WARNING: {wanted}" in (tmp_path / f"reports/streets/{name}.tex").read_text(
            encoding="utf-8"
        )
    assert f"**Warning:** {wanted}" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert row(tmp_path, "cwd")["status"] == "not run"
    assert row(tmp_path, "cwd")["miou_mean"] == ""


def test_cells_of_other_settings_are_left_out_with_a_warning(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "runs", tmp_path / "runs")
    write_tables(make_params(), tmp_path)
    table_file = tmp_path / "reports/streets/comparison.md"
    assert "left out" not in table_file.read_text(encoding="utf-8")
    before = row(tmp_path, "cwd")
    params = make_params()
    changed = params.model_copy(update={"methods": params.methods | {"kd": {"weight": 2.0}}})
    write_tables(changed, tmp_path)
    text = table_file.read_text(encoding="utf-8")
    assert "2 cells are left out" in text  # kd has two
    warning = next(line for line in text.splitlines() if "Warning" in line and "left out" in line)
    assert "kd/0: method" in warning and "cwd/" not in warning
    kd = row(tmp_path, "kd")
    assert (kd["n"], kd["miou_mean"], kd["diff_mean"]) == ("0", "", "")
    assert kd["status"].startswith("0 of 3; seed 0: left out, other method; seed 1: not run")
    assert row(tmp_path, "cwd")["miou_mean"] == before["miou_mean"]


@pytest.mark.parametrize("what", ["data", "weights of the teacher", "training of the teacher"])
def test_cells_of_other_data_or_another_teacher_are_left_out(done: Path, tmp_path: Path, what: str) -> None:
    """Seeds beyond the suite's stay from an earlier teacher: no mean may have both."""
    shutil.copytree(done / "runs", tmp_path / "runs")
    params, folder = make_params(), tmp_path / f"runs/streets/{STUDENT}/cwd/0"
    wanted = {f"streets/{STUDENT}/cwd/0": ["data" if what == "data" else "weights of the teacher"]}
    if what == "data":
        rewrite(folder, {"data_sha256": "1" * 64})
    elif what == "weights of the teacher":
        used = json.loads((folder / "run.json").read_text())["teacher"]
        rewrite(folder, {"teacher": used | {"sha256": "0" * 64}})
    else:
        streets = params.benchmark("streets")
        longer = streets.teacher.training.model_copy(update={"steps": streets.teacher.training.steps + 1})
        teacher = streets.teacher.model_copy(update={"training": longer})
        streets = streets.model_copy(update={"teacher": teacher})
        params = params.model_copy(update={"benchmarks": params.benchmarks | {"streets": streets}})
    records = report.finished(params, tmp_path)["streets"]
    results = gather(params, "streets", tracking.frame(map(tracking.entry, records)), tmp_path, records)
    if what == "training of the teacher":  # all that learned from it
        assert results.stale.keys() == {r.cell for r in records if r.cell.is_teacher or r.run["teacher"]}
        assert set(results.cells["method"]) == {"none", "none-x1.5", "none-x2"}
        return
    assert {cell.path: parts for cell, parts in results.stale.items()} == wanted
    assert results.by_seed(STUDENT, "cwd").keys() == {1, 2}
    assert {r.cell.seed for r in results.finished if r.cell.method == "cwd"} == {1, 2}
    assert any("1 cells are left out" in text for text in conditions.warnings(results))


def test_readme_block(done: Path) -> None:
    text = (done / "README.md").read_text(encoding="utf-8")
    assert text.startswith(
        "# A\n<!-- results:begin -->\nBetter than the student alone at equal steps are 3 of 3 methods "
        "(psp\\_net-r18, streets, exploratory) where the student starts from random weights. Trained for 2 "
        "times the steps, the student alone ends above "
    )
    assert text.endswith("<!-- results:end -->\nafter\n")
    assert "\nold\n" not in text
    acfd = row(done, "acfd")
    assert f"| acfd | {float(acfd['miou_mean']):.2f} ± {float(acfd['miou_sd']):.2f} (n = 3) |" in text
    best = max(table(done, "comparison"), key=lambda line: float(line["miou_mean"]))
    equal = [verdict for line in table(done, "comparison") if (verdict := line["equal_verdict"])]
    ahead = equal.count("gain")
    alone, longer = (float(row(done, name)["miou_mean"]) for name in ("none", "none ×2"))
    assert (
        "| [streets](reports/streets/comparison.md) | psp\\_net-r18, random weights, 300 steps | 2 or 3 "
        f"| 3 / 0 of 3 | {ahead} / 0 of {len(equal)} | {best['method']} {float(best['diff_mean']):+.2f} "
        in text
    )
    assert f"| {alone:.2f} → {longer:.2f} (×2) |" in text
    table_of_methods = text[text.index("| method |") :]
    rows = [line.split(" | ")[0] for line in table_of_methods.splitlines() if line.startswith("| ")]
    wanted = sorted(table(done, "comparison"), key=lambda line: -float(line["miou_mean"]))
    assert rows == ["| method", *(f"| {line['method']}" for line in wanted if line["method"] != "none ×1.5")]
    assert "Not finished: on streets, psp\\_net-r18, 1 of 6 rows lack trainings." in text
    for part in text.split("](")[1:]:
        assert (done / part.split(")")[0]).is_file() or part.startswith("docs/tables.md#comparison")


def test_the_readme_shows_eight_rows_of_the_benchmark_of_tuning(done: Path, tmp_path: Path) -> None:
    """Without its records it says that there are none; with them all, who is first."""
    params = make_params(methods=["kd", "cwd"])
    rivals = {f"kd{i}": {"weight": 1.0} for i in range(8)}
    methods = params.methods | rivals
    suite = params.suite.model_copy(update={"methods": ["kd", "cwd", *rivals]})
    params = params.model_copy(update={"methods": methods, "suite": suite})
    text = readme.block([], params)
    assert text.startswith("Not known yet: no results of `camvid-half` have been committed.")
    found = read(done, params)
    text = readme.block([found], params)  # of the first that there is
    assert text.count("\n| ") == 3 + readme.ROWS and "8 of 14 rows" in text
    assert "| none |" in text and "| acfd |" in text and "9 of 14 rows lack trainings" in text
    every = [replace(found, benchmark="other"), replace(found, benchmark="camvid-half")]
    text = readme.block(every, params)
    first, second = (f"\n| [{name}](reports/{name}/comparison.md) |" for name in ("camvid-half", "other"))
    assert 0 < text.index(first) < text.index(second)
    assert text.count("Better and worse mean") == 1  # what holds for all stands there once


def test_the_readme_has_the_claims_of_its_own_checkout(done: Path) -> None:
    """Which is one without a claims.yaml."""
    assert "can be neither confirmed" in readme.block([read(done)], make_params(), ROOT)
    assert "can be neither confirmed" not in (done / "README.md").read_text(encoding="utf-8")


def test_a_row_whose_later_training_failed_lacks_none(root: Path) -> None:
    note = Cell("streets", STUDENT, "cwd", 1).scratch(root) / "failure.txt"
    write_bytes(note, b"It stopped.\n")
    results = read(root)
    assert results.status(STUDENT, "cwd").startswith("3 of 3; seed 1: an earlier record")
    assert answer.lacking(results, STUDENT).endswith(", 1 of 6 rows lack trainings.")  # kd


def test_a_status_is_no_number(done: Path) -> None:
    own = tables.comparison(read(done))
    row = dict.fromkeys(own.columns, "") | {"student": "a", "status": "1 of 3; seed 1: not run"}
    own = replace(own, cells=[row])
    assert own.right == [False, *[True] * 6, False]


def test_sentences_follow_the_scores(tmp_path: Path) -> None:
    """Planted: kd better than none and than longer training, cwd worse, acfd as good as none."""
    root, params = tmp_path, make_params(seeds=list(range(6)))
    planted = {"none": 0.55, "none-x1.5": 0.58, "none-x2": 0.6, "kd": 0.8, "cwd": 0.3, "acfd-full": 0.55}
    for cell in expected_cells(params, "streets", root):
        if cell.method in planted:
            make_record(cell, root, planted[cell.method])
    results = read(root, params)
    text = " ".join(answer.sentences(results, STUDENT))
    assert text.startswith(
        "At equal steps, 1 of 3 methods is clearly better than the student alone: kd; 1 clearly worse, 1 not "
        "clearly different. At equal training compute, against the student alone trained longer, 1 of 3 is "
        "clearly better: kd; 2 clearly worse. How sure: "
    )
    assert "Worse than the student alone, with the loss weights used here: cwd." in text
    assert "(max-T, 5 %), 1 of 3 is better: kd." in text
    assert "Exploratory" not in text
    tests = conditions.significance(results, STUDENT, results.methods)
    assert "n = 6: nothing below 0.05 by Holm (smallest possible: 0.094; n = 7 is needed)" in tests
    assert "kd better and cwd worse below 0.05 by max-T (smallest possible: 0.031)" in tests
    assert conditions.power(6) == "n = 6: the smallest p that a sign-flip test can reach is 0.031"
    kd, cwd, paper = (results.standings(STUDENT, results.methods)[m] for m in ("kd", "cwd", "acfd-full"))
    assert [s.gain.verdict for s in (kd, cwd, paper)] == ["gain", "loss", "undecided"]
    assert [s.equal.verdict for s in (kd, cwd, paper)] == ["gain", "loss", "loss"]
    alone = results.standings(STUDENT, results.methods)["none"]
    assert (kd.rank, cwd.rank) == ((1, 1), (4, 4)) and paper.rank == alone.rank == (2, 3)


def test_an_easy_seed_alone_makes_no_largest_gain(done: Path) -> None:
    results = read(done)
    best = max(("cwd", "acfd-full"), key=lambda m: results.paired(STUDENT, m).mean or 0.0)
    kd = results.cells["method"] == "kd"
    cells = results.cells[~kd | (results.cells["seed"] == 0)].copy()
    cells.loc[cells["method"] == "kd", "test/miou"] += 50.0
    row = answer.row(replace(results, cells=cells), STUDENT)
    assert row["largest mean gain"].startswith(f"{results.label(best)} +")


def test_what_compute_leaves_out_is_said(done: Path) -> None:
    """The teacher's own training, as a multiple of that of the student alone."""
    costs = {
        name: json.loads((done / "runs/streets" / folder / "run.json").read_text())["compute"]["flops"]
        for name, folder in (("teacher", "teacher"), ("none", f"{STUDENT}/none/0"))
    }
    wanted = f"({costs['teacher'] / costs['none']:.1f} times that of {STUDENT} alone)"
    assert wanted in " ".join(answer.caveats(read(done), [STUDENT]))
    assert wanted in " ".join(answer.sentences(read(done), STUDENT))


def test_a_teacher_that_is_smaller_and_pretrained_is_said(done: Path) -> None:
    """Only where the student is larger, and does not start from such weights too."""
    results = read(done)
    larger = results.cells["student"] == STUDENT
    cells = results.cells.assign(**{answer.PARAMETERS: np.where(larger, 9e6, 2.5e6)})
    teacher, *rest = results.finished
    run = teacher.run | {"config": teacher.run["config"] | {"network": {"weights": "resnet18"}}}
    known = [replace(teacher, run=run), *rest]
    wanted = (
        f"The teacher (2.5 M parameters, from ImageNet weights) is smaller than {STUDENT} (9.0 M, from random"
    )
    assert wanted in " ".join(answer.caveats(replace(results, cells=cells, finished=known), [STUDENT]))
    assert "smaller than" not in " ".join(answer.caveats(replace(results, cells=cells), [STUDENT]))
    assert "smaller than" not in " ".join(answer.caveats(replace(results, finished=known), [STUDENT]))


def test_an_ablation_compares_its_rows_with_the_whole_method_seed_by_seed(done: Path) -> None:
    results = read(done)
    assert not any("Minus full" in note for note in tables.ablation(results).notes)  # afd has one seed
    cells = results.cells[results.cells["method"] != "acfd-afd"].replace({"method": {"kd": "acfd-afd"}})
    (note,) = (n for n in tables.ablation(replace(results, cells=cells)).notes if "Minus full" in n)
    gaps = [miou(done, "kd", seed) - miou(done, "acfd-full", seed) for seed in (0, 2)]
    assert f"{STUDENT}: afd {np.mean(gaps):+.2f} [" in note and note.endswith("(n = 2).")


def test_an_ablation_says_how_few_seeds_it_has(done: Path) -> None:
    own, others = ((done / f"reports/streets/{name}.md").read_text() for name in ("ablation", "comparison"))
    assert "n = 1: one seed, so nothing can be told apart" in own  # of afd
    assert "n = 1" not in others and "n = 2: the smallest p" in others


def test_classes_that_nobody_learns_are_a_warning(done: Path) -> None:
    results = read(done)
    metric = f"test/iou/{metric_name(results.classes()[1])}"
    assert not [text for text in conditions.warnings(results) if "far from the end" in text]
    lost = replace(results, cells=results.cells.assign(**{metric: 0.9}))
    (text,) = (text for text in conditions.warnings(lost) if "far from the end" in text)
    assert f"has barely learned {results.classes()[1]} (mean IoU below 1 %)" in text
    count = len(results.classes())
    assert text.endswith(f"Alone, it has learned {count - 1} of {count} classes.")
    record, none = results.finished[0], {results.classes()[4]: None}  # a class without a pixel is in no mean
    test = record.metrics["test"]
    test = test | {"iou": test["iou"] | none}
    record = replace(record, metrics=record.metrics | {"test": test})
    (text,) = (
        text
        for text in conditions.warnings(replace(lost, finished=[record, *lost.finished[1:]]))
        if "far from the end" in text
    )
    assert f"learned {count - 2} of {count - 1} classes." in text
    second = f"test/iou/{metric_name(results.classes()[2])}"  # which the student alone does not find
    low = lost.cells[second].where(lost.cells["method"] != "none", 0.9)
    more = replace(lost, cells=lost.cells.assign(**{second: low}))
    (text,) = (text for text in conditions.warnings(more) if "far from the end" in text)
    assert f"learned {count - 2} of {count} classes." in text
    one = lost.cells[metric].where(lost.cells["method"] != "kd", 1.1)  # a single method finds it
    found = replace(lost, cells=lost.cells.assign(**{metric: one}))
    (text,) = (text for text in conditions.warnings(found) if "far from the end" in text)
    assert text.startswith(f"{STUDENT} alone has barely learned {results.classes()[1]} (mean")
    both = lost.cells[metric].where(lost.cells["method"] == "kd", 1.1)  # so does the student alone
    found = replace(lost, cells=lost.cells.assign(**{metric: both}))
    assert not [text for text in conditions.warnings(found) if "far from the end" in text]


def test_the_headline_counts_the_methods_that_all_students_have(done: Path) -> None:
    results = read(done)
    fewer = replace(results, benchmark="other", methods=[m for m in results.methods if m != "acfd-full"])
    text = answer.headline([(results, STUDENT), (fewer, STUDENT)])
    assert f"3 of 3 methods ({STUDENT}, streets, exploratory) and 2 of 2 methods ({STUDENT}, other" in text
    assert "Of the 2 methods that all of these students have, it is 2 and 2." in text
    standings = results.standings(STUDENT, results.methods)
    equal = [standings[m].equal.verdict for m in ("kd", "cwd", "acfd-full")]
    below = [f"{own.count('gain')} of {len(own)}" for own in (equal, equal[:2])]
    assert text.endswith(f"for as many FLOPs as the method, it is clearly below {' and '.join(below)}.")
    alone = answer.headline([(results, STUDENT)])
    assert "that all of these students have" not in alone
    assert "times the steps" not in answer.headline([(replace(results, controls={}), STUDENT)])


def test_time_beyond_the_compute_and_a_lead_that_training_gives_are_said(done: Path) -> None:
    results = read(done)
    said = " ".join(answer.caveats(results, [STUDENT]))
    guided = results.cells["method"].isin(["kd", "cwd", "acfd-full"])
    slow = results.cells[STEP].where(~guided, 5 * results.cells[STEP])
    late = " ".join(answer.caveats(replace(results, cells=results.cells.assign(**{STEP: slow})), [STUDENT]))
    ratios = [results.ratio(STUDENT, m, STEP) or 0 for m in ("kd", "cwd", "acfd-full")]
    assert f"with {STUDENT} {5 * min(ratios):.2f} to {5 * max(ratios):.2f} times as long as alone" in late
    assert late.count("which is rough") == 1 and "On test the teacher leads" not in said + late
    longest = results.mean(STUDENT, "none-x2") or 0
    first = longest - 4 - (results.mean(STUDENT, "none") or 0)  # the student alone, four points below
    score = results.cells[SCORE].mask(results.cells["student"] == TEACHER, longest + 1)
    score += first * (results.cells["method"] == "none")
    near = " ".join(answer.caveats(replace(results, cells=results.cells.assign(**{SCORE: score})), [STUDENT]))
    assert f"On test the teacher leads {STUDENT} alone by +5.00, and none ×2 by +1.00: most of" in near


def test_seeds_beyond_the_suite_count(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "runs", tmp_path / "runs")
    for method in ("none", "cwd"):
        make_record(Cell("streets", STUDENT, method, 7), tmp_path)
    write_tables(make_params(), tmp_path)
    assert [row(tmp_path, name)["n"] for name in ("none", "cwd", "acfd")] == ["4", "4", "3"]
    assert (row(tmp_path, "cwd")["diff_n"], row(tmp_path, "acfd")["diff_n"]) == ("4", "3")
    assert row(tmp_path, "kd")["status"].startswith("2 of 3")


def test_the_hours_are_those_of_cells_alone_not_of_their_packs(done: Path) -> None:
    results = read(done)
    steps = [record.run["seconds"]["step_median"] for record in results.finished]
    line = next(
        line
        for line in benchmark_table.overview(make_params(), [results], done).splitlines()
        if line.startswith("| `streets`")
    )
    hours = sum(300 * step + 10 for step in steps) / 3600
    assert f"| {hours:.1f} h of one process for the {len(steps)} trainings committed here" in line


def test_a_benchmark_that_the_suite_does_not_run_has_its_own_students_and_seeds(tmp_path: Path) -> None:
    params = make_params()
    other = "another"
    elsewhere = params.model_copy(
        update={
            "students": {other: params.student(STUDENT), **params.students},
            "suite": params.suite.model_copy(update={"benchmarks": [], "students": [other]}),
        }
    )
    assert {cell.student for cell in expected_cells(elsewhere, "streets", tmp_path)} == {other}  # no record
    make_record(teacher_cell(params, "streets"), tmp_path)
    for seed in (7, 9):
        make_record(Cell("streets", STUDENT, "none", seed), tmp_path)
    make_record(Cell("streets", STUDENT, "kd", 7), tmp_path)
    cells = [*expected_cells(elsewhere, "streets", tmp_path)]
    assert {(cell.student, cell.seed) for cell in cells} == {(STUDENT, 7), (STUDENT, 9)}
    found = read(tmp_path, elsewhere)
    assert found.students == [STUDENT] and found.status(STUDENT, "none") == "complete"
    assert found.status(STUDENT, "kd").startswith("1 of 2")
    tuned = elsewhere.tuning.model_copy(
        update={"benchmark": "streets", "student": STUDENT, "methods": ["kd", "cwd"]}
    )
    text = readme.block([found], elsewhere.model_copy(update={"tuning": tuned}))
    assert " | 1 | – | – | – |" in text and "Not trained yet: cwd." in text


def test_ranks_need_two_blocks_and_rank_what_all_have(done: Path, tmp_path: Path) -> None:
    assert not (done / "reports/ranks.md").exists() and ranks.rank([read(done)]) is None
    params = make_params()
    for benchmark in ("streets", "camvid-small"):
        for cell in expected_cells(params, benchmark, tmp_path):
            if (benchmark, cell.method) != ("camvid-small", "kd") and cell.method != "acfd-afd":
                make_record(cell, tmp_path, SKILL[cell.method] + 0.1 * (cell.method == "cwd"))
    write_texts(tmp_path)
    with (tmp_path / "reports/ranks.csv").open(newline="") as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert list(lines) == ["cwd", "acfd", "none"]  # kd is missing on one benchmark, controls are no methods
    assert [float(line["mean_rank"]) for line in lines.values()] == [1, 2, 3]
    assert float(lines["cwd"]["improvement"]) == 1.0 and lines["none"]["improvement"] == ""
    assert lines["cwd"]["improvement_low"] == ""  # every run is better, and so in every resample
    text = (tmp_path / "reports/ranks.md").read_text(encoding="utf-8")
    assert "2.34 (Nemenyi, 5 %)" in text  # Demšar's table: 2.343 √(3·4 / (6·2))
    assert "the ranking could tell no methods apart" in text  # 3 ranks differ by 2 at most
    assert "only 2 blocks for 3 methods" in text
    assert (tmp_path / "reports/ranks.png").is_file()
    shutil.rmtree(tmp_path / "runs/camvid-small")
    write_texts(tmp_path)
    assert not [*(tmp_path / "reports").glob("ranks.*")]


def test_every_figure_names_the_records_it_was_drawn_from(done: Path, tmp_path: Path) -> None:
    def origins(root: Path) -> set[str]:
        return {Image.open(path).info[figures.SOURCE] for path in (root / "reports").rglob("*.png")}

    (before,) = origins(done)
    shutil.copytree(done / "runs", tmp_path / "runs")
    make_record(Cell("streets", STUDENT, "cwd", 1), tmp_path, skill=0.3)
    report.report(make_params(), tmp_path)
    (after,) = origins(tmp_path)
    assert len(before) == 64 and before != after


def test_a_matplotlibrc_changes_no_figure(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "runs", tmp_path / "runs")
    with figures.plt.rc_context({"axes.facecolor": "black", "font.size": 20, "savefig.dpi": 30}):
        report.report(make_params(), tmp_path)
    drawn = [path.relative_to(done) for path in (done / "reports").rglob("*.png")]
    assert drawn and all((tmp_path / path).read_bytes() == (done / path).read_bytes() for path in drawn)


def test_a_readme_without_markers_stays_as_it_is(root: Path) -> None:
    for text in ("# plain\n", "<!-- results:end --> <!-- results:begin -->"):
        (root / "README.md").write_text(text, encoding="utf-8")
        assert readme.update(root / "README.md", "results", "new") is False
        assert (root / "README.md").read_text(encoding="utf-8") == text


def test_benchmarks_without_a_record_get_no_report(done: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in (done / "reports").iterdir()) == ["index.html", "streets"]
    assert report.finished(make_params(), tmp_path) == {}
    report.report(make_params(), tmp_path)
    assert not (tmp_path / "reports").exists()


def test_the_plan_of_a_benchmark_follows_from_counts_and_schedule(tmp_path: Path) -> None:
    """PSPNet-ResNet101 → PSPNet-ResNet18 on Cityscapes, by hand: 40,000 steps of 16 crops as counted; no GPU
    was measured."""
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT / "runs" / "networks.json", tmp_path / "runs")
    counts = json.loads((ROOT / "runs" / "networks.json").read_text())["networks"]
    macs = {name: rows[0]["macs"] for name, rows in counts.items()}
    student, teacher = macs["PSPNet-resnet18, stride 8"], macs["PSPNet-resnet101, stride 8"]
    rows = pd.DataFrame(benchmark_table.table(config.load(), ROOT).data).set_index("benchmark")
    guided = 40_000 * 16 * 2 * (3 * student + teacher)
    assert rows.loc["cityscapes", "guided_flops"] == pytest.approx(guided)
    assert rows.loc["cityscapes", "teacher_flops"] == pytest.approx(80_000 * 16 * 6 * teacher)
    assert rows.loc["voc", "guided_flops"] == pytest.approx(guided / 2)
    params, alone = config.load(), 40_000 * 16 * 6 * student
    suite = params.suite
    methods = len({*params.suite_methods} - {suite.reference, *params.controls})
    whole = 80_000 * 16 * 6 * teacher + len(suite.seeds) * (
        methods * guided + (1 + sum(suite.controls)) * alone
    )
    assert rows.loc["cityscapes", "cells"] == len(suite.seeds) * (methods + 1 + len(suite.controls))
    text = benchmark_table.overview(config.load(), [], tmp_path)
    assert "| `cityscapes` | leftImg8bit_trainvaltest.zip" in text
    assert f"| {whole / benchmark_table.SUSTAINED / 3600:,.0f} GPU hours |" in text
    assert "All GPU hours are **estimates**, from counted operations at 40 TFLOP/s (assumed)" in text
    settings = "benchmarks: [voc], students: [pspnet-resnet18-imagenet], weights: [resnet18, resnet101]"
    assert f"| `{settings}` |" in text and "| `benchmarks: [streets]` |" in text
