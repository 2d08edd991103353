"""Published against measured: what papers report (``reports/claims.yaml``) beside what the run records say.

A verdict is computed from the claim, params.yaml and the finished cells, never typed. The rule is ``RULE``,
printed with the tables. Cells that the tables leave out do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import config, files
from pipelines.config import PAPER, Network, Params
from pipelines.reports import orders, statistics
from pipelines.reports.published import Architecture, Claim, Claims
from pipelines.reports.results import HEADLINE, SCORE, Gain, Results, label
from pipelines.reports.table import Table, ends, escape_markdown, rounded

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
NOT_COMPARABLE, NOT_RUN = "not comparable", "not run"
GAIN, LOSS, UNDECIDED = "gain", "loss", "undecided"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, UNDECIDED, NOT_COMPARABLE, NOT_RUN)
MOST = 8  # cases that a sentence lists

SPLIT = SCORE.split("/")[0]  # the split that the measured scores come from
COST = {"student/parameters": "parameters", "student/flops": "FLOPs"}  # of one forward pass of the student

RULE = [
    f"**{NOT_COMPARABLE}**: no benchmark here matches the published setting, or the source leaves out the "
    "data set, the unit of the gain or the student's baseline. What must match, where the source states it: "
    "student, teacher, image size, crop, batch size, steps, learning rate, weight decay, ImageNet weights "
    "of the student, split, loss. What need not match: loss weights, temperatures, the checkpoint (papers "
    "mostly report the best on validation, this suite the last), and the training images that it holds out "
    "where the published validation split is its test split. Not compared, because few sources state them: "
    "optimiser, learning-rate schedule, augmentation, and how the teacher was trained. What the source does "
    "not state is listed. The differences named are those of the benchmark that was measured, else of the "
    "closest one.",
    f"**{NOT_RUN}**: a benchmark of params.yaml is comparable, but there is no seed for which both the "
    "method and the student alone have finished.",
    f"**{REPRODUCED}**: the gain over the student alone, paired by seed, is clear (its 95 % intervals over "
    "seeds, over images and over both at once lie above 0), and the upper end of the one over seeds reaches "
    "the claimed gain (for a claimed loss: below 0, and the lower end).",
    f"**{UNDECIDED}**: fewer than two seeds, an interval over seeds that contains 0 and the claim, or one "
    "over images, or over both, that contains 0 or could not be had.",
    f"**{NOT_REPRODUCED}**: every other outcome: clearly less than the claim or the opposite of it, or an "
    "interval that contains 0 and not the claim.",
    f"A claim of unchanged inference cost is **{REPRODUCED}** if the deployed students of the method and the "
    "student alone have equal numbers of parameters and FLOPs in the records of all finished cells.",
    "Cells trained with other settings, data or another teacher than today's do not count.",
]


@dataclass(frozen=True)
class Measured:
    """The gain of a method over the student alone, in points of mIoU, paired by seed."""

    benchmark: str
    student: str
    gain: Gain
    alone: float  # mIoU of the student alone

    @property
    def n(self) -> int:
        return self.gain.paired.n

    @property
    def mean(self) -> float:
        return self.gain.paired.mean or 0.0

    @property
    def interval(self) -> statistics.Interval | None:
        """Over seeds."""
        return self.gain.over_seeds

    @property
    def direction(self) -> str:
        """``gain`` or ``loss`` where it is clear, else ``undecided``."""
        return self.gain.verdict or UNDECIDED


@dataclass(frozen=True)
class Verdict:
    """A word of ``VERDICTS``, why, what the source left open, and the closest measurement."""

    word: str
    reasons: list[str]
    unstated: list[str] = field(default_factory=list)
    setting: tuple[str, str] | None = None  # the benchmark and student that the reasons are about
    measured: Measured | None = None
    gap: float | None = None  # measured - claimed, in points


@dataclass(frozen=True)
class Direction:
    """The published gains of a method beside one measurement, if there is one."""

    method: str
    claims: list[Claim]
    measured: Measured | None

    @property
    def word(self) -> str:
        return NOT_RUN if self.measured is None else self.measured.direction


def judge(claim: Claim, claims: Claims, every: Sequence[Results], params: Params) -> Verdict:
    """Whether a claim holds here, by ``RULE``; ``every`` holds the results of the benchmarks with records."""
    if claim.kind == "cost":
        return _judge_cost(claim, every, params)
    settings = {
        (benchmark, student): _differences(claim, claims, params, benchmark, student)
        for benchmark, own in params.benchmarks.items()
        if claim.dataset in (None, own.data.get("dataset"))
        for student in params.students
    }

    def distance(setting: tuple[str, str]) -> tuple[bool, int]:
        return "student" in settings[setting], len(settings[setting])

    measurements = {
        setting: found
        for found in _measurements(claim.method, every)  # where several are as close: the one with most seeds
        if (setting := (found.benchmark, found.student)) in settings
    }
    nearest = min(measurements, key=lambda s: (distance(s), -measurements[s].n), default=None)
    measured = None if nearest is None else measurements[nearest]
    gap = None
    if measured is not None and claim.unit is not None and claim.claimed is not None:
        gap = measured.mean - claim.claimed

    def verdict(word: str, reasons: list[str], setting: tuple[str, str] | None) -> Verdict:
        return Verdict(word, reasons, _unstated(claim, claims, params), setting, measured, gap)

    stated = {
        "data set": claim.dataset,
        "unit of the gain": claim.unit,
        "score" if claim.score is None else "baseline": claim.claimed,
    }
    if lacks := [f"{name} not stated" for name, value in stated.items() if value is None]:
        return verdict(NOT_COMPARABLE, lacks, None)
    if not settings:
        return verdict(NOT_COMPARABLE, [f"no benchmark with the data set {claim.dataset}"], None)
    closest = min(settings, key=distance)
    if settings[closest]:
        shown = nearest or closest
        return verdict(NOT_COMPARABLE, list(settings[shown].values()), shown)
    if measured is None or nearest is None or settings[nearest]:
        missing = f"no seed with finished cells of both {claim.method} and {params.suite.reference}"
        return verdict(NOT_RUN, [missing], closest)
    word, reason = _outcome(measured, claim.claimed or 0.0)
    return verdict(word, [reason], nearest)


def judge_all(claims: Claims, every: Sequence[Results], params: Params) -> dict[str, Verdict]:
    """The verdict of every claim, by its id."""
    return {claim.id: judge(claim, claims, every, params) for claim in claims.claims}


def table(claims: Claims, verdicts: Mapping[str, Verdict]) -> Table:
    """Every claim with its verdict and the closest measurement."""
    data, text = [], []
    for claim in claims.claims:
        verdict = verdicts[claim.id]
        measured = verdict.measured
        row: dict[str, Any] = claim.model_dump(exclude={"gain", "note", "terms"})
        row["terms"] = "+".join(claim.terms or [])
        row["gain"] = claim.claimed
        row |= {
            "verdict": verdict.word,
            "reasons": "; ".join(verdict.reasons),
            "reasons_benchmark": verdict.setting[0] if verdict.setting else None,
            "reasons_student": verdict.setting[1] if verdict.setting else None,
            "not_stated": "; ".join(verdict.unstated),
            "measured_benchmark": measured.benchmark if measured else None,
            "measured_student": measured.student if measured else None,
            "measured_n": measured.n if measured else 0,
            "measured_gain": measured.mean if measured else None,
            **ends("measured", measured.interval if measured else None),
            "gap": verdict.gap,
            "note": claim.note,
        }
        data.append(rounded(row))
        where = f"{claim.dataset or 'data set not stated'}{f' ({claim.split})' if claim.split else ''}"
        teacher = f" from {claim.teacher}" if claim.teacher else ", teacher not stated"
        name = f" as {claim.published_as}" if claim.published_as else ""
        text.append(
            {
                "claim": claim.id,
                "method": f"{label(claim.method)}{name}",
                "data set (split)": where,
                "student from teacher": (claim.student or "student not stated") + teacher,
                "claimed gain (source)": f"{_claimed_text(claim)} ({claim.source})",
                "measured gain": f"{_measured_text(measured)}, {_place(measured)}" if measured else "–",
                "verdict": verdict.word,
                "why": _why(verdict),
            }
        )
    words = [row["verdict"] for row in data]
    gains = sum(claim.kind == "gain" for claim in claims.claims)
    notes = [
        f"{len(words)} claims, {gains} of accuracy and {len(words) - gains} of cost: "
        + ", ".join(f"{words.count(word)} {word}" for word in VERDICTS)
        + ".",
        "measured gain: of the comparable benchmark, else of the closest one, and where several are as close "
        "of that with most seeds; with the 95 % t-interval over n paired seeds.",
    ]
    return Table("claims", "claims", data, text, notes)


def directions(claims: Claims, every: Sequence[Results]) -> Table:
    """Per method, benchmark and student: the published gains, the measured gain and its direction."""
    text = []
    for item in _directions(claims, every):
        measured = item.measured
        interval = None if measured is None else measured.interval
        stated = [claim for claim in item.claims if claim.claimed is not None] or item.claims
        sources = {claim.source for claim in stated}
        text.append(
            {
                "method": label(item.method),
                "published gain": _published_text(item),
                "claims (sources)": f"{len(stated)} ({len(sources)})",
                "measured on": _place(measured) if measured else "–",
                "n": str(measured.n if measured else 0),
                "measured gain": f"{measured.mean:+.2f}" if measured else "–",
                "95 % t-interval": f"{interval.low:+.2f} to {interval.high:+.2f}" if interval else "–",
                "here": item.word,
            }
        )
    notes = [
        f"here: {GAIN} or {LOSS} if the intervals over seeds, images and both leave 0 out, else {UNDECIDED}.",
        "published gain: lowest to highest over all data sets, networks and schedules of the claims.",
    ]
    return Table("directions", "directions", [], text, notes)


def sentences(
    claims: Claims, verdicts: Mapping[str, Verdict], every: Sequence[Results], params: Params
) -> list[str]:
    """The outcome in a few plain sentences, without Markdown; the claims of the paper itself one by one."""
    gains = [claim for claim in claims.claims if claim.kind == "gain"]
    words, stated = [verdicts[c.id].word for c in gains], sum(c.claimed is not None for c in gains)
    counts = [f"{words.count(word)} {word}" for word in VERDICTS]
    found = [
        f"Of {len(words)} published accuracies of the methods of this suite ({stated} of them state a gain): "
        f'{", ".join(counts)}. "{NOT_COMPARABLE}" says that the published setting differs from every '
        "benchmark here or is not fully stated; the column why gives the reason."
    ]
    found += [_of_the_paper(c, verdicts[c.id], every) for c in claims.claims if c.method == HEADLINE]
    measured = [item for item in _directions(claims, every) if item.measured and item.measured.n > 1]
    seen = [item for item in measured if item.word == GAIN]
    unseen = [item for item in measured if item.word != GAIN]
    if len(measured) > MOST:
        found.append(
            f"Of the methods with a published gain, a clear one over the student alone is seen here in "
            f"{len(seen)} of {len(measured)} cases (method, benchmark, student) with several seeds, at equal "
            "steps."
        )
    elif seen:
        found.append(
            f"A clear gain over the student alone is seen here, at equal steps, for {_listed(seen)}."
        )
    if unseen and len(measured) <= MOST:
        found.append(f"No clear gain over the student alone is seen here for {_listed(unseen)}.")
    if not measured:
        found.append("None of these methods has been measured here with several seeds yet.")
    if text := orders.sentence(orders.orders(claims, every)):
        found.append(text)
    return found


def _of_the_paper(claim: Claim, verdict: Verdict, every: Sequence[Results]) -> str:
    """What became of a claim of the paper itself."""
    what, reasons = _claimed_text(claim), "; ".join(verdict.reasons)
    if (claim.kind, verdict.word) == ("cost", REPRODUCED):
        reasons = f"it holds by construction, as adapters are dropped: {reasons}"
    if verdict.word != NOT_COMPARABLE:
        return f"{PAPER}'s {what}: {verdict.word} ({reasons})."
    text = f"{PAPER}'s {what} can be neither confirmed nor refuted here ({reasons})."
    if not (found := _measurements(claim.method, every)):
        return text
    named = "; ".join(f"{_measured_text(own)} on {_place(own)}" for own in found)
    text += f" The suite's reading of {PAPER} changes test mIoU by {named}."
    known = [own for own in found if own.interval is not None]
    if claim.claimed is not None and known:
        where = _within(known, [claim.claimed] * len(known))
        text += f" Taken as points of mIoU, {claim.claimed:+.2f} lies {where}."
        shares = [claim.claimed * own.alone / 100 for own in known]
        points = ", ".join(f"{share:+.2f}" for share in shares)
        text += f" Taken as a share of the student alone ({points}), it lies {_within(known, shares)}."
    return text


def _within(known: Sequence[Measured], wanted: Sequence[float]) -> str:
    """In which of the intervals what was claimed lies."""
    pairs = [
        (_place(own), own.interval.contains(gain))
        for own, gain in zip(known, wanted, strict=True)
        if own.interval
    ]
    within, out = ([place for place, inside in pairs if inside is found] for found in (True, False))
    where = f"within the interval of {' and '.join(within)}" if within else "in none of these intervals"
    return where + (f", and outside that of {' and '.join(out)}" if within and out else "")


def paper(claims: Claims, every: Sequence[Results], params: Params) -> str:
    """What became of the gain that the paper claims, in a sentence."""
    own = [c for c in claims.claims if c.method == HEADLINE and c.kind == "gain"]
    return " ".join(_of_the_paper(claim, judge(claim, claims, every, params), every) for claim in own)


def write(claims: Claims, every: Sequence[Results], params: Params, folder: Path) -> None:
    """Write ``folder/claims.md`` and ``folder/claims.csv``; the same input gives the same bytes."""
    verdicts = judge_all(claims, every, params)
    judged, outline = table(claims, verdicts), directions(claims, every)
    ordered = orders.orders(claims, every)
    rules = "[How a claim is judged](../docs/tables.md#claims)"
    lines = [
        "# Published against measured",
        "",
        *(
            line
            for text in sentences(claims, verdicts, every, params)
            for line in (escape_markdown(text), "")
        ),
        "## Does the direction hold?",
        "",
        *_markdown(outline),
        "",
        *(["## Does the order hold?", "", *_markdown(orders.table(ordered)), ""] if ordered else []),
        "## Claims",
        "",
        *_markdown(judged),
        "",
        f"{rules}, [all columns](claims.csv), sources, evidence and protocols in [claims.yaml](claims.yaml).",
        "",
    ]
    files.write_bytes(folder / "claims.md", "\n".join(lines).encode())
    files.write_bytes(folder / "claims.csv", judged.csv)


def _judge_cost(claim: Claim, every: Sequence[Results], params: Params) -> Verdict:
    """Compare the exported students of the method and of the reference over all their cells."""
    equal: list[str] = []
    different: list[str] = []
    for results in every:
        for student in results.students:
            pairs = [
                [{*results.by_seed(student, m, column).values()} for m in (claim.method, results.reference)]
                for column in COST  # their different values over the cells
            ]
            if not all(here and there for here, there in pairs):
                continue
            same = all(here == there and len(here) == 1 for here, there in pairs)
            parts = [
                f"{_numbers(here)} {name}" + ("" if same else f" against {_numbers(there)}")
                for name, (here, there) in zip(COST.values(), pairs, strict=True)
            ]
            (equal if same else different).append(f"{results.benchmark}, {student}: {', '.join(parts)}")
    if different:
        return Verdict(NOT_REPRODUCED, [f"not equal on {place}" for place in different])
    if equal:
        return Verdict(REPRODUCED, [f"equal on {place}" for place in equal])
    return Verdict(NOT_RUN, [f"no finished cells of both {claim.method} and {params.suite.reference}"])


def _numbers(values: Iterable[float]) -> str:
    return " or ".join(f"{value:,.0f}" for value in sorted(values))


def _outcome(measured: Measured, claimed: float) -> tuple[str, str]:
    """The verdict on a comparable measurement, and why."""
    interval = measured.interval
    if interval is None:
        return UNDECIDED, "only one seed"
    text = f"{interval.low:+.2f} to {interval.high:+.2f}"
    if interval.excludes_zero and measured.direction == UNDECIDED:
        over = measured.gain.over_images
        images = (
            "there is none over images"
            if over is None
            else f"the interval over {'both' if over.excludes_zero else 'images'} contains 0"
        )
        return UNDECIDED, f"{text} over seeds, but {images}"
    if not interval.excludes_zero:
        if interval.contains(claimed):
            return UNDECIDED, f"with n = {measured.n}, {text} contains 0 and the claim"
        return NOT_REPRODUCED, f"the interval contains 0 and not the claim: {text}"
    low, high, wanted = interval.low, interval.high, claimed
    if claimed < 0:  # a claimed loss: the same rule, mirrored
        low, high, wanted = -interval.high, -interval.low, -claimed
    if low <= 0:
        return NOT_REPRODUCED, f"the opposite of the claim: {text}, claimed {claimed:+.2f}"
    if high < wanted:
        return (
            NOT_REPRODUCED,
            f"{'below' if claimed >= 0 else 'above'} the claim: {text}, claimed {claimed:+.2f}",
        )
    return REPRODUCED, f"{text} reaches {claimed:+.2f}"


def _differences(
    claim: Claim, claims: Claims, params: Params, benchmark: str, student: str
) -> dict[str, str]:
    """In which stated conditions a benchmark and student differ from a claim: condition to text, in order."""
    own, protocol = params.benchmark(benchmark), claims.protocols[claim.protocol]
    training, size = own.training, own.data.get("size")
    found = {}
    for role, network, wanted in (
        ("student", params.student(student), claim.student),
        ("teacher", own.teacher.network, claim.teacher),
    ):
        if wanted is not None and not _same(network, claims.networks[wanted]):
            found[role] = f"{role} {_name(network, claims)} instead of {wanted}"
    if protocol.images is not None and size is not None:
        found["image size"] = f"images of {_pixels(size)} instead of the {protocol.images} size"
    if protocol.crop is not None and protocol.crop != training.crop:
        found["crop"] = f"crop {_pixels(training.crop)} instead of {_pixels(protocol.crop)}"
    if protocol.batch_size not in (None, training.batch_size):
        found["batch size"] = f"batches of {training.batch_size} images instead of {protocol.batch_size}"
    if protocol.steps not in (None, training.steps):
        found["steps"] = f"{training.steps:,} steps instead of {protocol.steps:,}"
    for name, text in (("lr", "learning rate"), ("weight_decay", "weight decay")):
        wanted, here = getattr(protocol, name), getattr(params.student(student).recipe or training, name)
        if wanted not in (None, here):
            found[text] = f"{text} {here:g} instead of {wanted:g}"
    pretrained = params.student(student).weights is not None
    if protocol.pretrained not in (None, pretrained):
        found["weights"] = "ImageNet weights instead of none" if pretrained else "no ImageNet weights"
    scored = getattr(config.dataset_module(own.data, benchmark), "TEST", SPLIT)
    if claim.split not in (None, scored):
        found["split"] = f"{scored} split instead of {claim.split}"
    weights = _weights(claim.method, params)
    terms = [name for name, value in weights.items() if value]
    if claim.terms is not None and set(claim.terms) != set(terms):
        found["terms"] = f"loss terms {' + '.join(terms) or 'none'} instead of {' + '.join(claim.terms)}"
    if claim.other_loss is not None:
        found["loss"] = f"another loss ({claim.other_loss})"
    if claim.method not in params.method_keys:
        found["method"] = f"{claim.method} is not in params.yaml"
    return found


def _unstated(claim: Claim, claims: Claims, params: Params) -> list[str]:
    """The conditions that the source of a claim leaves open, in the order of ``_differences``."""
    protocol = claims.protocols[claim.protocol]
    conditions: dict[str, Any] = {
        "student": claim.student,
        "teacher": claim.teacher,
        "image size": protocol.images,
        "crop": protocol.crop,
        "batch size": protocol.batch_size,
        "steps": protocol.steps,
        "learning rate": protocol.lr,
        "weight decay": protocol.weight_decay,
        "ImageNet weights": protocol.pretrained,
        "split": claim.split,
    }
    if _weights(claim.method, params):
        conditions["loss terms"] = claim.terms
    return [name for name, value in conditions.items() if value is None]


def _weights(method: str, params: Params) -> dict[str, Any]:
    """The weights of a method's loss terms in params.yaml, by term; {} for a method of one term."""
    values = params.method_values(method) if method in params.method_keys else {}
    prefix = "weight_"
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _measurements(method: str, every: Iterable[Results]) -> list[Measured]:
    """Every benchmark and student with a seed that the method and the reference have both finished."""
    found = []
    for results in every:
        for student in results.students:
            if (gain := results.gain(student, method)).paired.n:
                alone = results.mean(student, results.reference) or 0.0
                found.append(Measured(results.benchmark, student, gain, alone))
    return found


def _directions(claims: Claims, every: Sequence[Results]) -> list[Direction]:
    """Methods in the order of claims.yaml; one line for a method that was not measured."""
    about: dict[str, list[Claim]] = {}
    for claim in claims.claims:
        if claim.kind == "gain":
            about.setdefault(claim.method, []).append(claim)
    found = []
    for method, own in about.items():
        measurements: list[Measured | None] = [*_measurements(method, every)]
        found += [Direction(method, own, measured) for measured in measurements or [None]]
    return found


def _same(network: Network, wanted: Architecture) -> bool:
    encoder = network.encoder.removeprefix("tu-")
    return (network.architecture, encoder) == (wanted.architecture, wanted.encoder)


def _name(network: Network, claims: Claims) -> str:
    """A network as claims.yaml calls it, else by its architecture and encoder."""
    names = [name for name, known in claims.networks.items() if _same(network, known)]
    return names[0] if names else f"{network.architecture}-{network.encoder.removeprefix('tu-')}"


def _pixels(size: Iterable[int]) -> str:
    return "×".join(map(str, size))


def _claimed_text(claim: Claim) -> str:
    if claim.kind == "cost":
        return "unchanged inference cost"
    if claim.claimed is None:
        return "–"
    return f"{claim.claimed:+.2f}" + ("" if claim.unit else " (unit not stated)")


def _why(verdict: Verdict) -> str:
    text = "; ".join(verdict.reasons)
    if verdict.word == NOT_COMPARABLE and verdict.setting is not None:
        text = f"{', '.join(verdict.setting)}: {text}"
    return text + (f"; not stated: {', '.join(verdict.unstated)}" if verdict.unstated else "")


def _place(measured: Measured) -> str:
    return f"{measured.benchmark}, {measured.student}"


def _measured_text(measured: Measured) -> str:
    """``+1.20 (+0.30 to +2.10, n = 5)``; without an interval for one seed."""
    interval = measured.interval
    spread = "" if interval is None else f"{interval.low:+.2f} to {interval.high:+.2f}, "
    return f"{measured.mean:+.2f} ({spread}n = {measured.n})"


def _published_text(item: Direction) -> str:
    """The range of the published gains, in points where the sources say so."""
    gains = [gain for c in item.claims if c.unit is not None and (gain := c.claimed) is not None]
    if gains:
        low, high = (f"{value:+.2f}" for value in (min(gains), max(gains)))
        return low if low == high else f"{low} to {high}"
    return ", ".join(_claimed_text(claim) for claim in item.claims)


def _listed(items: Sequence[Direction]) -> str:
    """Methods with where and what was measured, joined to the part of a sentence."""
    return "; ".join(
        f"{label(item.method)} on {_place(item.measured)}: {_measured_text(item.measured)}"
        + ("" if item.word == GAIN else f", {item.word}")
        for item in items
        if item.measured is not None
    )


def _markdown(shown: Table) -> list[str]:
    """A table in Markdown, its notes above it."""
    return [*(f"- {escape_markdown(note)}" for note in shown.notes), "", *shown.markdown]
