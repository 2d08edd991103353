"""The results as they stand in the README: tables, sentences in plain words, figures; all of it generated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines import files
from pipelines.config import PAPER, ConfigError
from pipelines.reports import figures, ranks, tables
from pipelines.reports.ranks import Ranks
from pipelines.reports.results import HEADLINE, SCORE, Gain, Results, Standing
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
    tested = [
        (f"{results.label(m)} on {results.benchmark}, {student}", standings[m])
        for results in every
        for student in results.students
        for standings in [results.standings(student, results.methods)]
        for m in results.tested(results.methods)
        if standings[m].gain.paired.n
    ]
    if not tested:
        return []

    def split(gains: Sequence[tuple[str, Gain]]) -> tuple[list[str], list[str]]:
        """Those above and those below, with their differences."""
        above, below = (
            [f"{name}: {_gain(gain)}" for name, gain in gains if gain.verdict == verdict]
            for verdict in ("gain", "loss")
        )
        return above, below

    above, below = split([(name, s.gain) for name, s in tested])
    total = f"{len(tested)} comparisons (method, benchmark, student)"
    found = [
        f"Does distillation help here? Of {total} with the undistilled student at equal steps, {len(above)} "
        f"are above it and {len(below)} below it by both 95 % intervals, each taken by itself"
        + "".join(f"; {word}: {'; '.join(own)}" for word, own in (("above", above), ("below", below)) if own)
        + "."
    ]
    if equal := [(name, s.equal) for name, s in tested if s.equal.paired.n]:
        above, below = split(equal)
        found.append(
            "And at equal compute? Against the student alone, trained longer and interpolated to the compute "
            f"of the method, {len(above)} of {len(equal)} are above it by both intervals, {len(below)} "
            f"below, {len(equal) - len(above) - len(below)} not told apart"
            + (f"; {len(tested) - len(equal)} more have no value." if len(equal) < len(tested) else ".")
        )
    parts = []
    for name, how in (("p_holm", "Holm's adjustment"), ("p_max", "the max-T test")):
        least = [f"{at}: {p:.2g}" for at, s in tested if (p := getattr(s, name)) < tables.ALPHA]
        listed = f" ({'; '.join(least)})" if least else ""
        parts.append(f"{len(least)} of {len(tested)} below {tables.ALPHA:g} by {how}{listed}")
    found.append(
        "How sure is that? Sign-flip tests, for the methods of a table together: " + "; ".join(parts) + "."
    )
    return found


def sentences(results: Results, student: str) -> list[str]:
    """Which methods are better than the undistilled student, which than longer training, and how sure that
    is."""
    every, reference = results.standings(student, results.methods), results.reference
    rows = [reference, *results.tested(results.methods)]
    standings = {m: every[m] for m in rows if m in every and every[m].scores}
    if not standings:
        return [f"No cell of {student} has finished yet."]
    found = [_best(results, student, standings)]
    others = {m: s for m, s in standings.items() if s.gain.paired.n}

    def listed(gains: dict[str, Gain], verdict: str) -> str:
        return ", ".join(
            f"{results.label(m)} {_gain(gain)}" for m, gain in gains.items() if gain.verdict == verdict
        )

    alone = ", each by itself" if len(others) > 1 else ""
    for verdict, text in (
        ("gain", f"Above {reference} by both 95 % intervals{alone}"),
        ("loss", f"Below {reference} by both 95 % intervals{alone}"),
        ("undecided", f"Not told apart from {reference}"),
    ):
        if named := listed({m: s.gain for m, s in others.items()}, verdict):
            found.append(f"{text}: {named}.")
    equal = {m: s.equal for m, s in others.items() if s.equal.paired.n}
    words = (("gain", "above"), ("loss", "below"), ("undecided", "not told apart"))
    parts = [f"{word}: {named}" for verdict, word in words if (named := listed(equal, verdict))]
    parts += [f"no value: {results.label(m)}, {s.why}" for m, s in others.items() if m not in equal and s.why]
    if equal:
        text = f"Against {reference} alone, trained longer and interpolated to each method's own compute"
        found.append(f"{text}, by both intervals: {'; '.join(parts)}.")
    if HEADLINE in others:
        means = sorted((results.mean(student, m) or 0.0 for m in standings), reverse=True)
        place = means.index(results.mean(student, HEADLINE) or 0.0) + 1
        gain = others[HEADLINE].gain
        found.append(
            f"{PAPER} is number {place} of {len(means)} by mean score: {PAPER} {_gain(gain)} "
            f"against {reference} over seeds, {between(gain.over_images)} over test images."
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
    near = [results.label(m) for m, s in standings.items() if s.place == "≈"]
    scores = results.mean(student, best)
    text = f"Best mean test mIoU of {student}: {results.label(best)}, {scores:.2f}"
    if len(standings) == 1:
        return f"{text}; no other method has a finished cell of today's settings."
    return text + (f"; not told apart from it: {', '.join(near)}." if near else "; all others are behind it.")


def _gain(gain: Gain) -> str:
    return f"{gain.paired.mean:+.2f} {between(gain.over_seeds)}"


def _benchmark(results: Results) -> str:
    folder = f"reports/{results.benchmark}"
    lines = [f"### {results.benchmark}", ""]
    lines += [f"> **Warning:** {escape_markdown(text)}\n" for text in tables.warnings(results)]
    columns = ["student", "method", "n", "test mIoU", "≈ best", f"Δ {results.reference}", "over seeds"]
    columns += ["p (Holm)", "p (max-T)", "over images", "Δ at equal compute"]
    columns += [f"compute (× {results.reference})", "status"]
    lines += ["| " + " | ".join(columns) + " |", "|---|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|---|"]
    for row in tables.comparison(results).data.to_dict("records"):
        cells = [
            row["student"],
            row["method"],
            str(row["n"]),
            plus_minus(row["miou_mean"], row["miou_sd"]),
            row["near_best"],
            tables.number(row["diff_mean"], "+.2f"),
            between(tables.interval(row, "over_seeds")),
            tables.number(row["p_holm"], ".2g"),
            tables.number(row["p_max_t"], ".2g"),
            between(tables.interval(row, "over_images")),
            tables.equal_text(row),
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
