"""`make tune`: score every method's candidate loss weights on the validation split, and log all of them.

Every method gets the same number of trials and the same short schedule. The test split is never read. The log
is ``reports/<benchmark>/tuning.csv``; a trial that is already in it is not run again. The chosen weights are
then written into params.yaml by the user.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from pipelines import cli, config
from pipelines.config import ROOT, ConfigError, Params
from pipelines.results.records import Cell, read_json, teacher_cell, write_bytes

COLUMNS = ("method", "trial", "weights", "steps", "seed", "val_miou", "chosen", "trial_id")

log = logging.getLogger(__name__)


def trials(params: Params) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(method, number, weights) of every trial, the first of each method before any second."""
    tuning = params.tuning
    for number in range(max(map(len, tuning.trials.values()), default=0)):
        for method, sets in tuning.trials.items():
            yield method, number, sets[number]


def tune(params: Params, root: Path = ROOT) -> Path:
    """Run the trials that the log lacks; returns the log, with one row per method marked as chosen."""
    from pipelines.datasets.folder import describe
    from pipelines.engine.cell import plan, train
    from pipelines.method import method_config
    from pipelines.results.confusion import summary

    tuning = params.tuning
    path = root / "reports" / tuning.benchmark / "tuning.csv"
    done = {row["trial_id"]: row for row in _read(path)}
    rows: list[dict[str, str]] = []
    description = describe(root / "data" / tuning.benchmark)
    teacher = teacher_cell(params, tuning.benchmark).folder(root)
    if not (teacher / "run.json").is_file():
        raise ConfigError(
            f"{tuning.benchmark} has no teacher: put it into suite.benchmarks and run `make repro` first."
        )
    for method, number, weights in trials(params):
        values = {**params.method_values(method), **weights}
        checked = method_config(method, values)
        cell = Cell(tuning.benchmark, tuning.student, method, tuning.seed)
        planned = plan(params, cell)
        training = planned.training.model_copy(update={"steps": tuning.steps, "validate_every": tuning.steps})
        planned = dataclasses.replace(planned, training=training, config=checked)
        inputs = [
            planned.values(),
            tuning.seed,
            description.sha256,
            read_json(teacher / "run.json")["weights_sha256"],
        ]
        trial_id = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
        row = {
            "method": method,
            "trial": str(number),
            "weights": " ".join(f"{name}={value:g}" for name, value in weights.items()),
            "steps": str(tuning.steps),
            "seed": str(tuning.seed),
            "trial_id": trial_id,
        }
        if trial_id in done:
            row["val_miou"] = done[trial_id]["val_miou"]
        else:
            trained, _ = train(planned, params, root)
            row["val_miou"] = f"{summary(trained.val, description.classes)['miou']:.4f}"
            log.info("%s with %s: %s mIoU on validation", method, row["weights"], row["val_miou"])
        rows.append(row)
        _write(path, rows)
    return path


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    best: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["method"] not in best or float(row["val_miou"]) > float(best[row["method"]]["val_miou"]):
            best[row["method"]] = row
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: (row["method"], int(row["trial"]))):
        writer.writerow({**row, "chosen": "yes" if row is best[row["method"]] else ""})
    write_bytes(path, text.getvalue().encode())


def main() -> None:
    path = tune(config.load())
    log.info("all trials are in %s: write the chosen weights into params.yaml.", path.relative_to(ROOT))


if __name__ == "__main__":
    cli.run(main)
