"""The tables of a benchmark: comparison, cost, ablation and classes.

Rows come from params.yaml, numbers from :class:`pipelines.reports.results.Results`. The CSV has every number,
Markdown the columns that are read first, TeX those that fit a page; what they mean is explained in
docs/tables.md. A cell that is missing or failed is shown as such. Nothing depends on when or where the tables
are made, so making them twice gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines import files
from pipelines.config import PAPER, TEACHER, metric_name
from pipelines.reports import conditions, statistics
from pipelines.reports.results import COMPUTE, HEADLINE, SCORE, STEP, Results, Standing, variant
from pipelines.reports.table import (
    CONDITIONS,
    Table,
    between,
    ends,
    escape_markdown,
    interval,
    number,
    plus_minus,
    render,
    rounded,
)
from pipelines.runs import exports

ARROWS = {"gain": " ↑", "loss": " ↓"}


def comparison(results: Results) -> Table:
    """Student × method: scores, gains over the student alone with both uncertainties, compute, and
    what the deployed student costs."""
    data, text = [], []
    for student in results.students:
        standings = results.standings(student, results.methods)
        for method in results.rows(student):
            named = {"student": student, "method": results.label(method)}
            row = named | _scores(results, student, method, standings[method])
            row |= _compute(results, student, method) | _deployed(results, student, method)
            row |= {"status": results.status(student, method)}
            data.append(row)
            compute = {f"compute (× {results.reference})": number(row["compute_ratio"], ".2f")}
            text.append(named | _score_text(row, results.reference) | compute | {"status": row["status"]})
    notes = [_lead(results), " ".join(conditions.tests(results, results.methods))]
    return Table("comparison", "comparison of methods", data, text, notes, _wide(results))


def cost(results: Results) -> Table:
    """Student × method: what the deployed student costs, and what its training cost."""
    data, text = [], []
    for student in results.students:
        for method in results.rows(student):
            named = {"student": student, "method": results.label(method)}
            row = named | costs(results, student, method)
            row |= {"status": results.status(student, method)}
            data.append(row)
            text.append(named | _cost_text(row, results.reference))
    notes = [_deployed_note(results), _trials_note(results)]
    return Table("cost", "cost of methods", data, text, notes, _wide(results))


def ablation(results: Results) -> Table:
    """The variants of the paper's method, with the student alone as the reference."""
    weights = list(dict.fromkeys(name for key in results.variants for name in results.weights[key]))
    data, text, tests = [], [], list[str]()
    for student in results.students:
        methods = [key for key in results.methods if key == results.reference] + results.shown(student)
        tests += conditions.tests(results, methods, student)
        standings = results.standings(student, methods)
        for method in methods:
            own = results.weights.get(method, {})
            row: dict[str, Any] = {"student": student, "method": variant(method)}
            row |= _scores(results, student, method, standings[method])
            row |= {name: own.get(name) for name in weights}
            row |= _compute(results, student, method) | {"status": results.status(student, method)}
            data.append(row)
            named = (f"{name.removeprefix('weight_')} {own[name]:g}" for name in weights if own.get(name))
            line = {"student": student, "variant": variant(method)}
            line |= {"terms and weights": ", ".join(named) or "–"} | _score_text(row, results.reference)
            text.append(line | {"status": row["status"]})
    notes = [_lead(results, results.variants), " ".join(tests), _against_full(results)]
    return Table("ablation", f"ablation of {PAPER}", data, text, notes, _wide(results))


def _against_full(results: Results) -> str:
    """The variants beside the whole method, over the seeds that both have."""
    parts = []
    for student in results.students:
        rows = [key for key in results.shown(student) if key != HEADLINE]
        gains = {key: results.gain(student, key, HEADLINE) for key in rows}
        said = [
            f"{variant(key)} {own.paired.mean:+.2f} {between(own.over_seeds)}{ARROWS.get(own.verdict, '')} "
            f"(n = {own.paired.n})"
            for key, own in gains.items()
            if own.paired.n > 1
        ]
        parts += [f"{student}: {', '.join(said)}."] if said else []
    if not parts:
        return ""
    whole = variant(HEADLINE)
    text = f"Minus {whole}, over the seeds that both have; all have the weights that were chosen for {whole}."
    return f"{text} {' '.join(parts)}"


def per_class(results: Results) -> Table:
    """IoU of every class, mean ± sd over the seeds: the teacher's, that of the student alone, and those of
    the methods with the highest and the lowest mean; the CSV has all methods."""
    data: list[dict[str, Any]] = []
    text, reference, metrics = [], results.reference, _class_metrics(results)
    for student in results.students:
        rows = {method: classes(results, student, method) for method in results.rows(student)}
        for place, (metric, name) in enumerate(metrics.items()):
            known = {method: own[place] for method, own in rows.items()}
            data += known.values()
            known = {method: row for method, row in known.items() if row["n"]}
            line = {"student": student, "class": name, TEACHER: number(results.teacher(metric), ".2f")}
            line[reference] = _iou_text(known[reference]) if reference in known else "–"
            tested = [known[method] for method in results.tested(results.methods) if method in known]
            for choose, head, apart in (
                (max, "highest", f"its Δ {reference}"),
                (min, "lowest", f"Δ {reference} of that"),
            ):
                row = choose(tested, key=lambda own: own["iou_mean"], default={})
                line[head] = f"{row['method']}, {_iou_text(row)}" if row else "–"
                line[apart] = number(row.get("diff_mean"), "+.2f")
            text.append(line)
    for metric, name in metrics.items():
        score = results.teacher(metric)
        row = {"student": TEACHER, "method": "", "class": name, "n": int(score is not None)}
        data.append(row | rounded({"iou_mean": score, "iou_sd": None, "diff_mean": None}))
    notes = [
        _lead(results),
        "highest, lowest: of the methods of that student, class by class, so partly luck.",
    ]
    return Table("per_class", "IoU per class", data, text, notes, _wide(results))


def classes(results: Results, student: str, method: str) -> list[dict[str, Any]]:
    """The lines of a row in the CSV of the classes."""
    found = []
    for metric, name in _class_metrics(results).items():
        values, known = results.by_seed(student, method, metric).values(), method != results.reference
        row = {"student": student, "method": results.label(method), "class": name, "n": len(values)}
        difference = results.paired(student, method, metric).mean if known else None
        scores = {"iou_mean": statistics.mean(values), "iou_sd": statistics.sd(values)}
        found.append(row | rounded(scores | {"diff_mean": difference}))
    return found


def _class_metrics(results: Results) -> dict[str, str]:
    """The name of every class by its metric, and of their mean."""
    return {f"test/iou/{metric_name(name)}": name for name in results.classes()} | {SCORE: "mean (mIoU)"}


def _iou_text(row: Mapping[str, Any]) -> str:
    return plus_minus(row["iou_mean"], row["iou_sd"])


def write(results: Results, folder: Path) -> None:
    """Write every table of a benchmark to ``folder/<name>.{md,csv,tex}``, and ``folder/conditions.md``."""
    about, said = conditions.facts(results), conditions.warnings(results)
    for make in NAMES.values():
        shown = results if make is ablation else replace(results, variants=[])
        own = conditions.warnings(shown, times=make is cost)
        render(make(results), folder, results.benchmark, about, own, "../../")
    lines = [f"# {escape_markdown(results.benchmark)}: what was measured, and how", ""]
    for text in said:
        lines += [f"> **Warning:** {escape_markdown(text)}", ""]
    lines += [f"- **{name}**: {escape_markdown(text)}" for name, text in about]
    lines += ["", "What the numbers mean: [how to read the tables](../../docs/tables.md)."]
    files.write_bytes(folder / CONDITIONS, "\n".join([*lines, ""]).encode())


def _wide(results: Results) -> frozenset[str]:
    """The columns that TeX has no room for."""
    return frozenset({"status", *(["student"] if len(results.students) == 1 else [])})


def _lead(results: Results, methods: Sequence[str] = ()) -> str:
    """The first note: what there was to distil, and how many trainings stand behind a number of the
    ``methods``, by default those of the suite."""
    score = results.teacher(SCORE)
    leads = [
        f"over {student} {lead:+.2f} ({number(results.lead(student), '+.2f')} on validation)"
        for student in results.students
        if (lead := results.lead(student, metric=SCORE)) is not None
    ]
    text = "The teacher has not run." if score is None else f"Teacher: {score:.2f} test mIoU."
    if score is not None and leads:
        text = f"Teacher: {score:.2f} test mIoU; its lead: {', '.join(leads)}."
    parts = []
    for student in results.students:
        if counts := {len(results.by_seed(student, m)) for m in methods or results.methods} - {0}:
            parts.append(f"{student}, {conditions.power(min(counts))}.")
    return " ".join([text, *parts]) if parts else f"{text} No cell has finished yet."


def _deployed_note(results: Results) -> str:
    size = " or ".join(
        "×".join(map(str, json.loads(value)))
        for value in results.distinct("tags.student.input", students_only=True)
    )
    text = f"Parameters and GFLOPs: of the deployed student, one image of {size or '?'} pixels"
    return f"{text}; latency: {'; '.join(conditions.exported(results)) or 'not measured'}."


def _trials_note(results: Results) -> str:
    return (
        f"A step: teacher and method included. Tuning: {conditions.trials(results)}; more in conditions.md."
    )


def _scores(results: Results, student: str, method: str, standing: Standing) -> dict[str, Any]:
    scores, gain, known = standing.scores, standing.gain, method != results.reference
    row: dict[str, Any] = {
        "n": len(scores),
        "miou_mean": statistics.mean(scores.values()),
        "miou_sd": statistics.sd(scores.values()),
        "seeds": " ".join(f"{seed}:{score:.2f}" for seed, score in scores.items()),
        "rank_low": standing.rank[0] if standing.rank else None,
        "rank_high": standing.rank[1] if standing.rank else None,
        "diff_mean": gain.paired.mean if known else None,
        "diff_sd": gain.paired.sd if known else None,
        "diff_n": gain.paired.n if known else None,
    }
    for prefix, own in (("", gain), ("equal_", standing.equal)):
        for kind in ("over_seeds", "over_images", "over_both"):
            row |= ends(f"{prefix}{kind}", getattr(own, kind))
    return rounded(
        row
        | {
            "p": standing.p,
            "p_holm": standing.p_holm,
            "p_max_t": standing.p_max,
            "equal_diff_mean": standing.equal.paired.mean,
            "equal_n": standing.equal.paired.n,
            "equal_why": standing.why,
            "verdict": standing.gain.verdict,
            "equal_verdict": standing.equal.verdict,
            "val_miou_mean": results.mean(student, method, "val/miou"),
            "best_val_miou_mean": results.mean(student, method, "best_val/miou"),
            "pixel_accuracy_mean": results.mean(student, method, "test/pixel_accuracy"),
            "mean_accuracy_mean": results.mean(student, method, "test/mean_accuracy"),
        }
    )


def _compute(results: Results, student: str, method: str) -> dict[str, Any]:
    own, reference = (results.mean(student, key, COMPUTE) for key in (method, results.reference))
    return rounded(
        {
            "training_tflop": None if own is None else own / 1e12,
            "compute_ratio": None if own is None or reference is None else own / reference,
        }
    )


def costs(results: Results, student: str, method: str) -> dict[str, Any]:
    """What the deployed student of a row costs, and what its training cost."""

    def values(metric: str) -> list[float]:
        return list(results.by_seed(student, method, metric).values())

    step = statistics.median(values(STEP))
    return _deployed(results, student, method) | rounded(
        {
            "steps": _whole(values("steps")),
            "step_flops": _whole(values("compute/step_flops")),
            "step_ms": None if step is None else 1000 * step,
            "step_ratio": results.ratio(student, method, STEP),
            "training_s": statistics.median(values("seconds/training")),
            "memory_mb": max(values("memory_peak_mb"), default=None),
            "memory_ratio": results.ratio(student, method, "memory_peak_mb"),
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
        found = exports.timing(record, method, results.reference, runtime) if record else (None,) * 4
        names = [f"{runtime}_{what}" for what in ("ms", "ms_q1", "ms_q3", "ratio")]
        row |= zip(names, found, strict=True)
    apart = exports.difference(record, method) if record else None
    return rounded(row) | {"largest_difference": None if apart is None else float(f"{apart:.6g}")}


def _whole(values: Iterable[float]) -> int | None:
    """The number that all seeds of a row share."""
    return next((int(value) for value in values), None)


def _score_text(row: Mapping[Any, Any], reference: str) -> dict[str, str]:
    score = plus_minus(row["miou_mean"], row["miou_sd"]) + (f" (n = {row['n']})" if row["n"] else "")
    why = f" ({row['equal_why']})" if row["equal_why"] else ""
    return {
        "test mIoU": score,
        "rank": rank_text(row),
        f"Δ {reference}": _gain_text(row, "", row["diff_n"]),
        "Δ at equal compute": _gain_text(row, "equal_", row["equal_n"]) + why,
    }


def rank_text(row: Mapping[Any, Any]) -> str:
    """``2–9``: the places that a row may have; nothing where it has none."""
    low, high = row["rank_low"], row["rank_high"]
    return "" if low is None else f"{low}" if low == high else f"{low}–{high}"


def _gain_text(row: Mapping[Any, Any], kind: str, n: int | None) -> str:
    """``+1.20 [+0.30, +2.10] ↑ (n = 2)``: over seeds; an arrow where all three intervals leave 0 out, and how
    many seeds, where not all."""
    text = number(row[f"{kind}diff_mean"], "+.2f")
    if found := interval(row, f"{kind}over_seeds"):
        text += f" {between(found)}"
    return text + ARROWS.get(row[f"{kind}verdict"] or "", "") + (f" (n = {n})" if n and n < row["n"] else "")


def _cost_text(row: dict[str, Any], reference: str) -> dict[str, str]:
    sizes = ("parameters", 1e6), ("flops", 1e9), ("step_flops", 1e9)
    parameters, flops, step = (None if row[name] is None else row[name] / unit for name, unit in sizes)
    return {
        "parameters (M)": number(parameters, ".2f"),
        "GFLOPs": number(flops, ".2f"),
        f"latency (× {reference})": number(row["onnxruntime_ratio"], ".2f"),
        "GFLOPs a step": number(step, ".1f"),
        f"step time (× {reference})": number(row["step_ratio"], ".2f"),
        f"memory (× {reference})": number(row["memory_ratio"], ".2f"),
    }


NAMES = {make.__name__: make for make in (comparison, cost, ablation, per_class)}
