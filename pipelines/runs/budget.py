"""What tuning has cost each method: the log that `make tune` leaves, and whether it was fair."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import ROOT, ConfigError, Params

COLUMNS = ("method", "trial", "weights", "steps", "seed", "val_miou", "chosen", "note", "trial_id")


def path(params: Params, root: Path = ROOT) -> Path:
    """Where the log is."""
    return root / "reports" / params.tuning.benchmark / "tuning.csv"


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a log, [] where there is none; :class:`ConfigError` for a file that is something else."""
    if not file.is_file():
        return []
    damaged = ConfigError(
        f"reports/{file.parent.name}/{file.name} is damaged or no log of this version's `make tune`: restore "
        f"it with git, or delete it and run `make tune`."
    )
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            reader = csv.DictReader(opened, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise damaged
            rows = list(reader)
        for row in rows:
            if set(row) != set(COLUMNS) or None in row.values() or row["chosen"] not in ("", "yes"):
                raise damaged
            numbers = [*weights(row).values(), float(row["val_miou"] or 0)]
            counts = [int(row[name]) for name in ("trial", "steps", "seed")]
            if (
                not row["method"]
                or not weights(row)
                or not all(map(math.isfinite, numbers))
                or min(counts) < 0
            ):
                raise damaged
    except (ValueError, csv.Error):
        raise damaged from None
    return rows


def text(weights: dict[str, float]) -> str:
    """``weight_pair=1 weight_pixel=0.5``: the weights in one cell of the log."""
    return " ".join(f"{name}={value:g}" for name, value in sorted(weights.items()))


def weights(row: dict[str, str]) -> dict[str, float]:
    """The weights of a row."""
    return {name: float(value) for name, value in (pair.split("=") for pair in row["weights"].split())}


def finished(rows: list[dict[str, str]]) -> bool:
    """Whether a search has chosen the weights of every method."""
    return any(row["chosen"] for row in rows)


def trials(params: Params, root: Path = ROOT) -> dict[str, int]:
    """Trials by method, none while the search goes on. :class:`ConfigError` when one method was given more
    than another: such weights are no fair comparison."""
    rows = read(path(params, root))
    counts = Counter(row["method"] for row in (rows if finished(rows) else ()))
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{method} {count}" for method, count in counts.items())
        raise ConfigError(
            f"The methods were tuned with unequal numbers of trials ({listed}): run `make tune`, which gives "
            f"all of them {params.tuning.trials}."
        )
    return dict(counts)


def different(params: Params, root: Path = ROOT) -> dict[str, int]:
    """By method: how many of its trials had weights of their own, where some had the same."""
    rows = read(path(params, root))
    own = {m: [row["weights"] for row in rows if row["method"] == m] for m in trials(params, root)}
    return {m: len(set(tried)) for m, tried in own.items() if len(set(tried)) < len(tried)}


def choose(scores: Sequence[float | None], margin: float) -> int:
    """Which trial is chosen: the first, the middle of the ranges, unless the best one leads it by more than
    ``margin`` points of mIoU (as the one-standard-error rule of Breiman et al. 1984, section 3.4.3). A trial
    without a score is never chosen; ValueError when none has one."""
    score, best = max((score, -number) for number, score in enumerate(scores) if score is not None)
    first = scores[0]
    return 0 if first is not None and score - first <= margin else -best


@dataclass(frozen=True)
class Choice:
    """What the search chose for a method: the middle of its ranges, and whether a weight lies at an end of
    its range, or is the largest or the smallest that was tried; with the validation mIoU of its trial and of
    the middle."""

    middle: bool
    at_end: bool
    outermost: bool
    score: float
    first: float | None


def choices(params: Params, root: Path = ROOT) -> dict[str, Choice]:
    """By method; none while the search goes on."""
    rows = read(path(params, root))
    first = {row["method"]: row["val_miou"] for row in rows if int(row["trial"]) == 0}
    return {
        row["method"]: Choice(
            middle=int(row["trial"]) == 0,
            at_end=bool(row["note"]),
            outermost=_outermost(row, rows),
            score=float(row["val_miou"]),
            first=float(middle) if (middle := first.get(row["method"])) else None,
        )
        for row in rows
        if row["chosen"]
    }


def _outermost(chosen: dict[str, str], rows: Sequence[dict[str, str]]) -> bool:
    """Whether a chosen weight is the largest or the smallest that was tried."""
    tried = [weights(row) for row in rows if row["method"] == chosen["method"]]
    return any(
        value in (min(values), max(values))
        for name, value in weights(chosen).items()
        if len(values := {other[name] for other in tried}) > 1
    )


def untuned(params: Params, root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Methods whose weights in params.yaml are not those that their search chose, with the chosen ones."""
    found = {}
    for row in read(path(params, root)):
        if row["chosen"] and row["method"] in params.method_keys:
            values, best = params.method_values(row["method"]), weights(row)
            if any(values.get(name) != value for name, value in best.items()):
                found[row["method"]] = best
    return found
