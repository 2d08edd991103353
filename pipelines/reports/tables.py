"""The tables of a benchmark, in Markdown, CSV and TeX.

Rows come from params.yaml, numbers from :class:`pipelines.reports.results.Results`. A cell that is missing
or failed stands in its row as such. Nothing depends on when or where the tables are made, so making them
twice gives the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from pipelines import files
from pipelines.config import PAPER, TEACHER
from pipelines.reports import statistics
from pipelines.reports.results import COMPUTE, FEWEST, RESAMPLES, SCORE, Results, Standing, machines, variant
from pipelines.reports.statistics import Interval
from pipelines.runs import exports
from pipelines.runs.tracking import metric_name

LEAD = 3.0  # mIoU by which a teacher has to beat the undistilled student before a comparison says much
ALPHA = 0.05  # of a test

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Table:
    """``data`` is the CSV; ``columns`` and ``rows`` are the text of the Markdown and TeX tables."""

    name: str
    title: str
    data: pd.DataFrame
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def comparison(results: Results) -> Table:
    """Student × method: scores, gains over the undistilled student with both uncertainties, compute, and
    what the deployed student costs."""
    data, text, notes = [], [], list[str]()
    for student in results.students:
        standings = results.standings(student, results.methods)
        notes += _tests(results, student, results.methods)
        for method in results.methods:
            row = {"student": student, "method": results.label(method)}
            row |= _scores(results, student, method, standings[method])
            row |= _compute(results, student, method) | _deployed(results, student, method)
            row |= {"status": results.status(student, method)}
            data.append(row)
            texts = [*_score_text(row), *_compute_text(row), *_size_text(row), _ratio_text(row)]
            text.append([student, results.label(method), *texts, row["status"]])
    columns = ["student", "method", *_score_columns(results), *SIZE_COLUMNS, _ratio_column(results), "status"]
    notes += _deployed_notes(results)
    return Table(
        "comparison", "comparison of methods", pd.DataFrame(data, dtype=object), columns, text, notes
    )


def cost(results: Results) -> Table:
    """Student × method: what the deployed student costs, and what its training cost."""
    data, text = [], []
    for student in results.students:
        for method in results.methods:
            row = {"student": student, "method": results.label(method)} | _deployed(results, student, method)
            row |= _costs(results, student, method) | {"status": results.status(student, method)}
            data.append(row)
            text.append([student, results.label(method), *_cost_text(row), row["status"]])
    columns = ["student", "method", *SIZE_COLUMNS, "ONNX latency (ms)", _ratio_column(results), *COST_COLUMNS]
    notes = [
        *_deployed_notes(results),
        "GFLOPs a step, ms a step (median), training: teacher and method included, validation not.",
        f"times of training: median over seeds, under the load of the machine then. {results.reference} and "
        "its controls take the same step: where their times differ, it is that load, and other differences "
        "of this size are too.",
        "memory: peak of the training process, largest of the seeds.",
        "trials: of the search for the loss weights, the same number for every method (`make tune`)"
        + "".join(f"; {results.label(m)}: {n} different ones" for m, n in results.different.items())
        + ".",
    ]
    return Table("cost", "cost of methods", pd.DataFrame(data, dtype=object), columns, text, notes)


def ablation(results: Results) -> Table:
    """The variants of the paper's method, with the undistilled student as the reference."""
    weights = list(dict.fromkeys(name for key in results.variants for name in results.weights[key]))
    data, text, notes = [], [], ["A weight of 0 switches a term off; the weights are those of params.yaml."]
    for student in results.students:
        methods = [key for key in results.methods if key == results.reference] + results.shown(student)
        notes += _tests(results, student, methods)
        standings = results.standings(student, methods)
        for method in methods:
            row: dict[str, Any] = {"student": student, "method": variant(method)}
            row |= _scores(results, student, method, standings[method])
            row |= {name: results.weights.get(method, {}).get(name) for name in weights}
            row |= _compute(results, student, method) | {"status": results.status(student, method)}
            data.append(row)
            shown = [number(row[name], "g") for name in weights]
            texts = [*shown, *_score_text(row), *_compute_text(row)]
            text.append([student, variant(method), *texts, row["status"]])
    columns = ["student", "variant", *weights, *_score_columns(results), "status"]
    return Table("ablation", f"ablation of {PAPER}", pd.DataFrame(data, dtype=object), columns, text, notes)


def per_class(results: Results) -> Table:
    """IoU of every class per method, mean ± sd over the seeds, and the teacher's."""
    names = {f"test/iou/{metric_name(name)}": name for name in results.classes()} | {SCORE: "mean (mIoU)"}
    data, text = [], []
    for student in results.students:
        for metric, name in names.items():
            line = [student, name]
            for method in results.methods:
                values, paired = (
                    results.by_seed(student, method, metric).values(),
                    results.paired(student, method, metric),
                )
                mean, sd = statistics.mean(values), statistics.sd(values)
                row = {"student": student, "method": results.label(method), "class": name, "n": len(values)}
                difference = None if method == results.reference else paired.mean
                data.append(row | _rounded({"iou_mean": mean, "iou_sd": sd, "diff_mean": difference}))
                line.append(plus_minus(mean, sd))
            line.append(number(results.teacher(metric), ".2f"))
            text.append(line)
    for metric, name in names.items():
        score = results.teacher(metric)
        row = {"student": TEACHER, "method": "", "class": name, "n": int(score is not None)}
        data.append(row | _rounded({"iou_mean": score, "iou_sd": None, "diff_mean": None}))
    columns = [
        "student",
        "class",
        *(f"{results.label(m)} (n = {_seeds(results, m)})" for m in results.methods),
        TEACHER,
    ]
    notes = ["A class without a pixel in the test split has no IoU and is left out of the mean."]
    return Table("per_class", "IoU per class", pd.DataFrame(data, dtype=object), columns, text, notes)


def warnings(results: Results) -> list[str]:
    """What a reader has to know before believing a table of this benchmark."""
    found = []
    for student in results.students:
        lead = results.lead(student)
        if lead is None:
            part = "the teacher" if results.teacher("val/miou") is None else f"the undistilled {student}"
            found.append(
                f"the lead of the teacher over {student} is unknown, because {part} has no finished cell of "
                "today's settings."
            )
        elif lead < LEAD:
            found.append(
                f"the teacher leads the undistilled {student} by {lead:+.2f} mIoU on validation, "
                f"less than {LEAD:g}: there is little to distil, so the differences say little about methods."
            )
    found += [
        f"the last training of the teacher failed: {note}."
        for cell, note in results.failures.items()
        if cell.is_teacher
    ]
    if results.stale:
        named = "; ".join(
            f"{cell.path}: {', '.join(parts)}" for cell, parts in list(results.stale.items())[:5]
        )
        found.append(
            f"{len(results.stale)} cells are left out, because their settings, data or teacher are not those "
            f"of today ({named}); run `make repro`, or delete their folders in runs/."
        )
    for split in ("val", "test"):
        if missing := results.absent(split):
            found.append(
                f"no pixel of {split} is of {', '.join(missing)}: no score there, and the mean is over the "
                "other classes."
            )
    for tag, kind in (("data_sha256", "versions of the data"), ("teacher.sha256", "teachers")):
        if len(results.distinct(f"tags.{tag}", students_only=True)) > 1:  # there is no record of the teacher
            found.append(f"the cells were trained with different {kind}; run `make repro`.")
    if results.untuned:
        found.append(
            f"the weights of {', '.join(map(results.label, results.untuned))} in params.yaml are not those "
            "that were chosen; run `make tune`."
        )
    tested = results.tested(results.methods)  # the weights of the others are not to be searched
    ran = [m for m in tested if any(results.by_seed(student, m) for student in results.students)]
    others = [results.label(m) for m in ran if results.weights[m] and m not in results.trials]
    if results.trials and others:
        found.append(
            f"{', '.join(others)}: not tuned, while the others had {max(results.trials.values())} trials; "
            "put it into tuning.methods and run `make tune`."
        )
    if len({kind for kinds in machines(results.cells).values() for kind in kinds}) > 1:
        found.append("seeds ran on different machines: compare times and memory of the same seeds only.")
    return found


def facts(results: Results) -> list[tuple[str, str]]:
    """The header of every table: what was measured, on what, and what each uncertainty means."""
    counts = sorted({len(results.by_seed(s, m)) for s in results.students for m in results.methods} - {0})
    val, test = (number(results.teacher(metric), ".2f") for metric in ("val/miou", SCORE))
    leads, reference = [], results.reference
    controls = ", ".join(f"{factor:g}" for factor in results.controls.values()) or "no"
    for student in results.students:
        n = len(results.by_seed(student, reference, "val/miou"))
        lead = results.lead(student)
        leads.append(
            f"over the undistilled {student}: "
            + ("unknown" if lead is None else f"{lead:+.2f} (mean over n = {n})")
        )
    hashes = [value[:12] for value in results.distinct("tags.data_sha256")]
    images = f"the {results.images} test images" if results.images else "the test images"
    found = [
        ("benchmark", f"{results.benchmark}; data {', '.join(hashes) or 'unknown'}"),
        ("teacher", "not run" if test == "–" else f"{val} validation / {test} test mIoU"),
        ("lead of the teacher on validation", "; ".join(leads)),
        (
            "scores",
            "mIoU in percent on the test split, from the summed confusion matrix, at the last iterate; "
            "± is the sample standard deviation over n seeds (ddof 1)",
        ),
        ("seeds", "; ".join(map(power, counts)) or "none has finished"),
        (
            "over seeds",
            f"mean difference to {reference}, paired by seed; 95 % t-interval; exact two-sided sign-flip p",
        ),
        (
            "p (Holm), p (max-T)",
            "that p adjusted for the methods of this table (of one student): by Holm from each by itself; by "
            "the step-down max-T test of Westfall and Young, which turns the signs of a seed for all methods "
            f"at once. {reference} trained longer is no method, rows with official weights are descriptive: "
            "neither is tested or counted",
        ),
        (
            "over images",
            f"95 % interval of the same difference from {RESAMPLES:,} bootstrap resamples of {images}, "
            "paired over methods, the trained networks held fixed: another uncertainty than that over seeds, "
            "never pooled with it; images count as independent, which the frames of one video are not, so "
            f"there it is too narrow; of fewer than {FEWEST} images there is none, and nothing is told apart",
        ),
        (
            "≈ best",
            f"the best mean (best) of {reference} and the tested methods, and every one of them that cannot "
            "be told from it (≈): the interval over seeds or the one over images of the difference to it "
            "holds 0",
        ),
        (
            "Δ at equal compute",
            f"difference to {reference} alone at the method's own training compute, paired by seed; 95 % "
            "t-interval over seeds, then the bootstrap interval over images. The score of the student alone "
            f"is interpolated linearly in FLOPs, for each seed by itself, between {reference} and its "
            f"controls ({controls} times the steps): the intervals are of these differences and hold the "
            "noise of both neighbours, not the error of the straight line, which lies below a curve that "
            "flattens and so favours the method. Nothing is extrapolated",
        ),
        ("training compute", "floating-point operations of all training steps, teacher and method included"),
        ("best val", "of each training, picked on the validation split; for information, no headline"),
        ("training", _training(results)),
        ("machine of each seed", "; ".join(_machines(results)) or "unknown"),
    ]
    if results.tracking:
        found.append(("tracking", f"{results.tracking}: these numbers come straight from the run records"))
    return found


def write(results: Results, folder: Path) -> None:
    """Write every table of a benchmark to ``folder/<name>.{md,csv,tex}``."""
    head = {"benchmark": results.benchmark, "facts": facts(results), "warnings": warnings(results)}
    for table in (comparison(results), cost(results), ablation(results), per_class(results)):
        render(table, folder, head)


def render(table: Table, folder: Path, head: dict[str, Any]) -> None:
    """Write one table as ``folder/<name>.{csv,md,tex}``; ``head`` holds what stands above it."""
    files.write_bytes(
        folder / f"{table.name}.csv", table.data.to_csv(index=False, lineterminator="\n").encode()
    )
    for kind, escape in (("md", escape_markdown), ("tex", escape_tex)):
        # Every value that a template prints goes through `escape`; what stands in the template does not.
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            finalize=escape,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            comment_start_string="<#",
            comment_end_string="#>",
        )
        content = environment.get_template(f"table.{kind}.j2").render(table=table, **head)
        if kind == "tex" and any(character > "\u024f" and character.isalpha() for character in content):
            content = f"{SCRIPTS}\n{content}"
        files.write_bytes(folder / f"{table.name}.{kind}", content.encode())


def plus_minus(mean: float | None, sd: float | None, form: str = ".2f") -> str:
    """``41.20 ± 0.30``; without ± where there is no sd (one seed), ``–`` where there is nothing."""
    if mean is None:
        return "–"
    return f"{mean:{form}}" + ("" if sd is None else f" ± {sd:.2f}")


def between(interval: Interval | None, form: str = "+.2f") -> str:
    """``[-0.40, +1.20]``; ``–`` where there is no interval."""
    return "–" if interval is None else f"[{interval.low:{form}}, {interval.high:{form}}]"


def escape_markdown(value: Any) -> str:
    """Text that keeps its line, its table cell and its look in Markdown."""
    return re.sub(r"([\\`*_|<>\[\]&$~])", r"\\\1", " ".join(str(value).split()))


def escape_tex(value: Any) -> str:
    """Text that TeX prints as it stands, in one line."""
    return " ".join(str(value).split()).translate(TEX)


# Above a table with letters that pdfLaTeX does not have.
SCRIPTS = (
    r"% Names in other scripts: XeLaTeX or LuaLaTeX, \usepackage{fontspec}, \setmainfont{one that has them}."
)
TEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "≈": r"$\approx$",
        "×": r"$\times$",
        "Δ": r"$\Delta$",
        "–": "--",
    }
)

SIZE_COLUMNS = ["student parameters (M)", "student GFLOPs"]
COST_COLUMNS = [
    "torch latency (ms)",
    "largest difference",
    "steps",
    "GFLOPs a step",
    "ms a step",
    "training (s)",
    "memory (MB)",
    "trials",
    "status",
]


def _ratio_column(results: Results) -> str:
    return f"latency × {results.reference}"


def _score_columns(results: Results) -> list[str]:
    columns = ["n", "test mIoU", "≈ best", "seed:test mIoU", f"Δ {results.reference}", "over seeds", "p"]
    columns += ["p (Holm)", "p (max-T)", "over images", "Δ at equal compute", "val mIoU", "best val mIoU"]
    return [*columns, "training TFLOP", f"× {results.reference}"]


def _scores(results: Results, student: str, method: str, standing: Standing) -> dict[str, Any]:
    scores, gain, known = standing.scores, standing.gain, method != results.reference
    row: dict[str, Any] = {
        "n": len(scores),
        "miou_mean": statistics.mean(scores.values()),
        "miou_sd": statistics.sd(scores.values()),
        "seeds": " ".join(f"{seed}:{score:.2f}" for seed, score in scores.items()),
        "near_best": standing.place,
        "diff_mean": gain.paired.mean if known else None,
        "diff_sd": gain.paired.sd if known else None,
        "diff_n": gain.paired.n if known else None,
    }
    for prefix, own in (("", gain), ("equal_", standing.equal)):
        for name, interval in (("seeds", own.over_seeds), ("images", own.over_images)):
            row |= {
                f"{prefix}over_{name}_low": interval.low if interval else None,
                f"{prefix}over_{name}_high": interval.high if interval else None,
            }
    return _rounded(
        row
        | {
            "p": standing.p,
            "p_holm": standing.p_holm,
            "p_max_t": standing.p_max,
            "equal_diff_mean": standing.equal.paired.mean,
            "equal_n": standing.equal.paired.n,
            "equal_why": standing.why,
            "val_miou_mean": results.mean(student, method, "val/miou"),
            "best_val_miou_mean": results.mean(student, method, "best_val/miou"),
        }
    )


def _compute(results: Results, student: str, method: str) -> dict[str, Any]:
    own, reference = (results.mean(student, key, COMPUTE) for key in (method, results.reference))
    return _rounded(
        {
            "training_tflop": None if own is None else own / 1e12,
            "compute_ratio": None if own is None or reference is None else own / reference,
        }
    )


def _costs(results: Results, student: str, method: str) -> dict[str, Any]:
    """What the training of a row cost."""

    def values(metric: str) -> list[float]:
        return list(results.by_seed(student, method, metric).values())

    step = statistics.median(values("seconds/step_median"))
    return _rounded(
        {
            "steps": _whole(values("steps")),
            "step_flops": _whole(values("compute/step_flops")),
            "step_ms": None if step is None else 1000 * step,
            "training_s": statistics.median(values("seconds/training")),
            "memory_mb": max(values("memory_peak_mb"), default=None),
            "trials": results.trials.get(method),
        }
    )


def _deployed(results: Results, student: str, method: str) -> dict[str, Any]:
    """What the student of a row costs where it is used: counts of its cells, times of its export record."""
    row: dict[str, Any] = {
        name: _whole(results.by_seed(student, method, f"student/{name}").values())
        for name in ("parameters", "flops")
    }
    record = results.exported(student, method)
    for runtime in exports.RUNTIMES:
        timing = exports.timing(record, method, results.reference, runtime) if record else None
        spread = timing.interval if timing else None
        row |= {
            f"{runtime}_ms": timing.median if timing else None,
            f"{runtime}_ms_q1": timing.low if timing else None,
            f"{runtime}_ms_q3": timing.high if timing else None,
            f"{runtime}_ratio": timing.ratio if timing else None,
            f"{runtime}_ratio_low": spread.low if spread else None,
            f"{runtime}_ratio_high": spread.high if spread else None,
        }
    apart = exports.difference(record, method) if record else None
    return _rounded(row) | {"largest_difference": None if apart is None else float(f"{apart:.6g}")}


def _deployed_notes(results: Results) -> list[str]:
    size = " or ".join(
        "×".join(map(str, json.loads(value)))
        for value in results.distinct("tags.student.input", students_only=True)
    )
    measured = [
        f"{student}: seed {record['seed']}, {record['rounds']} rounds, "
        f"{'×'.join(map(str, record['input']))} pixels, {record['hardware']['threads']} threads of "
        f"{record['hardware']['processor']}, onnxruntime "
        f"{record['versions']['onnxruntime']}"
        for student, record in results.exports.items()
    ]
    return [
        f"student parameters and GFLOPs: of the exported student, one image of {size or '?'} pixels, without "
        "teacher, adapters and auxiliary head.",
        "latency: of single inferences of the exported student in float32 after a warm-up, all methods by "
        f"turns in every round, median [quartiles]; × {results.reference}: ratio of the medians with "
        "onnxruntime, 95 % bootstrap interval over rounds, noise of the machine where the ONNX graphs are "
        "equal; "
        f"{'; '.join(measured) or 'the stage `export` has not run'}.",
        "largest difference: of a logit between the trained network and its ONNX or torch.export form, over "
        "the largest absolute logit, on test images.",
    ]


def _whole(values: Iterable[float]) -> int | None:
    """The number that all seeds of a row share."""
    return next((int(value) for value in values), None)


def _size_text(row: Mapping[str, Any]) -> list[str]:
    return [
        number(None if row["parameters"] is None else row["parameters"] / 1e6, ".2f"),
        number(None if row["flops"] is None else row["flops"] / 1e9, ".2f"),
    ]


def _latency_text(row: Mapping[str, Any], runtime: str) -> str:
    if (median := row[f"{runtime}_ms"]) is None:
        return "–"
    quartiles = Interval(row[f"{runtime}_ms_q1"], row[f"{runtime}_ms_q3"])
    return f"{median:.2f} {between(quartiles, '.2f')}"


def _ratio_text(row: Mapping[str, Any], runtime: str = "onnxruntime") -> str:
    if row[f"{runtime}_ratio"] is None:
        return "–"
    return f"{row[f'{runtime}_ratio']:.2f} {between(interval(row, f'{runtime}_ratio'), '.2f')}"


def _score_text(row: dict[str, Any]) -> list[str]:
    n = row["diff_n"]
    return [
        str(row["n"]),
        plus_minus(row["miou_mean"], row["miou_sd"]),
        row["near_best"],
        row["seeds"] or "–",
        number(row["diff_mean"], "+.2f") + (f" (n = {n})" if n and n < row["n"] else ""),
        between(interval(row, "over_seeds")),
        number(row["p"], ".3g"),
        number(row["p_holm"], ".3g"),
        number(row["p_max_t"], ".3g"),
        between(interval(row, "over_images")),
        equal_text(row),
        number(row["val_miou_mean"], ".2f"),
        number(row["best_val_miou_mean"], ".2f"),
    ]


def _compute_text(row: dict[str, Any]) -> list[str]:
    return [number(row["training_tflop"], "#.3g"), number(row["compute_ratio"], ".2f")]


def equal_text(row: Mapping[Any, Any]) -> str:
    """``+0.40 [-0.10, +0.90], images [+0.20, +0.60]`` at equal compute, and why seeds are not in it."""
    text = number(row["equal_diff_mean"], "+.2f")
    if over_seeds := interval(row, "equal_over_seeds"):
        text += f" {between(over_seeds)}"
    if over_images := interval(row, "equal_over_images"):
        text += f", images {between(over_images)}"
    if row["equal_n"] and row["equal_n"] < row["n"]:
        text += f" (n = {row['equal_n']})"
    return text + (f" ({row['equal_why']})" if row["equal_why"] else "")


def _cost_text(row: dict[str, Any]) -> list[str]:
    return [
        *_size_text(row),
        _latency_text(row, "onnxruntime"),
        _ratio_text(row),
        _latency_text(row, "torch"),
        number(row["largest_difference"], ".1e"),
        number(row["steps"], "d"),
        number(None if row["step_flops"] is None else row["step_flops"] / 1e9, ".1f"),
        number(row["step_ms"], ".0f"),
        number(row["training_s"], ".0f"),
        number(row["memory_mb"], ".0f"),
        number(row["trials"], "d"),
    ]


def interval(row: Mapping[Any, Any], name: str) -> Interval | None:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return None if low is None else Interval(low, high)


def power(n: int) -> str:
    """What so few seeds can show at all."""
    text = f"n = {n}: the smallest p that a sign-flip test can reach is {statistics.smallest_p(n):.2g}"
    return text + (", exploratory" if n < statistics.SEEDS_FOR_SIGNIFICANCE else "")


def significance(results: Results, student: str, methods: Sequence[str]) -> str | None:
    """Which methods of one table differ from the undistilled student after each adjustment, and whether any
    could; None where nothing was tested."""
    tested = {m: s for m, s in results.standings(student, methods).items() if s.p is not None}
    if not tested:
        return None

    def below(name: str) -> str:
        found = [results.label(m) for m, s in tested.items() if getattr(s, name) < ALPHA]
        return f"{', '.join(found) if found else 'nothing'} below {ALPHA:g}"

    n = max(s.gain.paired.n for s in tested.values())
    first, least = min(1.0, len(tested) * statistics.smallest_p(n)), statistics.smallest_p(n)
    text = (
        f"sign-flip test, adjusted by Holm for {len(tested)} comparison{'s' * (len(tested) > 1)}: "
        f"{below('p_holm')}; with n = {n} the first could reach {first:.2g}"
    )
    if first >= ALPHA:
        needed = statistics.seeds_needed(len(tested), ALPHA)
        text += f", so no method can be significant by Holm with so few seeds (n = {needed} is needed)"
    return text + f". By the max-T test over all of them: {below('p_max')}; it could reach {least:.2g}"


def _tests(results: Results, student: str, methods: Sequence[str]) -> list[str]:
    """The notes of a table about the tests of one student, and about rows that differ in their seeds."""
    found = []
    if text := significance(results, student, methods):
        found.append(f"{student}, {text}.")
    ranked = (results.reference, *results.tested(methods))
    seeds = {tuple(s) for m in ranked if (s := results.by_seed(student, m))}
    if len(seeds) > 1:
        shared = sorted(set.intersection(*map(set, seeds)))
        found.append(
            f"{student}, the rows have different seeds: compare Δ {results.reference}, not the means; best "
            f"is the highest mean over the seeds that all have ({', '.join(map(str, shared)) or 'none'})."
        )
    return found


def _training(results: Results) -> str:
    plain = replace(results, cells=results.cells[~results.cells["method"].isin([*results.controls])])
    parts = []
    for name, key in (
        ("steps", "steps"),
        ("images a batch", "batch_size"),
        ("crop", "crop"),
        ("precision", "precision"),
    ):
        if values := plain.distinct(f"params.training.{key}", students_only=True):
            parts.append(f"{name} {' or '.join(values)}")
    return "; ".join(parts) or "unknown"


def _machines(results: Results) -> list[str]:
    """Which seeds of each student come from which kind of machine."""
    found: dict[tuple[str, str], list[str]] = {}
    for (student, seed), kinds in machines(results.cells).items():
        for kind in kinds:
            found.setdefault((student, kind), []).append(str(seed))
    return [f"{student}, seed {', '.join(seeds)}: {kind}" for (student, kind), seeds in found.items()]


def _seeds(results: Results, method: str) -> str:
    """How many seeds a column has, over all students: ``3``, or ``1 or 3``."""
    return " or ".join(
        str(n) for n in sorted({len(results.by_seed(student, method)) for student in results.students})
    )


def number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Floats to six decimals: what is written to the CSV should not hang on the last bit of a mean."""
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}
