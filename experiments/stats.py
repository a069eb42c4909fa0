"""Estimates and comparisons over seeds: pure functions of numbers.

Means leave out values that are not finite; results count them. Not for: choosing the runs to
average, nor tests of BLiMP's paradigms (`blimp_tests.py`).
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

CONFIDENCE = 0.95
POWER = 0.8
MAX_SEEDS = 1000
"""A gap that needs more is not worth its cost."""
RESAMPLES = 5000
LARGEST = 1e150
"""Beyond it a number is an overflow, not a measurement, and its square is infinite."""
ROUNDING = 1e-12
"""A standard deviation below this part of the values is rounding, not spread."""
Scale = Literal["linear", "log"]
"""`log` for perplexities: means are geometric, differences are ratios."""
Side = Literal["arm", "reference"]
T = TypeVar("T")

FEW_SEEDS = "seeds independent; values near normal, which few seeds cannot check"
ONE_SAMPLE = "seeds independent, values near normal; the model without seeds is one value (t)"
BOOTSTRAP = "bootstrap: seeds stand for all seeds, too narrow for few (84 % at 5)"
GEOMETRIC = "geometric mean, interval of the logarithms exponentiated; logarithms near normal"


# one arm ----------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Interval:
    """A mean and the Student t interval that covers it with 95 % confidence."""

    mean: float
    """nan where no value is finite."""
    low: float | None
    """None, as `high` and `sd`, for a single value, which has no spread; or not asked for."""
    high: float | None
    n: int
    """Values averaged."""
    sd: float | None
    """Of the sample, with n - 1; on the log scale, of the natural logarithms."""
    left_out: int = 0
    """Values that are not finite or, on the log scale, not positive."""
    scale: Scale = "linear"
    assumes: str = FEW_SEEDS


def mean_interval(values: Sequence[float], *, ends: bool = True) -> Interval:
    """Mean with its two-sided 95 % Student t interval: mean +- t(0.975, n - 1) * sd / sqrt(n).

    Without `ends` low and high are None, and scipy is not loaded. Raises ValueError without values.
    """
    if not len(values):
        raise ValueError("the mean of no values")
    usable = [value for value in values if finite(value)]
    n, left_out = len(usable), len(values) - len(usable)
    mean = statistics.fmean(usable) if usable else math.nan
    if n < 2:
        return Interval(mean=mean, low=None, high=None, n=n, sd=None, left_out=left_out)
    sd = statistics.stdev(usable, mean)
    if not ends:
        return Interval(mean=mean, low=None, high=None, n=n, sd=sd, left_out=left_out)
    half = _t_quantile(n - 1) * sd / math.sqrt(n)
    low, high = mean - half, mean + half
    return Interval(mean=mean, low=low, high=high, n=n, sd=sd, left_out=left_out)


def geometric_interval(values: Sequence[float], *, ends: bool = True) -> Interval:
    """Geometric mean with the interval of the logarithms, exponentiated: for perplexities.

    As `mean_interval` else.
    """
    logs = mean_interval([_log(value) for value in values], ends=ends)
    low, high = _back(logs.low, scale="log"), _back(logs.high, scale="log")
    mean = math.nan if not logs.n else _exp(logs.mean)
    return replace(logs, mean=mean, low=low, high=high, scale="log", assumes=GEOMETRIC)


def interval(values: Sequence[float], *, scale: Scale, ends: bool = True) -> Interval:
    """`mean_interval` or `geometric_interval`."""
    of_scale = geometric_interval if scale == "log" else mean_interval
    return of_scale(values, ends=ends)


# two arms ---------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class SeedsNeeded:
    """Seeds of each arm with which a test at 5 % finds the gap four times in five."""

    n: int | None = None
    """None if it is above MAX_SEEDS or cannot be computed; `text` says which."""
    text: str = "not known"
    assumes: str = "the gap and the spread seen are the true ones; few seeds know both only roughly"


@dataclass(kw_only=True, slots=True)
class Comparison:
    """An arm minus a reference over seeds; on the log scale the ratio arm / reference."""

    kind: Literal["paired", "one-sample", "welch", "none"]
    scale: Scale
    difference: float | None = None
    """None where an arm has no finite value. No difference is 0, on the log scale 1."""
    low: float | None = None
    """95 % t interval; None, as `high` and `p`, where seeds or their spread are missing."""
    high: float | None = None
    p: float | None = None
    """Two-sided."""
    p_holm: float | None = None
    """Adjusted for all comparisons of its table (`holm`)."""
    bootstrap: tuple[float, float] | None = None
    """95 % percentile interval over resampled seeds, from three pairs on; it assumes BOOTSTRAP."""
    effect: float | None = None
    """Hedges' g: in standard deviations of the differences, without pairs of the values (Welch).

    None for two pairs: the ratio has no expectation, so its bias cannot be corrected.
    """
    n: int = 0
    """Pairs used, or seeds against one fixed value; 0 for two samples."""
    n_arm: int = 0
    """Finite values of the arm, at common and other seeds."""
    n_reference: int = 0
    unmatched: list[int] = field(default_factory=list)
    """Seeds that only one of the two arms has."""
    not_finite: list[int] = field(default_factory=list)
    """Seeds at which an arm has no finite value: diverged, or broken."""
    needed: SeedsNeeded = field(default_factory=SeedsNeeded)
    note: str = ""
    """What is missing, and why; empty where nothing is."""
    assumes: str = "nothing: no test was made"
    """Of the test and its interval."""


def compare(
    arm: Mapping[int, float],
    reference: Mapping[int, float],
    *,
    scale: Scale = "linear",
    fixed: Side | None = None,
) -> Comparison:
    """Arm against reference, both seed -> value: paired on two or more common seeds, else Welch.

    A side that is `fixed` is one value, whose seed means nothing: every seed of the other is
    compared with it (one-sample t).
    """
    arm, reference = at_every_seed(arm, reference, fixed=fixed)
    a, b = _usable(arm, scale=scale), _usable(reference, scale=scale)
    if common := paired_seeds(a, b):
        comparison = _paired([a[s] for s in common], [b[s] for s in common], scale=scale)
    else:
        comparison = _welch(list(a.values()), list(b.values()), scale=scale)
    comparison.n_arm, comparison.n_reference = len(a), len(b)
    if fixed and common:
        _say_fixed(comparison, fixed)
    comparison.unmatched = sorted(arm.keys() ^ reference.keys())
    broken = arm.keys() - a.keys() if fixed != "arm" else set[int]()
    broken |= reference.keys() - b.keys() if fixed != "reference" else set[int]()
    comparison.not_finite = sorted(broken)
    comparison.note = "; ".join(filter(None, [comparison.note, *_missing(comparison)]))
    return comparison


def at_every_seed(
    arm: Mapping[int, T], reference: Mapping[int, T], *, fixed: Side | None
) -> tuple[Mapping[int, T], Mapping[int, T]]:
    """Both, with what the fixed side has at its one seed at each seed of the other."""
    if fixed == "arm":
        arm = {seed: one for seed in reference for one in arm.values()}
    elif fixed == "reference":
        reference = {seed: one for seed in arm for one in reference.values()}
    return arm, reference


def paired_seeds(arm: Mapping[int, object], reference: Mapping[int, object]) -> list[int]:
    """The seeds to pair: those of both, ascending; none where Welch's test has more to go by."""
    common = sorted(arm.keys() & reference.keys())
    return common if len(common) >= 2 or min(len(arm), len(reference)) < 2 else []


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979) step-down adjustment, which controls the family-wise error rate.

    None, a comparison that could not be tested, stays None and is not part of the family.
    """
    tested = sorted(p for p in p_values if p is not None)
    adjusted, largest = dict[float, float](), 0.0
    for rank, p in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted.setdefault(p, largest)
    return [None if p is None else adjusted[p] for p in p_values]


def seeds_needed(differences: Sequence[float]) -> SeedsNeeded:
    """Number of common seeds at which a paired t-test would detect the mean of `differences`."""
    usable = [value for value in differences if finite(value)]
    sd = statistics.stdev(usable) if len(usable) > 1 else 0.0
    if sd <= ROUNDING * max(map(abs, usable), default=0.0):
        return SeedsNeeded()
    return _needed(statistics.fmean(usable) / sd, arms=1)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap of the mean, nominally 95 %.

    It covers 75 % with 3 values, 84 % with 5, 90 % with 10 and 93 % with 20.
    """
    import numpy as np

    rows = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    with np.errstate(all="ignore"):
        means = np.asarray(values, dtype=float)[rows].mean(axis=1)
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def finite(value: float) -> bool:
    """Whether it is neither nan nor infinite, nor so large that it must be an overflow."""
    return abs(value) < LARGEST


def t_test(mean: float, *, se: float, df: float) -> tuple[float, float, float]:
    """Low and high of the 95 % interval of `mean`, and the two-sided p of its being 0."""
    from scipy.special import stdtr

    half = _t_quantile(df) * se
    return mean - half, mean + half, float(2 * stdtr(df, -abs(mean) / se))


# how --------------------------------------------------------------------------------------------
def _paired(a: Sequence[float], b: Sequence[float], *, scale: Scale) -> Comparison:
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    comparison = Comparison(kind="paired", scale=scale, difference=_back(mean, scale=scale), n=n)
    if n < 2:
        comparison.note = "one common seed: no interval and no test"
        return comparison
    sd = statistics.stdev(differences, mean)
    if sd <= ROUNDING * _size([*a, *b], scale=scale):
        same = abs(mean) <= ROUNDING * _size([*a, *b], scale=scale)
        what = "the arms are equal at every seed" if same else "the same gap at every seed"
        comparison.note = f"{what}: no spread to test against"
        return comparison
    low, high, comparison.p = t_test(mean, se=sd / math.sqrt(n), df=n - 1)
    comparison.low, comparison.high = _back(low, scale=scale), _back(high, scale=scale)
    comparison.effect = _hedges(mean / sd, df=n - 1)
    comparison.needed = seeds_needed(differences)
    comparison.assumes = "differences at common seeds independent and near normal (paired t)"
    if n >= 3:
        ends = bootstrap_interval(differences)
        comparison.bootstrap = (_exp(ends[0]), _exp(ends[1])) if scale == "log" else ends
    return comparison


def _say_fixed(comparison: Comparison, fixed: Side) -> None:
    """Say of a paired comparison, one side of which is equal at every seed, that it is no pair."""
    comparison.kind = "one-sample"
    if fixed == "arm":
        comparison.n_arm = 1
    else:
        comparison.n_reference = 1
    if comparison.n < 2:
        comparison.note = "one seed: no interval and no test"
    elif comparison.p is not None:
        comparison.assumes = ONE_SAMPLE
    who = "the arm" if fixed == "arm" else "the reference"
    comparison.note = "; ".join(
        filter(None, [f"{who} is one value without seeds", comparison.note])
    )


def _welch(a: Sequence[float], b: Sequence[float], *, scale: Scale) -> Comparison:
    comparison = Comparison(kind="none", scale=scale)
    if not a or not b:
        comparison.note = "an arm has no finite value: nothing to compare"
        return comparison
    gap = statistics.fmean(a) - statistics.fmean(b)
    comparison.difference = _back(gap, scale=scale)
    if min(len(a), len(b)) < 2:
        comparison.note = "no common seeds and an arm with one seed: no interval and no test"
        return comparison
    n, m, sa, sb = len(a), len(b), statistics.stdev(a), statistics.stdev(b)
    if max(sa, sb) <= ROUNDING * _size([*a, *b], scale=scale):
        comparison.note = "no spread over the seeds of either arm: nothing to test against"
        return comparison
    se = math.hypot(sa / math.sqrt(n), sb / math.sqrt(m))
    share_a, share_b = (sa / se) ** 2 / n, (sb / se) ** 2 / m
    df = 1 / (share_a**2 / (n - 1) + share_b**2 / (m - 1))
    low, high, comparison.p = t_test(gap, se=se, df=df)
    comparison.low, comparison.high = _back(low, scale=scale), _back(high, scale=scale)
    effect = gap / math.hypot(sa, sb) * math.sqrt(2)
    comparison.effect, comparison.needed = _hedges(effect, df=n + m - 2), _needed(effect, arms=2)
    comparison.kind, comparison.note = "welch", "fewer than two common seeds: not paired"
    comparison.assumes = "arms independent, each near normal, variances free (Welch's t)"
    return comparison


def _needed(effect: float, *, arms: int) -> SeedsNeeded:
    from scipy.special import nctdtr, stdtrit

    def power(n: int) -> float:
        """The chance of a significant gap of the right sign."""
        df = arms * (n - 1)
        # Beyond 40 power is 1 at any n, and scipy's noncentral t gives nan.
        shift = min(abs(effect) * math.sqrt(n / arms), 40.0)
        return 1 - float(nctdtr(df, shift, stdtrit(df, 0.5 + CONFIDENCE / 2)))

    sizes = range(2, MAX_SEEDS + 1)
    at = bisect.bisect_left(sizes, POWER, key=power)
    if at == len(sizes):
        return SeedsNeeded(text=f"> {MAX_SEEDS}")
    return SeedsNeeded(n=sizes[at], text=str(sizes[at]))


def _missing(comparison: Comparison) -> list[str]:
    notes = []
    if comparison.unmatched:
        notes.append(f"in one arm only: {_seeds(comparison.unmatched)}")
    if comparison.not_finite:
        seeds = _seeds(comparison.not_finite)
        notes.append(f"not finite at {seeds}: a comparison of the survivors")
    return notes


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _usable(values: Mapping[int, float], *, scale: Scale) -> dict[int, float]:
    scaled = {s: _log(v) if scale == "log" else float(v) for s, v in values.items()}
    return {seed: value for seed, value in scaled.items() if finite(value)}


def _size(values: Sequence[float], *, scale: Scale) -> float:
    # A relative error of a value is an absolute error of its logarithm.
    return max([abs(value) for value in values] + [1.0] * (scale == "log"))


def _hedges(effect: float, *, df: float) -> float | None:
    """`effect` without the bias that comes from estimating its standard deviation."""
    if df < 2:
        return None
    return effect * math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2)


def _t_quantile(df: float) -> float:
    from scipy.special import stdtrit  # scipy.stats takes a second to load

    return float(stdtrit(df, 0.5 + CONFIDENCE / 2))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _back(value: float | None, *, scale: Scale) -> float | None:
    return value if value is None or scale == "linear" else _exp(value)
