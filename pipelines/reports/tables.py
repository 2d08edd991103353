"""The tables of a benchmark, in Markdown, CSV and TeX, and the conditions under which they were measured.

Rows come from params.yaml, numbers from :class:`pipelines.reports.results.Results`. The CSV has every number,
Markdown the columns that are read first, TeX those that fit a page; what they mean is explained in
docs/tables.md. A cell that is missing or failed is shown as such. Nothing depends on when or where the tables
are made, so making them twice gives the same bytes.
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

from pipelines import config, files
from pipelines.config import PAPER, TEACHER, Params
from pipelines.reports import statistics
from pipelines.reports.results import COMPLETE, COMPUTE, FEWEST, SCORE, Results, Standing, variant
from pipelines.reports.statistics import Interval
from pipelines.runs import exports
from pipelines.runs.tracking import metric_name

UNLEARNT = 1.0  # IoU in percent below which a class is not found at all
LEAD = 3.0  # mIoU by which a teacher has to beat the student alone before a comparison says much
ALPHA = 0.05  # of a test

TEMPLATES = Path(__file__).with_name("templates")
CONDITIONS = "conditions.md"
MOST = 8  # columns that are read at a glance
LINES = 45  # rows of a TeX table that fit a page
NUMBER = re.compile(r"[-+<]?\d.*|–.*|")
ARROWS = {"gain": " ↑", "loss": " ↓"}


@dataclass(frozen=True)
class Table:
    """``data`` is the CSV; ``columns`` (at most ``MOST``) and ``rows`` are the text of the Markdown table,
    and of the TeX table without the columns ``wide``; ``notes`` (at most two) stand above it."""

    name: str
    title: str
    data: pd.DataFrame
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    wide: frozenset[str] = frozenset()

    @property
    def right(self) -> list[bool]:
        """Which columns hold numbers."""
        return [all(NUMBER.fullmatch(row[i]) for row in self.rows) for i in range(len(self.columns))]

    def narrow(self) -> Table:
        """What TeX prints."""
        kept = [i for i, name in enumerate(self.columns) if name not in self.wide]
        rows = [[row[i] for i in kept] for row in self.rows]
        return replace(self, columns=[self.columns[i] for i in kept], rows=rows)

    @property
    def pages(self) -> list[list[list[str]]]:
        """The rows, as many as fit a page at a time."""
        return [self.rows[start : start + LINES] for start in range(0, len(self.rows), LINES)] or [[]]


def comparison(results: Results) -> Table:
    """Student × method: scores, gains over the student alone with both uncertainties, compute, and
    what the deployed student costs."""
    data, text = [], []
    for student in results.students:
        standings = results.standings(student, results.methods)
        for method in results.rows(student):
            row = {"student": student, "method": results.label(method)}
            row |= _scores(results, student, method, standings[method])
            row |= _compute(results, student, method) | _deployed(results, student, method)
            row |= {"status": results.status(student, method)}
            data.append(row)
            text.append([student, results.label(method), *_score_text(row), row["status"]])
    columns = ["student", "method", *_score_columns(results), "status"]
    notes = [_lead(results), " ".join(_tests(results, results.methods))]
    frame = pd.DataFrame(data, dtype=object)
    return Table("comparison", "comparison of methods", frame, columns, text, notes, _wide(results))


def cost(results: Results) -> Table:
    """Student × method: what the deployed student costs, and what its training cost."""
    data, text = [], []
    for student in results.students:
        for method in results.rows(student):
            row = {"student": student, "method": results.label(method)} | _deployed(results, student, method)
            row |= _costs(results, student, method) | {"status": results.status(student, method)}
            data.append(row)
            text.append([student, results.label(method), *_cost_text(row)])
    columns = ["student", "method", "parameters (M)", "GFLOPs", f"latency (× {results.reference})"]
    columns += ["GFLOPs a step", *(f"{what} (× {results.reference})" for what in ("step time", "memory"))]
    notes = [_deployed_note(results), _trials_note(results)]
    frame = pd.DataFrame(data, dtype=object)
    return Table("cost", "cost of methods", frame, columns, text, notes, _wide(results))


def ablation(results: Results) -> Table:
    """The variants of the paper's method, with the student alone as the reference."""
    weights = list(dict.fromkeys(name for key in results.variants for name in results.weights[key]))
    data, text, tests = [], [], list[str]()
    for student in results.students:
        methods = [key for key in results.methods if key == results.reference] + results.shown(student)
        tests += _tests(results, methods, student)
        standings = results.standings(student, methods)
        for method in methods:
            own = results.weights.get(method, {})
            row: dict[str, Any] = {"student": student, "method": variant(method)}
            row |= _scores(results, student, method, standings[method])
            row |= {name: own.get(name) for name in weights}
            row |= _compute(results, student, method) | {"status": results.status(student, method)}
            data.append(row)
            named = (f"{name.removeprefix('weight_')} {own[name]:g}" for name in weights if own.get(name))
            score, place, gain, equal, _ = _score_text(row)
            text.append([student, variant(method), ", ".join(named) or "–", score, place, gain, equal])
            text[-1].append(row["status"])
    columns = ["student", "variant", "terms and weights", *_score_columns(results)[:-1], "status"]
    notes = [_lead(results), " ".join(tests)]
    frame = pd.DataFrame(data, dtype=object)
    return Table("ablation", f"ablation of {PAPER}", frame, columns, text, notes, _wide(results))


def per_class(results: Results) -> Table:
    """IoU of every class, mean ± sd over the seeds: the teacher's, that of the student alone, and those of
    the methods with the highest and the lowest mean; the CSV has all methods."""
    names = {f"test/iou/{metric_name(name)}": name for name in results.classes()} | {SCORE: "mean (mIoU)"}
    data, text, reference = [], [], results.reference
    for student in results.students:
        for metric, name in names.items():
            line = [student, name, number(results.teacher(metric), ".2f")]
            known: dict[str, tuple[float, str, str]] = {}  # mean, as text, difference as text
            for method in results.rows(student):
                values, paired = (
                    results.by_seed(student, method, metric).values(),
                    results.paired(student, method, metric),
                )
                mean, sd = statistics.mean(values), statistics.sd(values)
                row = {"student": student, "method": results.label(method), "class": name, "n": len(values)}
                difference = None if method == reference else paired.mean
                data.append(row | rounded({"iou_mean": mean, "iou_sd": sd, "diff_mean": difference}))
                if mean is not None:
                    known[method] = mean, plus_minus(mean, sd), number(difference, "+.2f")
            line.append(known[reference][1] if reference in known else "–")
            tested = [method for method in results.tested(results.methods) if method in known]
            for choose in (max, min):
                method = choose(tested, key=lambda m: known[m][0], default="")
                found = known.get(method)
                line += [f"{results.label(method)}, {found[1]}", found[2]] if found else ["–", "–"]
            text.append(line)
    for metric, name in names.items():
        score = results.teacher(metric)
        row = {"student": TEACHER, "method": "", "class": name, "n": int(score is not None)}
        data.append(row | rounded({"iou_mean": score, "iou_sd": None, "diff_mean": None}))
    columns = ["student", "class", TEACHER, reference, "highest", f"its Δ {reference}"]
    columns += ["lowest", f"Δ {reference} of that"]
    notes = [
        _lead(results),
        f"highest, lowest: of the {len(results.tested(results.methods))} methods, class by class, so partly "
        "luck.",
    ]
    frame = pd.DataFrame(data, dtype=object)
    return Table("per_class", "IoU per class", frame, columns, text, notes, _wide(results))


def _wide(results: Results) -> frozenset[str]:
    """The columns that TeX has no room for."""
    return frozenset({"status", *(["student"] if len(results.students) == 1 else [])})


def _lead(results: Results) -> str:
    """The first note: what there was to distil, and how many trainings stand behind a number."""
    score = results.teacher(SCORE)
    leads = [
        f"over {student} {lead:+.2f}"
        for student in results.students
        if (lead := results.lead(student)) is not None
    ]
    text = "The teacher has not run." if score is None else f"Teacher: {score:.2f} test mIoU."
    if score is not None and leads:
        text = f"Teacher: {score:.2f} test mIoU; its lead on validation: {', '.join(leads)}."
    parts = []
    for student in results.students:
        if counts := {len(results.by_seed(student, m)) for m in results.methods} - {0}:
            parts.append(f"{student}, {power(min(counts))}.")
    return " ".join([text, *parts]) if parts else f"{text} No cell has finished yet."


def _deployed_note(results: Results) -> str:
    size = " or ".join(
        "×".join(map(str, json.loads(value)))
        for value in results.distinct("tags.student.input", students_only=True)
    )
    text = f"Parameters and GFLOPs: of the deployed student, one image of {size or '?'} pixels"
    return f"{text}; latency: {'; '.join(_exported(results)) or 'not measured'}."


def _exported(results: Results) -> list[str]:
    """How the latencies of each student were measured."""
    return [
        f"{student}: seed {record['seed']}, {record['rounds']} rounds, "
        f"{'×'.join(map(str, record['input']))} pixels, {record['hardware']['threads']} threads of "
        f"{record['hardware']['processor']}, onnxruntime {record['versions']['onnxruntime']}"
        for student, record in results.exports.items()
    ]


def _trials_note(results: Results) -> str:
    return f"A step: teacher and method included. Tuning: {_tuning(results)}"


def _tuning(results: Results) -> str:
    if not results.trials:
        return "no method was tuned."
    how = results.tuning
    text = f"{max(results.trials.values())} trials of {how.steps} steps for every method, on {how.student}"
    text += "".join(f"; {results.label(m)}: {n} different ones" for m, n in results.different.items())
    middle = sum(choice.middle for choice in results.choices.values())
    text += (
        f". {middle} of {len(results.choices)} methods keep the middle of their ranges: no trial led it by "
        f"more than {how.margin:g} mIoU"
    )
    moved = (
        f"{results.label(m)} {choice.score - choice.first:+.1f}"
        for m, choice in results.choices.items()
        if not choice.middle and choice.first is not None
    )
    text += f"; the others gained on it {', '.join(moved)}." if middle < len(results.choices) else "."
    if ends := [results.label(m) for m, choice in results.choices.items() if choice.at_end]:
        text += f" At an end of a range, beyond which there may be better: {', '.join(ends)}."
    return text + _agreement(results)


def _agreement(results: Results) -> str:
    """Whether what scored well in the short trials of tuning scores well in the table."""
    if results.benchmark != results.tuning.benchmark:
        return ""
    pairs = [
        (choice.score, mean)
        for method, choice in results.choices.items()
        if (mean := results.mean(results.tuning.student, method)) is not None
    ]
    if len(pairs) < statistics.FEWEST_PAIRS:
        return ""
    rho, interval = statistics.rank_correlation(*zip(*pairs, strict=True))
    return (
        f" Between the validation mIoU of the chosen trials and the mean test mIoU of the table, over "
        f"{len(pairs)} methods, Spearman's ρ is {rho:+.2f} {between(interval)}."
    )


def warnings(results: Results) -> list[str]:
    """What a reader has to know before believing a table of this benchmark."""
    found = []
    for student in results.students:
        lead = results.lead(student)
        if lead is None:
            part = "the teacher" if results.teacher("val/miou") is None else f"{student} alone"
            found.append(
                f"the lead of the teacher over {student} is unknown, because {part} has no finished cell of "
                "today's settings."
            )
        elif lead < LEAD:
            found.append(
                f"the teacher leads {student} alone by {lead:+.2f} mIoU on validation, "
                f"less than {LEAD:g}: there is little to distil, so the differences say little about methods."
            )
        if lost := _unlearnt(results, student):
            found.append(
                f"with every method, {student} has barely learned {', '.join(lost)} (mean IoU below "
                f"{UNLEARNT:g} %): it is far from the end of its training, and its mIoU rests on the other "
                f"{len(results.classes()) - len(lost)} classes."
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
                f"the split {split} has no pixel of {', '.join(missing)}: no score there; the mean is over "
                "the other classes."
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
    if len({kind for kinds in results.machines.values() for kind in kinds}) > 1:
        found.append(
            "seeds ran on different machines: compare times in the CSV within a seed, as the tables do."
        )
    if results.elsewhere:
        found.append(
            f"rows whose status names another machine than that of {results.reference}: their gains hold a "
            "difference of rounding, too, which moves a score as another seed of the noise would."
        )
    return found


def _unlearnt(results: Results, student: str) -> list[str]:
    """The classes that no method finds."""
    methods, lost = (results.reference, *results.tested(results.methods)), []
    for name in results.classes():
        scores = [results.mean(student, m, f"test/iou/{metric_name(name)}") for m in methods]
        known = [score for score in scores if score is not None]
        if known and max(known) < UNLEARNT:
            lost.append(name)
    return lost


def about(results: Results, params: Params) -> str:
    """What a benchmark consists of, in one sentence."""
    own = params.benchmark(results.benchmark)
    module = config.dataset_module(own.data, results.benchmark)
    size = own.data.get("size")
    shape = f", at {size[0]}×{size[1]} pixels (height × width)" if size else ""
    network = own.teacher.network
    return (
        f"{own.data['dataset']}: {module.ABOUT}{shape}. Teacher: {network.architecture} with "
        f"{network.encoder.removeprefix('tu-')}."
    )


def facts(results: Results) -> list[tuple[str, str]]:
    """Under which conditions a benchmark was measured; what the numbers mean is said in docs/tables.md."""
    counts = sorted({len(results.by_seed(s, m)) for s in results.students for m in results.methods} - {0})
    val, test = (number(results.teacher(metric), ".2f") for metric in ("val/miou", SCORE))
    leads, reference = [], results.reference
    controls = ", ".join(f"{factor:g}" for factor in results.controls.values()) or "no"
    for student in results.students:
        n = len(results.by_seed(student, reference, "val/miou"))
        lead = results.lead(student)
        leads.append(
            f"over {student} alone: " + ("unknown" if lead is None else f"{lead:+.2f} (mean over n = {n})")
        )
    hashes = [value[:12] for value in results.distinct("tags.data_sha256")]
    images = str(results.images or "unknown")
    if results.images and results.images < FEWEST:
        images += f", fewer than {FEWEST}: no interval over images, and no method is called better or worse"
    found = [
        ("benchmark", f"{results.benchmark}; data {', '.join(hashes) or 'unknown'}"),
        ("test images", images),
        ("teacher", "not run" if test == "–" else f"{val} validation / {test} test mIoU"),
        ("lead of the teacher on validation", "; ".join(leads)),
        ("seeds", "; ".join(map(power, counts)) or "none has finished"),
        ("tests", " ".join(_tests(results, results.methods)) or "none"),
        (
            "student alone",
            f"{reference}; for the comparison at equal compute also {controls} times the steps",
        ),
        ("training", _training(results)),
        ("tuning", _tuning(results)),
        ("machine of each seed", "; ".join(_machines(results)) or "unknown"),
        ("latency", "; ".join(_exported(results)) or "not measured"),
    ]
    lacking = [
        f"{student}, {results.label(method)}: {status}"
        for student in results.students
        for method in dict.fromkeys((*results.rows(student), *results.shown(student)))
        if not (status := results.status(student, method)).startswith(COMPLETE)
    ]
    if lacking:
        found.append(("not complete", "; ".join(lacking)))
    return found


def write(results: Results, folder: Path) -> None:
    """Write every table of a benchmark to ``folder/<name>.{md,csv,tex}``, and ``folder/conditions.md``."""
    about, said = facts(results), warnings(results)
    head = {"benchmark": results.benchmark, "facts": about, "warnings": said}
    for make in NAMES.values():
        render(make(results), folder, head, "../../")
    lines = [f"# {escape_markdown(results.benchmark)}: what was measured, and how", ""]
    for text in said:
        lines += [f"> **Warning:** {escape_markdown(text)}", ""]
    lines += [f"- **{name}**: {escape_markdown(text)}" for name, text in about]
    lines += ["", "What the numbers mean: [how to read the tables](../../docs/tables.md)."]
    files.write_bytes(folder / CONDITIONS, "\n".join([*lines, ""]).encode())


def render(table: Table, folder: Path, head: dict[str, Any], up: str = "../") -> None:
    """Write one table as ``folder/<name>.{csv,md,tex}``; ``head`` has its ``benchmark``, ``warnings`` and
    ``facts``, which are comments in TeX; ``up`` leads from the folder to the repository."""
    files.write_bytes(
        folder / f"{table.name}.csv", table.data.to_csv(index=False, lineterminator="\n").encode()
    )
    for kind, escape, shown in (("md", escape_markdown, table), ("tex", escape_tex, table.narrow())):
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
        anchor = table.name.replace("_", "-")
        about = {"table": shown, "up": up, "anchor": anchor, "conditions": CONDITIONS}
        content = environment.get_template(f"table.{kind}.j2").render(**about, **head)
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
        "×": r"$\times$",
        "Δ": r"$\Delta$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "−": "$-$",
        "–": "--",
    }
)


def _score_columns(results: Results) -> list[str]:
    reference = results.reference
    return ["test mIoU", "rank", f"Δ {reference}", "Δ at equal compute", f"compute (× {reference})"]


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
        for name, interval in (("seeds", own.over_seeds), ("images", own.over_images)):
            row |= {
                f"{prefix}over_{name}_low": interval.low if interval else None,
                f"{prefix}over_{name}_high": interval.high if interval else None,
            }
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


def _costs(results: Results, student: str, method: str) -> dict[str, Any]:
    """What the training of a row cost."""

    def values(metric: str) -> list[float]:
        return list(results.by_seed(student, method, metric).values())

    def ratio(metric: str) -> float | None:
        """Within each seed, as seeds may come from different machines."""
        alone = results.by_seed(student, results.reference, metric)
        own = results.by_seed(student, method, metric)
        return statistics.median([own[seed] / alone[seed] for seed in own.keys() & alone.keys()])

    step = statistics.median(values("seconds/step_median"))
    return rounded(
        {
            "steps": _whole(values("steps")),
            "step_flops": _whole(values("compute/step_flops")),
            "step_ms": None if step is None else 1000 * step,
            "step_ratio": ratio("seconds/step_median"),
            "training_s": statistics.median(values("seconds/training")),
            "memory_mb": max(values("memory_peak_mb"), default=None),
            "memory_ratio": ratio("memory_peak_mb"),
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
    return rounded(row) | {"largest_difference": None if apart is None else float(f"{apart:.6g}")}


def _whole(values: Iterable[float]) -> int | None:
    """The number that all seeds of a row share."""
    return next((int(value) for value in values), None)


def _ratio_text(row: Mapping[str, Any], runtime: str = "onnxruntime") -> str:
    if row[f"{runtime}_ratio"] is None:
        return "–"
    return f"{row[f'{runtime}_ratio']:.2f} {between(interval(row, f'{runtime}_ratio'), '.2f')}"


def _score_text(row: dict[str, Any]) -> list[str]:
    return [
        score_text(row),
        rank_text(row),
        gain_text(row),
        equal_text(row),
        number(row["compute_ratio"], ".2f"),
    ]


def score_text(row: Mapping[Any, Any]) -> str:
    """``41.20 ± 0.30 (n = 3)``"""
    return plus_minus(row["miou_mean"], row["miou_sd"]) + (f" (n = {row['n']})" if row["n"] else "")


def rank_text(row: Mapping[Any, Any]) -> str:
    """``2–9``: the places that a row may have; nothing where it has none."""
    low, high = row["rank_low"], row["rank_high"]
    return "" if low is None else f"{low}" if low == high else f"{low}–{high}"


def gain_text(row: Mapping[Any, Any]) -> str:
    """``+1.20 [+0.30, +2.10] ↑``: over seeds, and an arrow where both intervals leave 0 out."""
    n = row["diff_n"]
    text = _gain_text(row, "diff_mean", "over_seeds", "verdict")
    return text + (f" (n = {n})" if n and n < row["n"] else "")


def equal_text(row: Mapping[Any, Any]) -> str:
    """The same at equal compute, and why seeds are not in it."""
    text = _gain_text(row, "equal_diff_mean", "equal_over_seeds", "equal_verdict")
    if row["equal_n"] and row["equal_n"] < row["n"]:
        text += f" (n = {row['equal_n']})"
    return text + (f" ({row['equal_why']})" if row["equal_why"] else "")


def _gain_text(row: Mapping[Any, Any], mean: str, over_seeds: str, verdict: str) -> str:
    text = number(row[mean], "+.2f")
    if found := interval(row, over_seeds):
        text += f" {between(found)}"
    return text + ARROWS.get(row[verdict] or "", "")


def _cost_text(row: dict[str, Any]) -> list[str]:
    return [
        number(None if row["parameters"] is None else row["parameters"] / 1e6, ".2f"),
        number(None if row["flops"] is None else row["flops"] / 1e9, ".2f"),
        _ratio_text(row),
        number(None if row["step_flops"] is None else row["step_flops"] / 1e9, ".1f"),
        number(row["step_ratio"], ".2f"),
        number(row["memory_ratio"], ".2f"),
    ]


def interval(row: Mapping[Any, Any], name: str) -> Interval | None:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return None if low is None else Interval(low, high)


def power(n: int) -> str:
    """What so few seeds can show at all."""
    if n == 1:
        return "n = 1: one seed, so nothing can be told apart"
    text = f"n = {n}: the smallest p that a sign-flip test can reach is {statistics.smallest_p(n):.2g}"
    return text + (", exploratory" if n < statistics.SEEDS_FOR_SIGNIFICANCE else "")


def significance(results: Results, student: str, methods: Sequence[str]) -> str | None:
    """Which methods of one table differ from the student alone after each adjustment, and whether any
    could; None where nothing was tested."""
    tested = {m: s for m, s in results.standings(student, methods).items() if s.p is not None}
    if not tested:
        return None

    def below(name: str) -> str:
        found = [results.label(m) for m, s in tested.items() if getattr(s, name) < ALPHA]
        return f"{', '.join(found) if found else 'nothing'} below {ALPHA:g}"

    n = max(s.gain.paired.n for s in tested.values())
    first, least = min(1.0, len(tested) * statistics.smallest_p(n)), statistics.smallest_p(n)
    how = f"smallest possible: {first:.2g}"
    if first >= ALPHA:
        how += f"; n = {statistics.seeds_needed(len(tested), ALPHA)} is needed"
    return (
        f"sign-flip tests of {len(tested)} method{'s' * (len(tested) > 1)}, n = {n}: {below('p_holm')} by "
        f"Holm ({how}), {below('p_max')} by max-T (smallest possible: {least:.2g})"
    )


def _tests(results: Results, methods: Sequence[str], *students: str) -> list[str]:
    """What a table says about the tests of each student, and about rows that differ in their seeds."""
    found = []
    for student in students or results.students:
        if text := significance(results, student, methods):
            found.append(f"{student}, {text}.")
        ranked = (results.reference, *results.tested(methods))
        seeds = {tuple(s) for m in ranked if (s := results.by_seed(student, m))}
        if len(seeds) > 1:
            found.append(
                f"{student}, the rows have different seeds: compare Δ {results.reference}, not the means."
            )
    return found


def schedule(results: Results, student: str) -> str:
    """How long a student and its teacher were trained, and from which weights, in one sentence; nothing
    without a record."""
    own = [
        r.run for r in results.finished if r.cell.student == student and r.cell.method not in results.controls
    ]
    taught = [r.run for r in results.finished if r.cell.is_teacher]
    if not own or not taught:
        return ""
    (student_run, *_), (teacher_run, *_) = own, taught
    return (
        f"{student} starts from {_start(student_run)} weights and trains for {student_run['steps']} steps of "
        f"{student_run['config']['training']['batch_size']} images; its teacher started from "
        f"{_start(teacher_run)} weights and trained for {teacher_run['steps']}."
    )


def _start(run: Mapping[str, Any]) -> str:
    return "random" if run["config"]["network"]["weights"] is None else "ImageNet"


def _training(results: Results) -> str:
    parts = []
    for student in results.students:
        for run in (r.run["config"] for r in results.finished if r.cell.student == student):
            protocol, recipe = run["training"], run["network"].get("recipe") or {"optimizer": "sgd"}
            values = protocol | recipe
            size = "×".join(map(str, values["crop"]))
            parts.append(
                f"{schedule(results, student)} Optimiser: {recipe['optimizer']}, learning rate "
                f"{values['lr']:g}, weight decay {values['weight_decay']:g}, crops of {size} pixels, "
                f"{values['precision']}."
            )
            break
    return " ".join(parts).strip() or "unknown"


def _machines(results: Results) -> list[str]:
    """Which seeds of each student come from which kind of machine."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for (student, seed), kinds in results.machines.items():
        for kind, methods in kinds.items():
            named = f" ({', '.join(map(results.label, methods))})" if len(kinds) > 1 else ""
            found.setdefault((student, kind, named), []).append(str(seed))
    return [
        f"{student}, seed {', '.join(seeds)}{named}: {kind}"
        for (student, kind, named), seeds in found.items()
    ]


def number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Floats to six decimals: what is written to the CSV should not hang on the last bit of a mean."""
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}


NAMES = {make.__name__: make for make in (comparison, cost, ablation, per_class)}
