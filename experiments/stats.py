"""Estimates and comparisons over seeds: pure functions of numbers.

Values that are not finite are never averaged and never dropped in silence: results count them. Not
for: choosing which runs to average, nor tests of BLiMP's paradigms (`stats_blimp.py`).
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

CONFIDENCE = 0.95
POWER = 0.8
MAX_SEEDS = 1000
"""More than these resolve no gap that anyone would pay for."""
RESAMPLES = 5000
LARGEST = 1e150
"""Beyond it a number is an overflow, not a measurement, and its square is infinite."""
ROUNDING = 1e-12
"""A standard deviation below this part of the values is rounding, not spread."""
Scale = Literal["linear", "log"]
"""`log` for perplexities: means are geometric, differences are ratios."""

FEW_SEEDS = "seeds independent; values near normal, which few seeds cannot check"
GEOMETRIC = "geometric mean, interval of the logarithms exponentiated; logarithms near normal"


# one arm ----------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Interval:
    """A mean and the Student t interval that covers it with 95 % confidence."""

    mean: float
    """nan where no value is finite."""
    low: float | None
    """None, as `high` and `sd`, of a single value: it says nothing about spread."""
    high: float | None
    n: int
    """Values averaged."""
    sd: float | None
    """Of the sample, with n - 1; on the log scale, of the natural logarithms."""
    left_out: int = 0
    """Values that are not finite or, on the log scale, not positive."""
    scale: Scale = "linear"
    assumes: str = FEW_SEEDS


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean with its two-sided 95 % Student t interval: mean +- t(0.975, n - 1) * sd / sqrt(n).

    Raises ValueError without values.
    """
    if not len(values):
        raise ValueError("the mean of no values")
    kept = [value for value in values if finite(value)]
    n, left_out = len(kept), len(values) - len(kept)
    mean = statistics.fmean(kept) if kept else math.nan
    if n < 2:
        return Interval(mean=mean, low=None, high=None, n=n, sd=None, left_out=left_out)
    sd = statistics.stdev(kept, mean)
    half = _t_quantile(n - 1) * sd / math.sqrt(n)
    low, high = mean - half, mean + half
    return Interval(mean=mean, low=low, high=high, n=n, sd=sd, left_out=left_out)


def geometric_interval(values: Sequence[float]) -> Interval:
    """Geometric mean with the interval of the logarithms, exponentiated: for perplexities.

    Raises ValueError without values.
    """
    found = mean_interval([_log(value) for value in values])
    low, high = _back(found.low, scale="log"), _back(found.high, scale="log")
    mean = math.nan if not found.n else _exp(found.mean)
    return replace(found, mean=mean, low=low, high=high, scale="log", assumes=GEOMETRIC)


def interval(values: Sequence[float], *, scale: Scale) -> Interval:
    """`mean_interval` or `geometric_interval`."""
    return geometric_interval(values) if scale == "log" else mean_interval(values)


# two arms ---------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class SeedsNeeded:
    """Seeds of each arm with which a test at 5 % would find the gap four times in five."""

    n: int | None = None
    """None where over MAX_SEEDS, or not known; `text` says which."""
    text: str = "not known"
    assumes: str = "the gap and the spread seen are the true ones; few seeds know both only roughly"


@dataclass(kw_only=True, slots=True)
class Comparison:
    """An arm minus a reference over seeds; on the log scale the ratio arm / reference."""

    kind: Literal["paired", "welch", "none"]
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
    """95 % percentile interval over resampled seeds, from three pairs on."""
    effect: float | None = None
    """Hedges' g: in standard deviations of the differences (paired) or of the values (Welch).

    None of two pairs, whose ratio has no expectation that could be corrected for.
    """
    n: int = 0
    """Pairs used; 0 where not paired."""
    n_arm: int = 0
    """Finite values of the arm, common seed or not."""
    n_reference: int = 0
    unmatched: list[int] = field(default_factory=list)
    """Seeds that only one of the two arms has."""
    not_finite: list[int] = field(default_factory=list)
    """Seeds at which an arm has no finite value: diverged, or broken."""
    needed: SeedsNeeded = field(default_factory=SeedsNeeded)
    note: str = ""
    """What cannot be said, and why; empty where nothing is missing."""
    assumes: str = "nothing: no test was made"


def compare(
    arm: Mapping[int, float], reference: Mapping[int, float], *, scale: Scale = "linear"
) -> Comparison:
    """Arm against reference, both seed -> value: paired on two or more common seeds, else Welch."""
    a, b = _usable(arm, scale=scale), _usable(reference, scale=scale)
    common = sorted(a.keys() & b.keys())
    if len(common) >= 2 or (common and min(len(a), len(b)) < 2):
        found = _paired([a[s] for s in common], [b[s] for s in common], scale=scale)
    else:
        found = _welch(list(a.values()), list(b.values()), scale=scale)
    found.n_arm, found.n_reference = len(a), len(b)
    found.unmatched = sorted(arm.keys() ^ reference.keys())
    broken = (arm.keys() - a.keys()) | (reference.keys() - b.keys())
    found.not_finite = sorted(broken)
    found.note = "; ".join(filter(None, [found.note, *_missing(found)]))
    return found


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment: holds the chance of any false positive in the family.

    None, a comparison that could not be tested, stays None and does not count in the family.
    """
    known = sorted(p for p in p_values if p is not None)
    adjusted, reached = dict[float, float](), 0.0
    for rank, p in enumerate(known):
        reached = max(reached, min(1.0, (len(known) - rank) * p))
        adjusted.setdefault(p, reached)
    return [None if p is None else adjusted[p] for p in p_values]


def seeds_needed(differences: Sequence[float]) -> SeedsNeeded:
    """Common seeds with which a paired t-test would resolve the mean of `differences`."""
    kept = [value for value in differences if finite(value)]
    sd = statistics.stdev(kept) if len(kept) > 1 else 0.0
    if sd <= ROUNDING * max(map(abs, kept), default=0.0):
        return SeedsNeeded()
    return _needed(statistics.fmean(kept) / sd, arms=1)


def bootstrap_interval(
    values: Sequence[float], *, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap of the mean, 95 % in name: it covers 75 % with 3 values, 84 with 5.

    With 10 it is 90 %, with 20 it is 93.
    """
    import numpy as np

    rows = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    with np.errstate(all="ignore"):
        means = np.asarray(values, dtype=float)[rows].mean(axis=1)
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def finite(value: float) -> bool:
    """Neither nan nor infinite, nor so large that only an overflow can have made it."""
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
    found = Comparison(kind="paired", scale=scale, difference=_back(mean, scale=scale), n=n)
    if n < 2:
        found.note = "one common seed: no interval and no test"
        return found
    sd = statistics.stdev(differences, mean)
    if sd <= ROUNDING * _size([*a, *b], scale=scale):
        same = abs(mean) <= ROUNDING * _size([*a, *b], scale=scale)
        what = "the arms are equal at every seed" if same else "the same gap at every seed"
        found.note = f"{what}: no spread to test against"
        return found
    low, high, found.p = t_test(mean, se=sd / math.sqrt(n), df=n - 1)
    found.low, found.high = _back(low, scale=scale), _back(high, scale=scale)
    found.effect = _hedges(mean / sd, df=n - 1)
    found.needed = seeds_needed(differences)
    found.assumes = "differences at common seeds independent and near normal (paired t)"
    if n >= 3:
        ends = bootstrap_interval(differences)
        found.bootstrap = (_exp(ends[0]), _exp(ends[1])) if scale == "log" else ends
        found.assumes += "; bootstrap: seeds stand for all seeds, too narrow for few (84 % at 5)"
    return found


def _welch(a: Sequence[float], b: Sequence[float], *, scale: Scale) -> Comparison:
    found = Comparison(kind="none", scale=scale)
    if not a or not b:
        found.note = "an arm has no finite value: nothing to compare"
        return found
    gap = statistics.fmean(a) - statistics.fmean(b)
    found.difference = _back(gap, scale=scale)
    if min(len(a), len(b)) < 2:
        found.note = "no common seeds and an arm with one seed: no interval and no test"
        return found
    n, m, sa, sb = len(a), len(b), statistics.stdev(a), statistics.stdev(b)
    if max(sa, sb) <= ROUNDING * _size([*a, *b], scale=scale):
        found.note = "no spread over the seeds of either arm: nothing to test against"
        return found
    se = math.hypot(sa / math.sqrt(n), sb / math.sqrt(m))
    share_a, share_b = (sa / se) ** 2 / n, (sb / se) ** 2 / m
    df = 1 / (share_a**2 / (n - 1) + share_b**2 / (m - 1))
    low, high, found.p = t_test(gap, se=se, df=df)
    found.low, found.high = _back(low, scale=scale), _back(high, scale=scale)
    effect = gap / math.hypot(sa, sb) * math.sqrt(2)
    found.effect, found.needed = _hedges(effect, df=n + m - 2), _needed(effect, arms=2)
    found.kind, found.note = "welch", "fewer than two common seeds: not paired"
    found.assumes = "arms independent, each near normal, variances free (Welch's t)"
    return found


def _needed(effect: float, *, arms: int) -> SeedsNeeded:
    from scipy.special import nctdtr, stdtrit

    def reached(n: int) -> float:
        """Power in the gap's own direction; significance with the wrong sign is no success."""
        df = arms * (n - 1)
        # Beyond 40 power is 1 at any n, and scipy's noncentral t gives nan.
        shift = min(abs(effect) * math.sqrt(n / arms), 40.0)
        return 1 - float(nctdtr(df, shift, stdtrit(df, 0.5 + CONFIDENCE / 2)))

    sizes = range(2, MAX_SEEDS + 1)
    at = bisect.bisect_left(sizes, POWER, key=reached)
    if at == len(sizes):
        return SeedsNeeded(text=f"> {MAX_SEEDS}")
    return SeedsNeeded(n=sizes[at], text=str(sizes[at]))


def _missing(found: Comparison) -> list[str]:
    said = []
    if found.unmatched:
        said.append(f"in one arm only: {_seeds(found.unmatched)}")
    if found.not_finite:
        said.append(f"not finite at {_seeds(found.not_finite)}: a comparison of the survivors")
    return said


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _usable(values: Mapping[int, float], *, scale: Scale) -> dict[int, float]:
    taken = {s: _log(v) if scale == "log" else float(v) for s, v in values.items()}
    return {seed: value for seed, value in taken.items() if finite(value)}


def _size(values: Sequence[float], *, scale: Scale) -> float:
    # A relative error of a value is an absolute one of its logarithm, however near 0 that is.
    return max([abs(value) for value in values] + [1.0] * (scale == "log"))


def _hedges(effect: float, *, df: float) -> float | None:
    """`effect` without the bias it has because its standard deviation is estimated, too."""
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
