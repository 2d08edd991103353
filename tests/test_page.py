"""What the page says, without a browser: the answer in words, the rank groups, what a method's file tells."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_report import SEEDS, STUDENT, make_params, make_record, make_root, read, row, write_texts

from pipelines import config
from pipelines.config import metric_name
from pipelines.reports import answer, figures, page, svg, tables
from pipelines.reports.about import about
from pipelines.reports.looks import looks
from pipelines.runs import counts
from pipelines.runs.records import Cell, expected_cells, teacher_cell
from pipelines.stages import report


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_root(tmp_path_factory.mktemp("suite"), make_params())
    report.report(make_params(), root)
    return root


def test_the_answer_follows_from_the_table(done: Path) -> None:
    """By both intervals of each row."""
    rows = {name: row(done, name) for name in ("kd", "cwd", "acfd")}
    order = sorted(rows, key=lambda name: -float(rows[name]["diff_mean"]))

    def apart(prefix: str) -> list[str]:
        ends = [f"{prefix}over_{kind}_low" for kind in ("seeds", "images")]
        mean = f"{prefix}diff_mean"
        found = [name for name in order if all(float(rows[name][end]) > 0 for end in ends)]
        return sorted(found, key=lambda name: -float(rows[name][mean]))

    def listed(names: list[str]) -> str:
        return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))

    first, *others = answer.sentences(read(done), STUDENT)
    better, equal = apart(""), apart("equal_")
    assert len(better) > 1
    assert first.startswith(f"At equal steps, {len(better)} of 3 methods are clearly better than the ")
    assert f"student alone: {listed(better)}; none clearly worse" in first
    text = " ".join(others)
    rest = [name for name in rows if name not in better]
    assert first.endswith(f", {len(rest)} not clearly different." if rest else "worse.")
    are = "is" if len(equal) < 2 else "are"
    longer = f"trained longer, {len(equal) or 'none'} of 3 {are} clearly better{': ' * bool(equal)}"
    assert longer + listed(equal) in text
    assert f"{float(rows[order[0]]['diff_mean']):+.2f} points of test mIoU ({order[0]})" in text
    assert "with 3 seeds the width of an interval is itself a matter of chance" in text
    assert "no method could pass a sign-flip test at 5 % (smallest possible p: 0.25; one test " in text
    assert "test needs 6 seeds, 3 with Holm's correction need 7)." in text


def test_the_answer_admits_what_is_not_known(done: Path, tmp_path: Path) -> None:
    results = read(done)
    nothing = replace(results, cells=results.cells[results.cells["method"] == "none"])
    assert answer.sentences(nothing, STUDENT) == [
        f"Not known yet: no seed of {STUDENT} has finished with a method and without one."
    ]
    alone = replace(results, controls={}, methods=["none", "cwd"])
    assert "not known, because the student alone has not been trained longer" in " ".join(
        answer.sentences(alone, STUDENT)
    )
    one = answer.sentences(replace(results, cells=results.cells[results.cells["seed"] == SEEDS[0]]), STUDENT)
    assert one[0] == "Not known yet: one seed cannot say how far another would move a score."
    assert one[1].startswith("The highest gain is ") and one[2].startswith("The student alone scores ")
    assert one[3].startswith(f"{STUDENT} starts from random weights and trains for 300 steps of 4 images; ")
    assert len(one) == 4
    single = replace(results, cells=results.cells[results.cells["seed"] == SEEDS[0]])
    stand = single.standings(STUDENT, single.methods)
    assert {(s.rank, s.p, s.p_holm, s.p_max, s.gain.verdict, s.equal.verdict) for s in stand.values()} == {
        (None, None, None, None, "", "")
    }
    cells = results.cells  # kd has one seed, the others have more
    mixed = replace(results, cells=cells[(cells["method"] != "kd") | (cells["seed"] == SEEDS[0])])
    text = answer.sentences(mixed, STUDENT)
    assert "Not known, with one seed each: kd." in text
    assert not any("kd" in sentence for sentence in text if sentence.startswith(("At equal steps", "Worse")))
    assert set(mixed.ranks(STUDENT, mixed.methods)) == {"none", "cwd", "acfd-full"}
    params = make_params(controls=[], methods=["kd"], variants=[])
    make_record(teacher_cell(params, "streets"), tmp_path, params=params)
    for seed in SEEDS:
        make_record(Cell("streets", STUDENT, "none", seed), tmp_path, params=params)
        make_record(Cell("streets", STUDENT, "kd", seed), tmp_path, skill=0.40, params=params)
    first, *others = answer.sentences(read(tmp_path, params), STUDENT)
    assert first == "At equal steps, kd is clearly worse than the student alone."
    assert not any(sentence.startswith("Worse") for sentence in others)


def test_a_rank_is_as_wide_as_what_is_not_known(done: Path) -> None:
    """A row whose seeds scatter is not lifted by that; what is clear stays in order."""
    results = read(done)
    ranks = results.ranks(STUDENT, results.methods)
    assert set(ranks) == {"none", "kd", "cwd", "acfd-full"} and ranks["none"][0] > 1
    order = sorted(ranks, key=lambda m: -(results.mean(STUDENT, m) or 0))
    for place, method in enumerate(order, 1):
        assert ranks[method][0] <= place <= ranks[method][1]
    cells = results.cells.copy()  # the same mean, from seeds that are far apart
    own = (cells["student"] == STUDENT) & (cells["method"] == order[0])
    cells.loc[own, "test/miou"] += np.where(
        cells.loc[own, "seed"] == SEEDS[0], 40.0, -40.0 / (len(SEEDS) - 1)
    )
    noisy = replace(results, cells=cells).ranks(STUDENT, results.methods)
    assert noisy[order[0]] == (1, 4) and ranks[order[0]] != (1, 4)


def test_every_method_has_a_summary_and_its_paper() -> None:
    params = config.load()
    for method in params.method_keys:
        found = about(method, params)
        assert found["summary"] and (ROOT / found["file"]).is_file(), method
        if params.module_key(method) != params.suite.reference:
            assert re.search(r'href="https://(arxiv\.org/abs|doi\.org)/', found["paper"]), method
            assert len(re.sub("<.*?>", "", found["formula"])) < 1500, method


def test_a_family_is_where_student_and_teacher_are_compared(done: Path) -> None:
    results = read(done)
    counted = counts.read(ROOT)["methods"]
    expected = {"kd": "logits", "fitnet": "features", "dist": "logits", "acfd-full": "features and logits"}
    found = {method: page.family(results, method, counted[method]["taps"]) for method in expected}
    assert found == expected
    assert page.family(results, "none", []) == "student alone"
    assert page.family(results, "mine", []) == "not counted"


def test_a_method_has_one_look_on_every_benchmark(done: Path) -> None:
    results, params = read(done), make_params()
    fewer = replace(results, methods=["none", "cwd"])
    assert looks(fewer) == looks(results)
    look = looks(replace(results, weights={key: {} for key in config.load().method_keys}))
    rivals = [key for key in config.load().methods if key != params.suite.reference]
    assert len({look[key] for key in rivals}) == len(rivals)


def test_the_page_asks_for_nothing(done: Path) -> None:
    text = (done / "reports" / "index.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    own = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert re.findall(r"src=\"(?!data:)([^\"]*)", own) == [] and "<link" not in own
    led = set(re.findall(r"<a href=\"(?!#)([^\"]*)", own))  # what a reader may open is no request of the page
    assert set(re.findall(r"href=\"(?!#)([^\"]*)", own)) == led
    assert "https://arxiv.org/abs/2011.13256" in led  # CWD's paper
    ours = {name.removeprefix("../") for name in led if not name.startswith("https://")}
    assert "baselines/kd.py" in ours and [name for name in ours if not (ROOT / name).is_file()] == []
    assert str(done) not in text and all(figures.sentence(name, read(done)) for name in figures.NAMES)


def test_a_variant_has_its_costs_and_classes(done: Path) -> None:
    params, results = make_params(), read(done)
    boards = page._benchmark(results, params, done)["boards"]
    rows = {r["key"]: r for board in boards for r in board["rows"]}
    assert list(rows) == ["none", "none-x1.5", "none-x2", "kd", "cwd", "acfd-full", "acfd-afd"]
    own = [results.by_seed(STUDENT, m, "seconds/step_median")[0] for m in ("acfd-afd", "none")]
    assert rows["acfd-afd"]["costs"]["step_ratio"] == pytest.approx(own[0] / own[1], abs=1e-6)
    classes = {c["class"]: c for c in rows["acfd-afd"]["classes"]}
    assert list(classes) == [*results.classes(), "mean (mIoU)"]
    assert classes["mean (mIoU)"]["iou_mean"] == rows["acfd-afd"]["miou_mean"]
    assert "acfd-afd" not in {line["method"] for line in tables.cost(results).data}
    assert "acfd-afd" not in {line["method"] for line in tables.per_class(results).data}


def test_the_bars_of_the_classes_are_on_an_axis_that_holds_them_all(done: Path) -> None:
    """That of the gains is too narrow for the largest difference of a class."""
    results = read(done)
    metric = f"test/iou/{metric_name(results.classes()[0])}"
    far = results.cells[metric].where(results.cells["method"] != "cwd", 200.0)
    results = replace(results, cells=results.cells.assign(**{metric: far}))
    board = page._benchmark(results, make_params(), done)["boards"][0]
    drawn = [c for r in board["rows"] for c in r["classes"] if c["diff_mean"] is not None]
    order = sorted(drawn, key=lambda c: c["diff_mean"])
    places = [float(re.search(r'<circle cx="([\d.]+)"', c["bar"])[1]) for c in order]
    assert places == sorted(places) and places[-1] < svg.WIDTH - svg.MARGIN
    assert order[-1]["diff_mean"] > 100


def test_a_name_is_no_markup(tmp_path: Path) -> None:
    """A class and a note of a failure with characters of HTML stand on the page as they are."""
    root = make_root(tmp_path, make_params())
    note = next(c for c in expected_cells(make_params(), "streets") if (c.method, c.seed) == ("kd", 1))
    (note.scratch(root) / "failure.txt").write_text("<script>alert(1)</script> & more")
    write_texts(root)
    text = (root / "reports" / "index.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and "car &amp; van" in text
