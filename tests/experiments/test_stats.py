"""Intervals, comparisons and seeds agree with tables and with other programs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from experiments import stats
from experiments.stats import (
    Comparison,
    bootstrap_interval,
    compare,
    geometric_interval,
    holm,
    interval,
    mean_interval,
    seeds_needed,
)

SEEDED = np.random.default_rng
spread_out = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30).filter(
    lambda values: np.std(values) > 1e-3
)
anything = st.dictionaries(st.integers(0, 6), st.floats(width=64), max_size=7)


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """Enough for what is asserted here: thousands of comparisons resample each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "RESAMPLES", 600)
        yield


def seeded(values: object) -> dict[int, float]:
    return dict(enumerate(np.asarray(values, dtype=float).tolist()))


def covers(comparison: Comparison, truth: float) -> bool:
    assert comparison.low is not None
    assert comparison.high is not None
    return comparison.low <= truth <= comparison.high


# one arm ----------------------------------------------------------------------------------------
def test_three_values_by_hand() -> None:
    # t(0.975, 2) = 4.30265 in any table; sd of 1, 2, 3 is 1.
    result = mean_interval([1.0, 2.0, 3.0])
    assert (result.mean, result.sd, result.n) == (2.0, 1.0, 3)
    assert result.low == pytest.approx(2.0 - 4.30265 / 3**0.5, abs=1e-4)
    assert result.high == pytest.approx(2.0 + 4.30265 / 3**0.5, abs=1e-4)


@given(spread_out)
def test_agrees_with_scipy(values: list[float]) -> None:
    result = mean_interval(values)
    low, high = scipy_stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=scipy_stats.sem(values)
    )
    assert result.low == pytest.approx(low, rel=1e-6, abs=1e-6)
    assert result.high == pytest.approx(high, rel=1e-6, abs=1e-6)


def test_one_value_has_no_interval() -> None:
    result = mean_interval([2.5])
    assert (result.mean, result.low, result.high, result.sd, result.n) == (2.5, None, None, None, 1)


def test_equal_values_have_an_interval_of_no_width() -> None:
    result = mean_interval([4.0, 4.0, 4.0])
    assert result.low == result.mean == result.high == 4.0


@pytest.mark.parametrize("estimate", [mean_interval, geometric_interval])
def test_no_values_are_an_error(estimate) -> None:
    with pytest.raises(ValueError, match="no values"):
        estimate([])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1.7e308])
def test_what_is_not_finite_is_counted_and_changes_nothing_else(broken: float) -> None:
    result, without = mean_interval([1.0, broken, 2.0, 3.0]), mean_interval([1.0, 2.0, 3.0])
    assert (result.n, result.left_out) == (3, 1)
    assert (result.mean, result.low, result.high) == (without.mean, without.low, without.high)


def test_an_arm_of_which_nothing_is_finite_has_a_count_and_no_mean() -> None:
    for scale in ("linear", "log"):
        result = interval([math.nan, math.inf], scale=scale)
        assert math.isnan(result.mean)
        assert (result.n, result.left_out, result.low, result.high) == (0, 2, None, None)


def test_geometric_mean_by_hand() -> None:
    result = geometric_interval([math.exp(1), math.exp(2), math.exp(3)])
    assert result.mean == pytest.approx(math.exp(2))
    assert result.low == pytest.approx(math.exp(2 - 4.30265 / 3**0.5), rel=1e-5)
    assert result.high == pytest.approx(math.exp(2 + 4.30265 / 3**0.5), rel=1e-5)
    assert result.scale == "log"
    assert "geometric" in result.assumes


@given(st.lists(st.floats(1, 1e5), min_size=2, max_size=9), st.floats(1e-3, 1e3))
def test_geometric_intervals_have_no_unit(values: list[float], unit: float) -> None:
    plain, scaled = geometric_interval(values), geometric_interval([unit * v for v in values])
    for name in ("mean", "low", "high"):
        ours, theirs = getattr(scaled, name), getattr(plain, name) * unit
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-300)
    assert plain.low is not None
    assert plain.low > 0 or plain.low == pytest.approx(0)


def test_perplexities_that_are_not_positive_or_overflowed_are_counted() -> None:
    result = geometric_interval([20.0, math.inf, 0.0, -3.0, 30.0])
    assert (result.n, result.left_out) == (2, 3)
    assert result.mean == pytest.approx(math.sqrt(600))


# two arms ---------------------------------------------------------------------------------------
def test_paired_by_hand() -> None:
    # Student's t with 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2); here t = 2 / (1 / sqrt(3)).
    result = compare({0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert (result.kind, result.n, result.difference) == ("paired", 3, 2.0)
    assert result.p == pytest.approx(1 - 12**0.5 / 14**0.5)
    assert result.low == pytest.approx(2 - 4.30265 / 3**0.5, abs=1e-4)
    # J(2) = gamma(1) / (sqrt(1) gamma(1/2)) = 1 / sqrt(pi), of d = 2.
    assert result.effect == pytest.approx(2 / math.pi**0.5)
    assert result.note == ""


@given(spread_out, st.integers(0, 99))
def test_paired_agrees_with_scipy(values: list[float], seed: int) -> None:
    others = (np.array(values) + SEEDED(seed).normal(size=len(values))).tolist()
    result = compare(seeded(values), seeded(others))
    scipys = scipy_stats.ttest_rel(values, others)
    assert result.p == pytest.approx(scipys.pvalue, rel=1e-6)
    low, high = scipys.confidence_interval()
    assert (result.low, result.high) == pytest.approx((low, high), rel=1e-5)


@given(spread_out, spread_out)
def test_welch_agrees_with_scipy(a: list[float], b: list[float]) -> None:
    result = compare(seeded(a), {100 + s: v for s, v in seeded(b).items()})
    scipys = scipy_stats.ttest_ind(a, b, equal_var=False)
    assert (result.kind, result.n) == ("welch", 0)
    assert result.p == pytest.approx(scipys.pvalue, rel=1e-6, abs=1e-12)
    low, high = scipys.confidence_interval()
    assert (result.low, result.high) == pytest.approx((low, high), rel=1e-5)


@given(spread_out, st.integers(0, 99))
def test_one_fixed_value_is_compared_with_every_seed(values: list[float], first: int) -> None:
    """Whichever seeds those are: the value's own means nothing."""
    arm = {first + i: value for i, value in enumerate(values)}
    result = compare(arm, {0: 0.8}, fixed="reference")
    scipys = scipy_stats.ttest_1samp(values, 0.8)
    assert (result.kind, result.n, result.n_reference) == ("one-sample", len(values), 1)
    assert result.unmatched == []
    assert result.p == pytest.approx(scipys.pvalue, rel=1e-6, abs=1e-12)
    low, high = (end - 0.8 for end in scipys.confidence_interval())
    assert (result.low, result.high) == pytest.approx((low, high), rel=1e-5)
    back = compare({0: 0.8}, arm, fixed="arm")
    assert (back.difference, back.p) == (pytest.approx(-result.difference), pytest.approx(result.p))


def test_what_a_seed_does_to_both_arms_cancels() -> None:
    random = SEEDED(1)
    a, b, luck = random.normal(0.3, 1, 6), random.normal(0, 1, 6), random.normal(0, 50, 6)
    plain, shifted = compare(seeded(a), seeded(b)), compare(seeded(a + luck), seeded(b + luck))
    assert (shifted.p, shifted.low) == (pytest.approx(plain.p), pytest.approx(plain.low))


def test_exchanging_the_arms_exchanges_the_sign() -> None:
    a, b = seeded([3.1, 2.7, 3.9, 3.3]), seeded([2.0, 2.9, 2.5, 2.2])
    there, back = compare(a, b), compare(b, a)
    assert (back.difference, back.p) == (pytest.approx(-there.difference), there.p)
    assert (back.low, back.high) == (pytest.approx(-there.high), pytest.approx(-there.low))
    ratio, inverse = compare(a, b, scale="log"), compare(b, a, scale="log")
    assert inverse.difference == pytest.approx(1 / ratio.difference)
    assert inverse.low == pytest.approx(1 / ratio.high)


def test_on_the_log_scale_the_difference_is_a_ratio() -> None:
    result = compare({0: 200.0, 1: 330.0}, {0: 100.0, 1: 110.0}, scale="log")
    assert result.difference == pytest.approx(6**0.5)
    assert result.low is not None
    assert result.high is not None
    assert result.low < 1 < result.high
    assert result.p is not None
    assert result.p > 0.05


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_paired_intervals_cover_the_truth_as_often_as_they_say(scale) -> None:
    random = SEEDED(5)
    luck = random.normal(4, 1, size=(1000, 5))
    a, b = luck + random.normal(0.2, 0.3, luck.shape), luck + random.normal(0, 0.3, luck.shape)
    if scale == "log":
        a, b = np.exp(a), np.exp(b)
    results = [compare(seeded(x), seeded(y), scale=scale) for x, y in zip(a, b, strict=True)]
    truth = 0.2 if scale == "linear" else math.exp(0.2)
    assert 0.93 < np.mean([covers(c, truth) for c in results]) < 0.97


@pytest.mark.parametrize(("n", "stated"), [(3, 0.75), (5, 0.84), (10, 0.90), (20, 0.93)])
def test_the_bootstrap_is_as_narrow_as_its_docstring_says(n: int, stated: float) -> None:
    draws = SEEDED(n).normal(1.0, 1.0, size=(1500, n)).tolist()
    ends = [bootstrap_interval(row) for row in draws]
    covered = np.mean([low <= 1.0 <= high for low, high in ends])
    assert covered == pytest.approx(stated, abs=0.03)


def test_the_bootstrap_gives_the_same_twice_and_stays_inside_the_data() -> None:
    values = [3.0, 1.0, 4.0, 1.5]
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert 1.0 <= low < 2.375 < high <= 4.0


# what cannot be said ----------------------------------------------------------------------------
def test_one_common_seed_gives_a_difference_and_no_more() -> None:
    result = compare({0: 3.0}, {0: 1.0, 1: 2.0})
    assert (result.kind, result.difference, result.n) == ("paired", 2.0, 1)
    assert result.low is result.high is result.p is result.bootstrap is result.effect is None
    assert "one common seed" in result.note
    assert result.unmatched == [1]
    assert result.needed.text == "not known"


def test_arms_without_common_seeds_are_compared_unpaired_and_it_says_so() -> None:
    result = compare(seeded([1.0, 2.0]), {7: 4.0, 8: 6.0})
    assert (result.kind, result.n, result.n_arm, result.n_reference) == ("welch", 0, 2, 2)
    assert "not paired" in result.note
    assert result.unmatched == [0, 1, 7, 8]


def test_one_common_seed_of_several_is_not_enough_to_pair() -> None:
    result = compare({0: 1.0, 1: 2.0, 2: 1.5}, {2: 4.0, 3: 6.0})
    assert (result.kind, result.n, result.unmatched) == ("welch", 0, [0, 1, 3])
    assert "not paired" in result.note


def test_one_seed_against_another_is_no_test() -> None:
    result = compare({0: 1.0}, {1: 3.0})
    assert (result.kind, result.difference, result.p) == ("none", -2.0, None)
    assert "no test" in result.note


def test_one_seed_against_a_fixed_value_is_no_test() -> None:
    result = compare({4: 1.0, 5: math.nan}, {0: 3.0}, fixed="reference")
    assert (result.kind, result.difference, result.p) == ("one-sample", -2.0, None)
    assert "one seed: no interval" in result.note
    assert "not finite at seed 5" in result.note
    assert compare({4: 1.0}, {}, fixed="reference").difference is None


def test_a_fixed_value_that_is_not_finite_is_no_seed_that_is_lost() -> None:
    seeds = {4: 1.0, 5: math.nan, 6: 2.0}
    for result in (
        compare(seeds, {0: math.nan}, fixed="reference"),
        compare({0: math.inf}, seeds, fixed="arm"),
    ):
        assert (result.kind, result.difference, result.not_finite) == ("none", None, [5])
        assert "no finite value" in result.note


@pytest.mark.parametrize("arm", [{}, {0: math.nan, 1: math.inf}])
def test_an_arm_without_a_value_has_no_difference(arm: Mapping[int, float]) -> None:
    result = compare(arm, {0: 1.0, 1: 2.0})
    assert (result.kind, result.difference, result.p) == ("none", None, None)
    assert "no finite value" in result.note
    assert result.not_finite == sorted(arm)


def test_a_diverged_seed_is_named_and_its_pair_left_out() -> None:
    result = compare({0: 1.0, 1: math.nan, 2: 3.0, 3: 2.0}, {0: 1.5, 1: 1.0, 2: 3.1, 3: 2.9})
    assert (result.n, result.not_finite) == (3, [1])
    assert "not finite at seed 1" in result.note


@pytest.mark.parametrize(
    ("a", "note"), [([1.1, 2.1, 3.1], "same gap"), ([1.0, 2.0, 3.0], "equal at every seed")]
)
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_without_spread_there_is_no_test(a: list[float], note: str, scale) -> None:
    b = [1.0, 2.0, 3.0] if scale == "linear" else [v / a[0] for v in a]
    a = a if scale == "linear" or note == "same gap" else b
    result = compare(seeded(a), seeded(b), scale=scale)
    assert note in result.note
    assert result.difference == pytest.approx(a[0] / b[0] if scale == "log" else a[0] - b[0])
    assert result.low is result.p is result.bootstrap is None


@settings(max_examples=3 * settings.default.max_examples)
@given(anything, anything, st.sampled_from(["linear", "log"]))
def test_no_numbers_break_it_and_none_invent_an_interval(a, b, scale) -> None:
    result = compare(a, b, scale=scale)
    if result.low is None:
        assert result.p is None
        assert result.note
        return
    assert result.difference is not None
    assert result.high is not None
    assert result.p is not None
    assert result.low <= result.difference <= result.high
    assert 0 <= result.p <= 1
    assert result.n >= 2 or result.kind == "welch"
    assert result.assumes
    no_difference = 0 if scale == "linear" else 1
    assume(abs(result.p - 0.05) > 1e-6)
    assert (result.p > 0.05) == (result.low <= no_difference <= result.high)


# families ---------------------------------------------------------------------------------------
def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), 0.06]
    assert holm([None, 0.5, None]) == [None, 0.5, None]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 12))
def test_holm_agrees_with_statsmodels(p_values: list[float], at: int) -> None:
    from statsmodels.stats.multitest import multipletests

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda: 0)  # theirs begins with one, of everything
        theirs = multipletests(p_values, method="holm")[1]
    ours = holm([*p_values[:at], None, *p_values[at:]])
    assert ours.pop(min(at, len(p_values))) is None
    assert ours == pytest.approx(list(theirs))


# seeds needed -----------------------------------------------------------------------------------
def of_effect(effect: float) -> list[float]:
    """Two differences whose mean is `effect` standard deviations."""
    return [effect - 0.5**0.5, effect + 0.5**0.5]


@pytest.mark.parametrize(("effect", "n"), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_as_in_cohens_tables(effect: float, n: int) -> None:
    assert seeds_needed(of_effect(effect)).n == n
    assert seeds_needed([-d for d in of_effect(effect)]).n == n


@given(st.floats(0.1, 11))
def test_seeds_needed_agree_with_statsmodels(effect: float) -> None:
    from statsmodels.stats.power import TTestPower

    n = seeds_needed(of_effect(effect)).n

    def theirs(size: int) -> float:
        # One-sided at half the level: a gap found with the wrong sign is no success.
        return float(TTestPower().power(effect, size, 0.025, alternative="larger"))

    if n is None:
        assert theirs(1000) < 0.8 + 1e-6
        return
    assert theirs(n) > 0.8 - 1e-6
    assert n == 2 or theirs(n - 1) < 0.8 + 1e-6


def test_seeds_needed_unpaired_agree_with_statsmodels() -> None:
    from statsmodels.stats.power import TTestIndPower

    a, b = [1.0, 1.4, 0.7, 1.1], [0.8, 0.9, 0.3, 0.6]
    result = compare(seeded(a), {9 + s: v for s, v in seeded(b).items()})
    effect = (np.mean(a) - np.mean(b)) / math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2)
    assert result.needed.n == math.ceil(TTestIndPower().solve_power(effect, power=0.8, alpha=0.05))


def test_seeds_needed_says_when_it_is_hopeless_or_unknown() -> None:
    assert seeds_needed([1.0, -1.0]).text == "> 1000"
    assert seeds_needed([1.01, -1.0]).n is None
    assert seeds_needed([1.0]).text == seeds_needed([2.0, 2.0]).text == "not known"
    assert seeds_needed([]).text == seeds_needed([1.0, math.nan]).text == "not known"
