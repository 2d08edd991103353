"""What README.md and docs/ say of the records, generated: the answer with its table, and the words for it."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

from pipelines import files
from pipelines.config import OFFICIAL, PAPER, ROOT, ConfigError, Params
from pipelines.reports import claims, tables
from pipelines.reports.results import HEADLINE, Gain, Results, Standing
from pipelines.reports.tables import between, escape_markdown
from pipelines.runs.tracking import metric_name

RESULTS = ("<!-- results:begin -->", "<!-- results:end -->")
PLANS = ("<!-- benchmarks:begin -->", "<!-- benchmarks:end -->")
RULES = ("<!-- claims:begin -->", "<!-- claims:end -->")
METHODS = ("<!-- methods:begin -->", "<!-- methods:end -->")
UNLEARNT = 1.0  # IoU in percent below which a class is not found at all
TABLES = ("comparison", "cost", "ablation", "per_class")
FIGURE = "compute"
ROWS = 8  # of the table in the README


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


def block(every: Sequence[Results], params: Params) -> str:
    """The answer in one sentence, eight rows and a figure: of the benchmark that the methods were tuned on,
    else of the first that has results."""
    wanted = params.tuning.benchmark
    named = [results for results in every if results.benchmark == wanted]
    if not every:
        return (
            f"The table is not finished: no student of `{wanted}` has been trained and committed yet, so "
            "there is no answer here so far."
        )
    results = (named or list(every))[0]
    students = results.students
    student = params.tuning.student if params.tuning.student in students else students[0]
    folder = f"reports/{results.benchmark}"
    lines = [escape_markdown(answer(results, student)), ""]
    lines += [f"> **Warning:** {escape_markdown(text)}\n" for text in tables.warnings(results)]
    found = tables.comparison(results)
    own = [row for row in found.rows if row[0] == student]
    shown = _chosen(results, student)
    kept = [i for i, name in enumerate(found.columns) if name != "student"]
    head = [found.columns[i] for i in kept]
    lines += ["| " + " | ".join(map(escape_markdown, head)) + " |"]
    lines += ["|" + "|".join("--:" if found.right[i] else "---" for i in kept) + "|"]
    order = {results.label(method): place for place, method in enumerate(shown)}
    for row in sorted((row for row in own if row[1] in order), key=lambda row: order[row[1]]):
        lines.append("| " + " | ".join(escape_markdown(row[i]) for i in kept) + " |")
    lines += [
        "",
        f"{len(order)} of {len(own)} rows, by mean score; all: [comparison]({folder}/comparison.md), "
        "[what the columns mean](docs/tables.md#comparison).",
        "",
        f"![gain against training compute on {results.benchmark}]({folder}/{FIGURE}.png)",
    ]
    return "\n".join(lines)


def _chosen(results: Results, student: str) -> list[str]:
    """The rows of the README, best first: the reference, the paper's method, the best of the others; and what
    has no score, where there is room."""
    means = {m: -1.0 if (mean := results.mean(student, m)) is None else mean for m in results.methods}
    order = sorted(results.methods, key=lambda m: -means[m])
    always = [m for m in (results.reference, HEADLINE) if m in order]
    others = [m for m in order if m not in always and not m.endswith(OFFICIAL)]
    chosen = {*always, *others[: ROWS - len(always)]}
    return [m for m in order if m in chosen]


def answer(results: Results, student: str) -> str:
    """Whether distillation helps on one benchmark and student, how sure that is, and whether all has run."""
    standings, reference = results.standings(student, results.methods), results.reference
    tested = {m: standings[m] for m in results.tested(results.methods) if standings[m].gain.paired.n}
    place = f"{results.benchmark} with {student}"
    lacking = sum(results.status(student, m) != "complete" for m in results.methods)
    rest = f" Not finished: {lacking} of {len(results.methods)} rows lack trainings." if lacking else ""
    if not tested:
        return f"On {place}, no method has finished beside {reference} yet.{rest}"
    seeds = " or ".join(str(n) for n in sorted({s.gain.paired.n for s in tested.values()}))
    above, equal = (
        sum(gain.verdict == "gain" for gain in gains)
        for gains in ([s.gain for s in tested.values()], [s.equal for s in tested.values()])
    )
    joint = sum(
        s.p_max is not None and s.p_max < tables.ALPHA and (s.gain.paired.mean or 0.0) > 0
        for s in tested.values()
    )
    best = max(tested, key=lambda m: results.mean(student, m) or 0.0)
    return (
        f"Does distillation help? On {place} ({seeds} seeds), {above} of {len(tested)} methods are above the "
        f"student trained alone for the same steps, and {equal} above it at the same compute, by both 95 % "
        f"intervals (over seeds and over images); {joint} are above it by the max-T test, which allows for "
        f"all methods together. The best is {results.label(best)}, {_gain(tested[best].gain)}.{rest}"
    )


def rules() -> str:
    """How a published claim is judged."""
    return "\n".join(f"- {rule}" for rule in claims.RULE)


def methods(params: Params, root: Path = ROOT) -> str:
    """Every method of params.yaml by the words of its own file."""
    lines = ["| method | what it does | source | authors' weights |", "|---|---|---|---|"]
    for name in params.methods:
        file = Path("baselines") / f"{name}.py"
        text = ast.get_docstring(ast.parse((root / file).read_text(encoding="utf-8"))) or ""
        first = " ".join(text.split("\n\n")[0].split())
        source = re.search(r"Source: (.*?\([^()]*\d{4}[^()]*\))", " ".join(text.split()))
        own = params.official.get(name, {})
        weights = ", ".join(f"{key.removeprefix('weight_')} {value:g}" for key, value in own.items())
        cells = (
            (first.partition(": ")[2] or first).removesuffix("."),
            source[1] if source else "–",
            weights or "–",
        )
        lines.append(f"| [{name}](../{file}) | " + " | ".join(map(escape_markdown, cells)) + " |")
    return "\n".join(lines)


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
