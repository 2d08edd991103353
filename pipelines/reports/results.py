"""What is known of one benchmark: its finished cells beside the expected ones, and how the methods stand.

Every table, figure and sentence is made from a :class:`Results`. Which cells there should be comes from
params.yaml, scores come from the query of :mod:`pipelines.runs.tracking`, counts per image from the
records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.config import OFFICIAL, PAPER, TEACHER, Params, Tuning
from pipelines.reports import statistics
from pipelines.reports.statistics import ImageBootstrap, Interval, Paired
from pipelines.runs import budget, exports, journal, records
from pipelines.runs.fingerprint import outdated
from pipelines.runs.records import Cell, Record

HEADLINE = f"{PAPER}-full"  # the variant that stands for the paper's method, as the row `acfd`
SCORE = "test/miou"
COMPUTE = "compute/flops"
STEP = "seconds/step_median"

RESAMPLES = 10_000  # of the test images
COMPLETE = "complete"  # how the status of a row begins that has all its seeds
FEWEST = 10  # test images, or blocks of frames, of which a resample says something
RESAMPLING_SEED = 0


@dataclass(frozen=True)
class Gain:
    """Differences of a method to something, by seed, with both uncertainties of their mean."""

    paired: Paired = field(default_factory=lambda: Paired({}))
    over_seeds: Interval | None = None  # 95 % t-interval
    over_images: Interval | None = None  # 95 % bootstrap interval, the training seeds held fixed
    over_both: Interval | None = None  # 95 % interval for other seeds and other images at once

    @property
    def verdict(self) -> str:
        """``gain`` or ``loss`` where all three intervals exclude 0 on one side, ``undecided`` where not;
        nothing for one seed, which cannot say how far another would move a score."""
        if self.paired.n < 2:
            return ""
        if self.over_seeds and statistics.told_apart(self.over_seeds, self.over_images, self.over_both):
            return "gain" if self.over_seeds.low > 0 else "loss"
        return "undecided"


@dataclass(frozen=True)
class Standing:
    """How a method stands against the student alone and among all, on one student."""

    scores: dict[int, float]  # test mIoU by seed
    gain: Gain  # over the reference, at equal steps
    p: float | None  # of the gain, exact sign-flip test; of two seeds at least
    p_holm: float | None  # the same, adjusted for the methods of one table
    p_max: float | None  # adjusted for them by the max-T test
    equal: Gain  # over the student alone at the method's own training compute
    why: str  # seeds have no gain at equal compute; else nothing
    rank: tuple[int, int] | None  # the places it may have among the methods and the reference, see `ranks`


@dataclass(frozen=True)
class Results:
    """Everything that the tables and figures of one benchmark are made from."""

    benchmark: str
    students: list[str]
    reference: str  # the student alone, to which every method is compared
    methods: list[str]  # of the comparison: the reference, its controls, the baselines, then HEADLINE
    variants: list[str]  # of the paper's method, HEADLINE among them
    planned: dict[str, list[str]]  # by student: what the suite runs; others are shown where they have a cell
    seeds: dict[str, list[int]]  # by student: a row without one of them is not complete; there may be more
    weights: dict[str, dict[str, Any]]  # per method: its loss weights in params.yaml
    tuning: Tuning  # how they were searched for
    cells: pd.DataFrame  # today's finished cells, in the form of tracking.frame
    controls: dict[str, float] = field(default_factory=dict)  # the reference for so many times the steps
    finished: Sequence[Record] = ()
    failures: dict[Cell, str] = field(default_factory=dict)  # of the last training of a cell, and why
    stale: dict[Cell, list[str]] = field(default_factory=dict)  # left out of all these, and why
    trials: dict[str, int] = field(default_factory=dict)  # of tuning, by method
    different: dict[str, int] = field(default_factory=dict)  # of them, where some had the same weights
    choices: dict[str, budget.Choice] = field(default_factory=dict)  # of tuning, by method
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)  # records of exports, by student
    untuned: list[str] = field(default_factory=list)  # methods whose weights are not those that tuning chose
    frames: int = 1  # test images that follow each other in a video, and are resampled together

    @cached_property
    def _values(self) -> dict[tuple[str, str, str], dict[int, float]]:
        """Every number of the finished cells, by student, method and metric, then by seed."""
        rows, found = self.cells.sort_values("seed"), dict[tuple[str, str, str], dict[int, float]]()
        numbers = rows.select_dtypes("number")
        for student, method, seed, own in zip(
            rows["student"], rows["method"], rows["seed"], numbers.to_numpy(float), strict=True
        ):
            for metric, value in zip(map(str, numbers), own.tolist(), strict=True):
                if not math.isnan(value):
                    found.setdefault((student, method, metric), {})[int(seed)] = value
        return found

    def by_seed(self, student: str, method: str, metric: str = SCORE) -> dict[int, float]:
        """A metric of a row, by seed; a seed that has no such value is left out."""
        return dict(self._values.get((student, method, metric), {}))

    def rows(self, student: str) -> list[str]:
        """The methods with a row for a student: those of the suite, and those with a cell."""
        return self._shown(student, self.methods)

    def shown(self, student: str) -> list[str]:
        """The variants with a row for a student."""
        return self._shown(student, self.variants)

    def _shown(self, student: str, methods: Sequence[str]) -> list[str]:
        rows = {method for of, method, _ in self._values if of == student}
        rows |= {cell.method for cell in (*self.failures, *self.stale) if cell.student == student}
        return [key for key in methods if key in rows or key in self.planned.get(student, ())]

    def mean(self, student: str, method: str, metric: str = SCORE) -> float | None:
        return statistics.mean(self.by_seed(student, method, metric).values())

    def teacher(self, metric: str) -> float | None:
        return next(iter(self.by_seed(TEACHER, TEACHER, metric).values()), None)

    def classes(self) -> list[str]:
        for value in self.distinct("tags.classes"):
            return list(json.loads(value))
        return []

    def absent(self, split: str) -> list[str]:
        """The classes without a pixel in ``val`` or ``test``, which have no score there."""
        scores: dict[str, float | None] = next((record.metrics[split]["iou"] for record in self.finished), {})
        return [name for name, score in scores.items() if score is None]

    def distinct(self, column: str, students_only: bool = False) -> list[str]:
        """The different values of a column of strings, sorted."""
        found = self.cells[self.cells["student"] != TEACHER] if students_only else self.cells
        return (
            sorted({str(value) for value in found[column] if not pd.isna(value)}) if column in found else []
        )

    def tested(self, methods: Sequence[str]) -> list[str]:
        """The family of the tests: of these rows neither the reference, nor its controls, which are no
        methods, nor the methods with their authors' weights, which are descriptive."""
        return [
            m for m in methods if m != self.reference and m not in self.controls and not m.endswith(OFFICIAL)
        ]

    def label(self, method: str) -> str:
        """The name of a row of the comparison."""
        return label(method, self.controls)

    def paired(self, student: str, method: str, metric: str = SCORE, reference: str | None = None) -> Paired:
        """Differences to the student alone (or another method), seed by seed."""
        return statistics.paired(
            self.by_seed(student, method, metric), self.by_seed(student, reference or self.reference, metric)
        )

    def gain(self, student: str, method: str, reference: str | None = None) -> Gain:
        """The paired differences of test mIoU to the student alone, or to another method."""
        reference, images = reference or self.reference, self.bootstraps.get(student)
        found = self.paired(student, method, reference=reference)
        return self._gain(found, images.difference(method, reference) if images and found.n else None)

    def _gain(self, found: Paired, over_images: Interval | None) -> Gain:
        over_seeds = statistics.t_interval(list(found.by_seed.values()))
        both = statistics.over_both(over_seeds, over_images, found.n, len(self.blocks))
        return Gain(found, over_seeds, over_images, both)

    def at_equal_compute(self, student: str, method: str) -> tuple[Gain, str]:
        """A method minus the student alone at the method's own training FLOPs, seed by seed; and why seeds
        have no such difference.

        The score of the student alone is interpolated between the reference and its controls of one seed,
        linearly in the logarithm of the FLOPs, and never beyond them. The intervals are of these
        differences: over the seeds, and over the resampled images with the same weights.
        """
        curve = [self.reference, *self.controls]
        scores, flops = (
            {m: self.by_seed(student, m, metric) for m in (method, *curve)} for metric in (SCORE, COMPUTE)
        )
        gains: dict[int, float] = {}
        cells: dict[tuple[str, int], float] = {}
        why: dict[str, list[int]] = {}
        for seed in sorted(scores[method].keys() & flops[method].keys()):
            points = {m: flops[m][seed] for m in curve if seed in scores[m] and seed in flops[m]}
            own, lacks = flops[method][seed], [self.label(m) for m in curve if m not in points]
            if not self.controls:
                reason = "no controls"
            elif lacks:
                reason = f"without {', '.join(lacks)}"
            elif (weights := statistics.interpolation(points, own)) is not None:
                gains[seed] = scores[method][seed] - sum(w * scores[m][seed] for m, w in weights.items())
                cells |= {(method, seed): 1.0} | {(m, seed): -w for m, w in weights.items()}
                continue
            else:
                far = max(points, key=lambda m: points[m]) if own > max(points.values()) else self.reference
                reason = f"{'more' if own > points[far] else 'less'} compute than {self.label(far)}"
            why.setdefault(reason, []).append(seed)
        images = self.bootstraps.get(student)
        shares = {cell: w / len(gains) for cell, w in cells.items()}
        found = self._gain(Paired(gains), images.combination(shares) if images else None)
        named = (
            reason + ("" if [*why] == [reason] and not gains else f" (seed {', '.join(map(str, seeds))})")
            for reason, seeds in why.items()
        )
        return found, "; ".join(named)

    def ratio(self, student: str, method: str, metric: str) -> float | None:
        """A metric over that of the student alone, the median over the seeds: within each, as they may come
        from different machines."""
        alone, own = (self.by_seed(student, key, metric) for key in (self.reference, method))
        return statistics.median([own[seed] / alone[seed] for seed in own.keys() & alone.keys()])

    def lead(self, student: str, method: str | None = None, metric: str = "val/miou") -> float | None:
        """mIoU of the teacher minus the mean of the student alone, or of a method, over its seeds."""
        teacher, plain = self.teacher(metric), self.mean(student, method or self.reference, metric)
        return None if teacher is None or plain is None else teacher - plain

    def exported(self, student: str, method: str) -> dict[str, Any] | None:
        """The export record of a student, if it measured the weights of today's cells of both the method and
        the reference; it measures few, as all students are one network."""
        if (record := self.exports.get(student)) is None:
            return None
        now = {
            r.cell.method: r.run["weights_sha256"]
            for r in self.finished
            if (r.cell.student, r.cell.seed) == (student, record["seed"])
        }
        same = all(
            key in now
            and "ms" in (own := record["methods"].get(key, {}))
            and now[key] == own["weights_sha256"]
            for key in (method, self.reference)
        )
        return record if same else None

    def left_out(self, student: str, method: str) -> list[str]:
        """The terms of a method that its cells did without, as their networks lack what the terms compare."""
        cells = [r for r in self.finished if (r.cell.student, r.cell.method) == (student, method)]
        return list(dict.fromkeys(name for record in cells for name in record.run["left_out"]))

    def status(self, student: str, method: str) -> str:
        """``complete``, ``not run``, or how many cells there are and what became of the others; and which
        seeds come from another kind of machine than the student alone."""
        done, planned = set(self.by_seed(student, method)), self._planned_seeds(student, method)
        cells = {seed: Cell(self.benchmark, student, method, seed) for seed in sorted(done.union(planned))}
        why = {seed: f"failed: {note}" for seed, cell in cells.items() if (note := self.failures.get(cell))}
        why |= {seed: f"an earlier record, a new training {why[seed]}" for seed in why if seed in done}
        why |= {
            seed: f"left out, other {' and '.join(parts)}"
            for seed, cell in cells.items()
            if seed not in why and (parts := self.stale.get(cell))
        }
        missing = planned - done
        if not done and not why:
            return "not run"
        why |= {seed: "not run" for seed in missing if seed not in why}
        parts = [f"{len(done & planned)} of {len(planned)}"] if why else [COMPLETE]
        parts += [f"seed {seed}: {why[seed]}" for seed in sorted(why)]
        if away := self.elsewhere.get((student, method)):
            named = f"seed{'s' * (len(away) > 1)} {', '.join(map(str, away))}"
            parts.append(f"{named} on another kind of machine than {self.reference}")
        return "; ".join(parts)

    def _planned_seeds(self, student: str, method: str) -> set[int]:
        """The seeds of a complete row: those of the student; of an ablation that the suite does not ask for,
        those of any of its variants."""
        ablation = [key for key in self.variants if key != HEADLINE]
        if method not in ablation or method in self.planned.get(student, ()):
            return set(self.seeds.get(student, ()))
        cells = (cell for cell in (*self.failures, *self.stale) if cell.student == student)
        known = {cell.seed for cell in cells if cell.method in ablation}
        return known.union(*(self.by_seed(student, key) for key in ablation))

    @cached_property
    def machines(self) -> dict[tuple[str, int], dict[str, list[str]]]:
        """By student and seed, the kinds of machine that its cells were trained on, each with the methods.

        A kind is what decides how sums are rounded: the GPU, or the processor and its threads, and torch.
        """
        found: dict[tuple[str, int], dict[str, list[str]]] = {}
        rows = self.cells[self.cells["student"] != TEACHER].sort_values(["student", "seed", "method"])
        for row in rows.to_dict("records"):
            kind = str(row.get("tags.hardware.device"))
            if kind == journal.CPU:
                kind = f"{row.get('tags.hardware.processor')}, threads: {row.get('hardware/threads', 0):.0f}"
            kind += f", torch {row.get('tags.versions.torch')}"
            found.setdefault((row["student"], int(row["seed"])), {}).setdefault(kind, []).append(
                row["method"]
            )
        return found

    @cached_property
    def elsewhere(self) -> dict[tuple[str, str], list[int]]:
        """By student and method, the seeds that come from another kind of machine than the student alone.
        Their draws, batches and steps are the same; how sums are rounded is not."""
        found: dict[tuple[str, str], list[int]] = {}
        for (student, seed), kinds in self.machines.items():
            if any(self.reference in methods for methods in kinds.values()):
                for method in (m for own in kinds.values() if self.reference not in own for m in own):
                    found.setdefault((student, method), []).append(seed)
        return found

    @cached_property
    def bootstraps(self) -> dict[str, ImageBootstrap]:
        """Resampled test images, by student; none where the cells were not scored on the same images, and of
        a split of a few: resamples of a handful repeat it, and their interval excludes almost everything."""
        found = {}
        for student in self.students if len(self.blocks) >= FEWEST else ():
            own = [r for r in self.finished if r.cell.student == student]
            if own and len({(r.run["data_sha256"], tuple(r.test_names())) for r in own}) == 1:
                # read one by one: those of a large set would not fit into memory together
                counts = (((r.cell.method, r.cell.seed), r.confusion("test")) for r in own)
                found[student] = statistics.image_bootstrap(counts, RESAMPLES, RESAMPLING_SEED, self.blocks)
        return found

    @cached_property
    def _test_names(self) -> list[str]:
        return next((record.test_names() for record in self.finished), [])

    @property
    def images(self) -> int:
        """How many test images there are, 0 without a record."""
        return len(self._test_names)

    @cached_property
    def blocks(self) -> list[int]:
        """Where the blocks of test images start that are resampled together."""
        return statistics.block_starts(self._test_names, self.frames)

    @property
    def units(self) -> str:
        """What is resampled: ``233 test images in 15 blocks of frames``."""
        text = f"{self.images} test images"
        return text + (f" in {len(self.blocks)} blocks of frames" if len(self.blocks) < self.images else "")

    def paired_mean(self, student: str, method: str) -> float | None:
        """The mean test mIoU of the student alone plus the mean difference to it of the seeds that both have:
        comparable also where rows have different seeds."""
        alone, gain = self.mean(student, self.reference), self.paired(student, method).mean
        return None if alone is None or gain is None else alone + gain

    def ranks(self, student: str, methods: Sequence[str]) -> dict[str, tuple[int, int]]:
        """The first and the last place that each of the reference and the tested methods may have: behind all
        that are clearly better than it, before all that are clearly worse. A row of which little is known
        has a wide range; one with a single seed has none."""
        rows = [m for m in methods if len(self.by_seed(student, m)) > 1]
        rows = [m for m in rows if m in (self.reference, *self.tested(methods))]
        better, worse = dict.fromkeys(rows, 0), dict.fromkeys(rows, 0)
        for first, second in combinations(rows, 2):
            verdict = self.gain(student, first, second).verdict
            winner, loser = (first, second) if verdict == "gain" else (second, first)
            if verdict in ("gain", "loss"):
                better[loser] += 1
                worse[winner] += 1
        return {m: (1 + better[m], len(rows) - worse[m]) for m in rows}

    def standings(self, student: str, methods: Sequence[str]) -> dict[str, Standing]:
        """How every row of one table stands, computed once; the family of the tests is :meth:`tested` of
        ``methods``."""
        if known := self._standings.get((student, *methods)):
            return known
        family = self.tested(methods)
        scores = {m: self.by_seed(student, m) for m in methods}
        gains = {m: self.gain(student, m) for m in methods if m != self.reference}
        differences = {m: gains[m].paired.by_seed for m in family if gains[m].paired.n > 1}
        p = {m: statistics.sign_flip_p(list(own.values())) or 0.0 for m, own in differences.items()}
        holm, joint = statistics.holm(p), statistics.max_t(differences)
        ranks, found = self.ranks(student, methods), {}
        for method in methods:
            alone = method == self.reference or method in self.controls
            equal, why = (Gain(), "") if alone else self.at_equal_compute(student, method)
            found[method] = Standing(
                scores=scores[method],
                gain=gains.get(method, Gain()),
                p=p.get(method),
                p_holm=holm.get(method),
                p_max=joint.get(method),
                equal=equal,
                why=why,
                rank=ranks.get(method),
            )
        self._standings[student, *methods] = found
        return found

    @cached_property
    def _standings(self) -> dict[tuple[str, ...], dict[str, Standing]]:
        return {}


def gather(
    params: Params,
    benchmark: str,
    cells: pd.DataFrame,
    root: Path,
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
            if name == "weight" or name.startswith("weight_")
        }
        for key in params.method_keys
    }
    rows = {*params.suite_methods, *cells["method"], *(cell.method for cell, note in notes.items() if note)}
    listed = params.method_keys  # a method with its authors' weights goes beside the method
    order = sorted(listed, key=lambda key: listed.index(key.removesuffix(OFFICIAL)))
    return Results(
        benchmark=benchmark,
        students=students,
        reference=params.suite.reference,
        methods=[key for key in order if key in rows and (key == HEADLINE or not records.is_variant(key))],
        variants=[key for key in order if records.is_variant(key)],
        planned={s: params.suite_methods for s in students if records.planned(params, benchmark, s)},
        seeds={s: records.planned_seeds(params, benchmark, s, root) for s in students},
        weights=weights,
        tuning=params.tuning,
        cells=cells[[key not in old for key in keys]],
        controls=params.controls,
        finished=[record for record in finished if record.cell not in stale],
        failures={
            cell: " ".join(note.replace(f"{root}/", "").split()) for cell, note in notes.items() if note
        },
        stale=stale,
        trials=budget.trials(params, root),
        different=budget.different(params, root),
        choices=budget.choices(params, root),
        exports={
            student: record
            for student in students
            if (record := exports.read(benchmark, student, root)) is not None
        },
        untuned=list(budget.untuned(params, root)),
        frames=params.benchmark(benchmark).frames,
    )


def label(method: str, controls: Mapping[str, float] | None = None) -> str:
    """The name of a row: ``acfd``, ``none ×1.5`` for a control, ``kd (authors' weight)``."""
    if controls and method in controls:
        factor = controls[method]
        return f"{method.removesuffix(f'-x{factor}')} ×{factor:g}"
    if method.endswith(OFFICIAL):
        return f"{method.removesuffix(OFFICIAL)} (authors' weight)"
    return PAPER if method == HEADLINE else method


def variant(method: str) -> str:
    """The name of a row of the ablation."""
    return method.removeprefix(f"{PAPER}-")
