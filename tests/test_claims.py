"""Published against measured on made-up claims and results: every verdict comes from a change of the data."""

from __future__ import annotations

import copy
import csv
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT

from pipelines import config
from pipelines.config import Benchmark, ConfigError, Network, Params
from pipelines.reports import claims, orders, published, statistics
from pipelines.reports.claims import Verdict
from pipelines.reports.published import Claims
from pipelines.reports.results import Results
from pipelines.reports.statistics import ImageBootstrap

STUDENT = "small"
BENCHMARK = "roads"
NONE = [50.0, 52.0, 51.0, 49.0]
CLAIM = {
    "id": "a-claim",
    "method": "kd",
    "dataset": "camvid",
    "split": "test",
    "student": "PSPNet-R18",
    "teacher": "PSPNet-R101",
    "score": 68.0,
    "baseline": 66.0,
    "teacher_score": 70.0,
    "source": "someone",
    "protocol": "same",
    "evidence": "authors",
}
RAW: dict[str, Any] = {
    "methods": ["kd", "skd", "cwd", "acfd-full"],
    "sources": {"someone": {"cite": "Some One | 2021", "where": "Table 2"}},
    "protocols": {
        "same": {
            "text": "as here",
            "images": "original",
            "crop": [360, 360],
            "batch_size": 16,
            "steps": 6000,
            "lr": 0.01,
            "weight_decay": 0.0005,
            "pretrained": True,
        }
    },
    "evidence": {"authors": "by its authors"},
    "networks": {
        "PSPNet-R18": {"architecture": "PSPNet", "encoder": "resnet18"},
        "PSPNet-R101": {"architecture": "PSPNet", "encoder": "resnet101"},
        "DeepLabV3-R18": {"architecture": "DeepLabV3", "encoder": "resnet18"},
    },
    "claims": [CLAIM],
}

Change = Callable[[dict[str, Any]], Any]


@cache
def parameters() -> Params:
    return config.load()


def network(encoder: str) -> Network:
    return Network(architecture="PSPNet", encoder=encoder, output_stride=8, weights="resnet18")


def benchmark(dataset: str = "camvid", size: list[int] | None = None, **training: Any) -> Benchmark:
    base = parameters().benchmarks["streets"]
    wanted = {
        "crop": (360, 360),
        "batch_size": 16,
        "steps": 6000,
        "lr": 0.01,
        "weight_decay": 0.0005,
    } | training
    return base.model_copy(
        update={
            "data": {"dataset": dataset, "size": size},
            "training": base.training.model_copy(update=wanted),
            "teacher": base.teacher.model_copy(update={"network": network("tu-resnet101")}),
        }
    )


def make_params(**benchmarks: Benchmark) -> Params:
    """Parameters whose one benchmark has all the conditions of RAW, unless others are given."""
    base = parameters()
    return base.model_copy(
        update={
            "suite": base.suite.model_copy(update={"students": [STUDENT], "seeds": [0, 1, 2, 3]}),
            "students": {STUDENT: network("tu-resnet18")},
            "benchmarks": benchmarks or {BENCHMARK: benchmark()},
            "methods": {
                "none": {},
                "kd": {"weight": 1.0},
                "skd": {"weight_pixel": 3.0, "weight_pair": 1.0, "weight_holistic": 0.0, "scale": 0.5},
            },
            "acfd": {"full": {"weight_afd": 1.0, "weight_csd": 1.0}},
        }
    )


def make_claims(tmp_path: Path, change: Change = lambda raw: None) -> Claims:
    raw = copy.deepcopy(RAW)
    change(raw)
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return published.load(path)


def results(
    gains: dict[str, list[float]] | None = None, name: str = BENCHMARK, student: str = STUDENT, **columns: Any
) -> Results:
    """Finished cells: NONE for the student alone, and NONE + gain for every method, by seed."""
    rows = [
        {"student": student, "method": method, "seed": seed, "test/miou": NONE[seed] + gain}
        | {"student/parameters": 12e6, "student/flops": 3e9}
        | columns.get(method.replace("-", "_"), {})
        for method, values in {"none": [0.0] * 4, **(gains or {})}.items()
        for seed, gain in enumerate(values)
    ]
    found = Results(
        benchmark=name,
        students=[student],
        reference="none",
        methods=["none", "kd", "skd", "acfd-full"],
        variants=["acfd-full"],
        planned={student: ["acfd-full"]},
        seeds={student: [0, 1, 2, 3]},
        weights={},
        tuning=config.load().tuning,
        cells=pd.DataFrame(rows),
    )
    return on_images(found)


def on_images(found: Results, spread: float = 0.0) -> Results:
    """With resamples of test images, on which a gain varies by so many points."""
    shift = spread * np.linspace(-1, 1, 201)
    scores = {
        (row["method"], row["seed"]): row["test/miou"] + (row["method"] != "none") * shift
        for row in found.cells.to_dict("records")
    }
    found.__dict__["bootstraps"] = {student: ImageBootstrap(scores) for student in found.students}
    return found


def without(found: Results, method: str, *seeds: int) -> Results:
    gone = (found.cells["method"] == method) & found.cells["seed"].isin(seeds)
    return on_images(replace(found, cells=found.cells[~gone]))


def judge(
    tmp_path: Path, *every: Results, params: Params | None = None, change: Change = lambda raw: None
) -> Verdict:
    found = make_claims(tmp_path, change)
    return claims.judge(found.claims[0], found, every, params or make_params())


def of_claim(**values: Any) -> Change:
    return lambda raw: raw["claims"][0].update(values)


def of_protocol(**values: Any) -> Change:
    return lambda raw: raw["protocols"]["same"].update(values)


AROUND = [1.7, 2.1, 2.5, 2.1]  # mean 2.1, sd 0.3266, t(3) = 3.1824: 2.1 ± 0.5197


def test_a_claim_is_reproduced_when_the_interval_reaches_it(tmp_path: Path) -> None:
    verdict = judge(tmp_path, results({"kd": AROUND}))
    assert verdict.word == "reproduced"
    assert verdict.reasons == ["+1.58 to +2.62 reaches +2.00"]
    assert verdict.unstated == []
    assert verdict.measured is not None
    assert verdict.measured.interval is not None
    assert (verdict.measured.benchmark, verdict.measured.student, verdict.measured.n) == (
        BENCHMARK,
        STUDENT,
        4,
    )
    assert verdict.measured.mean == pytest.approx(2.1)
    assert verdict.measured.interval.low == pytest.approx(1.5803, abs=1e-4)
    assert verdict.measured.interval.high == pytest.approx(2.6197, abs=1e-4)
    assert verdict.gap == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("gains", "claimed", "word", "reason"),
    [
        (AROUND, 68.61, "reproduced", "+1.58 to +2.62 reaches +2.61"),
        (AROUND, 68.63, "not reproduced", "below the claim: +1.58 to +2.62, claimed +2.63"),
        ([g + 5 for g in AROUND], 68.0, "reproduced", "+6.58 to +7.62 reaches +2.00"),
        ([g - 1 for g in AROUND], 68.0, "not reproduced", "below the claim: +0.58 to +1.62, claimed +2.00"),
        (
            [-2.0, 3.0, 2.0, 5.0],
            68.0,
            "undecided",
            "with n = 4, -2.68 to +6.68 contains 0 and the claim",
        ),
        (
            [-2.0, 3.0, 2.0, 5.0],
            73.0,
            "not reproduced",
            "the interval contains 0 and not the claim: -2.68 to +6.68",
        ),
        (
            [-g for g in AROUND],
            68.0,
            "not reproduced",
            "the opposite of the claim: -2.62 to -1.58, claimed +2.00",
        ),
        ([-g for g in AROUND], 64.0, "reproduced", "-2.62 to -1.58 reaches -2.00"),
        ([-g for g in AROUND], 63.0, "not reproduced", "above the claim: -2.62 to -1.58, claimed -3.00"),
        (AROUND, 64.0, "not reproduced", "the opposite of the claim: +1.58 to +2.62, claimed -2.00"),
        (AROUND[:1], 68.0, "undecided", "only one seed"),
    ],
)
def test_the_outcome_follows_the_gains(
    tmp_path: Path, gains: list[float], claimed: float, word: str, reason: str
) -> None:
    verdict = judge(tmp_path, results({"kd": gains}), change=of_claim(score=claimed))
    assert (verdict.word, verdict.reasons) == (word, [reason])


def test_a_stated_gain_goes_before_the_scores(tmp_path: Path) -> None:
    verdict = judge(tmp_path, results({"kd": AROUND}), change=of_claim(gain=9.0))
    assert verdict.word == "not reproduced"
    assert verdict.gap == pytest.approx(2.1 - 9.0)


def test_without_cells_a_comparable_claim_is_not_run(tmp_path: Path) -> None:
    full = results({"kd": AROUND})
    for every in (
        [],
        [results()],
        [without(full, "none", 0, 1, 2, 3)],
        [without(without(full, "none", 0, 1), "kd", 2, 3)],  # no seed in both
    ):
        verdict = judge(tmp_path, *every)
        assert (verdict.word, verdict.measured, verdict.gap) == ("not run", None, None)
        assert verdict.reasons == ["no seed with finished cells of both kd and none"]
    paired = judge(tmp_path, without(full, "none", 0))
    assert paired.measured is not None
    assert paired.measured.gain.paired.by_seed == pytest.approx({1: 2.1, 2: 2.5, 3: 2.1})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (of_claim(student="DeepLabV3-R18"), "student PSPNet-R18 instead of DeepLabV3-R18"),
        (of_claim(teacher="DeepLabV3-R18"), "teacher PSPNet-R101 instead of DeepLabV3-R18"),
        (of_protocol(crop=[512, 1024]), "crop 360×360 instead of 512×1024"),
        (of_protocol(batch_size=8), "batches of 16 images instead of 8"),
        (of_protocol(steps=40000), "6,000 steps instead of 40,000"),
        (of_protocol(lr=0.02), "learning rate 0.01 instead of 0.02"),
        (of_protocol(weight_decay=0.0001), "weight decay 0.0005 instead of 0.0001"),
        (of_protocol(pretrained=False), "ImageNet weights instead of none"),
        (of_claim(split="val"), "test split instead of val"),
        (of_claim(other_loss="adds a critic"), "another loss (adds a critic)"),
    ],
)
def test_one_other_condition_makes_a_claim_not_comparable(
    tmp_path: Path, change: Change, reason: str
) -> None:
    verdict = judge(tmp_path, results({"kd": AROUND}), change=change)
    assert (verdict.word, verdict.reasons) == ("not comparable", [reason])
    assert verdict.setting == (BENCHMARK, STUDENT)
    assert verdict.measured is not None  # what was measured is shown nevertheless
    assert verdict.gap == pytest.approx(0.1)


def test_every_difference_is_named_in_a_fixed_order(tmp_path: Path) -> None:
    params = make_params(tiny=benchmark(size=[72, 96], crop=(48, 64), batch_size=8, steps=160))
    plain = params.students[STUDENT].model_copy(update={"weights": None, "encoder": "tu-resnet34"})
    params = params.model_copy(update={"students": {STUDENT: plain}})
    verdict = judge(tmp_path, params=params)
    assert verdict.word == "not comparable"
    assert verdict.reasons == [
        "student PSPNet-resnet34 instead of PSPNet-R18",
        "images of 72×96 instead of the original size",
        "crop 48×64 instead of 360×360",
        "batches of 8 images instead of 16",
        "160 steps instead of 6,000",
        "no ImageNet weights",
    ]
    assert verdict.measured is None


def test_loss_terms_are_compared_with_the_weights_of_params(tmp_path: Path) -> None:
    cells = results({"skd": AROUND})
    assert judge(tmp_path, cells, change=of_claim(method="skd", terms=["pair", "pixel"])).word == "reproduced"
    verdict = judge(tmp_path, cells, change=of_claim(method="skd", terms=["pixel", "pair", "holistic"]))
    assert verdict.reasons == ["loss terms pixel + pair instead of pixel + pair + holistic"]
    unknown = judge(tmp_path, cells, change=of_claim(method="skd"))
    assert (unknown.word, unknown.unstated) == ("reproduced", ["loss terms"])


def test_a_method_that_params_leave_out_is_not_comparable(tmp_path: Path) -> None:
    verdict = judge(tmp_path, results(), change=of_claim(method="cwd"))
    assert (verdict.word, verdict.reasons) == ("not comparable", ["cwd is not in params.yaml"])


def test_conditions_that_the_source_does_not_state_are_listed_and_not_counted(tmp_path: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["protocols"]["same"] = dict.fromkeys(RAW["protocols"]["same"], None) | {"text": "?"}
        raw["claims"][0].update(student=None, teacher=None, split=None)

    verdict = judge(tmp_path, results({"kd": AROUND}), change=change)
    assert verdict.word == "reproduced"
    assert verdict.unstated == [
        "student",
        "teacher",
        "image size",
        "crop",
        "batch size",
        "steps",
        "learning rate",
        "weight decay",
        "ImageNet weights",
        "split",
    ]


@pytest.mark.parametrize(
    ("change", "reasons", "gap"),
    [
        (of_claim(dataset=None), ["data set not stated"], 0.1),
        (of_claim(unit=None, gain=5.0), ["unit of the gain not stated"], None),
        (of_claim(baseline=None), ["baseline not stated"], None),
        (of_claim(score=None), ["score not stated"], None),
        (of_claim(dataset=None, unit=None), ["data set not stated", "unit of the gain not stated"], None),
    ],
)
def test_a_claim_that_lacks_what_it_needs_is_not_comparable(
    tmp_path: Path, change: Change, reasons: list[str], gap: float | None
) -> None:
    verdict = judge(tmp_path, results({"kd": AROUND}), change=change)
    assert (verdict.word, verdict.reasons) == ("not comparable", reasons)
    assert verdict.measured is not None
    assert verdict.gap == (None if gap is None else pytest.approx(gap))


def test_another_data_set_is_not_comparable_and_not_shown(tmp_path: Path) -> None:
    verdict = judge(tmp_path, results({"kd": AROUND}), change=of_claim(dataset="voc"))
    assert (verdict.word, verdict.reasons) == ("not comparable", ["no benchmark with the data set voc"])
    assert (verdict.measured, verdict.gap) == (None, None)


def test_the_closest_measurement_has_the_same_student_then_the_fewest_differences(tmp_path: Path) -> None:
    params = make_params(
        short=benchmark(steps=10, batch_size=2), long=benchmark(steps=10), moon=benchmark("streets")
    )
    params = params.model_copy(
        update={"students": {"large": network("tu-resnet34"), STUDENT: network("tu-resnet18")}}
    )
    near, far = results({"kd": AROUND}, "long"), results({"kd": [1.0, 1.1, 1.2, 1.3]}, "short")
    other = results({"kd": [7.0] * 4}, "long", student="large")
    elsewhere = results({"kd": [9.0] * 4}, "moon")
    for every, place in (
        ([far, other, near, elsewhere], ("long", STUDENT)),
        ([other, far], ("short", STUDENT)),  # the same student goes before fewer differences
        ([other, elsewhere], ("long", "large")),
    ):
        verdict = judge(tmp_path, *every, params=params)
        assert verdict.word == "not comparable"
        assert verdict.setting == place
        assert verdict.measured is not None
        assert (verdict.measured.benchmark, verdict.measured.student) == place
    assert judge(tmp_path, elsewhere, params=params).measured is None


def test_of_two_comparable_benchmarks_the_one_with_more_seeds_decides(tmp_path: Path) -> None:
    params = make_params(first=benchmark(), second=benchmark())
    few, many = results({"kd": AROUND[:3]}, "first"), results({"kd": AROUND}, "second")
    for every in ([few, many], [many, few]):
        assert judge(tmp_path, *every, params=params).setting == ("second", STUDENT)
    equal = [results({"kd": AROUND}, name) for name in ("first", "second")]
    assert judge(tmp_path, *equal, params=params).setting == ("first", STUDENT)


def test_the_comparable_benchmark_decides_whatever_else_was_measured(tmp_path: Path) -> None:
    params = make_params(short=benchmark(steps=10), roads=benchmark())
    low, high = results({"kd": [0.1, 0.2, 0.1, 0.2]}, "short"), results({"kd": AROUND})
    assert judge(tmp_path, low, high, params=params).word == "reproduced"
    only = judge(tmp_path, low, params=params)
    assert (only.word, only.setting) == ("not run", ("roads", STUDENT))
    assert only.measured is not None
    assert only.measured.benchmark == "short"


def test_the_cost_claim_compares_parameters_and_flops_of_every_cell(tmp_path: Path) -> None:
    change = of_claim(kind="cost", method="acfd-full", dataset=None, score=None, baseline=None)
    cells = results({"acfd-full": AROUND})
    verdict = judge(tmp_path, cells, change=change)
    assert verdict.word == "reproduced"
    assert verdict.reasons == [f"equal on {BENCHMARK}, {STUDENT}: 12,000,000 parameters, 3,000,000,000 FLOPs"]
    slower = results({"acfd-full": AROUND}, acfd_full={"student/flops": 4e9})
    verdict = judge(tmp_path, cells, slower, change=change)
    assert verdict.word == "not reproduced"
    assert verdict.reasons == [
        f"not equal on {BENCHMARK}, {STUDENT}: 12,000,000 parameters against 12,000,000, "
        "4,000,000,000 FLOPs against 3,000,000,000"
    ]
    one = replace(cells, cells=cells.cells.copy())
    one.cells.loc[one.cells.index[-1], "student/parameters"] = 13e6  # a single seed
    assert judge(tmp_path, one, change=change).word == "not reproduced"
    one.cells.loc[one.cells["seed"] == 3, "student/parameters"] = 13e6  # the same values, but not one network
    assert judge(tmp_path, one, change=change).word == "not reproduced"
    for missing in (results(), without(cells, "none", 0, 1, 2, 3), None):
        assert judge(tmp_path, *([missing] if missing else []), change=change).word == "not run"
    unmeasured = replace(cells, cells=cells.cells.drop(columns="student/flops"))
    assert judge(tmp_path, unmeasured, change=change).word == "not run"


def several(raw: dict[str, Any]) -> None:
    raw["sources"]["other"] = {"cite": "Other", "where": "README"}
    raw["claims"] += [
        {**CLAIM, "id": "b", "score": 65.5, "source": "other"},
        {**CLAIM, "id": "c", "dataset": "voc", "score": 71.25},
        {**CLAIM, "id": "d", "method": "skd", "published_as": "S|KD"},
        {**CLAIM, "id": "e", "method": "acfd-full", "unit": None, "gain": 5.79, "dataset": None},
        {**CLAIM, "id": "f", "method": "acfd-full", "kind": "cost"},
    ]


def test_directions_hold_the_published_range_and_the_measured_word(tmp_path: Path) -> None:
    found = make_claims(tmp_path, several)
    every = [
        results({"kd": AROUND, "skd": [-g for g in AROUND]}),
        results({"kd": [-2.0, 3.0, 2.0, 5.0], "skd": [1.0]}, "more"),
    ]
    shown = claims.directions(found, every).rows
    assert [(row[0], *row[3:5], *row[6:]) for row in shown[1:]] == [
        ("kd", f"more, {STUDENT}", "4", "-2.68 to +6.68", "undecided"),
        ("skd", f"{BENCHMARK}, {STUDENT}", "4", "-2.62 to -1.58", "loss"),
        ("skd", f"more, {STUDENT}", "1", "–", "undecided"),
        ("acfd", "–", "0", "–", "not run"),
    ]
    assert shown[0] == [
        "kd",
        "-0.50 to +5.25",
        "3 (2)",
        f"{BENCHMARK}, {STUDENT}",
        "4",
        "+2.10",
        "+1.58 to +2.62",
        "gain",
    ]
    assert shown[4][1] == "+5.79 (unit not stated)"


def test_a_gain_that_hangs_on_the_test_images_is_not_decided(tmp_path: Path) -> None:
    found = results({"kd": AROUND})
    assert judge(tmp_path, found).word == "reproduced"
    verdict = judge(tmp_path, on_images(found, spread=5.0))
    assert verdict.word == "undecided" and "the interval over images contains 0" in verdict.reasons[0]
    found.__dict__["bootstraps"] = {}  # of a handful of images
    verdict = judge(tmp_path, found)
    assert verdict.word == "undecided" and "there is none over images" in verdict.reasons[0]


def test_an_order_is_set_beside_that_of_a_published_table(tmp_path: Path) -> None:
    """Of five methods, the best of several rows of one; against scipy, and Bonett and Wright by hand."""
    methods = ["kd", "skd", "cwd", "at", "ifvd"]
    scores = [70.0, 66.0, 68.0, 67.0, 65.0]

    def change(raw: dict[str, Any]) -> None:
        raw["methods"] = [*dict.fromkeys([*raw["methods"], *methods])]
        rows = zip([*methods, "kd"], [*scores, 60.0], strict=True)
        raw["claims"] = [{**CLAIM, "id": f"{m}-{s:g}", "method": m, "score": s} for m, s in rows]

    found = make_claims(tmp_path, change)
    here = [2.0, 1.0, 3.0, -1.0, 0.0]
    every = [results({m: [gain] * 4 for m, gain in zip(methods, here, strict=True)})]
    (order,) = orders.orders(found, every)
    assert order.scores["kd"] == pytest.approx((70.0, 2.0 + sum(NONE) / 4))
    rho = 1 - 6 * sum(d * d for d in (1, -1, -1, 2, -1)) / (5 * 24)
    half = 1.959964 * np.sqrt((1 + rho**2 / 2) / 2)
    assert order.rho == pytest.approx(rho)
    assert order.interval.low == pytest.approx(np.tanh(np.arctanh(rho) - half), abs=1e-6)
    assert order.interval.high == pytest.approx(np.tanh(np.arctanh(rho) + half), abs=1e-6)
    assert "Against 1 published table of 5 methods or more (from 1 source; in 0" in orders.sentence([order])
    assert order.others == []
    alike = [results({m: [1.0] * 4 for m in methods})]
    assert orders.orders(found, alike) == []  # an order of equal scores is none
    assert orders.orders(found, [results({m: [1.0] * 4 for m in methods[:4]})]) == []
    assert orders.sentence([]) == ""


def test_rows_of_another_loss_are_marked_in_an_order(tmp_path: Path) -> None:
    methods = ["kd", "skd", "cwd", "at", "ifvd"]

    def change(raw: dict[str, Any]) -> None:
        raw["methods"] = [*dict.fromkeys([*raw["methods"], *methods])]
        rows = [{**CLAIM, "id": m, "method": m, "score": 70.0 - place} for place, m in enumerate(methods)]
        rows[1]["terms"] = ["pixel"]
        rows[2]["other_loss"] = "of the features"
        rows[3]["terms"] = ["a", "b"]
        raw["claims"] = rows

    own = replace(
        results({m: [float(place)] * 4 for place, m in enumerate(methods)}),
        weights={"skd": {"weight_pixel": 10.0, "weight_pair": 1.0}, "at": {"weight_a": 1.0, "weight_b": 2.0}},
    )
    found = orders.orders(make_claims(tmp_path, change), [own])
    assert found[0].others == ["skd", "cwd"]  # of at all terms run
    assert "kd, skd*, cwd*, at, ifvd" in "".join(orders.table(found).markdown).replace("\\", "")
    assert "(from 1 source; in 1 some methods have another loss" in orders.sentence(found)


def test_an_order_compares_the_seeds_that_rows_share(tmp_path: Path) -> None:
    """A row whose only seed is an easy one does not lead."""
    methods = ["kd", "skd", "cwd", "at", "ifvd"]

    def change(raw: dict[str, Any]) -> None:
        raw["methods"] = [*dict.fromkeys([*raw["methods"], *methods])]
        raw["claims"] = [{**CLAIM, "id": m, "method": m, "score": 70.0 - i} for i, m in enumerate(methods)]

    gains = {m: [5.0 - i] * 4 for i, m in enumerate(methods)}
    gains["ifvd"] = [0.5]  # seed 0 alone
    (order,) = orders.orders(make_claims(tmp_path, change), [results(gains)])
    assert order.scores["ifvd"][1] == pytest.approx(sum(NONE) / 4 + 0.5)


def test_a_perfect_order_of_few_is_not_certain() -> None:
    rho, interval = statistics.rank_correlation([1, 2, 3, 4, 5], [5, 6, 7, 8, 9])
    assert rho == pytest.approx(1) and 0 < interval.low < 0.9 < interval.high < 1
    low = statistics.rank_correlation([1, 2, 3, 4, 5], [9, 8, 7, 6, 5])[1]
    assert (low.low, low.high) == pytest.approx((-interval.high, -interval.low))
    with pytest.raises(ValueError, match="four pairs"):
        statistics.rank_correlation([1, 2, 3], [1, 2, 3])


def test_sentences_count_the_verdicts_and_name_what_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, params = make_claims(tmp_path, several), make_params()
    every = [results({"kd": AROUND, "skd": [-2.0, 3.0, 2.0, 5.0], "acfd-full": [1.0]})]
    reason = (
        '"not comparable" says that the published setting differs from every benchmark here or is not fully '
        "stated; the column why gives the reason."
    )
    assert claims.sentences(found, claims.judge_all(found, every, params), every, params) == [
        "Of 5 published accuracies of the methods of this suite (5 of them state a gain): 1 reproduced, "
        "1 not reproduced, 1 undecided, 2 not comparable, 0 not run. " + reason,
        "acfd's +5.79 (unit not stated) can be neither confirmed nor refuted here (data set not stated; unit "
        "of the gain not stated). The suite's reading of acfd changes test mIoU by +1.00 (n = 1) on roads, "
        "small.",
        "acfd's unchanged inference cost: reproduced (it holds by construction, as adapters are dropped: "
        "equal on roads, small: 12,000,000 parameters, 3,000,000,000 FLOPs).",
        "A clear gain over the student alone is seen here, at equal steps, for kd on roads, "
        "small: +2.10 (+1.58 to +2.62, n = 4).",
        "No clear gain over the student alone is seen here for skd on roads, small: +2.00 "
        "(-2.68 to +6.68, n = 4), undecided.",  # and nothing of acfd, which has one seed
    ]
    four = [results({"acfd-full": [4.0, 5.0, 6.0, 7.0]}), replace(every[0], benchmark="lanes")]
    own = claims.sentences(found, claims.judge_all(found, four, params), four, params)[1]
    assert (
        "changes test mIoU by +5.50 (+3.45 to +7.55, n = 4) on roads, small; +1.00 (n = 1) on lanes, small."
        in own
    )
    assert own.endswith(
        "Taken as points of mIoU, +5.79 lies within the interval of roads, small. Taken as a share of the "
        "student alone (+2.92), it lies in none of these intervals."
    )
    twice = [four[0], replace(four[0], benchmark="lanes")]
    own = claims.sentences(found, claims.judge_all(found, twice, params), twice, params)[1]
    assert "within the interval of roads, small and lanes, small. Taken as a share of the" in own
    low = results({"acfd-full": [1.0, 1.2, 0.9, 1.1]}, student="tiny")
    own = claims.sentences(found, claims.judge_all(found, [four[0], low], params), [four[0], low], params)[1]
    assert "within the interval of roads, small, and outside that of roads, tiny. Taken as" in own
    monkeypatch.setattr(claims, "MOST", 1)  # cases that are listed one by one
    assert claims.sentences(found, claims.judge_all(found, every, params), every, params)[3:] == [
        "Of the methods with a published gain, a clear one over the student alone is seen here in 1 of 2 "
        "cases (method, benchmark, student) with several seeds, at equal steps."
    ]
    assert claims.sentences(found, claims.judge_all(found, [], params), [], params) == [
        "Of 5 published accuracies of the methods of this suite (5 of them state a gain): 0 reproduced, "
        "0 not reproduced, 0 undecided, 2 not comparable, 3 not run. " + reason,
        "acfd's +5.79 (unit not stated) can be neither confirmed nor refuted here (data set not stated; unit "
        "of the gain not stated).",
        "acfd's unchanged inference cost: not run (no finished cells of both acfd-full and none).",
        "None of these methods has been measured here with several seeds yet.",
    ]


def test_files_are_the_same_bytes_twice_and_change_with_the_records(tmp_path: Path) -> None:
    found, params = make_claims(tmp_path, several), make_params()
    every = [results({"kd": AROUND})]
    written = []
    for name in ("one", "two"):
        claims.write(found, every, params, tmp_path / name)
        written.append([(tmp_path / name / f"claims.{kind}").read_bytes() for kind in ("md", "csv")])
    assert written[0] == written[1]
    claims.write(found, [results({"kd": [g - 1 for g in AROUND]})], params, tmp_path / "two")
    assert (tmp_path / "two" / "claims.md").read_bytes() != written[0][0]
    rows = list(csv.DictReader(io.StringIO(written[0][1].decode())))
    assert [row["id"] for row in rows] == ["a-claim", "b", "c", "d", "e", "f"]
    assert [row["verdict"] for row in rows] == [
        "reproduced",
        "not reproduced",
        "not comparable",
        "not run",
        "not comparable",
        "not run",
    ]
    assert (rows[0]["gain"], rows[0]["measured_gain"], rows[0]["gap"]) == ("2.0", "2.1", "0.1")
    text = written[0][0].decode()
    assert "[How a claim is judged](../docs/tables.md#claims)" in text
    assert all(rule in (ROOT / "docs" / "tables.md").read_text(encoding="utf-8") for rule in claims.RULE)
    assert "6 claims, 5 of accuracy and 1 of cost: 1 reproduced, 1 not reproduced, 0 undecided, " in text
    assert r"S\|KD" in text
    assert str(tmp_path) not in text
    lines = text.splitlines()
    for start in (i for i, line in enumerate(lines) if line.startswith("| --- ")):
        table = lines[start - 1 : lines.index("", start)]
        assert len({line.replace(r"\|", "").count("|") for line in table}) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (of_claim(source="nobody"), "claim 'a-claim' names the source 'nobody'.*someone"),
        (of_claim(protocol="x"), "names the protocol 'x'.*same"),
        (of_claim(evidence="rumour"), "names the evidence level 'rumour'.*authors"),
        (of_claim(student="VGG"), "names the network 'VGG'.*PSPNet-R18"),
        (of_claim(teacher="VGG"), "names the network 'VGG'"),
        (of_claim(method="magic"), "names the method 'magic'.*acfd-full"),
        (of_claim(verdict="fine"), r"claims\.0\.verdict is not a known setting"),
        (of_claim(score="68.0"), r"claims\.0\.score = '68.0' is not allowed"),
        (of_claim(score=168.0), r"claims\.0\.score = 168.0 is not allowed"),
        (of_claim(gain=float("nan")), r"claims\.0\.gain = nan is not allowed"),
        (of_protocol(crop=[0, 5]), r"protocols\.same\.crop\.0 = 0 is not allowed"),
        (lambda raw: raw["claims"][0].pop("baseline"), r"claims\.0\.baseline is missing"),
        (lambda raw: raw["claims"].append(CLAIM), "two claims are called 'a-claim'"),
    ],
)
def test_bad_claims_are_one_sentence(tmp_path: Path, change: Change, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        make_claims(tmp_path, change)
    assert str(error.value).startswith("In claims.yaml: ")
    assert "\n" not in str(error.value)


def test_unreadable_claims(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"claims\.yaml cannot be read"):
        published.load(tmp_path / "claims.yaml")
    (tmp_path / "claims.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"claims\.yaml is not valid YAML"):
        published.load(tmp_path / "claims.yaml")


def test_the_claims_of_the_repository() -> None:
    found = published.load(ROOT / published.FILE)
    text = (ROOT / "reports" / "claims.yaml").read_text(encoding="utf-8")
    params = parameters()
    assert not [word for word in (*claims.VERDICTS, "verdict:") if word in text.lower()]
    own = found.claims
    assert {claim.method for claim in own} == set(found.methods)  # also those that params.yaml has not
    assert {claim.source for claim in own} == set(found.sources)
    assert {claim.protocol for claim in own} == set(found.protocols)
    assert {claim.evidence for claim in own} == set(found.evidence)
    assert {claim.dataset for claim in own} == {None, "camvid", "cityscapes", "voc", "ade20k"}
    for claim in own:
        if claim.score is not None:  # a published table gives scores, its gain is computed
            assert claim.gain is None
            assert 30 < claim.score < 80
            assert claim.teacher_score is None or claim.score < claim.teacher_score
            assert claim.claimed is None or -1.2 < claim.claimed < 9
            assert claim.student != claim.teacher
        if claim.method in params.method_keys:
            weights = [key for key in params.method_values(claim.method) if key.startswith("weight_")]
            assert {f"weight_{term}" for term in claim.terms or ()} <= set(weights)
    (acfd,) = [claim for claim in own if claim.method == "acfd-full" and claim.kind == "gain"]
    assert (acfd.gain, acfd.unit, acfd.dataset, acfd.baseline) == (5.79, None, None, None)
    (cost,) = [claim for claim in own if claim.kind == "cost"]
    assert cost.method == "acfd-full"
    words = {claim.id: claims.judge(claim, found, [], params).word for claim in own}
    assert words[acfd.id] == "not comparable"
    assert words[cost.id] == "not run"
    absent = [claim.id for claim in own if claim.method not in params.method_keys]
    assert {words[key] for key in absent} <= {"not comparable"}


def test_claims_need_no_heavy_library() -> None:
    code = "import sys, pipelines.reports.claims; print({'torch', 'mlflow', 'dvc'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_published_validation_split_is_our_test_split_where_test_labels_are_not_public() -> None:
    params, known = config.load(), published.load(ROOT / published.FILE)
    claim = next(claim for claim in known.claims if (claim.dataset, claim.split) == ("cityscapes", "val"))
    for benchmark, ours in (("cityscapes", "val"), ("voc", "val"), ("ade20k", "val"), ("camvid", "test")):
        found = claims._differences(claim, known, params, benchmark, "pspnet-resnet18")
        assert found.get("split") == (None if ours == "val" else "test split instead of val")
