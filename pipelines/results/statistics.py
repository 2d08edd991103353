"""The few statistics of the tables: pure functions of lists of scores, one score per seed.

± always means the sample standard deviation over n seeds (ddof 1). It is None for one seed, not 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SEEDS_FOR_SIGNIFICANCE = 6  # below this, no two-sided sign-flip test over paired seeds can reach p < 0.05


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    scores = list(values)
    return statistics.fmean(scores) if scores else None


def median(values: Iterable[float]) -> float | None:
    """Median; None of nothing."""
    scores = list(values)
    return statistics.median(scores) if scores else None


def sd(values: Iterable[float]) -> float | None:
    """Sample standard deviation (ddof 1); None when there are fewer than two values."""
    scores = list(values)
    return statistics.stdev(scores) if len(scores) > 1 else None


@dataclass(frozen=True)
class Paired:
    """Differences of two methods over the seeds that both have."""

    by_seed: dict[int, float]

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float | None:
        return mean(self.by_seed.values())

    @property
    def sd(self) -> float | None:
        """Of the differences themselves, so what the two methods share in a seed has dropped out."""
        return sd(self.by_seed.values())


def paired(scores: Mapping[int, float], reference: Mapping[int, float]) -> Paired:
    """``scores - reference`` by seed; both map a seed to its score. Seeds that only one has are left out."""
    return Paired({seed: scores[seed] - reference[seed] for seed in sorted(scores.keys() & reference.keys())})


def smallest_p(n: int) -> float:
    """The smallest two-sided p that a sign-flip test over ``n`` paired seeds can give: 2 / 2^n, at most 1."""
    return min(1.0, 2.0 / 2**n)
