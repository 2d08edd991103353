"""The statistics against formulas written out again, and against simulated data whose truth is known.

Simulations have fixed seeds. Their bounds lie several standard errors from what a correct method gives.
"""

from __future__ import annotations

import itertools
import math
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import ceil, inf, log2, nan, sqrt

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.reports import statistics
from pipelines.reports.statistics import (
    EXACT,
    Interval,
    cliques,
    critical_difference,
    friedman_p,
    holm,
    image_bootstrap,
    interpolation,
    max_t,
    mean_ranks,
    over_both,
    probability_of_improvement,
    seeds_needed,
    sign_flip_p,
    smallest_p,
    t_interval,
    told_apart,
)
from pipelines.runs.confusion import summary

finite = st.floats(-50, 50)


def known(interval: Interval | None) -> Interval:
    assert interval is not None
    return interval


# --- summaries ---


def test_mean_median_and_sample_sd() -> None:
    assert (statistics.mean([1.0, 2.0, 6.0]), statistics.median([6.0, 1.0, 2.0])) == (3, 2)
    assert statistics.sd([1.0, 2.0, 6.0]) == pytest.approx(sqrt((4 + 1 + 9) / 2))
    assert statistics.sd([1.0]) is None
    assert statistics.mean([]) is None
    assert statistics.median([]) is None


def test_differences_are_paired_by_seed() -> None:
    gain = statistics.paired({0: 5.0, 1: 7.0, 3: 9.0}, {1: 4.0, 0: 4.0, 2: 1.0})
    assert gain.by_seed == {0: 1, 1: 3}
    assert (gain.n, gain.mean, gain.sd) == (2, 2, pytest.approx(sqrt(2)))
    nothing = statistics.paired({0: 1.0}, {1: 1.0})
    assert (nothing.n, nothing.mean, nothing.sd) == (0, None, None)


# --- intervals ---


@pytest.mark.parametrize(
    ("low", "high", "excludes"),
    [(0.1, 2, True), (-2, -0.1, True), (-1, 1, False), (0, 1, False), (-1, 0, False), (nan, nan, False)],
)
def test_an_interval_excludes_zero_only_strictly(low: float, high: float, excludes: bool) -> None:
    assert Interval(low, high).excludes_zero is excludes


def test_an_interval_contains_its_ends() -> None:
    assert [Interval(1, 2).contains(x) for x in (0.99, 1, 1.5, 2, 2.01)] == [False, True, True, True, False]


@pytest.mark.parametrize(
    ("seeds", "images", "apart"),
    [
        (Interval(1, 2), Interval(0.1, 3), True),
        (Interval(-2, -1), Interval(-3, -0.1), True),
        (Interval(-0.1, 2), Interval(0.1, 3), False),
        (Interval(1, 2), Interval(-0.1, 3), False),
        (Interval(1, 2), Interval(-2, -1), False),
        (None, Interval(1, 2), False),
        (Interval(1, 2), None, False),
    ],
)
def test_methods_are_told_apart_only_by_all_intervals(
    seeds: Interval | None, images: Interval | None, apart: bool
) -> None:
    assert told_apart(seeds, images) is apart
    for third, also in ((Interval(0.5, 1), True), (Interval(-0.5, 1), False), (None, False)):
        for order in itertools.permutations((seeds, images, third)):
            assert told_apart(*order) is (apart and also and seeds is not None and seeds.low > 0)


# --- over seeds and images at once ---


def test_the_variances_over_seeds_and_images_add() -> None:
    """By Student's table: t of 5, 18 and 19 degrees of freedom."""
    seeds = Interval(2 - 2.570582, 2 + 2.570582)  # a standard error of 1 from 6 seeds
    none, wide = Interval(1.9, 1.9), Interval(2 - 3.919928, 2 + 3.919928)  # of 0 and 2 from 15 blocks
    found = over_both(seeds, none, 6, 15)
    assert found is not None and (found.low, found.high) == pytest.approx((seeds.low, seeds.high), abs=1e-6)
    found, error = over_both(seeds, wide, 6, 15), math.sqrt(1 + 4 * 15 / 14)
    freedom = error**4 / (1 / 5 + (4 * 15 / 14) ** 2 / 14)
    assert found is not None and 18 < freedom < 19
    assert 2.093 * error < found.width / 2 < 2.101 * error  # t for 19 and for 18
    assert found.low + found.high == pytest.approx(4)
    assert over_both(none, none, 2, 10) == none
    assert over_both(None, wide, 6, 15) is over_both(seeds, None, 6, 15) is None


@pytest.mark.parametrize("images", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_no_difference_is_found_as_often_as_it_should_be(images: float) -> None:
    """Both sources at once, 6 seeds and 15 blocks: ``images`` is the standard error of the images over that
    of the seeds."""
    random, seeds, blocks, found = np.random.default_rng(3), 6, 15, {"two": 0, "three": 0}
    for _ in range(2000):
        drawn = random.normal(0, images * math.sqrt(blocks / seeds), blocks)
        differences = random.normal(drawn.mean(), 1, seeds)
        half = 1.959964 * drawn.std() / math.sqrt(blocks)  # of the means of resamples
        over_seeds, mean = t_interval(list(differences)), float(differences.mean())
        over_images = Interval(mean - half, mean + half)
        both = over_both(over_seeds, over_images, seeds, blocks)
        found["two"] += told_apart(over_seeds, over_images)
        found["three"] += told_apart(over_seeds, over_images, both)
    assert 0.035 < found["three"] / 2000 < 0.07
    assert images not in (1.0, 2.0) or found["two"] / 2000 > 0.07


# --- over seeds: t ---


def paired_differences(simulations: int, n: int, effect: float, seed: int) -> np.ndarray:
    """Scores of two methods on n seeds each, minus each other. Most of their spread is shared."""
    random = np.random.default_rng(seed)
    shared = random.normal(0, 3, (simulations, n))
    a, b = (shared + random.normal(0, 1, (simulations, n)) for _ in range(2))
    return a + effect - b


@settings(max_examples=60, deadline=None)
@given(st.lists(finite, min_size=2, max_size=12), st.sampled_from([0.9, 0.95, 0.99]))
def test_t_interval_equals_scipys(values: list[float], level: float) -> None:
    assume(np.std(values) > 1e-6)
    expected = stats.ttest_1samp(values, 0).confidence_interval(level)
    found = known(t_interval(values, level))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)


def test_t_interval_by_hand() -> None:
    found = known(t_interval([1.0, 2.0, 3.0]))  # t(2) = 4.302653, sd 1
    assert (found.low, found.high) == pytest.approx(
        (2 - 4.302653 / sqrt(3), 2 + 4.302653 / sqrt(3)), abs=1e-6
    )
    assert t_interval([0.5, 0.5]) == Interval(0.5, 0.5)
    assert t_interval([1.0]) is None
    assert t_interval([]) is None


@pytest.mark.parametrize("n", [3, 6])
def test_t_interval_holds_the_true_difference_in_95_of_100_cases(n: int) -> None:
    intervals = [known(t_interval(list(row))) for row in paired_differences(4000, n, 0.7, seed=n)]
    assert 0.94 <= np.mean([i.contains(0.7) for i in intervals]) <= 0.96
    assert np.mean([i.low > 0.7 for i in intervals]) == pytest.approx(0.025, abs=0.008)


@pytest.mark.parametrize("n", [3, 6])
def test_t_interval_finds_no_effect_where_there_is_none_but_finds_a_planted_one(n: int) -> None:
    def found(effect: float, simulations: int) -> float:
        rows = paired_differences(simulations, n, effect, seed=10 + n)
        return float(np.mean([known(t_interval(list(row))).excludes_zero for row in rows]))

    assert found(0, 4000) == pytest.approx(0.05, abs=0.01)
    assert found(20 / sqrt(n), 200) > 0.95


# --- over seeds: sign flips ---


def enumerated_p(differences: Sequence[int]) -> float:
    """Every assignment of signs, one by one, in whole numbers."""
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(x >= abs(sum(differences)) for x in sums) / len(sums)


def counted_p(differences: Sequence[int]) -> float:
    """The same from the distribution of the sum, built up difference by difference."""
    ways = Counter({0: 1})
    for d in differences:
        after: Counter[int] = Counter()
        for total, count in ways.items():
            after[total + d] += count
            after[total - d] += count
        ways = after
    reached = sum(count for total, count in ways.items() if abs(total) >= abs(sum(differences)))
    return reached / 2 ** len(differences)


whole = st.lists(st.integers(-30, 30), min_size=1, max_size=9)


@settings(max_examples=80, deadline=None)
@given(whole, st.sampled_from([0.0, 41.7, 60.1]))
def test_sign_flips_equal_their_enumeration_in_spite_of_rounding(tenths: list[int], score: float) -> None:
    """Small whole differences have many ties, and tenths that come from scores break them by rounding."""
    p = sign_flip_p([(score + d / 10) - score for d in tenths])
    assert p == enumerated_p(tenths)
    assert p == sign_flip_p([score - (score + d / 10) for d in tenths])
    assert p == sign_flip_p([-d for d in tenths][::-1])
    assert p is not None
    assert smallest_p(len(tenths)) <= p <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(finite, min_size=1, max_size=8))
def test_a_sign_flip_p_lies_between_the_smallest_and_1_and_has_no_side(values: list[float]) -> None:
    p = sign_flip_p(values)
    assert p is not None
    assert smallest_p(len(values)) <= p <= 1
    assert p == sign_flip_p([-x for x in values])


def test_sign_flips_equal_scipys() -> None:
    values = np.random.default_rng(3).normal(0.4, 1, 10)
    expected = stats.permutation_test((values,), np.sum, permutation_type="samples", n_resamples=inf).pvalue
    assert 0.01 < expected < 0.99
    assert sign_flip_p(list(values)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 9, EXACT])
def test_differences_of_one_sign_give_the_smallest_p(n: int) -> None:
    assert sign_flip_p([0.1 + i * 1e-16 for i in range(n)]) == smallest_p(n) == min(1, 2 / 2**n)
    assert sign_flip_p([(50 + i + 0.1) - (50 + i) for i in range(n)]) == smallest_p(n)
    assert sign_flip_p([0.1 * 3**i for i in range(n)]) == smallest_p(n)


def test_no_difference_is_no_evidence() -> None:
    assert sign_flip_p([]) is None
    assert sign_flip_p([0.0] * 6) == 1
    assert sign_flip_p([0.3, -0.3]) == 1
    assert sign_flip_p([0.0] * (EXACT + 1)) == 1
    assert (smallest_p(0), smallest_p(1)) == (1, 1)


@pytest.mark.parametrize("call", [sign_flip_p, t_interval])
@pytest.mark.parametrize("value", [nan, inf])
def test_what_is_not_finite_is_refused(call: Callable[[Sequence[float]], object], value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        call([1.0, value, 2.0])


def test_many_differences_are_sampled_close_to_the_exact_p_and_always_the_same_way() -> None:
    differences = [int(d) for d in np.random.default_rng(8).integers(-20, 31, 20)]
    expected = counted_p(differences)
    assert expected == counted_p([-d for d in differences])
    assert counted_p(differences[:8]) == enumerated_p(differences[:8])
    assert 0.02 < expected < 0.5
    p = sign_flip_p(differences)
    assert p == pytest.approx(expected, abs=4 * sqrt(expected * (1 - expected) / 2**16))
    assert p == sign_flip_p(differences)


@pytest.mark.parametrize("n", [EXACT + 1, 30, 40])
def test_a_sampled_p_is_never_0_nor_below_what_the_exact_test_can_reach(n: int) -> None:
    p = sign_flip_p([1.0 + i for i in range(n)])
    assert p is not None
    assert max(smallest_p(n), 2**-16) <= p < 2**-13


@pytest.mark.parametrize(("n", "attainable"), [(6, 2 / 64), (8, 12 / 256), (9, 24 / 512)])
def test_sign_flips_err_as_often_as_they_say(n: int, attainable: float) -> None:
    """At a level of 5 % the p below it come in steps of 2 / 2^n."""
    rows = paired_differences(6000, n, 0, seed=20 + n)
    assert np.mean([(sign_flip_p(list(row)) or 0) <= 0.05 for row in rows]) == pytest.approx(
        attainable, abs=0.008
    )
    found = [(sign_flip_p(list(row)) or 0) <= 0.05 for row in paired_differences(200, n, 5, seed=n)]
    assert np.mean(found) > 0.95


# --- several methods: Holm ---

p_values = st.dictionaries(st.text("abcdef", min_size=1), st.floats(0, 1), max_size=6)


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert list(adjusted) == ["a", "b", "c", "d"]
    # 4 × 0.005; 3 × 0.01; 2 × 0.03; 1 × 0.04 may not be below the one before it
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1, "b": 1}
    assert holm({"a": 0.2}) == {"a": 0.2}
    assert holm({}) == {}


@settings(max_examples=80, deadline=None)
@given(p_values)
def test_holm_is_the_closure_of_bonferroni(p: dict[str, float]) -> None:
    """A hypothesis is rejected when Bonferroni rejects every group that it is in (Marcus et al. 1976)."""
    groups = [group for size in range(1, len(p) + 1) for group in itertools.combinations(p, size)]
    adjusted = holm(p)
    assert list(adjusted) == list(p)
    for name in p:
        closed = max(
            min(1, len(group) * min(p[other] for other in group)) for group in groups if name in group
        )
        assert adjusted[name] == pytest.approx(closed, abs=1e-12)
        assert p[name] <= adjusted[name] <= 1
    order = sorted(p, key=lambda name: p[name])
    assert [adjusted[name] for name in order] == sorted(adjusted.values())


@pytest.mark.parametrize("value", [-0.1, 1.1, nan])
def test_holm_refuses_what_is_no_p(value: float) -> None:
    with pytest.raises(ValueError, match="p value of b"):
        holm({"a": 0.1, "b": value})


def test_holm_keeps_the_familywise_error() -> None:
    """Eight methods against one baseline that they share, n = 6 seeds; then with two of them truly better."""
    random = np.random.default_rng(31)
    scores = random.normal(0, 1, (4000, 9, 6))
    differences = scores[:, 1:] - scores[:, :1]

    def errors(shift: np.ndarray) -> tuple[float, float, float]:
        p = stats.ttest_1samp(differences + shift[:, None], 0, axis=2).pvalue
        adjusted = [holm({str(i): float(x) for i, x in enumerate(row)}) for row in p]
        rejected = np.array([[x <= 0.05 for x in row.values()] for row in adjusted])
        null = shift == 0
        return (
            float(rejected[:, null].any(axis=1).mean()),
            float((p[:, null] <= 0.05).any(axis=1).mean()),
            float(rejected[:, ~null].mean()) if (~null).any() else nan,
        )

    adjusted, plain, _ = errors(np.zeros(8))
    assert adjusted <= 0.06
    assert plain > 0.15  # what the adjustment is for
    adjusted, _, power = errors(np.array([8.0, 8.0] + [0.0] * 6))
    assert adjusted <= 0.06
    assert power > 0.95


def test_holm_is_exact_for_independent_p_values() -> None:
    random = np.random.default_rng(32)
    rows = random.uniform(0, 1, (8000, 5))
    wrong = [min(holm({str(i): float(x) for i, x in enumerate(row)}).values()) <= 0.05 for row in rows]
    assert np.mean(wrong) == pytest.approx(1 - (1 - 0.05 / 5) ** 5, abs=0.008)


@pytest.mark.parametrize(
    ("comparisons", "seeds"), [(1, 6), (2, 7), (4, 8), (6, 8), (7, 9), (20, 10), (25, 10), (26, 11), (51, 11)]
)
def test_seeds_needed_is_the_first_n_that_holm_can_reject(comparisons: int, seeds: int) -> None:
    assert seeds_needed(comparisons, 0.05) == seeds == 1 + ceil(log2(comparisons / 0.05))
    for n in (seeds - 1, seeds):
        p = {str(i): sign_flip_p([1.0] * n) if i == 0 else 1.0 for i in range(comparisons)}
        assert (holm({name: x or 0.0 for name, x in p.items()})["0"] <= 0.05) is (n == seeds)


# --- several methods: max-T ---

tables = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.lists(st.integers(-12, 12), min_size=n, max_size=n), min_size=1, max_size=4)
)


def enumerated_max_t(rows: Sequence[Sequence[float]]) -> list[float]:
    """Step-down max-T by loops over all signs and over the methods that are left, with |t| itself."""

    def t(values: Sequence[float]) -> float:
        centre, spread = np.mean(values), np.std(values, ddof=1) / sqrt(len(values))
        if spread > 1e-12:
            return round(float(abs(centre) / spread), 9)
        return inf if abs(centre) > 1e-12 else 0.0

    n, observed = len(rows[0]), [t(row) for row in rows]
    left = sorted(range(len(rows)), key=lambda i: -observed[i])
    found, before = [nan] * len(rows), 0.0
    while left:
        largest = [
            max(t([s * d for s, d in zip(signs, rows[i], strict=True)]) for i in left)
            for signs in itertools.product((1, -1), repeat=n)
        ]
        before = max(before, sum(x >= observed[left[0]] for x in largest) / len(largest))
        found[left.pop(0)] = before
    return found


@settings(max_examples=60, deadline=None)
@given(tables.filter(lambda rows: len(rows[0]) > 1))
def test_max_t_equals_its_enumeration(rows: list[list[int]]) -> None:
    found = max_t({str(i): {seed: d / 10 for seed, d in enumerate(row)} for i, row in enumerate(rows)})
    assert list(found.values()) == pytest.approx(enumerated_max_t(rows))


@settings(max_examples=60, deadline=None)
@given(tables)
def test_max_t_of_one_method_is_its_sign_flip_test_and_of_more_never_below_it(rows: list[list[int]]) -> None:
    table = {str(i): {seed: d / 10 for seed, d in enumerate(row)} for i, row in enumerate(rows)}
    found = max_t(table)
    for name, own in table.items():
        alone = sign_flip_p(list(own.values()))
        assert alone is not None
        assert smallest_p(len(own)) <= alone <= found[name] <= 1


def test_max_t_by_hand() -> None:
    # the same but for scale: one of four flips (and its mirror image) reaches as much
    assert max_t({"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 2.0, 1: 4.0, 2: 6.0}}) == {"a": 0.25, "b": 0.25}
    # without a difference in some seeds: half of the flips keep the two 5 on one side
    found = max_t({"flat": {0: 0.0, 1: 0.0}, "late": {1: 5.0, 2: 5.0}, "empty": {}})
    assert found == {"flat": 1.0, "late": 0.5}
    # a alone has 2 / 2^3, but the flips (1, -1, 1) and (-1, 1, -1) make more of b than a is
    assert max_t({"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 1.0, 1: -1.0, 2: 1.0}}) == {"a": 0.5, "b": 1.0}
    assert max_t({}) == max_t({"a": {}}) == {}
    with pytest.raises(ValueError, match="finite"):
        max_t({"a": {0: 1.0}, "b": {0: nan}})


def test_many_seeds_are_sampled_close_to_the_exact_max_t_and_always_the_same_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = np.random.default_rng(9).normal(0.5, 1, (3, 12))
    table = {str(i): dict(enumerate(map(float, row))) for i, row in enumerate(draw)}
    exact = max_t(table)
    assert 0.001 < min(exact.values()) < 0.5
    monkeypatch.setattr(statistics, "EXACT", 11)
    sampled = max_t(table)
    assert sampled == max_t(table) != exact
    for name, p in exact.items():
        assert sampled[name] == pytest.approx(p, abs=4 * sqrt(p * (1 - p) / 2**16))
    assert min(max_t({"a": dict.fromkeys(range(40), 1.0)}).values()) >= 2**-16


def family_errors(shift: Sequence[float], n: int, simulations: int, seed: int) -> np.ndarray:
    """How often a method without an effect is called different by max-T, Holm and no adjustment, and how
    often one with an effect is: (3, 2). Methods share the reference, and pairs of them half of their own
    noise, as variants of a method do."""
    random = np.random.default_rng(seed)
    reference = random.normal(0, 1, (simulations, 1, n))
    pairs = np.repeat(random.normal(0, 0.7, (simulations, len(shift) // 2, n)), 2, axis=1)
    own = random.normal(0, 0.7, (simulations, len(shift), n))
    planted, counts = np.array(shift) != 0, []
    for rows in np.array(shift)[:, None] + pairs + own - reference:
        table = {str(i): dict(enumerate(map(float, row))) for i, row in enumerate(rows)}
        p = {name: sign_flip_p(list(own.values())) or 0.0 for name, own in table.items()}
        rejected = [np.array([x <= 0.05 for x in found.values()]) for found in (max_t(table), holm(p), p)]
        counts.append([(r[~planted].any(), r[planted].mean() if planted.any() else 0) for r in rejected])
    return np.mean(np.array(counts, dtype=float), axis=0)


def test_max_t_keeps_the_familywise_error_of_correlated_methods() -> None:
    """Under the complete null, at seven seeds the attainable levels are 2/128 apart."""
    (joint, _), (adjusted, _), (plain, _) = family_errors([0.0] * 8, 7, 3000, seed=35)
    assert 0.03 <= joint <= 0.05 + 3 * sqrt(0.05 * 0.95 / 3000)
    assert adjusted == 0  # 8 · 2 / 2^7 is more than 5 %
    assert plain > 0.12  # what the adjustment is for


def test_max_t_keeps_the_error_of_the_others_and_finds_more_than_holm() -> None:
    """Four of eight methods are better: the others are called so no more often than they may be."""
    (joint, power), (adjusted, less), _ = family_errors([2.0] * 4 + [0.0] * 4, 9, 1500, seed=36)
    assert max(joint, adjusted) <= 0.05 + 3 * sqrt(0.05 * 0.95 / 1500)
    assert power > less + 0.1
    assert power > 0.6


# --- equal compute ---


def test_interpolation_weighs_the_neighbours_and_never_extrapolates() -> None:
    points = {"c": 8.0, "a": 1.0, "b": 2.0}
    assert interpolation(points, 2**0.25) == pytest.approx({"a": 0.75, "b": 0.25})
    assert interpolation(points, 4.0) == pytest.approx({"b": 0.5, "c": 0.5})
    assert [interpolation(points, x) for x in (1.0, 8.0)] == [{"a": 1.0, "b": 0.0}, {"b": 0.0, "c": 1.0}]
    assert [interpolation(points, x) for x in (0.99, 8.01)] == [None, None]
    assert interpolation({"a": 1.0}, 1.0) is interpolation({}, 1.0) is None
    assert interpolation({"a": 1.0, "b": 1.0}, 1.0) == {"a": 1.0, "b": 0.0}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), finite), min_size=2, max_size=6, unique_by=lambda p: p[0]))
def test_interpolation_equals_numpys_over_the_logarithm(pairs: list[tuple[int, float]]) -> None:
    points = {str(i): float(x) for i, (x, _) in enumerate(pairs)}
    values = {str(i): y for i, (_, y) in enumerate(pairs)}
    x, y = zip(*sorted(pairs), strict=True)
    for at in np.linspace(x[0], x[-1], 13):
        weights = interpolation(points, float(at))
        assert weights is not None
        assert sum(weights.values()) == pytest.approx(1)
        wanted = np.interp(np.log(at), np.log(x), y)
        assert sum(w * values[name] for name, w in weights.items()) == pytest.approx(wanted)


# --- over images ---

CLASSES = 4
SHARE = np.array([4.0, 2.0, 1.2, 0.8])  # of the classes in an image: parameters of a Dirichlet distribution
PLAIN = np.array([0.85, 0.7, 0.75, 0.6])  # share of each class that a method gets right


def mixing(right: np.ndarray) -> np.ndarray:
    """P(prediction | truth), (..., classes, classes): what is not right spreads evenly over the others."""
    wrong = (1 - right)[..., None] / (CLASSES - 1)
    return np.where(np.eye(CLASSES, dtype=bool), right[..., None], wrong)


def population_miou(right: np.ndarray) -> float:
    """mIoU in percent of infinitely many images."""
    expected = (SHARE / SHARE.sum())[:, None] * mixing(right)
    hit = np.diag(expected)
    return float(100 * np.mean(hit / (expected.sum(axis=0) + expected.sum(axis=1) - hit)))


def simulated(
    simulations: int, rights: Sequence[np.ndarray], images: int = 150, seed: int = 0
) -> list[np.ndarray]:
    """Counts (simulations, images, classes, classes) of methods on the same images.

    Images differ in their classes and in how hard they are, by the same for all methods.
    """
    random = np.random.default_rng(seed)
    truth = random.multinomial(400, random.dirichlet(SHARE, (simulations, images)))
    ease = random.uniform(-0.1, 0.1, (simulations, images, 1))
    return [random.multinomial(truth, mixing(right + ease)) for right in rights]


def differences(a: np.ndarray, b: np.ndarray, resamples: int = 1000, seed: int = 1) -> list[Interval]:
    """The interval of a - b of every simulation, all of them in one bootstrap."""
    counts = {(f"a{i}", 0): x for i, x in enumerate(a)} | {(f"b{i}", 0): x for i, x in enumerate(b)}
    found = image_bootstrap(counts.items(), resamples, seed)
    return [known(found.difference(f"a{i}", f"b{i}")) for i in range(len(a))]


def small_counts(cells: int = 3, images: int = 7, seed: int = 0) -> dict[tuple[str, int], np.ndarray]:
    """Counts with a class that is never the truth but predicted, and one that only a single image has."""
    random = np.random.default_rng(seed)
    found = {}
    for cell in range(cells):
        counts = random.integers(0, 30, (images, 5, 5))
        counts[:, 2] = 0
        counts[1:, 4] = 0
        counts[0, 4, 4] += 1
        found["abc"[cell % 3], cell // 3] = counts
    return found


def naive_bootstrap(counts: np.ndarray, resamples: int, seed: int) -> list[float]:
    """Image by image and class by class, from the same weights."""
    images, classes, _ = counts.shape
    weights = np.random.default_rng(seed).multinomial(images, [1 / images] * images, size=resamples)
    found = []
    for row in weights:
        drawn = [image for image in range(images) for _ in range(row[image])]
        scores = []
        for c in range(classes):
            hit = sum(int(counts[i, c, c]) for i in drawn)
            truth = sum(int(counts[i, c, k]) for i in drawn for k in range(classes))
            guess = sum(int(counts[i, k, c]) for i in drawn for k in range(classes))
            if truth:
                scores.append(hit / (truth + guess - hit))
        found.append(100 * sum(scores) / len(scores))
    return found


def test_resampled_scores_equal_loops_over_the_drawn_images(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = small_counts()
    for chunk in (1000, 7):
        monkeypatch.setattr(statistics, "CHUNK", chunk)
        found = image_bootstrap(counts.items(), 40, seed=5)
        for cell, array in counts.items():
            np.testing.assert_allclose(found.scores[cell], naive_bootstrap(array, 40, 5), rtol=1e-12)


def test_frames_that_follow_each_other_are_drawn_together() -> None:
    """Against the images of each drawn block, one by one."""
    counts, starts = small_counts(images=7), [0, 3, 4]
    found = image_bootstrap(counts.items(), 30, 5, starts)
    weights = np.random.default_rng(5).multinomial(3, [1 / 3] * 3, size=30)
    blocks = [[0, 1, 2], [3], [4, 5, 6]]
    for cell, array in counts.items():
        for score, row in zip(found.scores[cell], weights, strict=True):
            images = [i for block, times in zip(blocks, row, strict=True) for i in block * times]
            drawn = array[images].sum(axis=0)
            there = drawn.sum(axis=1) > 0
            with np.errstate(invalid="ignore"):
                iou = np.diag(drawn) / (drawn.sum(axis=0) + drawn.sum(axis=1) - np.diag(drawn))
            assert score == pytest.approx(100 * iou[there].mean(), rel=1e-12)
    each = image_bootstrap(counts.items(), 30, 5, range(7)).scores
    alone = image_bootstrap(counts.items(), 30, 5).scores
    assert all(np.array_equal(each[cell], alone[cell]) for cell in counts)


def test_copies_of_a_frame_do_not_narrow_the_interval() -> None:
    """Twelve images, each five times in a row, say as much as twelve images."""
    random = np.random.default_rng(2)
    a, b = (random.integers(1, 40, (12, 3, 3)) for _ in range(2))
    plain = known(image_bootstrap({("a", 0): a, ("b", 0): b}.items(), 4000, 0).difference("a", "b"))
    copies = {("a", 0): np.repeat(a, 5, axis=0), ("b", 0): np.repeat(b, 5, axis=0)}
    blocks = known(image_bootstrap(copies.items(), 4000, 0, range(0, 60, 5)).difference("a", "b"))
    assert (blocks.low, blocks.high) == pytest.approx((plain.low, plain.high))
    naive = known(image_bootstrap(copies.items(), 4000, 0).difference("a", "b"))
    assert naive.width < 0.6 * plain.width


def test_blocks_do_not_cross_videos() -> None:
    videos = [f"test/a_{i:03}.png" for i in range(62)] + [f"test/b_f{i}.png" for i in range(171)]
    starts = statistics.block_starts(videos, 15)
    lengths = np.diff([*starts, len(videos)])
    assert 62 in starts and len(starts) == 4 + 11 and set(lengths) <= {15, 16}
    assert statistics.block_starts(videos, 1) == [*range(233)]
    assert statistics.block_starts(videos, 1000) == [0, 62]
    others = ["street.png", "0001.png", "house 2.final.png", "0002_label.png"]  # no two of a video
    assert statistics.block_starts(others, 15) == [0, 1, 2, 3]
    assert statistics.block_starts([], 15) == []


def test_a_resample_of_the_only_image_is_the_score_of_the_split() -> None:
    counts = {("a", 0): small_counts()["a", 0][:1]}
    expected = summary(counts["a", 0], list("vwxyz"))["miou"]
    np.testing.assert_allclose(image_bootstrap(counts.items(), 3, 0).scores["a", 0], expected, atol=1e-6)


def test_sums_beyond_float32_stay_exact() -> None:
    """One missed pixel in 2^25."""
    counts = {("a", 0): np.array([[[2**25, 1], [0, 5]]])}
    expected = 100 * (2**25 / (2**25 + 1) + 5 / 6) / 2
    assert image_bootstrap(counts.items(), 1, 0).scores["a", 0][0] == pytest.approx(expected, rel=1e-13)


def test_small_integer_types_do_not_overflow_in_the_bootstrap() -> None:
    counts = small_counts(1)
    narrow = {cell: (8 * array).astype(np.uint8) for cell, array in counts.items()}
    wide = {cell: array.astype(np.int64) for cell, array in narrow.items()}
    small, large = (image_bootstrap(counts.items(), 20, 0) for counts in (narrow, wide))
    np.testing.assert_array_equal(small.scores["a", 0], large.scores["a", 0])


def test_a_resample_without_a_labelled_pixel_does_not_count() -> None:
    """Half of the resamples of two images hold the empty one alone or together with the other."""
    counts = np.array([[[6, 2], [0, 8]], [[0, 0], [0, 0]]])
    found = image_bootstrap({("a", 0): counts, ("b", 0): counts[:, ::-1, ::-1]}.items(), 200, 0)
    score = found.scores["a", 0]
    assert 20 < np.isnan(score).sum() < 80
    np.testing.assert_allclose(score[~np.isnan(score)], 100 * (6 / 8 + 8 / 10) / 2)
    assert found.difference("a", "b") == Interval(0, 0)


def test_the_bootstrap_holds_the_counts_of_one_cell_at_a_time() -> None:
    """A hundred cells of 150 classes would not fit into memory."""
    alive = list[weakref.ref[np.ndarray]]()

    def read() -> Iterator[tuple[tuple[str, int], np.ndarray]]:
        for seed in range(6):
            assert sum(ref() is not None for ref in alive) <= 1  # the one before, which is let go next
            counts = small_counts(1)["a", 0].copy()
            alive.append(weakref.ref(counts))
            yield ("a", seed), counts
            del counts

    found = image_bootstrap(read(), 5, 0)
    assert len(alive) == 6  # each was read once
    alone = image_bootstrap(small_counts(1).items(), 5, 0)
    np.testing.assert_array_equal(found.scores["a", 3], alone.scores["a", 0])


def test_a_difference_is_over_the_seeds_that_both_have() -> None:
    counts = small_counts(6)
    counts["a", 7] = small_counts(1, seed=9)["a", 0]
    found = image_bootstrap(counts.items(), 300, seed=5)
    naive = {cell: np.array(naive_bootstrap(array, 300, 5)) for cell, array in counts.items()}
    gap = (naive["a", 0] + naive["a", 1] - naive["b", 0] - naive["b", 1]) / 2
    expected = sorted(gap)
    forward, backward = known(found.difference("a", "b")), known(found.difference("b", "a"))
    assert expected[6] <= forward.low <= expected[8]
    assert expected[291] <= forward.high <= expected[293]
    assert (backward.low, backward.high) == pytest.approx((-forward.high, -forward.low))


def test_a_combination_of_cells_is_the_interval_of_their_weighted_sum() -> None:
    found = image_bootstrap(small_counts(6).items(), 300, seed=5)
    sums = 0.5 * found.scores["a", 0] - 0.2 * found.scores["b", 0] - 0.3 * found.scores["b", 1]
    interval = known(found.combination({("a", 0): 0.5, ("b", 0): -0.2, ("b", 1): -0.3}))
    assert (interval.low, interval.high) == pytest.approx(np.quantile(sums, [0.025, 0.975]))
    plain, same = (
        found.difference("a", "b"),
        {("a", s): 0.5 for s in (0, 1)} | {("b", s): -0.5 for s in (0, 1)},
    )
    combined = known(found.combination(same))
    assert (combined.low, combined.high) == pytest.approx((known(plain).low, known(plain).high))
    assert found.combination({("a", 0): 1.0, ("a", 9): -1.0}) is found.combination({}) is None


def test_methods_without_a_common_seed_have_no_difference() -> None:
    counts = small_counts(1)["a", 0]
    found = image_bootstrap({("a", 0): counts, ("b", 1): counts}.items(), 5, 0)
    assert found.difference("a", "b") is None
    assert found.difference("a", "never run") is None


def test_the_bootstrap_hangs_on_its_seed_and_not_on_the_order_of_the_cells() -> None:
    counts = small_counts(6)
    first, again, other = (image_bootstrap(counts.items(), 200, seed) for seed in (0, 0, 1))
    reverse = image_bootstrap(reversed(counts.items()), 200, 0)
    alone = image_bootstrap({("b", 1): counts["b", 1]}.items(), 200, 0)
    for cell in counts:
        np.testing.assert_array_equal(first.scores[cell], again.scores[cell])
        np.testing.assert_array_equal(first.scores[cell], reverse.scores[cell])
    np.testing.assert_array_equal(first.scores["b", 1], alone.scores["b", 1])
    assert first.difference("a", "c") == reverse.difference("a", "c")
    assert first.difference("a", "c") != other.difference("a", "c")


def test_methods_are_scored_on_the_same_resamples() -> None:
    counts = small_counts()["a", 0]
    found = image_bootstrap({("a", 0): counts, ("b", 0): counts.copy()}.items(), 200, 0)
    assert np.ptp(found.scores["a", 0]) > 1
    assert found.difference("a", "b") == Interval(0, 0)


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ([(3, 4, 4), (2, 4, 4)], "same images and classes"),
        ([(3, 4, 4), (3, 5, 5)], "same images and classes"),
        ([], "no cell"),
        ([(3, 4, 5)], "images, C, C"),
        ([(4, 4)], "images, C, C"),
        ([(0, 4, 4)], "images, C, C"),
    ],
)
def test_counts_that_do_not_fit_are_refused(shapes: list[tuple[int, ...]], sentence: str) -> None:
    counts = {("a", seed): np.ones(shape, dtype=np.int64) for seed, shape in enumerate(shapes)}
    with pytest.raises(ValueError, match=sentence):
        image_bootstrap(counts.items(), 10, 0)


def test_a_cell_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\('b', 0\) carries a label"):
        image_bootstrap({("a", 0): np.ones((2, 3, 3)), ("b", 0): np.zeros((2, 3, 3))}.items(), 10, 0)


def test_the_bootstrap_never_holds_all_resamples_of_the_images() -> None:
    counts = {("a", 0): np.ones((500, 2, 2), dtype=np.int64)}
    tracemalloc.start()
    image_bootstrap(counts.items(), 5000, 0)  # 20 MB of weights
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6


def test_image_bootstrap_holds_the_true_difference_in_95_of_100_cases() -> None:
    better = PLAIN + np.array([0.02, 0.0, 0.05, 0.04])
    effect = population_miou(better) - population_miou(PLAIN)
    assert effect > 1
    a, b = simulated(1200, [better, PLAIN], seed=40)
    intervals = differences(a, b)
    assert 0.93 <= np.mean([i.contains(effect) for i in intervals]) <= 0.97
    assert np.mean([i.low > effect for i in intervals]) == pytest.approx(0.025, abs=0.015)


def test_image_bootstrap_finds_no_effect_where_there_is_none_but_finds_a_planted_one() -> None:
    none, plain, better = simulated(1200, [PLAIN, PLAIN, PLAIN + 0.04], seed=41)
    assert np.mean([i.excludes_zero for i in differences(none, plain)]) == pytest.approx(0.05, abs=0.01)
    assert np.mean([i.low > 0 for i in differences(better[:100], plain[:100])]) > 0.95


# --- over benchmarks: ranks ---

# Table 6 of Demšar (2006): AUC of C4.5 and three variants on 14 data sets. The paper ranks one of two values
# that it prints as 0.975 before the other.
METHODS = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
AUC = [
    [0.763, 0.768, 0.771, 0.798],
    [0.599, 0.591, 0.590, 0.569],
    [0.954, 0.971, 0.968, 0.967],
    [0.628, 0.661, 0.654, 0.657],
    [0.882, 0.888, 0.886, 0.898],
    [0.936, 0.931, 0.916, 0.931],
    [0.661, 0.668, 0.609, 0.685],
    [0.583, 0.583, 0.563, 0.625],
    [0.775, 0.838, 0.866, 0.875],
    [1.000, 1.000, 1.000, 1.000],
    [0.940, 0.962, 0.965, 0.962],
    [0.619, 0.666, 0.614, 0.669],
    [0.972, 0.981, 0.9751, 0.975],
    [0.957, 0.978, 0.946, 0.970],
]
DEMSAR = {f"set {i}": dict(zip(METHODS, row, strict=True)) for i, row in enumerate(AUC)}


def friedman_by_hand(rows: Sequence[Sequence[float]]) -> float:
    """p of χ² from ranks counted one by one, with the usual correction for ties."""
    n, k = len(rows), len(rows[0])
    ranks = [[sum(y > x for y in row) + (1 + sum(y == x for y in row)) / 2 for x in row] for row in rows]
    sums = [sum(rank[j] for rank in ranks) for j in range(k)]
    ties = sum(count**3 - count for row in rows for count in Counter(row).values())
    chi = 12 / (n * k * (k + 1)) * sum(s**2 for s in sums) - 3 * n * (k + 1)
    return float(stats.chi2.sf(chi / (1 - ties / (n * k * (k**2 - 1))), k - 1))


def test_ranks_and_groups_of_demsars_example() -> None:
    ranks = mean_ranks(DEMSAR)
    assert list(ranks) == list(METHODS)
    assert list(ranks.values()) == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    for alpha, cd, groups in (
        (0.05, 1.25, [("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5")]),
        (0.10, 1.12, [("C4.5+m+cf", "C4.5+m", "C4.5+cf"), ("C4.5+cf", "C4.5")]),
    ):
        assert critical_difference(4, 14, alpha) == pytest.approx(cd, abs=5e-3)
        assert cliques(ranks, critical_difference(4, 14, alpha)) == groups


def test_friedman_of_demsars_example() -> None:
    assert friedman_p(DEMSAR) == pytest.approx(friedman_by_hand(AUC), rel=1e-9)


def test_ranks_are_of_the_methods_that_every_block_has() -> None:
    blocks = {
        ("x", 1): {"a": 1.0, "lost": 9.0, "b": 3.0, "c": 2.0},
        ("x", 2): {"c": 5.0, "b": 5.0, "a": 7.0},
        ("y", 1): {"a": 1.0, "b": 2.0, "c": 3.0, "new": 0.0},
    }
    assert mean_ranks(blocks) == pytest.approx({"a": 7 / 3, "b": 5.5 / 3, "c": 5.5 / 3})
    rows = [[row[m] for m in "abc"] for row in blocks.values()]
    assert friedman_p(blocks) == pytest.approx(friedman_by_hand(rows))


def test_too_few_methods_or_blocks_have_no_friedman_p() -> None:
    row = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert friedman_p({"x": row}) is None
    assert friedman_p({"x": row, "y": {"a": 1.0, "b": 2.0}}) is None
    assert friedman_p({}) is None
    assert friedman_p({"x": dict.fromkeys("abc", 1.0), "y": dict.fromkeys("abc", 2.0)}) == 1
    assert mean_ranks({}) == {}
    assert mean_ranks({"x": {"a": 1.0}, "y": {"b": 1.0}}) == {}


# Table 5 (a) of Demšar (2006).
NEMENYI = {
    0.05: [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164],
    0.10: [1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920],
}


@pytest.mark.parametrize("alpha", NEMENYI)
def test_critical_differences_equal_demsars_table(alpha: float) -> None:
    for methods, q in enumerate(NEMENYI[alpha], start=2):
        expected = q * sqrt(methods * (methods + 1) / (6 * 7))
        assert critical_difference(methods, 7, alpha) == pytest.approx(expected, rel=4e-4)


@pytest.mark.parametrize(("methods", "blocks"), [(1, 5), (3, 0)])
def test_ranks_of_nothing_have_no_critical_difference(methods: int, blocks: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        critical_difference(methods, blocks)


def test_friedman_and_nemenyi_err_as_often_as_they_say() -> None:
    cd = critical_difference(5, 20)

    def found(effect: float, simulations: int) -> tuple[float, float]:
        """How often each of the two sees a difference between five methods on 20 blocks."""
        friedman, nemenyi = [], []
        for scores in np.random.default_rng(51).normal(0, 1, (simulations, 20, 5)):
            scores[:, 0] += effect
            blocks = {i: dict(zip("abcde", map(float, row), strict=True)) for i, row in enumerate(scores)}
            friedman.append((friedman_p(blocks) or 0) <= 0.05)
            nemenyi.append([len(group) for group in cliques(mean_ranks(blocks), cd)] != [5])
        return float(np.mean(friedman)), float(np.mean(nemenyi))

    assert found(0, 1500) == pytest.approx((0.045, 0.045), abs=0.015)
    assert min(found(3, 50)) > 0.95


def test_cliques_by_hand() -> None:
    ranks = {"d": 4.5, "a": 1.0, "c": 3.0, "b": 2.0}
    assert cliques(ranks, 1.0) == []
    assert cliques(ranks, 1.1) == [("a", "b"), ("b", "c")]
    assert cliques(ranks, 2.1) == [("a", "b", "c"), ("c", "d")]
    assert cliques(ranks, 2.6) == [("a", "b", "c"), ("b", "c", "d")]
    assert cliques(ranks, 3.5) == [("a", "b", "c"), ("b", "c", "d")]
    assert cliques(ranks, 3.6) == [("a", "b", "c", "d")]
    assert cliques({}, 1.0) == []


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text("abcdefgh", min_size=1), st.integers(2, 12), max_size=7), st.integers(0, 8))
def test_cliques_are_all_largest_groups(halves: dict[str, int], cd: int) -> None:
    groups = [
        frozenset(group)
        for size in range(2, len(halves) + 1)
        for group in itertools.combinations(halves, size)
        if max(halves[m] for m in group) - min(halves[m] for m in group) < cd
    ]
    largest = {group for group in groups if not any(group < other for other in groups)}
    found = cliques({method: half / 2 for method, half in halves.items()}, cd / 2)
    assert {frozenset(group) for group in found} == largest
    assert len(found) == len(largest)
    best = [[halves[method] for method in group] for group in found]
    assert best == sorted(best)
    assert all(row == sorted(row) for row in best)


# --- over benchmarks: probability of improvement ---

runs = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=5)


def test_probability_of_improvement_by_hand() -> None:
    found = probability_of_improvement([[1.0, 3.0], [5.0]], [[2.0, 3.0], [5.0, 4.0, 6.0]])
    # 0 + 0 + 1 + 1/2 of 4 pairs; 1/2 + 1 + 0 of 3
    assert found is not None
    assert found[0] == pytest.approx((1.5 / 4 + 1.5 / 3) / 2)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(runs, runs), min_size=1, max_size=4))
def test_probability_of_improvement_equals_mann_whitney(
    blocks: list[tuple[list[float], list[float]]],
) -> None:
    a, b = [np.array(x) for x, _ in blocks], [np.array(y) for _, y in blocks]
    there, back = (probability_of_improvement(*pair, resamples=50) for pair in ((a, b), (b, a)))
    assert there is not None
    assert back is not None
    shares = [stats.mannwhitneyu(x, y, method="asymptotic").statistic / (len(x) * len(y)) for x, y in blocks]
    assert there[0] == pytest.approx(np.mean(shares))
    assert there[0] + back[0] == pytest.approx(1)
    assert -1e-12 <= there[1].low <= there[1].high <= 1 + 1e-12


def test_probability_of_improvement_resamples_runs_inside_their_blocks() -> None:
    """In every block one method wins for certain: only drawing runs across blocks would change the share."""
    found = probability_of_improvement([[9.0, 8.0], [1.0, 2.0]], [[5.0, 4.0], [6.0, 7.0]], resamples=100)
    assert found == (0.5, Interval(0.5, 0.5))
    found = probability_of_improvement([[9.0, 8.0]] * 3, [[1.0, 2.0, 3.0]] * 3)
    assert found is not None
    assert (found[0], found[1].low, found[1].high) == pytest.approx((1, 1, 1))


def test_the_interval_of_the_probability_equals_a_plain_bootstrap() -> None:
    random = np.random.default_rng(60)
    a, b = ([random.normal(shift, 1, 8) for _ in range(3)] for shift in (0.4, 0.0))
    drawn = [
        np.mean(
            [
                np.mean(random.choice(x, len(x))[:, None] > random.choice(y, len(y)))
                for x, y in zip(a, b, strict=True)
            ]
        )
        for _ in range(4000)
    ]
    found = probability_of_improvement(a, b)
    assert found is not None
    assert (found[1].low, found[1].high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.015)
    assert found == probability_of_improvement(a, b)
    assert found != probability_of_improvement(a, b, seed=1)


def test_the_interval_of_the_probability_holds_the_truth() -> None:
    random = np.random.default_rng(61)
    truth = stats.norm.cdf(0.5 / sqrt(2))
    covered, planted = [], []
    for _ in range(300):
        a, b = random.normal(0.5, 1, (4, 25)), random.normal(0, 1, (4, 25))
        found = probability_of_improvement(list(a), list(b), resamples=500)
        assert found is not None
        covered.append(found[1].contains(float(truth)))
        planted.append(found[1].low > 0.5)
    assert 0.92 <= np.mean(covered) <= 0.98
    assert np.mean(planted) > 0.85


def test_an_empty_block_has_no_probability_of_improvement() -> None:
    assert probability_of_improvement([[1.0], []], [[1.0], [2.0]]) is None
    assert probability_of_improvement([[1.0]], [[]]) is None
    assert probability_of_improvement([], []) is None
    with pytest.raises(ValueError, match="same blocks"):
        probability_of_improvement([[1.0]], [[1.0], [2.0]])
