"""The tables of a benchmark, in Markdown, CSV and TeX, and the block of results in the README.

Rows come from params.yaml, scores from the query of :mod:`pipelines.results.tracking`. A cell that is missing
or failed stands in its row as such. Nothing depends on when or where the tables are made, so making them
twice gives the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from pipelines.config import PAPER, TEACHER, Params
from pipelines.results import records, statistics
from pipelines.results.records import Cell, Record
from pipelines.results.tracking import metric_name

REFERENCE = "none"  # the method that every other one is compared to: the undistilled student
HEADLINE = f"{PAPER}-full"  # the variant that stands for the paper's method, as the row `acfd`
SCORE = "test/miou"
LEAD = 3.0  # mIoU by which a teacher has to beat the undistilled student before a comparison says much

TEMPLATES = Path(__file__).with_name("templates")
README_MARKERS = ("<!-- results:begin -->", "<!-- results:end -->")


@dataclass(frozen=True)
class Results:
    """Everything that the tables and figures of one benchmark are made from."""

    benchmark: str
    students: list[str]
    methods: list[str]  # of the comparison: the baselines, then HEADLINE
    variants: list[str]  # of the paper's method, HEADLINE among them
    seeds: list[int]
    weights: dict[str, dict[str, Any]]  # per variant: its loss weights in params.yaml
    cells: pd.DataFrame  # finished cells, in the form of tracking.frame
    failures: dict[Cell, str] = field(default_factory=dict)
    stale: dict[Cell, list[str]] = field(
        default_factory=dict
    )  # trained with other settings than params.yaml's
    tracking: str | None = None  # why the numbers do not come from MLflow, if they do not

    def rows(self, student: str, method: str) -> pd.DataFrame:
        """The finished cells of a row that are expected, by seed."""
        found = self.cells[(self.cells["student"] == student) & (self.cells["method"] == method)]
        return found[found["seed"].isin(self.seeds)].sort_values("seed")

    def by_seed(self, student: str, method: str, metric: str = SCORE) -> dict[int, float]:
        """A metric of a row, by seed; a seed that has no such value is left out."""
        found = self.rows(student, method)
        if metric not in found:
            return {}
        values = zip(found["seed"], found[metric], strict=True)
        return {int(seed): float(value) for seed, value in values if not pd.isna(value)}

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

    def paired(self, student: str, method: str, metric: str = SCORE) -> statistics.Paired:
        """Differences to the undistilled student, seed by seed."""
        return statistics.paired(
            self.by_seed(student, method, metric), self.by_seed(student, REFERENCE, metric)
        )

    def lead(self, student: str) -> float | None:
        """Validation mIoU of the teacher minus the undistilled student's mean over its seeds."""
        teacher, plain = (
            self.teacher("val/miou"),
            statistics.mean(self.by_seed(student, REFERENCE, "val/miou").values()),
        )
        return None if teacher is None or plain is None else teacher - plain

    def status(self, student: str, method: str) -> str:
        """``complete``, ``not run``, or how many cells there are and what became of the others."""
        done = set(self.by_seed(student, method))
        missing = [seed for seed in self.seeds if seed not in done]
        if not missing:
            return "complete"
        failed = {
            s: note for s in missing if (note := self.failures.get(Cell(self.benchmark, student, method, s)))
        }
        if not done and not failed:
            return "not run"
        parts = [f"{len(done)} of {len(self.seeds)}"]
        parts += [f"seed {s}: " + (f"failed: {failed[s]}" if s in failed else "not run") for s in missing]
        return "; ".join(parts)


@dataclass(frozen=True)
class Table:
    """``data`` is the CSV; ``columns`` and ``rows`` are the text of the Markdown and TeX tables."""

    name: str
    title: str
    data: pd.DataFrame
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def gather(
    params: Params,
    benchmark: str,
    cells: pd.DataFrame,
    root: Path,
    tracking: str | None = None,
    finished: Sequence[Record] = (),
) -> Results:
    """Bring together the finished cells of a benchmark with the ones that there should be."""
    notes = {cell: records.failure(cell, root) for cell in records.expected_cells(params, benchmark)}
    variants = [key for key in params.method_keys if records.is_variant(key)]
    weights = {
        key: {
            name: value
            for name, value in params.method_values(key).items()
            if re.fullmatch("weight(_.*)?", name)
        }
        for key in variants
    }
    return Results(
        benchmark=benchmark,
        students=list(params.suite.students),
        methods=[key for key in params.method_keys if key == HEADLINE or not records.is_variant(key)],
        variants=variants,
        seeds=list(params.suite.seeds),
        weights=weights,
        cells=cells,
        failures={
            cell: " ".join(note.replace(f"{root}/", "").split()) for cell, note in notes.items() if note
        },
        stale={record.cell: parts for record in finished if (parts := records.stale(record, params))},
        tracking=tracking,
    )


def label(method: str) -> str:
    """The name of a row of the comparison."""
    return PAPER if method == HEADLINE else method


def variant(method: str) -> str:
    """The name of a row of the ablation."""
    return method.removeprefix(f"{PAPER}-")


def comparison(results: Results) -> Table:
    """Student × method: scores over the seeds, paired differences, and what they cost."""
    data, text = [], []
    for student in results.students:
        for method in results.methods:
            row = {"student": student, "method": label(method)} | _scores(results, student, method)
            row |= _costs(results.rows(student, method)) | {"status": results.status(student, method)}
            data.append(row)
            text.append([student, label(method), *_score_text(row), *_cost_text(row), row["status"]])
    columns = ["student", "method", *SCORE_COLUMNS, *COST_COLUMNS, "status"]
    return Table(
        "comparison",
        "comparison of methods",
        pd.DataFrame(data, dtype=object),
        columns,
        text,
        _cost_notes(results),
    )


def ablation(results: Results) -> Table:
    """The variants of the paper's method, with the undistilled student as the reference."""
    weights = list(dict.fromkeys(name for variant in results.weights.values() for name in variant))
    data, text = [], []
    for student in results.students:
        for method in [key for key in results.methods if key == REFERENCE] + results.variants:
            row = {"student": student, "method": variant(method)} | _scores(results, student, method)
            row |= {name: results.weights.get(method, {}).get(name) for name in weights}
            row |= {
                "step_ms": _costs(results.rows(student, method))["step_ms"],
                "status": results.status(student, method),
            }
            data.append(row)
            shown = [_number(row[name], "g") for name in weights]
            text.append(
                [
                    student,
                    variant(method),
                    *shown,
                    *_score_text(row),
                    _number(row["step_ms"], ".0f"),
                    row["status"],
                ]
            )
    columns = ["student", "variant", *weights, *SCORE_COLUMNS, "ms per step", "status"]
    notes = ["A weight of 0 switches a term off; the weights are those of params.yaml."]
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
                row = {"student": student, "method": label(method), "class": name, "n": len(values)}
                difference = None if method == REFERENCE else paired.mean
                data.append(row | _rounded({"iou_mean": mean, "iou_sd": sd, "diff_none_mean": difference}))
                line.append(plus_minus(mean, sd))
            line.append(_number(results.teacher(metric), ".2f"))
            text.append(line)
    for metric, name in names.items():
        score = results.teacher(metric)
        row = {"student": TEACHER, "method": "", "class": name, "n": int(score is not None)}
        data.append(row | _rounded({"iou_mean": score, "iou_sd": None, "diff_none_mean": None}))
    columns = [
        "student",
        "class",
        *(f"{label(m)} (n = {_seeds(results, m)})" for m in results.methods),
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
                f"the lead of the teacher over {student} is unknown, because {part} has not been run."
            )
        elif lead < LEAD:
            found.append(
                f"the teacher leads the undistilled {student} by {lead:+.2f} mIoU on validation, "
                f"less than {LEAD:g}: there is little to distil, so the differences say little about methods."
            )
    if len(results.distinct("tags.data_sha256")) > 1:
        found.append("the cells were trained on different versions of the data; run `dvc repro`.")
    if results.stale:
        named = "; ".join(
            f"{cell.path}: {', '.join(parts)}" for cell, parts in list(results.stale.items())[:5]
        )
        found.append(
            f"{len(results.stale)} cells were trained with other settings than params.yaml has ({named}); "
            "run `dvc repro`."
        )
    current = results.cells[results.cells["student"] == TEACHER]
    known = {str(value) for value in current.get("tags.weights_sha256", pd.Series(dtype=str)).dropna()}
    used = set(results.distinct("tags.teacher.sha256", students_only=True))
    if len(used) > 1 or (known and used - known):
        found.append("the cells were trained with different teachers; run `dvc repro`.")
    if len(_hardware(results)) > 1:
        found.append("the cells ran on different hardware: times and memory are not comparable.")
    return found


def facts(results: Results) -> list[tuple[str, str]]:
    """The header of every table: what was measured, on what, and what ± means."""
    seeds = len(results.seeds)
    val, test = (_number(results.teacher(metric), ".2f") for metric in ("val/miou", SCORE))
    leads = []
    for student in results.students:
        n = len(results.by_seed(student, REFERENCE, "val/miou"))
        lead = results.lead(student)
        leads.append(
            f"over the undistilled {student}: "
            + ("unknown" if lead is None else f"{lead:+.2f} (mean over n = {n})")
        )
    hashes = [value[:12] for value in results.distinct("tags.data_sha256")]
    found = [
        ("benchmark", f"{results.benchmark}; data {', '.join(hashes) or 'unknown'}"),
        ("teacher", "not run" if test == "–" else f"{val} validation / {test} test mIoU"),
        ("lead of the teacher on validation", "; ".join(leads)),
        (
            "scores",
            "mIoU in percent on the test split, from the summed confusion matrix, at the last iterate",
        ),
        ("±", "sample standard deviation over n seeds (ddof 1); differences are paired by seed"),
        ("seeds", f"{', '.join(map(str, results.seeds))}{_exploratory(seeds)}"),
        ("training", _training(results)),
        ("hardware", "; ".join(_hardware(results)) or "unknown"),
    ]
    if results.tracking:
        found.append(("tracking", f"{results.tracking}: these numbers come straight from the run records"))
    return found


def write(results: Results, folder: Path) -> None:
    """Write every table of a benchmark to ``folder/<name>.{md,csv,tex}``."""
    head = {"benchmark": results.benchmark, "facts": facts(results), "warnings": warnings(results)}
    for table in (comparison(results), ablation(results), per_class(results)):
        records.write_bytes(
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
            records.write_bytes(folder / f"{table.name}.{kind}", content.encode())


def ranking(results: Results, student: str) -> str:
    """One plain sentence: who is ahead, and whether so few seeds can say so."""
    means = {
        m: mean
        for m in results.methods
        if (mean := statistics.mean(results.by_seed(student, m).values())) is not None
    }
    if not means:
        return f"No cell of {student} has finished yet."
    order = sorted(means, key=lambda method: -means[method])
    best = order[0]
    parts = [f"Best mean test mIoU of {student}: {_standing(results, student, best)}"]
    if HEADLINE in means and best != HEADLINE:
        parts.append(
            f"{PAPER} is number {order.index(HEADLINE) + 1} of {len(order)}: "
            f"{_standing(results, student, HEADLINE)}"
        )
    elif len(order) > 1:
        parts.append(f"next: {_standing(results, student, order[1])}")
    n = min(len(results.by_seed(student, method)) for method in means)
    parts.append(f"± is the sd over seeds{_exploratory(n)}")
    return "; ".join(parts) + "."


def readme_block(every: Sequence[Results]) -> str:
    """The results as they stand in the README: per benchmark a compact table, a sentence and the figures."""
    blocks = []
    for results in every:
        folder = f"reports/{results.benchmark}"
        lines = [f"### {results.benchmark}", ""]
        lines += [f"> **Warning:** {escape_markdown(text)}\n" for text in warnings(results)]
        lines += [
            "| student | method | n | test mIoU | difference to none | ms per step | status |",
            "|---|---|--:|--:|--:|--:|---|",
        ]
        for row in comparison(results).data.to_dict("records"):
            cells = [
                row["student"],
                row["method"],
                str(row["n"]),
                plus_minus(row["miou_mean"], row["miou_sd"]),
            ]
            cells += [
                plus_minus(row["diff_none_mean"], row["diff_none_sd"], "+.2f"),
                _number(row["step_ms"], ".0f"),
                row["status"],
            ]
            lines.append("| " + " | ".join(escape_markdown(cell) for cell in cells) + " |")
        lines += ["", *(escape_markdown(ranking(results, student)) for student in results.students)]
        teacher, leads = (
            results.teacher(SCORE),
            [lead for s in results.students if (lead := results.lead(s)) is not None],
        )
        if teacher is not None and leads:
            lines += [
                f"The teacher scores {teacher:.2f}; its lead over the undistilled student on validation is "
                f"{min(leads):+.2f} mIoU."
            ]
        links = ", ".join(f"[{name}]({folder}/{name}.md)" for name in ("comparison", "ablation", "per_class"))
        lines += [f"All tables: {links}.", ""]
        for name in ("scores", "per_class", "learning_curves", "cost"):
            lines.append(f"![{results.benchmark}: {name.replace('_', ' ')}]({folder}/{name}.png)")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def update_readme(path: Path, every: Sequence[Results]) -> bool:
    """Put the results between the markers of a README. Where there are none: change nothing, return False."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    begin, end = (text.find(marker) for marker in README_MARKERS)
    if begin < 0 or end < begin:
        return False
    content = text[: begin + len(README_MARKERS[0])] + "\n" + readme_block(every) + "\n" + text[end:]
    if content != text:
        records.write_bytes(path, content.encode())
    return True


def plus_minus(mean: float | None, sd: float | None, form: str = ".2f") -> str:
    """``41.20 ± 0.30``; without ± where there is no sd (one seed), ``–`` where there is nothing."""
    if mean is None:
        return "–"
    return f"{mean:{form}}" + ("" if sd is None else f" ± {sd:.2f}")


def escape_markdown(value: Any) -> str:
    """Text that keeps its line, its table cell and its look in Markdown."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(str(value).split()))


def escape_tex(value: Any) -> str:
    """Text that TeX prints as it stands, in one line."""
    return " ".join(str(value).split()).translate(TEX)


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
        "–": "--",
    }
)

SCORE_COLUMNS = ["n", "test mIoU", "seed:test mIoU", "Δ none (paired)", "val mIoU", "best val mIoU"]
COST_COLUMNS = ["parameters (M)", "GFLOPs", "latency (ms)", "ms per step", "training (s)", "memory (MB)"]


def _scores(results: Results, student: str, method: str) -> dict[str, Any]:
    scores, paired = results.by_seed(student, method), results.paired(student, method)
    return {"n": len(scores)} | _rounded(
        {
            "miou_mean": statistics.mean(scores.values()),
            "miou_sd": statistics.sd(scores.values()),
            "seeds": " ".join(f"{seed}:{score:.2f}" for seed, score in scores.items()),
            "diff_none_mean": None if method == REFERENCE else paired.mean,
            "diff_none_sd": None if method == REFERENCE else paired.sd,
            "diff_none_n": None if method == REFERENCE else paired.n,
            "val_miou_mean": statistics.mean(results.by_seed(student, method, "val/miou").values()),
            "best_val_miou_mean": statistics.mean(results.by_seed(student, method, "best_val/miou").values()),
        }
    )


def _costs(rows: pd.DataFrame) -> dict[str, Any]:
    def values(metric: str) -> list[float]:
        return [float(value) for value in rows[metric].dropna()] if metric in rows else []

    def whole(metric: str) -> int | None:
        return next((int(value) for value in values(metric)), None)

    steps = statistics.median(values("seconds/step_median"))
    return _rounded(
        {
            "parameters": whole("student/parameters"),
            "flops": whole("student/flops"),
            "latency_ms": statistics.median(values("student/latency_ms")),
            "step_ms": None if steps is None else 1000 * steps,
            "training_s": statistics.median(values("seconds/training")),
            "memory_mb": max(values("memory_peak_mb"), default=None),
        }
    )


def _cost_notes(results: Results) -> list[str]:
    size = " or ".join(
        "×".join(map(str, json.loads(value)))
        for value in results.distinct("tags.student.input", students_only=True)
    )
    return [
        "best val mIoU: of each training, picked on the validation split; for information, no headline.",
        f"parameters, GFLOPs, latency: of the exported student, one image of {size or '?'} pixels.",
        "ms per step: median, teacher and method included; training: without validation; median over seeds.",
        "times: under the load of the machine then; the student, so its latency, is the same for all.",
        "memory: peak of the training process, largest of the seeds.",
    ]


def _score_text(row: dict[str, Any]) -> list[str]:
    difference = plus_minus(row["diff_none_mean"], row["diff_none_sd"], "+.2f")
    if row["diff_none_n"] is not None and 0 < row["diff_none_n"] < row["n"]:
        difference += f" (n = {row['diff_none_n']})"
    return [
        str(row["n"]),
        plus_minus(row["miou_mean"], row["miou_sd"]),
        row["seeds"] or "–",
        difference,
        _number(row["val_miou_mean"], ".2f"),
        _number(row["best_val_miou_mean"], ".2f"),
    ]


def _cost_text(row: dict[str, Any]) -> list[str]:
    return [
        _number(None if row["parameters"] is None else row["parameters"] / 1e6, ".2f"),
        _number(None if row["flops"] is None else row["flops"] / 1e9, ".2f"),
        _number(row["latency_ms"], ".1f"),
        _number(row["step_ms"], ".0f"),
        _number(row["training_s"], ".0f"),
        _number(row["memory_mb"], ".0f"),
    ]


def _standing(results: Results, student: str, method: str) -> str:
    scores, paired = results.by_seed(student, method).values(), results.paired(student, method)
    text = f"{label(method)} {plus_minus(statistics.mean(scores), statistics.sd(scores))} (n = {len(scores)}"
    return text + (
        ")" if method == REFERENCE or paired.mean is None else f", {paired.mean:+.2f} to {REFERENCE})"
    )


def _exploratory(n: int) -> str:
    """Nothing from six seeds on; before that, why these differences prove nothing yet."""
    if n >= statistics.SEEDS_FOR_SIGNIFICANCE:
        return ""
    bound = f"no two-sided sign-flip test over n = {n} can give p below {statistics.smallest_p(n):.2g}"
    return f" (exploratory: n < {statistics.SEEDS_FOR_SIGNIFICANCE}, {bound})"


def _training(results: Results) -> str:
    parts = []
    for name, key in (
        ("steps", "steps"),
        ("images a batch", "batch_size"),
        ("crop", "crop"),
        ("precision", "precision"),
    ):
        if values := results.distinct(f"params.training.{key}", students_only=True):
            parts.append(f"{name} {' or '.join(values)}")
    return "; ".join(parts) or "unknown"


def _hardware(results: Results) -> list[str]:
    found = results.cells[results.cells["student"] != TEACHER]
    known = []
    for row in found.to_dict("records"):
        device, processor = row.get("tags.hardware.device"), row.get("tags.hardware.processor")
        names = dict.fromkeys(str(value) for value in (device, processor) if not pd.isna(value))
        threads = row.get("hardware/threads")
        known.append(", ".join(names) + ("" if pd.isna(threads) else f", {threads:.0f} threads"))
    return sorted(set(known))


def _seeds(results: Results, method: str) -> str:
    """How many seeds a column has, over all students: ``3``, or ``1 or 3``."""
    return " or ".join(
        str(n) for n in sorted({len(results.by_seed(student, method)) for student in results.students})
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Floats to six decimals: what is written to the CSV should not hang on the last bit of a mean."""
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}
