"""The statistics of the tables: pure functions of scores, and of the confusion counts of the test images.

Scores are mIoU in percent, differences and interval bounds are in the same points. ± always means the sample
standard deviation over n seeds (ddof 1). It is None for one seed, not 0.

Uncertainty has two sources, each with an interval of its own: the seeds of the training (t_interval,
sign_flip_p, max_t), and the choice of the test images with the trained networks held fixed (image_bootstrap,
of blocks of frames where the images come from videos). Whether methods differ is decided for both at once
(over_both).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby, pairwise
from math import atanh, inf, isfinite, sqrt, tanh
from pathlib import PurePosixPath
from string import digits as DIGITS
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95  # of every interval
SEEDS_FOR_SIGNIFICANCE = 6  # below this, no two-sided sign-flip test over paired seeds can reach p < 0.05
EXACT = 16  # differences up to which all 2^n sign flips are enumerated
FLIPS = 2**16 - 1  # random ones beyond; no p is then below 2^-16, which is smallest_p(EXACT + 1)
TIE = 1e-9  # of the length of the differences: two sums that are closer differ by rounding only
FEWEST_PAIRS = 4  # of which a rank correlation says anything
CHUNK = 1000  # resamples at a time: their image weights and sums are all that has to fit into memory

Block = TypeVar("Block", bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """A closed interval of scores or of differences of scores."""

    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low

    def contains(self, x: float) -> bool:
        return self.low <= x <= self.high

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it lies on one side of 0; never true of NaN."""
        return self.low > 0 or self.high < 0


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


@dataclass(frozen=True)
class ImageBootstrap:
    """Test mIoU of every cell on the same resamples of the test images."""

    scores: dict[tuple[str, int], np.ndarray]  # by method and seed: float64 (resamples,), percent

    def difference(self, a: str, b: str) -> Interval | None:
        """95 % percentile interval of ``a - b`` (Efron and Tibshirani 1993, chapter 13); None without a seed.

        Each is the mean over the seeds that both have. Both are scored on the same resamples, so what makes
        an image hard for both drops out.
        """
        if not (seeds := self._seeds(a) & self._seeds(b)):
            return None
        return _percentiles(self._mean(a, seeds) - self._mean(b, seeds))

    def combination(self, weights: Mapping[tuple[str, int], float]) -> Interval | None:
        """95 % percentile interval of a weighted sum of cells' scores; None when a cell was not resampled."""
        if not weights or not weights.keys() <= self.scores.keys():
            return None
        return _percentiles(np.sum([w * self.scores[cell] for cell, w in weights.items()], axis=0))

    def _seeds(self, method: str) -> set[int]:
        return {seed for name, seed in self.scores if name == method}

    def _mean(self, method: str, seeds: set[int]) -> np.ndarray:
        return np.mean([self.scores[method, seed] for seed in sorted(seeds)], axis=0)


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


def paired(scores: Mapping[int, float], reference: Mapping[int, float]) -> Paired:
    """``scores - reference`` by seed; both map a seed to its score. Seeds that only one has are left out."""
    return Paired({seed: scores[seed] - reference[seed] for seed in sorted(scores.keys() & reference.keys())})


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Two-sided Student t interval of the mean of paired differences; None below two of them.

    mean ± t(n - 1) sd / √n (Student 1908), exact for normal differences. ValueError if one is not finite.
    """
    _check_finite(values)
    spread = sd(values)
    if spread is None:
        return None
    n, centre = len(values), statistics.fmean(values)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * spread / sqrt(n)
    return Interval(centre - half, centre + half)


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of the sign-flip (paired permutation) test that the mean is 0; None of nothing.

    The share of all 2^n assignments of signs whose |sum| reaches the observed one (Fisher 1935);
    exact for differences that are symmetric about 0. Beyond ``EXACT`` differences a seeded sample of
    assignments, with the observed one counted in (Phipson and Smyth 2010). ValueError if one is not finite.
    """
    return max_t({"": dict(enumerate(differences))}).get("")


def smallest_p(n: int) -> float:
    """The smallest two-sided p that a sign-flip test over ``n`` paired seeds can give: 2 / 2^n, at most 1."""
    return min(1.0, 2.0 / 2**n)


def seeds_needed(comparisons: int, alpha: float) -> int:
    """The fewest paired seeds with which a sign-flip p can stay below ``alpha`` after Holm's adjustment.

    The smallest p, 2 / 2^n, is multiplied by the number m of comparisons: n = 1 + ⌈log2(m / α)⌉.
    """
    return next(n for n in count(1) if comparisons * smallest_p(n) <= alpha)


def max_t(differences: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """p values of several methods, adjusted together: step-down max-T over sign flips of the seeds.

    ``differences``: by method, the paired differences by seed. A flip turns a seed's differences of all
    methods at once, so that what they share (the reference above all) stays in the null distribution. The
    i-th largest |t| is set against the largest of it and the smaller ones under every flip; no p is below the
    one before (Westfall and Young 1993). |Σd| / √Σd² stands for |t|: for equal n it has the same order, and
    it stays finite. Two-sided; the familywise error is kept if, where the methods do not differ from the
    reference, their differences of a seed are symmetric about 0 together. The smallest p is 2 / 2^n, however
    many methods there are. Enumerated or sampled as in :func:`sign_flip_p`, of which it is the same for one
    method; methods without a difference are left out. ValueError if one is not finite.
    """
    names = [name for name, own in differences.items() if own]
    if not names:
        return {}
    seeds = sorted(set().union(*(differences[name] for name in names)))
    values = np.array([[float(differences[name].get(seed, 0.0)) for name in names] for seed in seeds])
    _check_finite(list(values.ravel()))
    length = np.sqrt((values**2).sum(axis=0))
    values = np.divide(values, length, out=np.zeros_like(values), where=length > 0)
    signs, extra = _signs(len(seeds))
    flipped, observed = np.abs(signs @ values), np.abs(values.sum(axis=0))
    order = np.argsort(-observed, kind="stable")
    adjusted, before = {}, 0.0
    for place, column in enumerate(order):
        largest = flipped[:, order[place:]].max(axis=1)
        reached = int((largest >= observed[column] - TIE).sum())
        before = adjusted[names[column]] = max(before, (reached + extra) / (len(signs) + extra))
    return {name: adjusted[name] for name in names}


def interpolation(points: Mapping[str, float], x: float) -> dict[str, float] | None:
    """Weights of the points around ``x`` in an interpolation that is piecewise linear in log ``x``; None
    outside of them.

    ``points``: the place of each on the line, above 0. The value at ``x`` is the weighted sum of the points'
    values.
    """
    for left, right in pairwise(sorted(points, key=lambda name: points[name])):
        if points[left] <= x <= points[right]:
            share = math.log(x / points[left]) / (math.log(points[right] / points[left]) or 1.0)
            return {left: 1 - share, right: share}
    return None


def holm(mapping: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p values (Holm 1979), in the order of the keys.

    The i-th smallest of m is multiplied by m - i + 1, is at least the one before it and at most 1. Rejecting
    those up to α keeps the familywise error at α under any dependence. ValueError if a p is not in [0, 1].
    """
    adjusted: dict[str, float] = {}
    before = 0.0
    for i, name in enumerate(sorted(mapping, key=lambda name: mapping[name])):
        if not 0 <= mapping[name] <= 1:
            raise ValueError(f"The p value of {name} is not between 0 and 1: {mapping[name]}.")
        before = adjusted[name] = min(1.0, max(before, (len(mapping) - i) * mapping[name]))
    return {name: adjusted[name] for name in mapping}


def image_bootstrap(
    counts: Iterable[tuple[tuple[str, int], np.ndarray]],
    resamples: int,
    seed: int,
    starts: Sequence[int] | None = None,
) -> ImageBootstrap:
    """Score every cell on resamples of the test images, the same ones for all cells (Efron 1979).

    ``counts``: of each method and seed, integer confusion counts (images, C, C) in the convention of
    :mod:`pipelines.runs.confusion`, the images in the same order for all. Those of a block, see
    :func:`block_starts`, are drawn together; without ``starts`` each by itself. The score of a resample is
    the mIoU of its summed matrix, in percent: the mean over the classes in the ground truth of the whole
    split, without those that no image of the resample has (NaN if it has none). ValueError when there is no
    cell, when cells differ in the number of images or classes, and when no pixel of a cell carries a label.
    """
    sums, shapes = {}, set[tuple[int, ...]]()
    for cell, array in counts:  # one at a time: they may be read from files
        shapes.add(array.shape)
        if len(shapes) > 1:
            raise ValueError(
                f"All cells must have counts of the same images and classes, not of shapes {sorted(shapes)}."
            )
        if array.ndim != 3 or array.shape[0] == 0 or array.shape[1] != array.shape[2]:
            raise ValueError(f"Counts must be (images, C, C), not {array.shape}.")
        if not array.any():
            raise ValueError(f"No pixel of cell {cell} carries a label: there is nothing to score.")
        sums[cell] = _image_sums(array)
        if starts is not None:
            sums[cell] = np.add.reduceat(sums[cell], starts)
    if not sums:
        raise ValueError("There is no cell to score.")
    blocks = len(next(iter(sums.values())))
    scores = {cell: np.empty(resamples) for cell in sums}
    random = np.random.default_rng(seed)
    for start in range(0, resamples, CHUNK):
        part = slice(start, min(start + CHUNK, resamples))
        # How often each block was drawn: drawing row by row, chunks of any size give the same weights.
        weights = random.multinomial(blocks, np.full(blocks, 1 / blocks), size=part.stop - start)
        weights = weights.astype(np.float64)  # whole numbers stay exact up to 2^53
        for cell, array in sums.items():
            scores[cell][part] = _miou(weights @ array)
    return ImageBootstrap(scores)


def block_starts(names: Sequence[str], frames: int) -> list[int]:
    """Where the blocks of about ``frames`` images start that are resampled together (Carlstein 1986):
    images that follow each other in ``names`` and whose names differ in the number at
    their end alone, as frames of a video do. A video is cut into equal parts; with ``frames`` = 1 every image
    is one."""
    starts, first = list[int](), 0
    videos = (str(PurePosixPath(name).with_suffix("")).rstrip(DIGITS) for name in names)
    for _, video in groupby(videos):
        length = len(list(video))
        parts = max(1, round(length / frames))
        starts += [first + part * length // parts for part in range(parts)]
        first += length
    return starts


def over_both(
    over_seeds: Interval | None, over_images: Interval | None, seeds: int, blocks: int
) -> Interval | None:
    """95 % interval of a mean difference for other trainings *and* other test images; None without either.

    ``over_seeds``: :func:`t_interval` of ``seeds`` differences; ``over_images``: a percentile interval of
    resamples of ``blocks`` of images, 2 or more. Their variances add, mean ± t(ν) √(a² + b²), with ν by Welch
    (1947) of seeds - 1 and blocks - 1; b² times blocks / (blocks - 1), as resamples vary less than samples.
    """
    if over_seeds is None or over_images is None:
        return None
    a = over_seeds.width / 2 / float(stats.t.ppf((1 + LEVEL) / 2, seeds - 1))
    b = over_images.width / 2 / float(stats.norm.ppf((1 + LEVEL) / 2)) * sqrt(blocks / (blocks - 1))
    if not a + b:
        return over_seeds
    freedom = (a**2 + b**2) ** 2 / (a**4 / (seeds - 1) + b**4 / (blocks - 1))
    centre = (over_seeds.low + over_seeds.high) / 2
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * sqrt(a**2 + b**2)
    return Interval(centre - half, centre + half)


def told_apart(*intervals: Interval | None) -> bool:
    """Whether two methods differ: all intervals of the difference are known and on the same side of 0."""
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(intervals):
        return False
    return min(own.low for own in known) > 0 or max(own.high for own in known) < 0


def mean_ranks(blocks: Mapping[Block, Mapping[str, float]]) -> dict[str, float]:
    """Mean rank over the blocks of every method that all of them have; rank 1 is the highest score.

    ``blocks``: by block, the score of each method. Ties share their mean rank (Demšar 2006, section 3.2.2).
    """
    methods, scores = _complete(blocks)
    ranks = stats.rankdata(-scores, axis=1).mean(axis=0) if methods else []
    return {method: float(rank) for method, rank in zip(methods, ranks, strict=True)}


def friedman_p(blocks: Mapping[Block, Mapping[str, float]]) -> float | None:
    """p of Friedman's test that all methods rank alike, corrected for ties (Friedman 1937, Demšar 2006).

    Of the methods that every block has; None below three of them or below two blocks. χ² is an approximation,
    conservative for few blocks.
    """
    methods, scores = _complete(blocks)
    if len(methods) < 3 or len(blocks) < 2:
        return None
    if (scores == scores[:, :1]).all():
        return 1.0  # scipy divides 0 by 0 when everything is tied
    return float(stats.friedmanchisquare(*scores.T).pvalue)


def critical_difference(methods: int, blocks: int, alpha: float = 0.05) -> float:
    """Difference of mean ranks that is significant in Nemenyi's test (Demšar 2006, section 3.2.2).

    q √(k (k + 1) / 6N) for k methods and N blocks, q the upper α quantile of the studentized range over √2.
    ValueError below two methods or one block.
    """
    if methods < 2 or blocks < 1:
        raise ValueError(f"Ranks need two methods and one block at least, not {methods} and {blocks}.")
    q = float(stats.studentized_range.ppf(1 - alpha, methods, inf)) / sqrt(2)
    return q * sqrt(methods * (methods + 1) / (6 * blocks))


def cliques(ranks: Mapping[str, float], cd: float) -> list[tuple[str, ...]]:
    """Largest groups of two or more methods that are not told apart: the bars of a CD diagram (Demšar 2006).

    The mean ranks of a group lie closer together than ``cd``: a difference of ``cd`` is significant. Best
    rank first, in the groups and among them; no group is part of another.
    """
    order = sorted(ranks, key=lambda method: ranks[method])
    found = []
    end = 0
    for start, method in enumerate(order):
        stop = sum(ranks[other] - ranks[method] < cd for other in order)
        if stop > max(end, start + 1):
            found.append(tuple(order[start:stop]))
            end = stop
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, Interval]:
    """Spearman's rank correlation of paired values, with its 95 % interval over the pairs.

    tanh(artanh ρ ± z √((1 + ρ²/2) / (n - 3))) (Bonett and Wright 2000), an approximation. Of a perfect order
    it is that of the largest ρ but half a step, as artanh 1 is infinite. ValueError below four pairs.
    """
    n = len(a)
    if n < FEWEST_PAIRS or n != len(b):
        raise ValueError(f"A rank correlation needs four pairs at least, not {n} and {len(b)} values.")
    rho = float(stats.spearmanr(a, b).statistic)
    most = 1 - 6 / (n**3 - n)
    centre = min(max(rho, -most), most)
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * sqrt((1 + centre**2 / 2) / (n - 3))
    return rho, Interval(tanh(atanh(centre) - half), tanh(atanh(centre) + half))


def probability_of_improvement(
    a_blocks: Sequence[ArrayLike], b_blocks: Sequence[ArrayLike], resamples: int = 10_000, seed: int = 0
) -> tuple[float, Interval] | None:
    """P(a run of ``a`` beats one of ``b``), mean over the blocks, with its 95 % percentile interval.

    ``a_blocks``, ``b_blocks``: per block the scores of the runs, (runs,) each, not paired. In a block it is
    the share of all pairs of runs that ``a`` wins, ties as half. The bootstrap is stratified: it draws the
    runs of each method anew inside every block (Agarwal et al. 2021, rliable). None without a block or when
    one is empty. ValueError when the numbers of blocks differ.
    """
    if len(a_blocks) != len(b_blocks):
        raise ValueError(f"Both methods need the same blocks, not {len(a_blocks)} and {len(b_blocks)}.")
    blocks = [
        (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
        for a, b in zip(a_blocks, b_blocks, strict=True)
    ]
    if not blocks or any(a.size == 0 or b.size == 0 for a, b in blocks):
        return None
    random = np.random.default_rng(seed)
    share = 0.0
    drawn = np.zeros(resamples)
    for a, b in blocks:
        wins = (1 + np.sign(a[:, None] - b)) / 2
        share += float(wins.mean()) / len(blocks)
        shares_a, shares_b = (
            random.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=resamples) / len(runs)
            for runs in (a, b)
        )
        drawn += ((shares_a @ wins) * shares_b).sum(axis=1) / len(blocks)
    return share, _percentiles(drawn)


def _signs(n: int) -> tuple[np.ndarray, int]:
    """Assignments of signs to ``n`` differences, (assignments, n) of ±1, and how often the observed one has
    to be counted in: 0 where all are enumerated, 1 where they are a seeded sample."""
    if n <= EXACT:
        # Flipping every sign keeps |sum|, so the last difference can keep its own.
        return 1 - 2 * ((np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1), 0
    return 1 - 2 * np.random.default_rng(0).integers(0, 2, size=(FLIPS, n)), 1


def _check_finite(values: Sequence[float]) -> None:
    if not all(map(isfinite, values)):
        raise ValueError(f"Differences must be finite: {list(values)}.")


def _percentiles(samples: np.ndarray) -> Interval:
    """``LEVEL`` percentile interval of bootstrap samples; those without a score (NaN) are left out."""
    low, high = np.nanquantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def _image_sums(counts: np.ndarray) -> np.ndarray:
    """Hits, union and truth of every class per image, float64 (images, 3 classes)."""
    hit = np.diagonal(counts, axis1=1, axis2=2)
    truth, guess = counts.sum(axis=2), counts.sum(axis=1)
    return np.hstack([hit, truth + guess - hit, truth]).astype(np.float64)


def _miou(sums: np.ndarray) -> np.ndarray:
    """mIoU in percent (resamples,) from hits, union and truth of every class, (resamples, 3 classes)."""
    hit, union, truth = np.split(sums, 3, axis=1)
    there = truth > 0  # as in confusion.iou: a class without a pixel in the truth is left out
    iou = np.divide(hit, union, out=np.zeros_like(hit), where=there)
    classes = there.sum(axis=1)
    return 100 * np.divide(iou.sum(axis=1), classes, out=np.full(len(iou), np.nan), where=classes > 0)


def _complete(blocks: Mapping[Block, Mapping[str, float]]) -> tuple[list[str], np.ndarray]:
    """The methods that every block has, in the order of the first, and their scores (blocks, methods)."""
    rows = list(blocks.values())
    methods = [method for method in rows[0] if all(method in row for row in rows)] if rows else []
    return methods, np.array([[row[method] for method in methods] for row in rows], dtype=np.float64)
