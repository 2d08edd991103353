"""Does distillation help? The answer for a student, computed: sentences for the page, and shorter ones
for the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.config import TEACHER
from pipelines.reports import conditions, statistics
from pipelines.reports.results import COMPUTE, FEWEST, SCORE, STEP, Results, Standing
from pipelines.reports.table import between, number

PARAMETERS = "student/parameters"


def sentences(results: Results, student: str) -> list[str]:
    """Whether distillation helps a student here, how sure that is, and on what, in plain sentences."""
    known = _tested(results, student)
    if not known:
        return [f"Not known yet: no seed of {student} has finished with a method and without one."]
    n, seeds = len(known), max(s.gain.paired.n for s in known.values())

    def listed(found: Sequence[str]) -> str:
        return named([results.label(m) for m in found])

    def those(verdict: str, gain: str = "gain") -> list[str]:
        found = [m for m, s in known.items() if getattr(s, gain).verdict == verdict]
        return sorted(found, key=lambda m: -(getattr(known[m], gain).paired.mean or 0))

    best = max(known, key=lambda m: known[m].gain.paired.mean or 0)
    lead, val = results.lead(student, metric=SCORE), results.lead(student)
    sure = [m for m in known if _sure(known[m]) > 0]
    highest = (
        f"The highest {'mean ' * (seeds > 1)}gain is {known[best].gain.paired.mean or 0:+.2f} points of test "
        f"mIoU ({results.label(best)})"
        + ("." if lead is None else f"; the teacher's own lead over the student alone is {lead:+.2f}")
        + (f" ({val:+.2f} on validation)." * (lead is not None) if val is not None else "")
    )
    schedule = [text for text in [conditions.schedule(results, student)] if text]
    if seeds == 1:
        first = "Not known yet: one seed cannot say how far another would move a score."
        return [first, highest, *_longer(results, student), *schedule]
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
        _at_equal_compute(known, equal, behind, results, student),
        f"How sure: clearly means that the 95 % intervals of the gain exclude 0: over {seeds} seeds, over "
        f"{results.units}, and over both at once.",
    ]
    if (least := statistics.smallest_p(seeds)) > conditions.ALPHA:
        found.append(
            f"Exploratory: with {seeds} seeds the width of an interval is itself a matter of chance, and so "
            "are the verdicts; no method could pass a sign-flip test at 5 % (smallest possible p: "
            f"{least:.2g}; one test needs {statistics.SEEDS_FOR_SIGNIFICANCE} seeds, {n} with Holm's "
            f"correction need {statistics.seeds_needed(n, conditions.ALPHA)})."
        )
    else:
        found.append(
            f"The intervals are not corrected for testing {n} method{'s' * (n > 1)}; with that correction "
            f"(max-T, 5 %), {len(sure)} of {n} {'is' if len(sure) == 1 else 'are'} "
            f"better{': ' * bool(sure)}{listed(sure)}."
        )
    if len(results.blocks) < FEWEST:
        found.append(f"With {results.units}, fewer than {FEWEST}, no method is called better or worse.")
    if worse and n > 1:
        found.append(f"Worse than the student alone, with the loss weights used here: {listed(worse)}.")
    if single:
        found.append(f"Not known, with one seed each: {listed(single)}.")
    return [*found, *_longer(results, student), highest, *schedule]


def _at_equal_compute(
    known: Mapping[str, Standing],
    better: Sequence[str],
    worse: Sequence[str],
    results: Results,
    student: str,
) -> str:
    """The verdicts against the student alone, trained longer."""
    decided = [m for m, s in known.items() if s.equal.paired.n > 1]
    if not decided:
        return (
            "At equal training compute: not known, because the student alone has not been trained longer "
            "with two seeds or more."
        )
    names = named([results.label(m) for m in better])
    uncounted = f" {text}" if (text := _uncounted(results, [student])) else ""
    lost = named([results.label(m) for m in known if m not in decided])
    return (
        f"At equal training compute, against the student alone trained longer, {len(better) or 'none'} of "
        f"{len(decided)} {'is' if len(better) < 2 else 'are'} clearly better{': ' * bool(names)}{names}; "
        f"{len(worse) or 'none'} clearly worse.{f' Not known for {lost}.' * bool(lost)}{uncounted}"
    )


def _uncounted(results: Results, students: Sequence[str], again: bool = False) -> str:
    """What the compute of a method does not contain, in one sentence; nothing without a record."""
    taught, parts = results.teacher(COMPUTE), []
    for student in students:
        alone = results.mean(student, results.reference, COMPUTE)
        if taught is not None and alone is not None:
            parts.append(f"{taught / alone:.1f} times that of {student} alone")
    if not parts:
        return ""
    if again:
        return f"The teacher's training, not in the compute of a method, takes {', '.join(parts)}."
    return (
        "A method's compute has the teacher's forward passes in it, but neither the teacher's training "
        f"({', '.join(parts)}) nor the search for its loss weights."
    )


def _time(results: Results, student: str, methods: Sequence[str]) -> list[str]:
    """How much more time the methods take for a step than the student alone, beside their compute; nothing
    where it is not more than that."""
    took, counted = (
        [ratio for m in methods if (ratio := results.ratio(student, m, metric)) is not None]
        for metric in (STEP, COMPUTE)
    )
    if (statistics.median(took) or 0.0) <= (statistics.median(counted) or 0.0):
        return []
    time, compute = (f"{min(own):.2f} to {max(own):.2f}" for own in (took, counted))
    return [f"with {student} {time} times as long as alone, with {compute} times the FLOPs"]


def _longest(results: Results, student: str) -> str:
    """The student alone as it was trained longest; nothing where it was not."""
    trained = (m for m in results.controls if results.by_seed(student, m))
    return max(trained, key=lambda m: results.controls[m], default="")


def _longer(results: Results, student: str) -> list[str]:
    """What the student alone reaches when it trains longer, beside the methods, in one sentence."""
    means = [results.mean(student, m) or 0 for m in _tested(results, student)]
    parts, rising, lead = [], False, None
    for control, factor in sorted(results.controls.items(), key=lambda pair: pair[1]):
        if (own := results.mean(student, control)) is not None:
            above = sum(own > mean for mean in means)
            parts.append(f"{factor:g} times the steps {own:.2f} (above {above} of {len(means)} methods)")
            rising = results.gain(student, control).verdict == "gain"
            lead = results.lead(student, control, SCORE)
    if not parts:
        return []
    plain = results.mean(student, results.reference) or 0
    end = " It has not converged, so this says nothing about a student that has." if rising else ""
    end += "" if lead is None else f" The teacher leads the longest of these trainings by {lead:+.2f}."
    return [f"The student alone scores {plain:.2f}; trained for {named(parts)}, by the means.{end}"]


def row(results: Results, student: str) -> dict[str, str]:
    """The answer for a student as a row of a table."""
    alone, tested = results.mean(student, results.reference), _tested(results, student)
    several = {m: stand for m, stand in tested.items() if stand.gain.paired.n > 1}  # one seed decides nothing

    def counted(which: str) -> str:
        words = [word for stand in several.values() if (word := getattr(stand, which).verdict)]
        return f"{words.count('gain')} / {words.count('loss')} of {len(words)}" if words else "–"

    best = max(several, key=lambda m: several[m].gain.paired.mean or 0.0, default=None)
    gain = several[best].gain if best else None
    start, steps = conditions.begins(results, student)
    longest = _longest(results, student)
    more = f" → {results.mean(student, longest):.2f} (×{results.controls[longest]:g})" if longest else ""
    return {
        "student": f"{student}, {start} weights, {steps} steps",
        "seeds": " or ".join(str(n) for n in sorted({own.gain.paired.n for own in tested.values()})) or "–",
        "better / worse, equal steps": counted("gain"),
        "better / worse, equal compute": counted("equal"),
        "largest mean gain": (
            f"{results.label(best)} {gain.paired.mean:+.2f} {between(gain.over_seeds)}"
            if best and gain
            else "–"
        ),
        "student alone → longer": number(alone, ".2f") + more,
        "teacher": number(results.teacher(SCORE), ".2f"),
    }


def lacking(results: Results, student: str) -> str:
    """Whether all that was asked for has run; nothing where it has."""
    rows, seeds = results.rows(student), {*results.seeds.get(student, ())}
    short = sum(not results.by_seed(student, m).keys() >= seeds for m in rows)
    place = f"{results.benchmark}, {student}"
    return f"Not finished: on {place}, {short} of {len(rows)} rows lack trainings." if short else ""


def headline(every: Sequence[tuple[Results, str]]) -> str:
    """Does distillation help? In a sentence for students that start from ImageNet weights and one for those
    that start from random ones, and what longer training does instead."""
    found: dict[str, list[str]] = {}
    equal, families = list[str](), list[dict[str, Standing]]()
    ahead, most = 0, set[float]()
    for results, student in every:
        several = {m: s for m, s in _tested(results, student).items() if s.gain.paired.n > 1}
        if not several:
            continue
        better = sum(stand.gain.verdict == "gain" for stand in several.values())
        start = conditions.begins(results, student)[0]
        seeds = max(stand.gain.paired.n for stand in several.values())
        few = ", exploratory" * (seeds < statistics.SEEDS_FOR_SIGNIFICANCE)
        found.setdefault(start, []).append(
            f"{better} of {len(several)} methods ({student}, {results.benchmark}{few})"
        )
        families.append(several)
        known = {f: own for m, f in results.controls.items() if (own := results.mean(student, m)) is not None}
        if known:
            most.add(max(known))
            ahead += max(known.values()) > max(results.mean(student, m) or 0.0 for m in several)
            words = [word for stand in several.values() if (word := stand.equal.verdict)]
            equal.append(f"{words.count('gain')} of {len(words)}")
    if not found:
        return "Not known yet: no student has finished with a method and without one, with two seeds or more."
    parts = [f"{named(own)} where the student starts from {start} weights" for start, own in found.items()]
    text = f"Better than the student alone at equal steps are {'; '.join(parts)}."
    shared = [m for m in families[0] if all(m in own for own in families)]
    if shared and len(shared) < max(map(len, families)):
        counts = [str(sum(own[m].gain.verdict == "gain" for m in shared)) for own in families]
        text += f" Of the {len(shared)} methods that all of these students have, it is {named(counts)}."
    if not equal:
        return text
    times = " or ".join(f"{factor:g}" for factor in sorted(most))
    return (
        f"{text} Trained for {times} times the steps, the student alone ends above every method, by the "
        f"means, in {ahead} of {len(equal)} case{'s' * (len(equal) > 1)}; trained for as many FLOPs as the "
        f"method, it is clearly below {named(equal)}."
    )


def caveats(results: Results, students: Sequence[str], again: bool = False) -> list[str]:
    """How sure the answers for ``students`` are, and what they do not say: sentences; ``again`` without what
    has been said of another benchmark."""
    joint, few, rising, larger = list[str](), list[str](), list[str](), list[str]()
    spent, ahead = list[str](), list[str]()
    taught, pretrained = results.teacher(PARAMETERS), conditions.begins(results, TEACHER)[0]
    for student in students:
        tested = _tested(results, student)
        if not any(stand.gain.paired.n > 1 for stand in tested.values()):
            continue
        least = statistics.smallest_p(max(stand.gain.paired.n for stand in tested.values()))
        if least > conditions.ALPHA:
            few.append(
                f"With {student} this is exploratory: with so few seeds no sign-flip test could reach "
                f"p < {conditions.ALPHA:g} (smallest possible: {least:.2g})."
            )
        else:
            sure = [*map(_sure, tested.values())]
            joint.append(f"{sure.count(1)} / {sure.count(-1)} of {len(sure)} with {student}")
        if any(results.gain(student, longer).verdict == "gain" for longer in results.controls):
            rising.append(student)
        spent += _time(results, student, [*tested])
        lead, longest = results.lead(student, metric=SCORE), _longest(results, student)
        left = results.lead(student, longest, SCORE) if longest else None
        if lead is not None and left is not None and left < conditions.LEAD <= lead:
            ahead.append(
                f"On test the teacher leads {student} alone by {lead:+.2f}, and "
                f"{results.label(longest)} by {left:+.2f}: most of its lead is what longer training gives."
            )
        size = results.mean(student, results.reference, PARAMETERS)
        start = conditions.begins(results, student)[0]
        if taught and size and size > taught and start != pretrained:
            larger.append(f"{student} ({size / 1e6:.1f} M, from {start} weights)")
    if not (joint or few):
        return []
    found = (
        []
        if again
        else [
            f"Better and worse mean that the 95 % intervals over seeds, over {results.units} and over both "
            "at once exclude 0, without correction for the number of methods. Another training of the "
            "teacher is in none of them: each benchmark has one."
        ]
    )
    if joint:
        found.append(
            "By the max-T test, which corrects for testing them all, better / worse at equal steps are "
            f"{named(joint)}."
        )
    uncounted = _uncounted(results, students, again)
    if spent:
        uncounted += f" By the measured time, which is rough, a step takes longer: {'; '.join(spent)}."
    found += [*few, uncounted, *ahead]
    if larger and taught:
        found.append(
            f"The teacher ({taught / 1e6:.1f} M parameters, from {pretrained} weights) is "
            f"smaller than {named(larger)}: what it passes on may be its pretraining, not capacity."
        )
    if results.trials and not again:
        middle = sum(choice.middle for choice in results.choices.values())
        found.append(
            f"The loss weights come from {conditions.trials(results)}; {middle} of {len(results.choices)} "
            f"kept the middle of their ranges. Worse means worse with these.{conditions.agreement(results)}"
        )
    if rising:
        means = ": a gain here may be faster learning, and says nothing about a student that has converged"
        found.append(
            f"Trained longer, {named(rising)} alone still {'gain' if len(rising) > 1 else 'gains'}"
            f"{'' if again else means}."
        )
    return list(filter(None, found))


def _tested(results: Results, student: str) -> dict[str, Standing]:
    """The methods that have a gain over the student alone."""
    standings = results.standings(student, results.methods)
    return {m: standings[m] for m in results.tested(results.methods) if standings[m].gain.paired.n}


def _sure(stand: Standing) -> int:
    """1 if better, -1 if worse by the test that allows for all methods together, else 0."""
    if stand.p_max is None or stand.p_max >= conditions.ALPHA:
        return 0
    return 1 if (stand.gain.paired.mean or 0) > 0 else -1


def named(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
