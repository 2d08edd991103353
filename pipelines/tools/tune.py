"""`make tune`: search every method's loss weights by the same number of short trainings, on validation alone.

What is searched, and in which range, stands in the ``Config`` of each method (``pipelines.method.Search``).
Every method gets ``tuning.trials`` trials on the same schedule and seed: first the middle of its ranges, then
what Optuna's TPE proposes. The trials of all methods train side by side, in packs. The test split is never
read, and the seeds of the tables play no part. After each round the log of all trials is in
``reports/<benchmark>/tuning.csv``: a killed search goes on where it stopped, on another machine too, and
proposes the same trials. When all methods have theirs, the chosen weights of each go into params.yaml: the
middle of the ranges, unless the best trial leads it by more than ``tuning.margin``. Another seed
may turn over a smaller lead.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli, config, files
from pipelines.config import PAPER, ROOT, ConfigError, Params
from pipelines.datasets.folder import describe
from pipelines.methods import checked, configured
from pipelines.runs import budget, records
from pipelines.runs.fingerprint import settings
from pipelines.runs.records import Cell, teacher_cell
from pipelines.suite import cluster, work

if TYPE_CHECKING:
    import optuna

    from pipelines.method import Search

STARTUP = 4  # trials at the middle or at random before the sampler learns from scores
ATTEMPTS = 20  # to propose weights that have not been tried

log = logging.getLogger(__name__)

Weights = dict[str, float]
Round = Mapping[str, Weights]  # the weights of a trial by method
Scores = Mapping[str, float | str]  # mIoU on validation, or why there is none


@dataclass(frozen=True)
class Task:
    """The search for one method's weights; ``context`` names everything beside them that moves a score."""

    method: str
    ranges: dict[str, Search]
    context: str

    def trial_id(self, weights: Weights) -> str:
        return _hash([self.context, weights])


def tune(params: Params, root: Path = ROOT, train: Callable[[Round], Scores] | None = None) -> Path:
    """Run the trials that are missing and return the log. ``train`` scores a round of trials; else they are
    trained here, in one pack.

    Raises :class:`ConfigError` when there is no teacher, when a method has no range to search, and when no
    trial of a method gave a score.
    """
    tuning, path = params.tuning, budget.path(params, root)
    train = train or (lambda trials: work.try_weights(params, trials, root))
    tasks = [_task(params, method, root) for method in tuning.methods]
    studies = {task.method: _study(task, tuning.trials, root, path) for task in tasks}
    for number in range(tuning.trials):
        due = [task for task in tasks if len(_counted(studies[task.method])) <= number]
        asked = {task.method: _ask(task, studies[task.method], number, tuning.seed) for task in due}
        scores = train({method: weights for method, (_, weights) in asked.items()}) if due else {}
        for method, (trial, weights) in asked.items():
            _tell(method, studies[method], trial, weights, scores[method])
        if due:
            _export(path, params, tasks, studies, {})
            log.info("round %d of %d: %d trials.", number + 1, tuning.trials, len(due))
    chosen = {task.method: _choose(task, studies[task.method], tuning.margin) for task in tasks}
    _export(path, params, tasks, studies, chosen)
    _write_params(root / "params.yaml", chosen)
    return path


def _task(params: Params, method: str, root: Path) -> Task:
    tuning = params.tuning
    values = configured(params, method)
    # a term that is off stays off: its weight is no weight to search
    ranges = {name: mark for name, mark in type(values).ranges().items() if getattr(values, name) > 0}
    if not ranges:
        raise ConfigError(
            f"{method} has no weight to search: mark one in its Config by `Search(low, high)`, or take "
            f"{method} out of tuning.methods in params.yaml."
        )
    teacher = records.read(teacher_cell(params, tuning.benchmark), root)
    if teacher is None:
        raise ConfigError(
            f"{tuning.benchmark} has no teacher: put it into suite.benchmarks and run `make repro` first."
        )
    known = settings(work.shortened(params, {}), Cell(tuning.benchmark, tuning.student, method, tuning.seed))
    known["method"] = {name: value for name, value in known["method"].items() if name not in ranges}
    context = _hash(
        [
            known,
            {name: [mark.low, mark.high] for name, mark in ranges.items()},
            [params.engine, tuning.student, method, tuning.seed],
            describe(root / "data" / tuning.benchmark).sha256,
            teacher.run["weights_sha256"],
        ]
    )
    return Task(method, ranges, context)


def _study(task: Task, trials: int, root: Path, path: Path) -> optuna.Study:
    """The method's own study, with the trials of the log that are its own."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    study = optuna.create_study(direction="maximize")
    for row in budget.read(path):
        weights = budget.weights(row)
        if row["method"] == task.method and row["trial_id"] == task.trial_id(weights):
            failed = {"state": optuna.trial.TrialState.FAIL, "user_attrs": {"reason": row["note"]}}
            study.add_trial(
                optuna.trial.create_trial(
                    params={name: _exponent(value) for name, value in weights.items()},
                    distributions=_distributions(task),
                    **({"value": float(row["val_miou"])} if row["val_miou"] else failed),
                )
            )
    if len(_counted(study)) > trials:
        raise ConfigError(
            f"{task.method} has had {len(_counted(study))} trials, more than tuning.trials = {trials}: raise "
            f"it in params.yaml, so that every method gets as many, or delete {path.relative_to(root)} to "
            "start anew."
        )
    return study


def _counted(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that were run, with a score or the reason why there is none; not proposals that were known."""
    return [t for t in study.trials if t.value is not None or "reason" in t.user_attrs]


def _ask(task: Task, study: optuna.Study, number: int, seed: int) -> tuple[optuna.Trial, Weights]:
    """The next weights to try, none that have been tried if that can be helped."""
    import optuna

    from pipelines.engine.seeds import derive

    distributions = _distributions(task)
    if number == 0:
        study.enqueue_trial(
            {name: _exponent(math.sqrt(mark.low * mark.high)) for name, mark in task.ranges.items()}
        )
    tried = [{name: _value(old.params[name]) for name in task.ranges} for old in _counted(study)]
    for attempt in range(ATTEMPTS):
        # seeded per trial, so that a search that was killed proposes what it would have proposed
        own = derive(seed, "tune", task.method, number, attempt) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=own, n_startup_trials=STARTUP)
        trial = study.ask(fixed_distributions=distributions)
        weights = {name: _value(trial.params[name]) for name in task.ranges}
        if weights not in tried:
            break
        if attempt + 1 < ATTEMPTS:  # the same again would teach nothing
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return trial, weights


def _tell(
    method: str, study: optuna.Study, trial: optuna.Trial, weights: Weights, score: float | str
) -> None:
    import optuna

    if isinstance(score, str):  # a term was not finite, say: a trial as any other, but without a score
        trial.set_user_attr("reason", score)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        log.warning("%s with %s: %s", method, budget.text(weights), score)
    else:
        study.tell(trial, score)
        log.info("%s with %s: %.4f mIoU on validation", method, budget.text(weights), score)


def _choose(task: Task, study: optuna.Study, margin: float) -> Weights:
    counted = _counted(study)
    try:
        chosen = counted[budget.choose([trial.value for trial in counted], margin)]
    except ValueError:
        reason = counted[-1].user_attrs["reason"]
        raise ConfigError(f"No trial of {task.method} gave a score; the last one: {reason}") from None
    return {name: _value(chosen.params[name]) for name in task.ranges}


def _ends(task: Task, weights: Weights) -> str:
    """Which of the weights lie at an end of their range, beyond which there may be better ones."""
    ranges = _distributions(task)
    at_end = [
        name for name, value in weights.items() if _exponent(value) in (ranges[name].low, ranges[name].high)
    ]
    return f"at an end of the range of {', '.join(at_end)}" if at_end else ""


def _export(
    path: Path,
    params: Params,
    tasks: Iterable[Task],
    studies: dict[str, optuna.Study],
    chosen: dict[str, Weights],
) -> None:
    """Write the log; a search that goes on has ``chosen`` nothing. Trials of methods that are not searched
    now stay in it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, budget.COLUMNS, lineterminator="\n")
    writer.writeheader()
    others = {*params.method_keys} - studies.keys()
    writer.writerows(row for row in budget.read(path) if row["method"] in others)
    for task in tasks:
        marked = False
        for number, trial in enumerate(_counted(studies[task.method])):
            weights = {name: _value(trial.params[name]) for name in task.ranges}
            mark = trial.value is not None and weights == chosen.get(task.method) and not marked
            marked |= mark
            writer.writerow(
                {
                    "method": task.method,
                    "trial": number,
                    "weights": budget.text(weights),
                    "steps": params.tuning.steps,
                    "seed": params.tuning.seed,
                    "val_miou": "" if trial.value is None else f"{trial.value:.4f}",
                    "chosen": "yes" if mark else "",
                    "note": trial.user_attrs.get("reason", _ends(task, weights) if mark else ""),
                    "trial_id": task.trial_id(weights),
                }
            )
    files.write_bytes(path, text.getvalue().encode())


def _write_params(path: Path, chosen: dict[str, Weights]) -> None:
    """Set the chosen weights in params.yaml; comments, anchors and the layout stay as they are."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 10_000
    null = "tag:yaml.org,2002:null"  # or ruamel writes nothing where `null` stood
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar(null, "null"))
    content = yaml.load(path.read_text(encoding="utf-8"))
    for method, weights in chosen.items():
        prefix = f"{PAPER}-"
        own = (
            content[PAPER][method.removeprefix(prefix)]
            if method.startswith(prefix)
            else content["methods"][method]
        )
        for name, value in weights.items():
            if own.get(name) != value:
                own[name] = value
    text = io.StringIO()
    yaml.dump(content, text)
    if (changed := text.getvalue().encode()) != path.read_bytes():
        files.write_bytes(path, changed)
        log.info("the chosen weights are in params.yaml; `make repro` trains the cells that they change.")


def _distributions(task: Task) -> dict[str, Any]:
    from optuna.distributions import IntDistribution

    return {
        name: IntDistribution(
            math.ceil(round(10 * math.log10(mark.low), 6)), math.floor(round(10 * math.log10(mark.high), 6))
        )
        for name, mark in sorted(task.ranges.items())
    }


def _value(exponent: int) -> float:
    """A weight on the grid of ten values a decade, to two digits: what the log shows is what was trained."""
    return float(f"{10 ** (exponent / 10):.2g}")


def _exponent(value: float) -> int:
    return round(10 * math.log10(value))


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def side_by_side(client: Any, expected: work.Identity, trials: Round) -> Scores:
    """Train a round of trials on all workers. :class:`ConfigError` when they do not survive it."""
    from distributed import KilledWorker

    names, workers = list(trials), len(client.nthreads())
    packs = [{name: trials[name] for name in names[first::workers]} for first in range(workers)]
    futures = [client.submit(work.trial, expected, pack, pure=False) for pack in packs if pack]
    try:
        return {name: score for future in futures for name, score in future.result().items()}
    except KilledWorker as error:
        raise ConfigError(f"A round of trials was lost: {cluster.lost(error)}.") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make tune",
        description="Search the loss weights of every method by the same number of short trainings, scored "
        "on validation; the best go into params.yaml. What was interrupted goes on where it stopped.",
    )
    parser.add_argument("--jobs", type=int, help="processes; default: one a GPU, or one a core")
    asked, gpus = cluster.some(parser.parse_args().jobs), cluster.visible_gpus()
    params = checked(config.load())
    jobs = asked or cluster.room(gpus, params.suite.threads)
    with (
        files.hold(ROOT / ".scratch" / "locks" / "tune.lock", "`make tune`"),
        cluster.local(jobs, gpus, False) as client,
    ):
        expected = work.identity(str(ROOT))
        written = tune(params, ROOT, lambda trials: side_by_side(client, expected, trials))
    log.info("all trials are in %s.", written.relative_to(ROOT))


if __name__ == "__main__":
    cli.run(main)
