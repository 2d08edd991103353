"""The results as they stand in the README: tables, sentences in plain words, figures; all of it generated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines import files
from pipelines.config import PAPER, ConfigError
from pipelines.reports import figures, ranks, tables
from pipelines.reports.ranks import Ranks
from pipelines.reports.results import COMPUTE, HEADLINE, MATCHED, REFERENCE, SCORE, Results, Standing, label
from pipelines.reports.statistics import Interval
from pipelines.reports.tables import between, escape_markdown, plus_minus
from pipelines.runs.tracking import metric_name

RESULTS = ("<!-- results:begin -->", "<!-- results:end -->")
PLANS = ("<!-- benchmarks:begin -->", "<!-- benchmarks:end -->")
UNLEARNT = 1.0  # IoU in percent below which a class is not found at all
TABLES = ("comparison", "cost", "ablation", "per_class")


def update(path: Path, markers: tuple[str, str], text: str) -> bool:
    """Put ``text`` between two markers of a README. Where there are none: change nothing, return False."""
    try:
        content = path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is damaged, it is no UTF-8 text: restore it with git.") from None
    begin, end = (content.find(marker) for marker in markers)
    if begin < 0 or end < begin:
        return False
    new = content[: begin + len(markers[0])] + "\n" + text + "\n" + content[end:]
    if new != content:
        files.write_bytes(path, new.encode())
    return True


def block(every: Sequence[Results], ranked: Ranks | None, claimed: Sequence[str], rounding: str = "") -> str:
    """The whole of the results; ``claimed`` are the sentences about what was published, ``rounding`` is what
    rounding alone did to scores."""
    parts = [_benchmark(results) for results in every]
    if (short := in_short(every)) and rounding:
        short.append(
            "And rounding? Sums taken in another order (the mode `strict`), all else the same, move the test "
            f"mIoU of a cell by {rounding}: see reports/spread.md. The spread over seeds holds this too."
        )
    if short:
        parts.insert(0, "\n".join(["### In short", "", *(f"- {escape_markdown(text)}" for text in short)]))
    if ranked:
        lines = ["### All benchmarks and students", "", escape_markdown(ranks.sentence(ranked)), ""]
        lines += [f"> **Warning:** {escape_markdown(text)}\n" for text in ranks.warnings(ranked)]
        lines += ["Table: [ranks](reports/ranks.md).", "", "![mean ranks](reports/ranks.png)"]
        parts.append("\n".join(lines))
    if claimed:
        lines = ["### Published against measured", "", escape_markdown(" ".join(claimed)), ""]
        lines += ["Every claim, its source, the rule and the verdict: [claims](reports/claims.md)."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def in_short(every: Sequence[Results]) -> list[str]:
    """What holds over all benchmarks and students, in plain words."""
    blocks = {
        (results.benchmark, student): (results, {m: s for m, s in standings.items() if s.gain.n})
        for results in every
        for student in results.students
        if (standings := results.standings(student, results.methods))
    }
    gains = [(place, m, s) for place, (_, own) in blocks.items() for m, s in own.items()]
    if not gains:
        return []
    distilled = [(place, m, s) for place, m, s in gains if m != MATCHED]

    def listed(found: Sequence[tuple[tuple[str, str], str, str]]) -> str:
        return "; ".join(f"{label(m)} on {', '.join(place)}: {text}" for place, m, text in found)

    above = [
        (place, m, _gain(m, s).removeprefix(f"{label(m)} "))
        for place, m, s in distilled
        if s.verdict == "gain"
    ]
    below = [
        (place, m, _gain(m, s).removeprefix(f"{label(m)} "))
        for place, m, s in distilled
        if s.verdict == "loss"
    ]
    total = f"{len(distilled)} comparisons (method, benchmark, student)"
    found = [
        f"Does distillation help here? Of {total} with the undistilled student at equal steps, {len(above)} "
        f"are above it and {len(below)} below it by both 95 % intervals, each taken by itself"
        + "".join(f"; {word}: {listed(own)}" for word, own in (("above", above), ("below", below)) if own)
        + "."
    ]
    matched = [(place, m, s) for place, m, s in distilled if s.over_matched.n]
    if matched:
        sides = [_side(s.matched_over_seeds) for _, _, s in matched]
        found.append(
            f"And at equal compute? Against {MATCHED}, the student alone trained longer, {sides.count(1)} of "
            f"{len(matched)} are better over seeds, {sides.count(-1)} worse, {sides.count(0)} not told apart."
        )
    tested = [(place, m, s.p_holm) for place, m, s in gains if s.p_holm is not None]
    below_alpha = [(place, m, f"{p:.2g}") for place, m, p in tested if p < tables.ALPHA]
    found.append(
        f"How sure is that? After Holm's adjustment for the comparisons of a table, {len(below_alpha)} of "
        f"{len(tested)} sign-flip tests are below {tables.ALPHA:g}"
        + (
            f" ({listed(below_alpha)})"
            if below_alpha
            else ": with these numbers of seeds all of it is exploratory"
        )
        + "."
    )
    return found


def sentences(results: Results, student: str) -> list[str]:
    """Who is better than the undistilled student, who than longer training, and how sure that is."""
    standings = {m: s for m, s in results.standings(student, results.methods).items() if s.scores}
    if not standings:
        return [f"No cell of {student} has finished yet."]
    found = [_best(results, student, standings)]
    others = {m: s for m, s in standings.items() if m != REFERENCE and s.gain.n}
    alone = ", each by itself" if len(others) > 1 else ""
    for verdict, text in (
        ("gain", f"Above {REFERENCE} by both 95 % intervals{alone}"),
        ("loss", f"Below {REFERENCE} by both 95 % intervals{alone}"),
        ("undecided", f"Not told apart from {REFERENCE}"),
    ):
        if named := [_gain(m, s) for m, s in others.items() if s.verdict == verdict]:
            found.append(f"{text}: {', '.join(named)}.")
    found += _at_matched_compute(results, student, standings)
    if HEADLINE in others:
        means = sorted((results.mean(student, m) or 0.0 for m in standings), reverse=True)
        place = means.index(results.mean(student, HEADLINE) or 0.0) + 1
        found.append(
            f"{PAPER} is number {place} of {len(means)} by mean score: {_gain(HEADLINE, others[HEADLINE])} "
            f"against {REFERENCE} over seeds, {between(others[HEADLINE].over_images)} over test images."
        )
    n = min(len(s.scores) for s in standings.values())
    found.append(f"For {tables.power(n)}.")
    if tested := tables.significance(results, student, results.methods):
        found.append(f"{tested[0].upper()}{tested[1:]}.")
    return found + _unlearnt(results, student, list(standings))


def _unlearnt(results: Results, student: str, methods: Sequence[str]) -> list[str]:
    """The classes that no method finds: mIoU moves on the others alone."""
    names = results.classes()
    lost = []
    for name in names:
        scores = [results.mean(student, m, f"test/iou/{metric_name(name)}") for m in methods]
        known = [score for score in scores if score is not None]
        if known and max(known) < UNLEARNT:
            lost.append(name)
    if not lost:
        return []
    return [
        f"{len(lost)} of {len(names)} classes have a mean IoU below {UNLEARNT:g} % with every method "
        f"({', '.join(lost)}): the students are far from the end of their training, and mIoU moves on the "
        "other classes."
    ]


def _best(results: Results, student: str, standings: dict[str, Standing]) -> str:
    best = next(m for m, s in standings.items() if s.place == "best")
    near = [label(m) for m, s in standings.items() if s.place == "≈"]
    scores = results.mean(student, best)
    text = f"Best mean test mIoU of {student}: {label(best)}, {scores:.2f}"
    if len(standings) == 1:
        return f"{text}; no other method has a finished cell of today's settings."
    return text + (f"; not told apart from it: {', '.join(near)}." if near else "; all others are behind it.")


def _at_matched_compute(results: Results, student: str, standings: dict[str, Standing]) -> list[str]:
    """Against the student alone with as much compute as the dearest method."""
    compared = {m: s for m, s in standings.items() if s.over_matched.n}
    if not compared:
        return []
    above = [m for m, s in compared.items() if _side(s.matched_over_seeds) > 0]
    below = [m for m, s in compared.items() if _side(s.matched_over_seeds) < 0]
    rest = [m for m in compared if m not in above + below]

    def listed(methods: list[str]) -> str:
        return ", ".join(
            f"{label(m)} {compared[m].over_matched.mean:+.2f} {between(compared[m].matched_over_seeds)}"
            for m in methods
        )

    own, plain = results.mean(student, MATCHED, COMPUTE), results.mean(student, REFERENCE, COMPUTE)
    times = f" ({own / plain:.2f} times that of {REFERENCE})" if own and plain else ""
    text = f"Against {MATCHED}, the student alone with the training compute of the dearest method{times}, "
    parts = [
        f"{word}: {listed(methods)}"
        for word, methods in (("better", above), ("worse", below), ("not told apart over seeds", rest))
        if methods
    ]
    return [text + "; ".join(parts) + "."]


def _side(interval: Interval | None) -> int:
    """1 above 0, -1 below, 0 where the interval holds 0 or there is none."""
    if interval is None or not interval.excludes_zero:
        return 0
    return 1 if interval.low > 0 else -1


def _gain(method: str, standing: Standing) -> str:
    return f"{label(method)} {standing.gain.mean:+.2f} {between(standing.over_seeds)}"


def _benchmark(results: Results) -> str:
    folder = f"reports/{results.benchmark}"
    lines = [f"### {results.benchmark}", ""]
    lines += [f"> **Warning:** {escape_markdown(text)}\n" for text in tables.warnings(results)]
    columns = ["student", "method", "n", "test mIoU", "≈ best", f"Δ {REFERENCE}", "over seeds", "p (Holm)"]
    columns += ["over images", f"Δ {MATCHED}", f"compute (× {REFERENCE})", "status"]
    lines += ["| " + " | ".join(columns) + " |", "|---|---|--:|--:|---|--:|--:|--:|--:|--:|--:|---|"]
    for row in tables.comparison(results).data.to_dict("records"):
        cells = [
            row["student"],
            row["method"],
            str(row["n"]),
            plus_minus(row["miou_mean"], row["miou_sd"]),
            row["near_best"],
            tables.number(row["diff_none_mean"], "+.2f"),
            between(tables.interval(row, "over_seeds")),
            tables.number(row["p_holm"], ".2g"),
            between(tables.interval(row, "over_images")),
            tables.number(row["diff_matched_mean"], "+.2f"),
            tables.number(row["compute_ratio"], ".2f"),
            row["status"],
        ]
        lines.append("| " + " | ".join(escape_markdown(cell) for cell in cells) + " |")
    for student in results.students:
        lines += ["", f"**{escape_markdown(student)}**", ""]
        lines += [f"- {escape_markdown(text)}" for text in sentences(results, student)]
    teacher = results.teacher(SCORE)
    leads = {s: lead for s in results.students if (lead := results.lead(s)) is not None}
    if teacher is not None and leads:
        named = ", ".join(f"{student} {lead:+.2f}" for student, lead in leads.items())
        text = (
            f"The teacher scores {teacher:.2f}; its lead over the undistilled student on validation: {named}."
        )
        lines += ["", escape_markdown(text)]
    links = ", ".join(f"[{name}]({folder}/{name}.md)" for name in TABLES)
    lines += ["", f"All tables: {links}.", ""]
    for name in figures.NAMES:
        lines.append(f"![{results.benchmark}: {name.replace('_', ' ')}]({folder}/{name}.png)")
    return "\n".join(lines)
