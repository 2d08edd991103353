"""What README.md and docs/ say of the records, generated: the answer with its table, and the words for it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from pipelines import files
from pipelines.config import ROOT, ConfigError, Params
from pipelines.reports import answer, claims, conditions, orders, published, tables
from pipelines.reports.method_table import PAPERS, compares
from pipelines.reports.results import COMPLETE, HEADLINE, Results
from pipelines.reports.table import escape_markdown
from pipelines.runs import counts
from pipelines.runs.journal import Journal

BENCH = Journal(Path("runs") / "bench.json", "`make bench`", itemgetter("what", "processor"))
FIGURE = "compute"
ROWS, LOWEST = 8, 2  # of the table in the README, and how many of them are the lowest


def update(path: Path, name: str, text: str) -> bool:
    """Put ``text`` between ``<!-- name:begin -->`` and ``<!-- name:end -->``. Where these are not: change
    nothing, return False."""
    try:
        content = path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is damaged, it is no UTF-8 text: restore it with git.") from None
    before, begin, rest = content.partition(f"<!-- {name}:begin -->")
    _, end, after = rest.partition(f"<!-- {name}:end -->")
    if not end:
        return False
    new = f"{before}{begin}\n{text}\n{end}{after}"
    if new != content:
        files.write_bytes(path, new.encode())
    return True


def block(every: Sequence[Results], params: Params, root: Path = ROOT) -> str:
    """The answers in a sentence each; eight rows and a figure of the benchmark that the methods were tuned
    on, else of the first that has results."""
    wanted = params.tuning.benchmark
    named = [results for results in every if results.benchmark == wanted]
    if not every:
        return (
            f"Not known yet: no results of `{wanted}` have been committed. `make repro` trains a small "
            "benchmark on your machine; its answer is in `reports/index.html`."
        )
    results = (named or list(every))[0]
    students = results.students
    student = params.tuning.student if params.tuning.student in students else students[0]
    folder = f"reports/{results.benchmark}"
    ordered = [student, *(name for name in students if name != student)]
    others = [found for found in every if found is not results]
    each = [(results, name) for name in ordered] + [(own, name) for own in others for name in own.students]
    answers = [answer.row(found, name) for found, name in each]
    lines = [
        escape_markdown(answer.headline(each)),
        "",
        f"| benchmark | {' | '.join(answers[0])} |",
        f"|---|---|{'--:|' * (len(answers[0]) - 1)}",
    ]
    for (found, _), row in zip(each, answers, strict=True):
        cells = " | ".join(map(escape_markdown, row.values()))
        lines.append(f"| [{found.benchmark}](reports/{found.benchmark}/comparison.md) | {cells} |")
    lines += [
        "",
        "*Better / worse*: how many methods are clearly above and below the student alone after the same "
        "number of steps, and after the same training FLOPs (without those that need more than its longest "
        "training). *Largest mean gain*: the best of several means, so biased upwards. In points of test "
        "mIoU.",
        "",
    ]
    lines += [f"{escape_markdown(text)}\n" for found, name in each if (text := answer.lacking(found, name))]
    tuned = params.tuning.methods if results.benchmark == wanted else []
    if left := [results.label(m) for m in tuned if not results.by_seed(student, m)]:
        lines += [f"Not trained yet: {escape_markdown(', '.join(left))}.", ""]
    shown = replace(results, variants=[])
    lines += [f"> **Warning:** {escape_markdown(text)}\n" for text in conditions.warnings(shown, times=False)]
    whole_table = tables.comparison(results)
    own = [row for row in whole_table.cells if row["student"] == student]
    chosen = _chosen(results, student)
    order = {results.label(method): place for place, method in enumerate(chosen)}
    rows = sorted((row for row in own if row["method"] in order), key=lambda row: order[row["method"]])
    whole = {"status"} if all(row["status"] == COMPLETE for row in rows) else set[str]()
    lines += replace(whole_table, cells=rows, wide=frozenset({"student", *whole})).narrow().markdown
    most = max(results.controls.values(), default=0)
    longer = f"; ×{most:g}: trained for {most:g} times as many steps" if most else ""
    lines += [
        "",
        f"{student}. `{results.reference}`: the student alone{longer}. ±: standard deviation over seeds; "
        "rank: the places that a row may have; Δ: difference in points, with its 95 % interval over seeds; "
        "↑ better, ↓ worse: those over test images and over both exclude 0 too. "
        f"{len(order)} of {len(own)} rows, with the highest and the lowest "
        f"by mean test mIoU. All: [comparison]({folder}/comparison.md); the terms of ACFD one by one: "
        f"[ablation]({folder}/ablation.md); [what the columns mean](docs/tables.md#comparison).",
        "",
        f"![gain against training compute on {results.benchmark}]({folder}/{FIGURE}.png)",
        "",
        f"*Mean gain against the FLOPs of the training, both relative to {results.reference}; dotted: the "
        "student alone, trained longer.*",
    ]
    lines += ["", "What these numbers say, and what they do not:", ""]
    said = answer.caveats(results, ordered)
    for found in others:
        if more := answer.caveats(found, found.students, again=True):
            said.append(f"{found.benchmark}: {' '.join(more)}")
    if (root / published.FILE).is_file():
        known = published.load(root / published.FILE)
        told = (claims.paper(known, every, params), orders.sentence(orders.orders(known, every)))
        said += [text for text in told if text]
    lines += [f"- {escape_markdown(text)}" for text in said]
    return "\n".join(lines)


def _chosen(results: Results, student: str) -> list[str]:
    """The rows of the README, best first: the reference, also trained longest, the paper's method, and of the
    others the best and the worst; what has no score where there is room."""
    means = {m: -1.0 if (mean := results.mean(student, m)) is None else mean for m in results.rows(student)}
    order = sorted(means, key=lambda m: -means[m])
    longest = max(results.controls, key=lambda m: results.controls[m], default=None)
    chosen = {m for m in (results.reference, longest, HEADLINE) if m in means}
    others = [m for m in results.tested(order) if m not in chosen]
    scored, room = [m for m in others if means[m] >= 0], ROWS - len(chosen)
    many = len(scored) > room
    chosen |= {*scored[: room - LOWEST], *scored[-LOWEST:]} if many else {*others[:room]}
    return [m for m in order if m in chosen]


def rules() -> str:
    """How a published claim is judged."""
    return "\n".join(f"- {rule}" for rule in claims.RULE)


def methods(params: Params, root: Path = ROOT) -> str:
    """Every method of params.yaml by the words of its own file."""
    counted = counts.read(root)["methods"]
    lines = [
        "| method | what it does | compares | source | published loss weights |",
        "|---|---|---|---|---|",
    ]
    for name in params.methods:
        file = Path("baselines") / f"{name}.py"
        text = ast.get_docstring(ast.parse((root / file).read_text(encoding="utf-8"))) or ""
        first = " ".join(text.split("\n\n")[0].split())
        source = re.search(r"Source: (.*?\([^()]*\d{4}[^()]*\))", " ".join(text.split()))
        own = params.official.get(name, {})
        weights = ", ".join(f"{key.removeprefix('weight_')} {value:g}" for key, value in own.items())
        cells = (
            first.removesuffix("."),
            "–" if name == params.suite.reference else compares(counted.get(name, {}).get("taps", ())),
            source[1] if source else "–",
            weights or "–",
        )
        text = " | ".join(map(escape_markdown, cells))
        for pattern, address in PAPERS.items():
            text = re.sub(pattern, rf"[\g<0>]({address})", text.replace(r"\_", "_"))
        lines.append(f"| [{name}](../{file}) | {text} |")
    return "\n".join(lines)


def minutes(root: Path = ROOT) -> str:
    """How long the default benchmark takes from nothing; nothing where it was not measured."""
    found = [entry for entry in BENCH.read(root) if entry["what"] == "suite"]
    if not found:
        return ""
    took = [round(entry["seconds"] / 60) for entry in found]
    spans = str(min(took)) if min(took) == max(took) else f"{min(took)} to {max(took)}"
    cores = " or ".join(map(str, sorted({entry["cores"] for entry in found})))
    return (
        f"From nothing, with the installation, it took {spans} minutes on {cores} cores "
        "([measured](docs/how-it-works.md))."
    )


def speed(root: Path = ROOT) -> str:
    """What ``make bench`` measured, as two tables."""
    found = BENCH.read(root)
    lines = []
    if own := [entry for entry in found if entry["what"] == "suite"]:
        rows: dict[str, Callable[[dict[str, Any]], str]] = {
            "trainings, with the teacher": lambda one: f"{one['trainings']}",
            "`make repro` from nothing": lambda one: f"{one['seconds']:.0f} s",
            "installation, of that": lambda one: f"{one['parts']['installation']:.0f} s",
            "share of training and inference": lambda one: f"{one['training']:.0%}",
            "cores busy, from the teacher to the report": lambda one: f"{one['busy']:.0%}",
            "largest memory of a process": lambda one: f"{one['memory_mb'] / 1024:.1f} GB",
            "a second `make repro`": lambda one: f"{one['again']:.0f} s",
            "a new method": lambda one: f"{one['added']:.0f} s",
            "training, of that": lambda one: f"{one['added_packs']:.0f} s",
        }
        lines += [
            "| " + "".join(f"| {one['cores']} cores, {one['processor']} " for one in own) + "|",
            "|---" + "|--:" * len(own) + "|",
            *(f"| {name} | {' | '.join(map(text, own))} |" for name, text in rows.items()),
        ]
    if pairs := [entry for entry in found if entry["what"] != "suite"]:
        head = (
            "| teacher, student | cells of a pack | a step of it | of its cells, one by one | bound "
            "| processor |"
        )
        lines += ["", head, "|---|--:|--:|--:|--:|---|"]
        lines += [
            f"| {entry['what'].removeprefix('packs ')} | {size} | {took:.2f} s | {alone:.2f} s "
            f"| {bound:.2f} s | {entry['processor']} |"
            for entry in pairs
            for size, took, alone, bound in entry["rows"]
        ]
        lines += [
            "",
            "*bound*: one pass of the teacher and what each cell takes besides, as timed with one cell; a "
            "measured step may lie below it.",
        ]
    return "\n".join(lines)
