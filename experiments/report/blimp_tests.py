"""Tests of two arms' BLiMP accuracies, each with what it assumes.

The paper's own test, and tests that account for paradigms and seeds. Not for: scoring sentences
(`relora_core/evals/blimp.py`), nor other metrics (`stats.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from experiments.report.document import plural
from experiments.stats import (
    CONFIDENCE,
    ROUNDING,
    Side,
    at_every_seed,
    bootstrap_interval,
    compare,
    paired_seeds,
    t_test,
)

if TYPE_CHECKING:
    import numpy as np

PAIRS = 1000
"""Sentence pairs of a BLiMP paradigm."""
Runs = Mapping[int, Mapping[str, float]]
"""Seed -> paradigm -> accuracy, in [0, 1]."""
FIXED_SEEDS = "silent on other seeds"
FEW_KINDS = f"paradigms independent, though those of a phenomenon are not; {FIXED_SEEDS}"


@dataclass(kw_only=True, slots=True)
class BlimpTest:
    """One test of whether an arm differs from the reference; differences are arm - reference."""

    name: str
    unit: str
    """What counts as an independent observation."""
    n: int
    """Number of units, of one model if they are sentence pairs."""
    difference: float | None = None
    low: float | None = None
    """95 %, two-sided; None, as the following, if the test has none or cannot be made."""
    high: float | None = None
    statistic: float | None = None
    p: float | None = None
    side: Literal["smaller", "two-sided"] = "two-sided"
    """The alternative hypothesis; `smaller`: the arm's accuracy is smaller."""
    note: str = ""
    """What was left out, averaged or is missing."""
    assumes: str


def blimp_tests(
    arm: Runs, reference: Runs, *, pairs: int = PAIRS, fixed: Side | None = None
) -> list[BlimpTest]:
    """Every test that the two arms' seeds and paradigms allow, the paper's first.

    `pairs` is the number of sentence pairs scored per paradigm; `fixed` as in `stats.compare`.
    Empty if no paradigm has an accuracy in both arms.
    """
    scores = _align(arm, reference, fixed=fixed)
    if scores is None:
        return []
    own, other = scores.arm.mean(axis=0), scores.reference.mean(axis=0)
    trials = len(own) * pairs
    tests = [proportion_test(float(own.mean()), float(other.mean()), trials=trials)]
    tests += paradigm_tests(own - other)
    for test in tests:
        test.note = "; ".join(filter(None, [test.note, scores.averaged]))
    tests += [_seed_test(scores, fixed=fixed)]
    if scores.paired and min(scores.arm.shape) > 1:
        tests.append(crossed_test(scores.arm - scores.reference))
    for test in tests:
        test.note = "; ".join(filter(None, [test.note, *scores.notes]))
    return tests


def proportion_test(accuracy: float, reference: float, *, trials: int = 67 * PAIRS) -> BlimpTest:
    """The paper's Z-test: two pooled proportions of `trials` pairs each."""
    from statsmodels.stats.proportion import confint_proportions_2indep, proportions_ztest

    test = BlimpTest(
        name="two-proportion Z-test (Weiss et al. 2025)",
        unit="sentence pair",
        n=trials,
        difference=accuracy - reference,
        side="smaller",
        assumes="pairs independent, though made from few templates; the models' pairs unrelated,"
        f" though they are the same; direction chosen beforehand; {FIXED_SEEDS}",
    )
    if not ROUNDING < accuracy + reference < 2 - ROUNDING:
        return replace(test, note="all right or all wrong in both: nothing to test against")
    a, b = accuracy * trials, reference * trials
    z, p = proportions_ztest([a, b], [trials, trials], alternative="smaller")
    alpha = 1 - CONFIDENCE
    low, high = confint_proportions_2indep(a, trials, b, trials, method="wald", alpha=alpha)
    return replace(test, statistic=float(z), p=float(p), low=float(low), high=float(high))


def paradigm_tests(differences: Sequence[float] | np.ndarray) -> list[BlimpTest]:
    """Paired over paradigms: t, bootstrap, Wilcoxon and sign test of arm - reference of each."""
    import numpy as np
    from scipy.stats import binomtest, wilcoxon

    # Accuracies have three or four decimals: without this, equal ones differ in their last bit.
    d = np.round(np.asarray(differences, dtype=float), 9)
    k, mean, middle = len(d), float(d.mean()), float(np.median(d))
    up, down = int((d > 0).sum()), int((d < 0).sum())
    t = BlimpTest(name="paired t", unit="paradigm", n=k, difference=mean, assumes=FEW_KINDS)
    resampled = replace(t, name="bootstrap", assumes=f"{FEW_KINDS}; too narrow for few")
    ranks = replace(t, name="Wilcoxon signed rank", difference=middle)
    ranks.assumes = f"{FEW_KINDS}; differences symmetric; `difference` is the median"
    signs = replace(t, name="sign test", difference=middle, statistic=float(up))
    signs.note = f"{up} better, {down} worse, {k - up - down} equal"
    signs.assumes = f"{FEW_KINDS}; only which is better counts; `difference` is the median"
    tests = [t, resampled, ranks, signs]
    if not up + down or k < 2:
        for test in tests:
            test.note = "equal in every paradigm" if k > 1 else "one paradigm: no test"
        return tests
    coin: Any = binomtest(up, up + down)
    rank_sum: Any = wilcoxon(d)
    signs.p = float(coin.pvalue)
    ranks.statistic, ranks.p = float(rank_sum.statistic), float(rank_sum.pvalue)
    resampled.low, resampled.high = bootstrap_interval(d.tolist())
    sd = float(d.std(ddof=1))
    if sd < 1e-12:
        t.note = "the same gap in every paradigm: no spread to test against"
        return tests
    se = sd / math.sqrt(k)
    (t.low, t.high, t.p), t.statistic = t_test(mean, se=se, df=k - 1), mean / se
    return tests


def crossed_test(differences: np.ndarray) -> BlimpTest:
    """Seeds and paradigms both random: t with Satterthwaite's degrees of freedom.

    `differences` is (seeds, paradigms), two of each at least. The variance of the mean is that of
    two crossed random factors, (MS_seed + MS_paradigm - MS_residual) / (seeds * paradigms).
    """
    s, k = differences.shape
    mean, rows, columns = differences.mean(), differences.mean(axis=1), differences.mean(axis=0)
    residual = differences - rows[:, None] - columns[None, :] + mean
    ms_seed, ms_paradigm = k * rows.var(ddof=1), s * columns.var(ddof=1)
    dof = (s - 1) * (k - 1)
    ms_residual = (residual**2).sum() / dof
    # The estimate can fall below what one factor alone gives, even below 0.
    ms = max(ms_seed + ms_paradigm - ms_residual, ms_seed, ms_paradigm)
    test = BlimpTest(
        name="t, seeds and paradigms crossed",
        unit="seed and paradigm",
        n=s * k,
        difference=float(mean),
        assumes="seeds and paradigms both samples, of all seeds and of all constructions; effects"
        " add up, near normal",
    )
    if ms <= 1e-18:
        return replace(test, note="no spread to test against")
    df = ms**2 / (ms_seed**2 / (s - 1) + ms_paradigm**2 / (k - 1) + ms_residual**2 / dof)
    se = math.sqrt(ms / (s * k))
    low, high, p = t_test(float(mean), se=se, df=float(df))
    return replace(test, statistic=float(mean) / se, low=low, high=high, p=p)


# the arms' accuracies ---------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class _Scores:
    arm: np.ndarray
    """(seeds, paradigms) that can be compared."""
    reference: np.ndarray
    paired: bool
    averaged: str = ""
    notes: list[str] = field(default_factory=list)


def _align(arm: Runs, reference: Runs, *, fixed: Side | None) -> _Scores | None:
    """The seeds that `compare` takes, and the paradigms that all of those runs have."""
    import numpy as np

    a, b = _scored(arm), _scored(reference)
    unused = len(arm) - len(a) + len(reference) - len(b)
    a, b = at_every_seed(a, b, fixed=fixed)
    common = paired_seeds(a, b)
    seeds_a, seeds_b = (common, common) if common else (sorted(a), sorted(b))
    runs = [a[seed] for seed in seeds_a] + [b[seed] for seed in seeds_b]
    if not seeds_a or not seeds_b:
        return None
    shared = set.intersection(*(set(run) for run in runs))
    everything = set().union(*arm.values(), *reference.values())
    if not shared:
        return None
    k = sorted(shared)
    scores = _Scores(
        arm=np.array([[a[seed][name] for name in k] for seed in seeds_a]),
        reference=np.array([[b[seed][name] for name in k] for seed in seeds_b]),
        paired=bool(common),
    )
    if max(len(seeds_a), len(seeds_b)) > 1:
        many = f"{len(seeds_a)}" if fixed else f"{len(seeds_a)} and {len(seeds_b)}"
        scores.averaged = f"accuracies averaged over {many} seeds first"
    unused += len(a) - len(seeds_a) + len(b) - len(seeds_b)
    if unused:
        scores.notes.append(f"{plural(unused, 'run')} left out: no common seed, or no accuracies")
    if len(everything) > len(k):
        scores.notes.append(f"{plural(len(everything) - len(k), 'paradigm')} left out: not in all")
    return scores


def _scored(runs: Runs) -> dict[int, dict[str, float]]:
    """The finite accuracies of each run that has any."""
    accuracies = {
        seed: {name: float(v) for name, v in run.items() if math.isfinite(v)}
        for seed, run in runs.items()
    }
    for value in (value for run in accuracies.values() for value in run.values()):
        if not 0 <= value <= 1:
            raise ValueError(f"an accuracy must be in [0, 1], got {value:g}")
    return {seed: run for seed, run in accuracies.items() if run}


def _seed_test(scores: _Scores, *, fixed: Side | None) -> BlimpTest:
    """A t-test over the seeds' means over paradigms."""
    own, other = scores.arm.mean(axis=1).tolist(), scores.reference.mean(axis=1).tolist()
    start = 0 if scores.paired else len(own)
    comparison = compare(dict(enumerate(own)), dict(enumerate(other, start=start)), fixed=fixed)
    return BlimpTest(
        name="one-sample t" if fixed else "paired t" if scores.paired else "Welch's t",
        unit="seed",
        n=comparison.n or len(own) + len(other),
        difference=comparison.difference,
        low=comparison.low,
        high=comparison.high,
        p=comparison.p,
        note="" if comparison.p is not None else comparison.note,
        assumes=f"{comparison.assumes}; silent on other constructions than these paradigms",
    )
