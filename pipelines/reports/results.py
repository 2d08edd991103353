"""What is known of one benchmark: its finished cells beside the expected ones, and how the methods stand.

Every table, figure and sentence is made from a :class:`Results`. Which cells there should be comes from
params.yaml, scores come from the query of :mod:`pipelines.runs.tracking`, counts per image from the
records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines.config import PAPER, TEACHER, Params
from pipelines.reports import statistics
from pipelines.reports.statistics import ImageBootstrap, Interval, Paired
from pipelines.runs import budget, exports, records
from pipelines.runs.fingerprint import outdated
from pipelines.runs.records import Cell, Record

REFERENCE = "none"  # the method that every other one is compared to: the undistilled student
MATCHED = "none_matched"  # the same for as many FLOPs as the dearest method
HEADLINE = f"{PAPER}-full"  # the variant that stands for the paper's method, as the row `acfd`
SCORE = "test/miou"
COMPUTE = "compute/flops"

RESAMPLES = 10_000  # of the test images
RESAMPLING_SEED = 0


@dataclass(frozen=True)
class Standing:
    """How a method stands against the undistilled student and against the best, on one student."""

    scores: dict[int, float]  # test mIoU by seed
    gain: Paired  # over REFERENCE
    over_seeds: Interval | None  # 95 % t-interval of the mean gain
    over_images: Interval | None  # 95 % bootstrap interval of the mean gain, the training seeds held fixed
    p: float | None  # of the gain, exact sign-flip test
    p_holm: float | None  # the same, adjusted for the methods of one table
    over_matched: Paired  # gain over MATCHED
    matched_over_seeds: Interval | None
    place: str  # ``best`` on the seeds that all have, ``≈`` where not told apart from it, else nothing

    @property
    def verdict(self) -> str:
        """``gain`` or ``loss`` where the intervals over seeds and over images both exclude 0 on one side."""
        if self.over_seeds and self.over_images and statistics.told_apart(self.over_seeds, self.over_images):
            if min(self.over_seeds.low, self.over_images.low) > 0:
                return "gain"
            if max(self.over_seeds.high, self.over_images.high) < 0:
                return "loss"
        return "undecided"


@dataclass(frozen=True)
class Results:
    """Everything that the tables and figures of one benchmark are made from."""

    benchmark: str
    students: list[str]
    methods: list[str]  # of the comparison: the baselines, then HEADLINE
    variants: list[str]  # of the paper's method, HEADLINE among them
    planned: list[str]  # the variants of the suite; others are shown where they have a cell
    seeds: list[int]  # of the suite: a row without one of them is not complete; there may be more
    weights: dict[str, dict[str, Any]]  # per method: its loss weights in params.yaml
    cells: pd.DataFrame  # today's finished cells, in the form of tracking.frame
    finished: Sequence[Record] = ()
    failures: dict[Cell, str] = field(default_factory=dict)  # of the last training of a cell, and why
    stale: dict[Cell, list[str]] = field(default_factory=dict)  # left out of all these, and why
    trials: dict[str, int] = field(default_factory=dict)  # of tuning, by method
    different: dict[str, int] = field(default_factory=dict)  # of them, where some had the same weights
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)  # records of exports, by student
    untuned: list[str] = field(default_factory=list)  # methods whose weights are not those that tuning chose
    tracking: str | None = None  # why the numbers do not come from MLflow, if they do not

    @cached_property
    def _rows(self) -> dict[tuple[str, str], pd.DataFrame]:
        """The finished cells by student and method."""
        groups = self.cells.sort_values("seed").groupby(["student", "method"])
        return {(str(student), str(method)): rows for (student, method), rows in groups}

    def rows(self, student: str, method: str) -> pd.DataFrame:
        """The finished cells of a row, by seed."""
        return self._rows.get((student, method), self.cells.iloc[:0])

    def by_seed(self, student: str, method: str, metric: str = SCORE) -> dict[int, float]:
        """A metric of a row, by seed; a seed that has no such value is left out."""
        found = self.rows(student, method)
        if metric not in found:
            return {}
        values = zip(found["seed"], found[metric], strict=True)
        return {int(seed): float(value) for seed, value in values if not pd.isna(value)}

    def shown(self, student: str) -> list[str]:
        """The variants with a row for a student: those of the suite, and those with a cell."""
        rows = {method for of, method in self._rows if of == student}
        rows |= {cell.method for cell in (*self.failures, *self.stale) if cell.student == student}
        return [key for key in self.variants if key in rows or key in self.planned]

    def mean(self, student: str, method: str, metric: str = SCORE) -> float | None:
        return statistics.mean(self.by_seed(student, method, metric).values())

    def teacher(self, metric: str) -> float | None:
        found = self.cells[self.cells["student"] == TEACHER]
        values = (
            [] if metric not in found else [float(value) for value in found[metric] if not pd.isna(value)]
        )
        return values[0] if values else None

    def classes(self) -> list[str]:
        for value in self.distinct("tags.classes"):
            return list(json.loads(value))
        return []

    def distinct(self, column: str, students_only: bool = False) -> list[str]:
        """The different values of a column of strings, sorted."""
        found = self.cells[self.cells["student"] != TEACHER] if students_only else self.cells
        return (
            sorted({str(value) for value in found[column] if not pd.isna(value)}) if column in found else []
        )

    def paired(self, student: str, method: str, metric: str = SCORE, reference: str = REFERENCE) -> Paired:
        """Differences to the undistilled student (or another method), seed by seed."""
        return statistics.paired(
            self.by_seed(student, method, metric), self.by_seed(student, reference, metric)
        )

    def lead(self, student: str) -> float | None:
        """Validation mIoU of the teacher minus the undistilled student's mean over its seeds."""
        teacher, plain = self.teacher("val/miou"), self.mean(student, REFERENCE, "val/miou")
        return None if teacher is None or plain is None else teacher - plain

    def exported(self, student: str, method: str) -> dict[str, Any] | None:
        """The export record of a student, if it measured the weights of today's cells of both the method and
        the reference."""
        if (record := self.exports.get(student)) is None:
            return None
        now = {
            r.cell.method: r.run["weights_sha256"]
            for r in self.finished
            if (r.cell.student, r.cell.seed) == (student, record["seed"])
        }
        same = all(
            key in now and now[key] == record["methods"].get(key, {}).get("weights_sha256")
            for key in (method, REFERENCE)
        )
        return record if same else None

    def status(self, student: str, method: str) -> str:
        """``complete``, ``not run``, or how many cells there are and what became of the others."""
        done = set(self.by_seed(student, method))
        cells = {seed: Cell(self.benchmark, student, method, seed) for seed in sorted(done.union(self.seeds))}
        why = {seed: f"failed: {note}" for seed, cell in cells.items() if (note := self.failures.get(cell))}
        why |= {seed: f"an earlier record, a new training {why[seed]}" for seed in why if seed in done}
        why |= {
            seed: f"left out, other {' and '.join(parts)}"
            for seed, cell in cells.items()
            if seed not in why and (parts := self.stale.get(cell))
        }
        missing = set(self.seeds) - done
        if not why:
            if not missing:
                return "complete"
            if not done:
                return "not run"
        why |= {seed: "not run" for seed in missing if seed not in why}
        parts = [f"{len(done.intersection(self.seeds))} of {len(self.seeds)}"]
        return "; ".join([*parts, *(f"seed {seed}: {why[seed]}" for seed in sorted(why))])

    @cached_property
    def bootstraps(self) -> dict[str, ImageBootstrap]:
        """Resampled test images, by student; none where the cells were not scored on the same images."""
        found = {}
        for student in self.students:
            own = [r for r in self.finished if r.cell.student == student]
            if own and len({(r.run["data_sha256"], tuple(r.test_names())) for r in own}) == 1:
                found[student] = statistics.image_bootstrap(_Counts(own), RESAMPLES, RESAMPLING_SEED)
        return found

    @property
    def images(self) -> int | None:
        """How many test images there are."""
        return next((len(record.test_names()) for record in self.finished), None)

    def standings(self, student: str, methods: Sequence[str]) -> dict[str, Standing]:
        """How every method of one table stands; the family of Holm's adjustment is ``methods``."""
        scores = {m: own for m in methods if (own := self.by_seed(student, m))}
        shared = set.intersection(*map(set, scores.values())) if scores else set()
        means = {  # of the seeds that all rows have: one with more of them may have drawn better ones
            m: statistics.mean([by_seed[seed] for seed in shared or by_seed]) or 0.0
            for m, by_seed in scores.items()
        }
        best = max(means, key=lambda m: means[m], default=None)
        images = self.bootstraps.get(student)
        gains = {m: self.paired(student, m) for m in methods if m != REFERENCE}
        p = {
            m: value
            for m, gain in gains.items()
            if (value := statistics.sign_flip_p(list(gain.by_seed.values()))) is not None
        }
        adjusted = statistics.holm(p)
        found = {}
        for method in methods:
            gain = gains.get(method, Paired({}))
            over_matched = self.paired(student, method, reference=MATCHED)
            if method in (REFERENCE, MATCHED):
                over_matched = Paired({})
            to_best = self.paired(student, method, reference=best) if best else Paired({})
            apart = best not in (None, method) and statistics.told_apart(
                statistics.t_interval(list(to_best.by_seed.values())),
                images.difference(method, best) if images and best else None,
            )
            found[method] = Standing(
                scores=self.by_seed(student, method),
                gain=gain,
                over_seeds=statistics.t_interval(list(gain.by_seed.values())),
                over_images=images.difference(method, REFERENCE) if images and gain.n else None,
                p=p.get(method),
                p_holm=adjusted.get(method),
                over_matched=over_matched,
                matched_over_seeds=statistics.t_interval(list(over_matched.by_seed.values())),
                place="best" if method == best else "≈" if method in means and not apart else "",
            )
        return found


class _Counts(Mapping[tuple[str, int], np.ndarray]):
    """The test counts of records by method and seed, read when asked for: those of a large set would
    not fit into memory together."""

    def __init__(self, own: Sequence[Record]) -> None:
        self.own = {(record.cell.method, record.cell.seed): record for record in own}

    def __getitem__(self, key: tuple[str, int]) -> np.ndarray:
        return self.own[key].confusion("test")

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def gather(
    params: Params,
    benchmark: str,
    cells: pd.DataFrame,
    root: Path,
    tracking: str | None = None,
    finished: Sequence[Record] = (),
) -> Results:
    """Bring together the finished cells of a benchmark with the ones that there should be. Cells that were
    trained with other settings, data or another teacher than today's are left out.

    :class:`~pipelines.config.ConfigError` when the methods were tuned with unequal numbers of trials.
    """
    students = records.students(params, benchmark, root)
    stale = outdated(finished, params)
    old = {(cell.student, cell.method, cell.seed) for cell in stale}
    keys = zip(cells["student"], cells["method"], cells["seed"], strict=True)
    planned = (records.teacher_cell(params, benchmark), *records.expected_cells(params, benchmark, root))
    notes = {cell: records.failure(cell, root) for cell in planned}
    weights = {
        key: {
            name: value
            for name, value in params.method_values(key).items()
            if re.fullmatch("weight(_.*)?", name)
        }
        for key in params.method_keys
    }
    return Results(
        benchmark=benchmark,
        students=students,
        methods=[key for key in params.method_keys if key == HEADLINE or not records.is_variant(key)],
        variants=[key for key in params.method_keys if records.is_variant(key)],
        planned=[f"{PAPER}-{name}" for name in params.suite.variants],
        seeds=list(params.suite.seeds),
        weights=weights,
        cells=cells[[key not in old for key in keys]],
        finished=[record for record in finished if record.cell not in stale],
        failures={
            cell: " ".join(note.replace(f"{root}/", "").split()) for cell, note in notes.items() if note
        },
        stale=stale,
        trials=budget.trials(params, root),
        different=budget.different(params, root),
        exports={
            student: record
            for student in students
            if (record := exports.read(benchmark, student, root)) is not None
        },
        untuned=list(budget.untuned(params, root)),
        tracking=tracking,
    )


def label(method: str) -> str:
    """The name of a row of the comparison."""
    return PAPER if method == HEADLINE else method


def variant(method: str) -> str:
    """The name of a row of the ablation."""
    return method.removeprefix(f"{PAPER}-")
