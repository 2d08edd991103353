"""Methods over several benchmarks and students: mean ranks, what they can tell apart, chance of improvement.

A block is a student on a benchmark; its score of a method is the mean over the seeds, in which the difference
to the student alone is that of the seeds of both. Only methods that every
block has are ranked, with the student alone, but neither its controls nor official weights; with fewer
than two blocks there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.reports import statistics
from pipelines.reports.results import RESAMPLES, RESAMPLING_SEED, Results, label
from pipelines.reports.statistics import Interval
from pipelines.reports.table import Table, between, ends, rounded


@dataclass(frozen=True)
class Ranks:
    """How the methods rank over all blocks."""

    reference: str  # the student alone
    blocks: list[tuple[str, str]]  # benchmark, student
    ranks: dict[str, float]  # mean over the blocks, 1 is the best; in this order
    friedman_p: float | None  # of the hypothesis that all methods are alike
    critical_difference: float  # Nemenyi: mean ranks closer than this are not told apart
    cliques: list[tuple[str, ...]]  # methods that are not told apart
    improvement: dict[str, tuple[float, Interval | None]]  # probability that a run beats one of the reference
    seeds: dict[str, int]  # the fewest seeds of a method in any block


def rank(every: Sequence[Results]) -> Ranks | None:
    """Rank the methods; None with fewer than two blocks or two methods that all of them have."""
    reference = every[0].reference if every else ""
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    means: dict[tuple[str, str], dict[str, float]] = {}
    for results, student in [(own, student) for own in every for student in own.students]:
        methods = [reference, *results.tested(results.methods)]
        own = {m: [*values.values()] for m in methods if (values := results.by_seed(student, m))}
        if reference in own and len(own) > 1:
            found = {m: mean for m in own if (mean := results.paired_mean(student, m)) is not None}
            scores[results.benchmark, student], means[results.benchmark, student] = own, found
    ranks = dict(sorted(statistics.mean_ranks(means).items(), key=lambda pair: pair[1]))
    methods = list(ranks)
    if len(scores) < 2 or len(methods) < 2:
        return None
    cd = statistics.critical_difference(len(methods), len(scores))
    seeds = {m: min(len(own[m]) for own in scores.values()) for m in methods}
    improvement: dict[str, tuple[float, Interval | None]] = {}
    for method in methods:
        if method != reference:
            chance = statistics.probability_of_improvement(
                [own[method] for own in scores.values()],
                [own[reference] for own in scores.values()],
                resamples=RESAMPLES,
                seed=RESAMPLING_SEED,
            )
            if chance is not None:  # of one run there is no resample, and where none beats another all agree
                known = min(seeds[method], seeds[reference]) > 1 and chance[1].width > statistics.TIE
                improvement[method] = chance if known else (chance[0], None)
    return Ranks(
        reference=reference,
        blocks=list(scores),
        ranks=ranks,
        friedman_p=statistics.friedman_p(means),
        critical_difference=cd,
        cliques=statistics.cliques(ranks, cd),
        improvement=improvement,
        seeds=seeds,
    )


def table(found: Ranks) -> Table:
    """Method × (mean rank, probability of improvement)."""
    data, text = [], []
    for method, mean in found.ranks.items():
        chance, interval = found.improvement.get(method, (None, None))
        data.append(
            rounded(
                {
                    "method": label(method),
                    "blocks": len(found.blocks),
                    "seeds_min": found.seeds[method],
                    "mean_rank": mean,
                    "improvement": chance,
                    **ends("improvement", interval),
                }
            )
        )
        shown = "–" if chance is None else f"{chance:.2f}"
        shown += "" if interval is None else f" {between(interval, '.2f')}"
        row = {
            "method": label(method),
            "seeds (fewest)": str(found.seeds[method]),
            "mean rank": f"{mean:.2f}",
        }
        text.append(row | {f"probability of improvement on {found.reference}": shown})
    p = "unknown" if found.friedman_p is None else f"p = {found.friedman_p:.2g}"
    blocks = "; ".join(", ".join(block) for block in found.blocks)
    groups = "; ".join(", ".join(map(label, group)) for group in found.cliques) or "none"
    notes = [
        sentence(found),
        f"Blocks: {blocks}. Friedman's test that the methods do not differ: {p}. Mean ranks closer than "
        f"{found.critical_difference:.2f} (Nemenyi, 5 %) are not told apart: {groups}.",
    ]
    return Table("ranks", "mean ranks", data, text, notes)


def warnings(found: Ranks) -> list[str]:
    """What a reader has to know before believing the ranks."""
    n = len(found.blocks)
    texts = []
    if n < len(found.ranks):
        texts.append(f"only {n} blocks for {len(found.ranks)} methods: the ranks say little, by themselves.")
    if len({student for _, student in found.blocks}) < n or len({name for name, _ in found.blocks}) < n:
        texts.append("blocks that share a benchmark or a student are not independent of each other.")
    if min(found.seeds.values()) < statistics.SEEDS_FOR_SIGNIFICANCE:
        texts.append("with so few seeds the intervals of the probability of improvement are too narrow.")
    return texts


def sentence(found: Ranks) -> str:
    """The outcome in plain words."""
    best, worst = min(found.ranks.values()), max(found.ranks.values())
    first, last = (
        " and ".join(label(m) for m, mean in found.ranks.items() if mean == end) for end in (best, worst)
    )
    apart = worst - best >= found.critical_difference
    could = len(found.ranks) - 1 >= found.critical_difference
    what = "tells some" if apart else "tells no" if could else "could tell no"
    return (
        f"Over {len(found.blocks)} blocks (student on benchmark), the best mean rank is that of {first} "
        f"({best:.2f}), the worst that of {last} ({worst:.2f}); the critical difference is "
        f"{found.critical_difference:.2f}, so the ranking {what} methods apart "
        "(a bar in the figure joins those that it does not)."
    )
