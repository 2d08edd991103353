"""``reports/index.html``: the answer, the leaderboards, figures, panels and claims as one page.

It is made from the same rows as the CSV tables, with everything in it: styles, figures and the script of
DataTables (from the package itables). A policy in its head forbids any request. The same records and figures
give the same bytes.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipelines import config, files
from pipelines.config import PAPER, Params
from pipelines.reports import (
    answer,
    claims,
    conditions,
    figures,
    method_table,
    panels,
    published,
    ranks,
    statistics,
    svg,
    table,
    tables,
)
from pipelines.reports.about import about, marked
from pipelines.reports.looks import looks
from pipelines.reports.ranks import Ranks
from pipelines.reports.results import RESAMPLES, Gain, Results, Standing, label, variant
from pipelines.runs import counts

FILE = "index.html"
VERDICT_COLOURS = {claims.REPRODUCED: "#009e73", claims.NOT_REPRODUCED: "#d55e00"}


def write(params: Params, every: Sequence[Results], folder: Path, root: Path) -> None:
    """Write ``folder/index.html``; figures, panels and what is published are read in ``root/reports``."""
    ranked = ranks.rank(every)
    environment = table.environment(autoescape=True)
    environment.filters |= {"number": _number, "between": _between, "named": answer.named}
    environment.filters["picture"] = _picture
    content = environment.get_template("page.html.j2").render(
        benchmarks=[_benchmark(results, params, root) for results in every],
        reference=params.suite.reference,
        paper=PAPER,
        resamples=f"{RESAMPLES:,}",
        ranks=_ranks(ranked, root),
        claims=_claims(params, every, root),
        style=Markup((table.TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup(_library() + (table.TEMPLATES / "page.js").read_text(encoding="utf-8")),
    )
    files.write_bytes(folder / FILE, content.encode())


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
        "about": conditions.about(results, params),
        "answers": [(student, answer.sentences(results, student)) for student in results.students],
        "facts": conditions.facts(results),
        "warnings": conditions.warnings(results),
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
    lines = {(line["student"], line["method"]): line for line in data}
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
    look = looks(results)
    for student in results.students:
        compared = methods if not name else [results.reference, *results.shown(student)]
        stand = results.standings(student, compared)
        classes = {m: tables.classes(results, student, m) for m in {*results.methods, *results.variants}}
        apart = [abs(c["diff_mean"]) for own in classes.values() for c in own if c["diff_mean"] is not None]
        limit = max(apart, default=1.0)
        differences = svg.scale([-limit, limit])  # one for both boards, wider than that of the gains
        for row in (r for r in rows if r["student"] == student):
            key = row["key"]
            row |= _row(results, row, stand[key], scores, gains, look[key].colour)
            row |= {
                "taps": taps.get(key, ()),
                "family": family(results, key, taps.get(key, ())),
                "rank": tables.rank_text(row),
                "id": re.sub(r"\W+", "-", "-".join(filter(None, (results.benchmark, name, student, key)))),
                "costs": tables.costs(results, student, key),
                "about": about(key, params),
                "weights": results.weights[key],
                "trials": results.trials.get(key),
                "tuning": tuning(results, key),
                "left_out": results.left_out(student, key),
                "classes": [
                    c | {"bar": _drawn(c["diff_mean"], Gain(), differences, look[key].colour)}
                    for c in classes[key]
                ],
                "class_axis": Markup(svg.axis(differences)),
                "curve": _curve(results, student, key),
            }
    return {
        "id": re.sub(r"\W+", "-", f"board-{results.benchmark}-{name}".rstrip("-")),
        "title": f"Variants of {PAPER}" if name else "Leaderboard",
        "rows": rows,
        "families": list(dict.fromkeys(r["family"] for r in rows)),
        "students": results.students,
        "first": params.tuning.student,  # the others are behind the filter
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


def _ranks(found: Ranks | None, root: Path) -> dict[str, Any] | None:
    if found is None:
        return None
    picture = _picture(root / "reports" / "ranks.png")
    return {"picture": picture, "sentence": ranks.sentence(found), "warnings": ranks.warnings(found)}


def _claims(params: Params, every: Sequence[Results], root: Path) -> dict[str, Any] | None:
    """Every published gain beside what was measured, the claim a tick on the measured interval."""
    if not (root / published.FILE).is_file():
        return None
    found = published.load(root / published.FILE)
    verdicts = claims.judge_all(found, every, params)
    judged = claims.table(found, verdicts)
    rows = judged.data
    gains = [row["gain"] for row in rows if row["gain"] is not None]
    gains += [row[f"measured_{end}"] for row in rows for end in ("low", "high") if row["measured_n"] > 1]
    over = svg.scale([0, *gains])
    for row, texts in zip(rows, judged.cells, strict=True):
        interval = table.interval(row, "measured")
        colour, claimed = VERDICT_COLOURS.get(row["verdict"], "#7a7a7a"), row["gain"] if row["unit"] else None
        drawn = ""
        if row["measured_gain"] is not None or claimed is not None:
            drawn = svg.bar(row["measured_gain"], interval, None, over, colour, claimed)
        source = found.sources[row["source"]]
        row |= {
            "method": label(row["method"]),
            "why": texts["why"],
            "setting": texts["student from teacher"],
            "interval": interval,
            "comparable": row["verdict"] in (claims.REPRODUCED, claims.NOT_REPRODUCED, claims.UNDECIDED)
            and row["gap"] is not None,
        }
        row |= {"drawn": Markup(drawn), "cite": marked(source.cite), "where": marked(source.where)}
    return {
        "rows": rows,
        "sentences": claims.sentences(found, verdicts, every, params),
        "rules": [marked(rule) for rule in claims.RULE],
        "methods": list(dict.fromkeys(row["method"] for row in rows)),
        "datasets": sorted({row["dataset"] for row in rows if row["dataset"]}),
        "verdicts": [word for word in claims.VERDICTS if any(row["verdict"] == word for row in rows)],
        "axis": Markup(svg.axis(over)),
    }


def _number(value: float | None, form: str) -> str:
    """With a minus sign, which a hyphen is not, and none before a zero."""
    text = table.number(value, form)
    return (text.removeprefix("-") if not text.strip("-0.") else text).replace("-", "−")


def _between(interval: statistics.Interval | None) -> str:
    return table.between(interval).replace("-", "−")


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
