"""``reports/index.html``: the answer, the leaderboards, figures, panels and claims as one page.

It is made from the same rows as the CSV tables, with everything in it: styles, figures and the script of
DataTables (from the package itables). A policy in its head forbids any request. The same records and figures
give the same bytes.
"""

from __future__ import annotations

import ast
import base64
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from html import escape
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines import config, files
from pipelines.config import PAPER, Params
from pipelines.reports import claims, figures, method_table, panels, published, ranks, statistics, svg, tables
from pipelines.reports.looks import looks
from pipelines.reports.ranks import Ranks
from pipelines.reports.results import FEWEST, RESAMPLES, SCORE, Gain, Results, Standing, label, variant
from pipelines.runs import counts, records

FILE = "index.html"
LINKS = method_table.PAPERS | {  # what a text names, and where that is
    r"(?<=compared at )([\w-]+/[\w.-]+), commits? ([0-9a-f]{7,})": r"https://github.com/\1/tree/\2",
    r"(?<!/)github\.com/([\w-]+/[\w.-]*\w)": r"https://github.com/\1",
    r"\b(?:baselines|acfd|pipelines)/[\w/]+\.(?:py|md)": r"../\g<0>",
}
VERDICT_COLOURS = {claims.REPRODUCED: "#009e73", claims.NOT_REPRODUCED: "#d55e00"}


def write(params: Params, every: Sequence[Results], folder: Path, root: Path) -> None:
    """Write ``folder/index.html``; figures, panels and what is published are read in ``root/reports``."""
    ranked = ranks.rank(every)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(tables.TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": _number, "between": _between, "named": _named}
    content = environment.get_template("page.html.j2").render(
        benchmarks=[_benchmark(results, params, root) for results in every],
        reference=params.suite.reference,
        paper=PAPER,
        resamples=f"{RESAMPLES:,}",
        ranks=_ranks(ranked, root),
        claims=_claims(params, every, root),
        style=Markup((tables.TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup(_library() + (tables.TEMPLATES / "page.js").read_text(encoding="utf-8")),
    )
    files.write_bytes(folder / FILE, content.encode())


def answer(results: Results, student: str) -> list[str]:
    """Whether distillation helps a student here, how sure that is, and on what, in plain sentences."""
    stand, tested = results.standings(student, results.methods), results.tested(results.methods)
    known = {m: stand[m] for m in tested if stand[m].gain.paired.n}
    if not known:
        return [f"Not known yet: no seed of {student} has finished with a method and without one."]
    n, seeds = len(known), max(s.gain.paired.n for s in known.values())

    def listed(found: Sequence[str]) -> str:
        return _named([results.label(m) for m in found])

    def those(verdict: str, gain: str = "gain") -> list[str]:
        found = [m for m, s in known.items() if getattr(s, gain).verdict == verdict]
        return sorted(found, key=lambda m: -(getattr(known[m], gain).paired.mean or 0))

    best = max(known, key=lambda m: known[m].gain.paired.mean or 0)
    lead, val = results.lead(student, SCORE), results.lead(student)
    sure = [m for m in known if _above(known[m])]
    highest = (
        f"The highest {'mean ' * (seeds > 1)}gain is {known[best].gain.paired.mean or 0:+.2f} points of test "
        f"mIoU ({results.label(best)})"
        + ("." if lead is None else f"; the teacher's own lead over the student alone is {lead:+.2f}")
        + (f" ({val:+.2f} on validation)." * (lead is not None) if val is not None else "")
    )
    longer = _longer(results, student, [*known])
    schedule = [text for text in [tables.schedule(results, student)] if text]
    if seeds == 1:
        first = "Not known yet: one seed cannot say how far another would move a score."
        return [first, highest, *longer, *schedule]
    better, worse, equal, behind = (
        those(word, which) for which in ("gain", "equal") for word in ("gain", "loss")
    )
    rest = [m for m in known if known[m].gain.verdict == "undecided"]
    single = [m for m in known if known[m].gain.paired.n == 1]
    unclear = f", {len(rest)} not clearly different" * bool(rest)
    first = (
        f"At equal steps, {len(better)} of {n} methods {'is' if len(better) == 1 else 'are'} clearly better "
        f"than the student alone{': ' * bool(better)}{listed(better)}; {len(worse) or 'none'} clearly "
        f"worse{unclear}."
    )
    if n == 1:
        word = "clearly better" if better else "clearly worse" if worse else "neither better nor worse"
        first = f"At equal steps, {listed([*known])} is {word} than the student alone."
    found = [
        first,
        f"How sure: clearly means that two 95 % intervals of the gain exclude 0, one over {seeds} seeds, one "
        f"over {results.images} test images, which is too narrow where these are frames of the same videos.",
    ]
    if (least := statistics.smallest_p(seeds)) > tables.ALPHA:
        found.append(
            f"Exploratory: with {seeds} seeds the width of an interval is itself a matter of chance, and so "
            f"are the verdicts; no method could pass a test at 5 % (smallest possible p: {least:.2g}; one "
            f"test needs {statistics.SEEDS_FOR_SIGNIFICANCE} seeds, {n} with Holm's correction need "
            f"{statistics.seeds_needed(n, tables.ALPHA)})."
        )
    else:
        found.append(
            f"The intervals are not corrected for testing {n} method{'s' * (n > 1)}; with that correction "
            f"(max-T, 5 %), {len(sure)} of {n} {'is' if len(sure) == 1 else 'are'} "
            f"better{': ' * bool(sure)}{listed(sure)}."
        )
    if (results.images or 0) < FEWEST:
        found.append(f"With fewer than {FEWEST} test images no method is called better or worse.")
    if worse and n > 1:
        found.append(f"Worse than the student alone, with the loss weights used here: {listed(worse)}.")
    if single:
        found.append(f"Not known, with one seed each: {listed(single)}.")
    if any(s.equal.paired.n > 1 for s in known.values()):
        lost = [m for m in known if known[m].equal.paired.n < 2]
        found.append(
            "At equal training compute, against the student alone trained longer, "
            + (f"better: {listed(equal)}" if equal else "no method is clearly better")
            + (f"; worse: {listed(behind)}." if behind else ".")
            + (f" Not known for {listed(lost)}." if lost else "")
        )
    else:
        found.append(
            "At equal training compute: not known, because the student alone has not been trained longer "
            "with two seeds or more."
        )
    return [*found, *longer, highest, *schedule]


def _longer(results: Results, student: str, methods: Sequence[str]) -> list[str]:
    """What the student alone reaches when it trains longer, in one sentence."""
    means, parts, rising = [results.mean(student, m) or 0 for m in methods], [], False
    for control, factor in sorted(results.controls.items(), key=lambda pair: pair[1]):
        if (own := results.mean(student, control)) is not None:
            above = sum(own > mean for mean in means)
            parts.append(f"{factor:g} times the steps {own:.2f} (above {above} of {len(means)} methods)")
            rising = results.gain(student, control).verdict == "gain"
    if not parts:
        return []
    plain = results.mean(student, results.reference) or 0
    end = " It has not converged, so this says nothing about a student that has." if rising else ""
    return [f"The student alone scores {plain:.2f}; trained for {_named(parts)}, by the means.{end}"]


def about(method: str, params: Params) -> dict[str, Any]:
    """What the docstring of a method's file says: a summary, the formula or the terms, the paper and what
    follows its name, the differences from the authors' code, and the rest."""
    file = f"{PAPER}/method.py" if records.is_variant(method) else f"baselines/{params.module_key(method)}.py"
    path = config.ROOT / file
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else None
    parts = (text or "").split("\n\n")
    formula = next((part for part in parts if part.startswith(("    ", "- ``"))), "")
    if formula.startswith("- "):  # terms: the first sentence of each
        formula = "\n".join("- " + term.split(". ")[0].rstrip(".") for term in _items(formula)[1:])
    source = next((part for part in parts if part.startswith("Source: ")), "").removeprefix("Source: ")
    cited = re.match(r".*?\([^()]*\d{4}[^()]*\)", source, re.DOTALL)
    paper = cited[0] if cited else source
    symbols = source[len(paper) :].lstrip(".;, \n")
    differences = [part for part in parts if part.startswith(("Differences", "Not in it"))]
    shown = [part for part in parts if part.startswith("Source: ")] + differences
    if formula.startswith("    "):
        shown.append(formula)
    return {
        "file": file,
        "summary": _marked(parts[0]),
        "formula": _block(formula),
        "paper": _marked(paper),
        "symbols": _marked(symbols[:1].upper() + symbols[1:]),
        "differences": [_marked(part) for part in differences],
        "rest": Markup("").join(_block(part) for part in parts[1:] if part not in shown),
    }


def _benchmark(results: Results, params: Params, root: Path) -> dict[str, Any]:
    key = results.benchmark
    taps = {method: found.get("taps", []) for method, found in counts.read(root)["methods"].items()}
    boards = [_board(results, params, taps, results.methods, tables.comparison(results).data, "")]
    shown = {m for student in results.students for m in results.shown(student)}
    if shown - {*results.methods}:
        rows, own = tables.ablation(results).data, [m for m in results.variants if m in shown]
        boards.append(_board(results, params, taps, own, rows, "variants"))
    return {
        "key": key,
        "about": tables.about(results, params),
        "answers": [(student, answer(results, student)) for student in results.students],
        "facts": tables.facts(results),
        "warnings": tables.warnings(results),
        "boards": boards,
        "figures": [
            (name, _picture(root / "reports" / key / f"{name}.png"), figures.sentence(name, results))
            for name in figures.NAMES
        ],
        "panels": panels.shown(results, root),
    }


def _board(
    results: Results,
    params: Params,
    taps: Mapping[str, Collection[str]],
    methods: Sequence[str],
    data: Any,
    name: str,
) -> dict[str, Any]:
    """A leaderboard: ``data`` are the rows of a CSV table, ``taps`` those of each method that was counted."""
    lines = {(line["student"], line["method"]): line for line in data.to_dict("records")}
    rows = []
    for student, method in product(results.students, methods):
        line = lines.get((student, variant(method) if name else results.label(method)))
        if line is not None:
            rows.append({"student": student, "key": method, **line})
    scores = svg.scale([x for r in rows for x in results.by_seed(r["student"], r["key"]).values()])
    ends = [
        r[f"{kind}_{end}"]
        for r in rows
        for kind in ("over_seeds", "over_images", "equal_over_seeds", "equal_over_images")
        for end in ("low", "high")
        if r[f"{kind}_{end}"] is not None
    ]
    means = [r[k] for r in rows for k in ("diff_mean", "equal_diff_mean") if r[k] is not None]
    spread = sorted([abs(x) for x in ends])
    # an interval of two seeds may be a hundred points wide: the axis ends where most of them do
    limit = max([1.0, *map(abs, means), *spread[: int(0.9 * len(spread))]])
    gains = svg.scale([-limit, limit])
    costs = {(line["student"], line["method"]): line for line in tables.cost(results).data.to_dict("records")}
    classes, look = tables.per_class(results).data.to_dict("records"), looks(results)
    for student in results.students:
        compared = methods if not name else [results.reference, *results.shown(student)]
        stand = results.standings(student, compared)
        for row in (r for r in rows if r["student"] == student):
            key = row["key"]
            row |= _row(results, row, stand[key], scores, gains, look[key].colour)
            row |= {
                "taps": taps.get(key, ()),
                "family": family(results, key, taps.get(key, ())),
                "rank": tables.rank_text(row),
                "id": re.sub(r"\W+", "-", "-".join(filter(None, (results.benchmark, name, student, key)))),
                "costs": costs.get((student, results.label(key))),
                "about": about(key, params),
                "weights": results.weights[key],
                "trials": results.trials.get(key),
                "tuning": tuning(results, key),
                "left_out": results.left_out(student, key),
                "classes": [
                    c | {"bar": _drawn(c["diff_mean"], Gain(), gains, look[key].colour)}
                    for c in classes
                    if (c["student"], c["method"]) == (student, results.label(key))
                ],
                "curve": _curve(results, student, key),
            }
    return {
        "id": re.sub(r"\W+", "-", f"board-{results.benchmark}-{name}".rstrip("-")),
        "title": f"Variants of {PAPER}" if name else "Leaderboard",
        "rows": rows,
        "families": list(dict.fromkeys(r["family"] for r in rows)),
        "students": results.students,
        "axes": {"scores": Markup(svg.axis(scores)), "gains": Markup(svg.axis(gains))},
    }


def _row(
    results: Results,
    row: Mapping[str, Any],
    stand: Standing,
    scores: svg.Scale,
    gains: svg.Scale,
    colour: str,
) -> dict[str, Any]:
    """What a row draws and says beside the numbers of the CSV."""
    student, key, mean = row["student"], row["key"], row["miou_mean"]
    alone = results.mean(student, results.reference)
    plain = results.by_seed(student, results.reference)
    best = results.by_seed(student, key, "best_val/miou")
    return {
        "label": results.label(key),
        "dots": ""
        if mean is None
        else Markup(svg.dots([*stand.scores.values()], mean, alone, scores, colour)),
        "gain": _drawn(row["diff_mean"], stand.gain, gains, colour),
        "equal": _drawn(row["equal_diff_mean"], stand.equal, gains, colour),
        "verdict": "" if key in results.controls else stand.gain.verdict,  # a control is no method
        "over_seeds": stand.gain.over_seeds,
        "equal_seeds": stand.equal.over_seeds,
        "seeds_list": [
            (seed, score, score - plain[seed] if seed in plain else None, best.get(seed))
            for seed, score in stand.scores.items()
        ],
    }


def family(results: Results, method: str, taps: Collection[str]) -> str:
    """What of student and teacher a row compares."""
    alone = method == results.reference or method in results.controls
    return "student alone" if alone else method_table.compares(taps)


def tuning(results: Results, method: str) -> str:
    """Where the loss weights of a method come from; what stands behind them in a sentence."""
    trials, choice = results.trials.get(method), results.choices.get(method)
    if not trials or choice is None:
        return "not tuned here"
    if choice.middle:
        margin = results.tuning.margin
        return f"the middle of the range: no trial of {trials} led it by more than {margin:g} mIoU"
    middle = "that of the middle failed" if choice.first is None else f"the middle {choice.first:.2f}"
    end = ", at the end of a range" if choice.at_end else ""
    return f"chosen of {trials} short trials: {choice.score:.2f} validation mIoU, {middle}{end}"


def _drawn(mean: float | None, gain: Gain, over: svg.Scale, colour: str) -> Markup | str:
    return "" if mean is None else Markup(svg.bar(mean, gain.over_seeds, gain.over_images, over, colour))


def _curve(results: Results, student: str, method: str) -> Markup:
    """Validation mIoU over the steps, each seed, above those of the student alone."""
    look = looks(results)
    lines = []
    for key in dict.fromkeys((results.reference, method)):
        for record in results.finished:
            if (record.cell.student, record.cell.method) == (student, key):
                points = [(r["step"] or 0, v) for r in record.history if (v := r.get("val_miou")) is not None]
                lines.append((points, look[key].colour, key == method))
    label = f"Validation mIoU by step, every seed: {results.label(method)} beside {results.reference}"
    return Markup(svg.curves(lines, label))


def _ranks(found: Ranks | None, root: Path) -> dict[str, str] | None:
    if found is None:
        return None
    return {"picture": _picture(root / "reports" / "ranks.png"), "sentence": ranks.sentence(found)}


def _claims(params: Params, every: Sequence[Results], root: Path) -> dict[str, Any] | None:
    """Every published gain beside what was measured, the claim a tick on the measured interval."""
    if not (root / published.FILE).is_file():
        return None
    found = published.load(root / published.FILE)
    verdicts = claims.judge_all(found, every, params)
    judged = claims.table(found, verdicts)
    rows = judged.data.to_dict("records")
    gains = [row["gain"] for row in rows if row["gain"] is not None]
    gains += [row[f"measured_{end}"] for row in rows for end in ("low", "high") if row["measured_n"] > 1]
    over = svg.scale([0, *gains])
    for row, text in zip(rows, judged.rows, strict=True):
        texts = dict(zip(judged.columns, text, strict=True))
        interval = None
        if row["measured_low"] is not None:
            interval = statistics.Interval(row["measured_low"], row["measured_high"])
        colour, claimed = VERDICT_COLOURS.get(row["verdict"], "#7a7a7a"), row["gain"] if row["unit"] else None
        drawn = ""
        if row["measured_gain"] is not None:
            drawn = svg.bar(row["measured_gain"], interval, None, over, colour, claimed)
        elif claimed is not None:
            drawn = svg.claim(claimed, over)
        source = found.sources[row["source"]]
        row |= {
            "method": label(row["method"]),
            "why": texts["why"],
            "setting": texts["student from teacher"],
            "interval": interval,
            "comparable": row["verdict"] in (claims.REPRODUCED, claims.NOT_REPRODUCED),
        }
        row |= {"drawn": Markup(drawn), "cite": _marked(source.cite), "where": _marked(source.where)}
    return {
        "rows": rows,
        "sentences": claims.sentences(found, verdicts, every, params),
        "rules": [_marked(rule) for rule in claims.RULE],
        "methods": list(dict.fromkeys(row["method"] for row in rows)),
        "datasets": sorted({row["dataset"] for row in rows if row["dataset"]}),
        "verdicts": [word for word in claims.VERDICTS if any(row["verdict"] == word for row in rows)],
        "axis": Markup(svg.axis(over)),
    }


def _above(stand: Standing) -> bool:
    """Better by the test that allows for all methods together."""
    return stand.p_max is not None and stand.p_max < tables.ALPHA and (stand.gain.paired.mean or 0) > 0


def _number(value: float | None, form: str) -> str:
    """With a minus sign, which a hyphen is not, and none before a zero."""
    text = tables.number(value, form)
    return (text.removeprefix("-") if not text.strip("-0.") else text).replace("-", "−")


def _between(interval: statistics.Interval | None) -> str:
    return tables.between(interval).replace("-", "−")


def _named(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _marked(text: str) -> Markup:
    """The text of a docstring with its ``code``, **bold**, and links to papers, code and our own files."""
    text = re.sub(r"``(.+?)``", r"<code>\1</code>", escape(text, quote=False), flags=re.DOTALL)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text, flags=re.DOTALL)
    text = re.sub(r"(?<![\w*])\*(\w[^*]*\w)\*(?![\w*])", r"<em>\1</em>", text)
    for pattern, address in LINKS.items():
        text = re.sub(pattern, rf'<a href="{address}">\g<0></a>', text)
    return Markup(text)


def _block(text: str) -> Markup:
    """A paragraph of a docstring: a formula, a list, or prose."""
    if not text:
        return Markup("")
    if text.startswith("    "):
        return Markup("<pre tabindex=0>{}</pre>").format(textwrap.dedent(text).replace("``", ""))
    head, *items = _items(text)
    found = Markup("<p>{}</p>").format(_marked(head)) if head else Markup("")
    if items:
        found += Markup("<ul>{}</ul>").format(
            Markup("").join(Markup("<li>{}</li>").format(_marked(item)) for item in items)
        )
    return found


def _items(text: str) -> list[str]:
    """What stands before the items of a list, then the items."""
    return re.split(r"^- ", text, flags=re.MULTILINE)


def _picture(path: Path) -> str:
    """A file as an address that holds it; nothing where it is not there."""
    if not path.is_file():
        return ""
    kind = path.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _library() -> str:
    """DataTables as itables ships it, a module whose last statement exports it."""
    bundle = (resources.files("itables") / "html" / "dt_bundle.js").read_text(encoding="utf-8")
    exported = re.search(r"export\{[^}]*?(\w+) as default[^}]*\};?", bundle)
    if exported is None or "</script" in bundle:
        raise config.ConfigError("This version of itables is unknown: install the one of requirements.lock.")
    return bundle.replace(exported[0], f"const DataTable={exported[1]};")
