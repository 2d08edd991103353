"""The search for loss weights: the same number of trials for all, no look at the test split, nothing lost."""

from __future__ import annotations

import csv
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from suites import slow

from pipelines import config
from pipelines.config import ConfigError, Params
from pipelines.engine import pack as pack_module
from pipelines.method import Search
from pipelines.methods import checked, configured
from pipelines.runs import budget
from pipelines.suite import cluster, work
from pipelines.tools import tune

METHODS = ["kd", "skd"]


@pytest.fixture
def params(edit: Any) -> Params:
    def change(raw: dict[str, Any]) -> None:
        raw["tuning"].update(
            benchmark="streets", student="pspnet-resnet18", methods=METHODS, trials=3, steps=2, margin=0.0
        )
        for section, kept in (("benchmarks", ["streets"]), ("students", ["pspnet-resnet18"])):
            raw[section] = {key: raw[section][key] for key in kept}  # YAML takes longer than all else here
        raw["methods"] = {key: raw["methods"][key] for key in ("none", "kd", "skd", "cwd")}
        raw["official"], raw["weights"] = {}, {}

    return edit(change)


class Scored:
    """In place of trainings: a score that follows from the weights. Stops at some of its rounds."""

    def __init__(
        self, stops: tuple[int, ...] = (), fails: Callable[[str, float], bool] | None = None
    ) -> None:
        self.stops, self.fails = stops, fails
        self.rounds: list[dict[str, dict[str, float]]] = []

    def __call__(self, trials: tune.Round) -> tune.Scores:
        self.rounds.append({method: dict(weights) for method, weights in trials.items()})
        if len(self.rounds) in self.stops:
            raise KeyboardInterrupt
        return {method: self.score(method, weights) for method, weights in trials.items()}

    def score(self, method: str, weights: dict[str, float]) -> float | str:
        first = next(iter(weights.values()))
        if self.fails and self.fails(method, first):
            return f"the term {method} is not finite"
        return round(50 + 10 * math.sin(7 * math.log(first)), 4)


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "reports" / "streets" / "tuning.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_tuning_never_reads_the_test_split_and_gives_every_method_as_many_trials(
    place: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained for once: all methods in one pack a round."""
    shutil.rmtree(place / "data" / "streets" / "test")
    packs, real = list[set[str]](), pack_module.train

    def watched(trainees: Any, *others: Any) -> None:
        packs.append({trainee.label.split("/")[2] for trainee in trainees})
        real(trainees, *others)

    monkeypatch.setattr(pack_module, "train", watched)
    before = {path for path in (place / "runs").rglob("*") if path.is_file()}
    tune.tune(params, place)
    assert packs == [{*METHODS}] * 3
    assert {path for path in (place / "runs").rglob("*") if path.is_file()} == before  # no trial is a record
    assert not [*(place / ".scratch").rglob("*.pt")]
    found = rows(place)
    assert [row["method"] for row in found] == ["kd"] * 3 + ["skd"] * 3
    after = checked(config.load(place / "params.yaml"))
    for method in METHODS:
        own = [row for row in found if row["method"] == method]
        best = max(own, key=lambda row: float(row["val_miou"]))
        assert [row for row in own if row["chosen"]] == [best]
        assert budget.weights(best).items() <= after.method_values(method).items()
        ranges = type(configured(params, method)).ranges()
        for row in own:
            assert budget.weights(row).keys() == ranges.keys()
            assert all(ranges[k].low <= v <= ranges[k].high for k, v in budget.weights(row).items())
    middle = {"weight_pixel": 1.0, "weight_pair": 1.0, "weight_holistic": 0.01}
    assert budget.weights(found[3]) == middle  # the first trial is the middle of the ranges, for every method
    assert budget.trials(after, place) == {"kd": 3, "skd": 3} and not budget.untuned(after, place)


def test_a_trial_scores_the_same_beside_any_other(place: Path, params: Params) -> None:
    """And one that fails says why, alone."""
    trials: dict[str, dict[str, float]] = {
        "kd": {"weight": 0.3},
        "cwd": {"weight": 1e38},
        "acfd-full": {"weight_afd": 0.1, "weight_ccd": 1.0, "weight_csd": 0.1},
        "skd": {"weight_pixel": 2.0, "weight_pair": 0.1, "weight_holistic": 0.01},
    }
    found = work.try_weights(params, trials, place)
    assert list(found) == list(trials)
    assert "is not finite" in str(found["cwd"])
    for method in ("skd", "acfd-full"):
        assert isinstance(found[method], float)
        assert work.try_weights(params, {method: trials[method]}, place) == {method: found[method]}
    short = work.shortened(params, trials)
    assert short.method_values("acfd-full")["weight_ccd"] == 1.0
    assert short.method_values("acfd-ccd") == params.method_values("acfd-ccd")
    assert short.benchmark("streets").training.steps == 2 != params.benchmark("streets").training.steps


def test_a_killed_search_goes_on_with_the_trials_it_would_have_had(place: Path, params: Params) -> None:
    """From the log of the rounds that it finished."""
    original = (place / "params.yaml").read_bytes()
    usual = Scored()
    tune.tune(params, place, usual)
    whole = rows(place)
    assert len(usual.rounds) == 3 and all(list(trials) == METHODS for trials in usual.rounds)
    (place / "params.yaml").write_bytes(original)
    (place / "reports/streets/tuning.csv").unlink()
    killed = Scored(stops=(1, 3, 4))
    for done in (0, 1, 1):
        with pytest.raises(KeyboardInterrupt):
            tune.tune(params, place, killed)
        log = rows(place) if done else []
        assert log == [row | {"chosen": ""} for row in whole if int(row["trial"]) < done]
        assert budget.trials(params, place) == {}  # no table counts them
    tune.tune(params, place, killed)
    assert rows(place) == whole
    first, second, third = usual.rounds
    assert killed.rounds == [first, first, second, second, second, third]


def test_a_finished_search_runs_nothing_again(place: Path, params: Params) -> None:
    tune.tune(params, place, Scored())
    log, none = rows(place), Scored()
    tune.tune(params, place, none)
    assert rows(place) == log
    # the weights in params.yaml are the chosen ones by now
    tune.tune(checked(config.load(place / "params.yaml")), place, none)
    assert rows(place) == log and none.rounds == []


def test_the_trials_of_a_method_that_is_not_searched_now_stay(place: Path, params: Params, edit: Any) -> None:
    tune.tune(params, place, Scored())
    log, more = rows(place), Scored()
    tune.tune(edit(lambda raw: raw["tuning"].update(methods=METHODS[-1:])), place, more)
    assert not more.rounds and len(METHODS) > 1
    assert sorted(rows(place), key=str) == sorted(log, key=str)


@pytest.mark.parametrize(("low", "high"), [(0, 10), (1, 1), (2, 1), (1, 1.2), (-1, 1), (1, float("inf"))])
def test_a_range_without_a_value_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="is no range"):
        Search(low, high)


def test_a_method_that_joins_later_is_searched_alone(place: Path, params: Params, edit: Any) -> None:
    tune.tune(params, place, Scored())
    log, more = rows(place), Scored()
    tune.tune(edit(lambda raw: raw["tuning"].update(methods=[*METHODS, "cwd"])), place, more)
    assert [list(trials) for trials in more.rounds] == [["cwd"]] * 3
    assert rows(place)[:6] == log and budget.trials(params, place) == {"kd": 3, "skd": 3, "cwd": 3}


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(engine=raw["engine"] + 1),
        lambda raw: raw["benchmarks"]["streets"]["training"].update(lr=0.011),
        lambda raw: raw["tuning"].update(steps=1),
    ],
)
def test_what_moves_a_score_begins_a_search_anew(place: Path, params: Params, edit: Any, change: Any) -> None:
    tune.tune(params, place, Scored())
    again = Scored()
    tune.tune(edit(change), place, again)
    assert len(again.rounds) == 3


def test_a_lead_within_the_margin_leaves_the_middle_of_the_ranges(
    place: Path, params: Params, edit: Any
) -> None:
    tune.tune(params, place, Scored())
    scores = [float(row["val_miou"]) for row in rows(place) if row["method"] == "skd"]
    lead = max(scores) - scores[0]
    assert lead > 0
    for margin, chosen in ((lead, scores[0]), (0.99 * lead, max(scores))):
        tune.tune(edit(lambda raw, m=margin: raw["tuning"].update(margin=m)), place, Scored())
        row = next(row for row in rows(place) if row["method"] == "skd" and row["chosen"])
        after = checked(config.load(place / "params.yaml"))
        assert float(row["val_miou"]) == chosen and not budget.untuned(after, place)


@slow
def test_the_log_says_which_chosen_weights_lie_at_an_end_of_their_range(place: Path, params: Params) -> None:
    """The score grows with the weight: sooner or later the largest one is tried, and it is the best."""

    class Growing(Scored):
        def score(self, method: str, weights: dict[str, float]) -> float | str:
            return sum(map(math.log, weights.values()))

    tune.tune(
        params.model_copy(update={"tuning": params.tuning.model_copy(update={"trials": 25})}),
        place,
        Growing(),
    )
    kd = type(configured(params, "kd")).ranges()["weight"]
    chosen = next(row for row in rows(place) if row["method"] == "kd" and row["chosen"])
    assert chosen["weights"] == f"weight={kd.high:g}" and chosen["note"] == "at an end of the range of weight"
    assert [row["note"] for row in rows(place) if not row["chosen"]] == [""] * 48
    found = budget.choices(params, place)["kd"]
    assert found.at_end and found.outermost and not found.middle


def test_a_diverged_trial_counts_and_is_never_chosen(place: Path, params: Params) -> None:
    tune.tune(params, place, Scored(fails=lambda method, weight: (method, weight) == ("kd", 1.0)))
    first = rows(place)[0]
    assert (first["val_miou"], first["chosen"], first["note"]) == ("", "", "the term kd is not finite")
    assert budget.trials(params, place) == {"kd": 3, "skd": 3}
    none = Scored()
    tune.tune(params, place, none)  # a failed trial of the log counts too
    assert none.rounds == [] and rows(place)[0] == first
    (place / "reports" / "streets" / "tuning.csv").unlink()
    with pytest.raises(ConfigError, match="No trial of kd gave a score; the last one: the term kd"):
        tune.tune(params, place, Scored(fails=lambda method, _: method == "kd"))


def test_trials_that_no_worker_survives_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(work, "trial", killed)
    monkeypatch.setitem(cluster.SETTINGS, "distributed.scheduler.allowed-failures", 0)
    with (
        cluster.local(1, [], False, tmp_path) as client,
        pytest.raises(ConfigError, match=r"^A round of trials was lost: its worker was killed .* JOBS\.$"),
    ):
        tune.side_by_side(client, work.identity(str(tmp_path)), {"kd": {"weight": 1.0}})


def test_unequal_budgets_are_refused(place: Path, params: Params, edit: Any) -> None:
    tune.tune(params, place, Scored())
    with pytest.raises(ConfigError, match=r"kd has had 3 trials, more than tuning\.trials = 2"):
        tune.tune(edit(lambda raw: raw["tuning"].update(trials=2)), place)
    log = place / "reports" / "streets" / "tuning.csv"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match=r"unequal numbers of trials \(kd 3, skd 2\)"):
        budget.trials(params, place)


def test_weights_that_were_not_chosen_are_seen(place: Path, params: Params, edit: Any) -> None:
    tune.tune(params, place, Scored())
    changed = edit(lambda raw: raw["methods"]["kd"].update(weight=123.0))
    assert list(budget.untuned(changed, place)) == ["kd"]


def test_a_method_without_a_range_cannot_be_tuned(place: Path, edit: Any) -> None:
    params = edit(lambda raw: raw["tuning"].update(benchmark="streets", methods=["none"]))
    with pytest.raises(ConfigError, match="none has no weight to search"):
        tune.tune(params, place)


def test_writing_the_weights_leaves_the_rest_of_params_as_it_is(tmp_path: Path) -> None:
    text = (config.ROOT / "params.yaml").read_text()
    file = tmp_path / "params.yaml"
    file.write_text(text)
    values = config.load(file)
    same = {m: {"weight": values.method_values(m)["weight"]} for m in ("kd", "cwd")}
    tune._write_params(file, same)
    assert file.read_text() == text
    tune._write_params(file, {"kd": {"weight": 0.123}, "acfd-full": {"weight_ccd": 7.5}})
    old, new = text.splitlines(), file.read_text().splitlines()
    assert len(old) == len(new)
    assert len([1 for a, b in zip(old, new, strict=True) if a != b]) == 2
    after = config.load(file)
    assert after.method_values("kd")["weight"] == 0.123
    assert after.method_values("acfd-ccd")["weight_ccd"] == 7.5  # the variants inherit it
    assert after.method_values("acfd-afd")["weight_ccd"] == 0.0
