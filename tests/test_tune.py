"""The search for loss weights: the same number of trials for all, no look at the test split, nothing lost."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest

from pipelines import config
from pipelines.config import ConfigError, Params
from pipelines.engine import cell as cell_module
from pipelines.methods import checked, configured
from pipelines.runs import budget
from pipelines.tools import tune

METHODS = ["kd", "skd"]


@pytest.fixture
def params(edit: Any) -> Params:
    wanted = {"benchmark": "streets", "methods": METHODS, "trials": 3, "steps": 2}
    return edit(lambda raw: raw["tuning"].update(wanted))


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "reports" / "streets" / "tuning.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_tuning_never_reads_the_test_split_and_gives_every_method_as_many_trials(
    place: Path, params: Params
) -> None:
    shutil.rmtree(place / "data" / "streets" / "test")
    tune.tune(params, place)
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


def test_a_killed_search_goes_on_with_the_trials_it_would_have_had(
    place: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = (place / "params.yaml").read_bytes()
    tune.tune(params, place)
    whole = rows(place)
    (place / "params.yaml").write_bytes(original)
    for name in ("tuning.db", "reports/streets/tuning.csv"):
        (place / name).unlink()
    real, calls = cell_module.train, [0]

    def dies_now_and_then(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] in (1, 4, 5):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(cell_module, "train", dies_now_and_then)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            tune.tune(params, place)
        assert not (place / "reports" / "streets" / "tuning.csv").exists()
    tune.tune(params, place)
    assert rows(place) == whole and calls[0] == 3 + 6


def test_a_finished_search_runs_nothing_again_also_from_the_log_alone(
    place: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tune.tune(params, place, only="kd") is None  # the other method has had nothing yet
    assert tune.tune(params, place, only="skd") is not None
    log = rows(place)
    monkeypatch.setattr(cell_module, "train", lambda *a: pytest.fail("a trial ran twice"))
    tune.tune(params, place)
    assert rows(place) == log
    (
        place / "tuning.db"
    ).unlink()  # as in a fresh clone; the weights in params.yaml are the chosen ones by now
    tune.tune(checked(config.load(place / "params.yaml")), place)
    assert rows(place) == log


def test_an_import_of_the_log_that_was_killed_goes_on(
    place: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune.tune(params, place)
    log = (place / "reports/streets/tuning.csv").read_bytes()
    (place / "tuning.db").unlink()
    calls, add = [0], optuna.Study.add_trial

    def killed(study: Any, trial: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        add(study, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(params, place)
    monkeypatch.setattr(cell_module, "train", lambda *_: pytest.fail("a trial of the log ran again"))
    tune.tune(params, place)
    assert (place / "reports/streets/tuning.csv").read_bytes() == log


def test_a_diverged_trial_counts_and_is_never_chosen(
    place: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cell_module.train

    def diverges(plan: Any, *rest: Any) -> Any:
        if plan.cell.method == "kd" and plan.config.weight == 1.0:
            raise ConfigError("the term kd is not finite")
        return real(plan, *rest)

    monkeypatch.setattr(cell_module, "train", diverges)
    tune.tune(params, place)
    first = rows(place)[0]
    assert (first["val_miou"], first["chosen"], first["note"]) == ("", "", "the term kd is not finite")
    assert budget.trials(params, place) == {"kd": 3, "skd": 3}

    def always(*args: Any) -> Any:
        raise ConfigError("no luck")

    (place / "tuning.db").unlink()
    (place / "reports" / "streets" / "tuning.csv").unlink()
    monkeypatch.setattr(cell_module, "train", always)
    with pytest.raises(ConfigError, match="No trial of kd gave a score; the last one: no luck"):
        tune.tune(params, place)


def test_unequal_budgets_are_refused(place: Path, params: Params, edit: Any) -> None:
    tune.tune(params, place)
    with pytest.raises(ConfigError, match=r"kd has had 3 trials, more than tuning\.trials = 2"):
        tune.tune(edit(lambda raw: raw["tuning"].update(trials=2)), place)
    log = place / "reports" / "streets" / "tuning.csv"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match=r"unequal numbers of trials \(kd 3, skd 2\)"):
        budget.trials(params, place)


def test_weights_that_were_not_chosen_are_seen(place: Path, params: Params, edit: Any) -> None:
    tune.tune(params, place)
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
