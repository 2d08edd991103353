"""Whether methods stand in the order of a published table: its scores beside the mean test mIoU here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.reports import statistics
from pipelines.reports.published import Claim, Claims
from pipelines.reports.results import Results, label
from pipelines.reports.table import Table, between

FEWEST = 5  # methods of a table, below which an order says little


@dataclass(frozen=True)
class Order:
    """A published table whose methods were measured here, all on one student of a benchmark."""

    source: str
    setting: str  # data set, split, networks
    protocol: str
    benchmark: str
    student: str
    scores: dict[str, tuple[float, float]]  # by method: published, here
    others: list[str]  # of the methods, those that were published with another loss, or with fewer terms
    rho: float  # Spearman's
    interval: statistics.Interval  # 95 %, over methods


def orders(claims: Claims, every: Sequence[Results]) -> list[Order]:
    """Every published table with ``FEWEST`` methods that have a score here, by source and setting. A method
    that has several rows in one table stands there with its best."""
    published: dict[tuple[str, str, str], dict[str, Claim]] = {}
    for claim in claims.claims:
        if claim.kind == "gain" and claim.score is not None:
            rows = published.setdefault((claim.source, _setting(claim), claim.protocol), {})
            before = rows.setdefault(claim.method, claim)
            if claim.score > (before.score or 0.0):
                rows[claim.method] = claim
    found = []
    for (source, setting, protocol), rows in published.items():
        for results in every:
            for student in results.students:
                scores = {
                    method: (claim.score or 0.0, here)
                    for method, claim in rows.items()
                    if (here := results.paired_mean(student, method)) is not None
                }
                if len(scores) < FEWEST:
                    continue
                others = [method for method in scores if _is_other(rows[method], results)]
                theirs, ours = zip(*scores.values(), strict=True)
                if len({*theirs}) == 1 or len({*ours}) == 1:
                    continue  # in no order
                rho, interval = statistics.rank_correlation(theirs, ours)
                place = (results.benchmark, student)
                found.append(Order(source, setting, protocol, *place, scores, others, rho, interval))
    return found


def table(found: Sequence[Order]) -> Table:
    """One line a published table and student."""
    rows = [
        {
            "source": order.source,
            "published on": order.setting,
            "protocol": order.protocol,
            "measured on": f"{order.benchmark}, {order.student}",
            "methods": ", ".join(label(m) + "*" * (m in order.others) for m in order.scores),
            "Spearman's ρ": f"{order.rho:+.2f}",
            "95 % interval": between(order.interval),
        }
        for order in found
    ]
    notes = [
        f"Tables with {FEWEST} methods or more that were measured here; the interval takes the methods for a "
        "sample (Bonett and Wright 2000). *: published with another loss than here, or without some of its "
        "terms. Tables of one source that share their methods are set against the same scores: they are not "
        "independent.",
    ]
    return Table("orders", "orders", [], rows, notes)


def sentence(found: Sequence[Order]) -> str:
    """The outcome in plain words; nothing without a table."""
    if not found:
        return ""
    low, high = min(order.rho for order in found), max(order.rho for order in found)
    agree = sum(order.interval.low > 0 for order in found)
    against = sum(order.interval.high < 0 for order in found)
    sources, others = {order.source for order in found}, sum(bool(order.others) for order in found)
    return (
        f"Does the order of the methods hold? Against {len(found)} published table{'s' * (len(found) > 1)} "
        f"of {FEWEST} methods or more (from {len(sources)} source{'s' * (len(sources) > 1)}"
        f"{', whose tables are not independent' * (len(found) > len(sources))}; in {others} some methods "
        "have another loss than here), Spearman's rank correlation with the means here lies "
        f"between {low:+.2f} and {high:+.2f}; "
        + (
            f"its 95 % interval lies above 0 in {agree} and below 0 in {against} of them."
            if agree or against
            else "every 95 % interval contains 0: with so few methods a table says little either way."
        )
    )


def _is_other(claim: Claim, results: Results) -> bool:
    """Whether what was published is not the loss that runs here."""
    weights = results.weights.get(claim.method, {})
    terms = {name.removeprefix("weight_") for name, value in weights.items() if value}
    return claim.other_loss is not None or (claim.terms is not None and {*claim.terms} != terms)


def _setting(claim: Claim) -> str:
    split = f" ({claim.split})" if claim.split else ""
    return f"{claim.dataset or 'not stated'}{split}, {claim.student or '?'} from {claim.teacher or '?'}"
