"""A report's first section: what its comparisons say, a sentence each.

Not for: estimates (`stats.py`), nor all metrics of all arms (`tables.py`, `comparisons.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from experiments.disk.states import State
from experiments.metrics import LOSS
from experiments.report import registered, responses
from experiments.report.comparisons import SIGNIFICANT, Pair, compared, title_end, unlike
from experiments.report.data import Arm, Sweep, differing_texts
from experiments.report.document import Block, Bullets, joined, plural
from experiments.report.registered import Registered
from experiments.report.tables import certainty, charts, name, value_text
from experiments.stats import Comparison, Interval
from relora_core.events import Metric

MOST, MOST_BESIDE_EFFECTS = 24, 6
"""Sentences on pairs of arms, alone and below some on axes; further ones are in the tables."""
LONGEST = 40
"""Letters of a reference's name that each sentence repeats."""
EXACT = 4
"""Most decimals."""


def answer(sweep: Sweep, pairs: Sequence[Pair], named: Sequence[Block]) -> list[Block]:
    """The best arm, a sentence for each comparison, and one for each other metric.

    `named` are sentences on comparisons that a file names, which come first, as do those on
    numeric axes. Empty where no run has finished.
    """
    metrics = charts(sweep)
    if not metrics:
        return []
    main = next((metric for metric in metrics if metric.key != LOSS.key), LOSS)
    others = [metric for metric in metrics if metric is not main]
    blocks: list[Block] = [line] if (line := best(sweep, main)) else []
    blocks += named
    if effects := responses.effects(sweep, main):
        blocks.append(Bullets(effects))
    if pairs:
        against, _ = title_end(pairs)
        of = f"Compared{against} in {name(main)} ({main.better} is better):"
        most = MOST_BESIDE_EFFECTS if effects else MOST
        blocks += [of, Bullets(_sentences(pairs, main, most=most))]
    if lines := [line for metric in others if (line := summary(pairs, metric))]:
        blocks.append(Bullets(lines))
    return blocks


def of_named(sweep: Sweep, comparisons: Sequence[Registered]) -> list[Block]:
    """The sentences on comparisons that a file names, adjusted by Holm over all of them."""
    if not comparisons:
        return []
    pairs = registered.arms_of(sweep, comparisons)
    outcomes = registered.compare_all(sweep, comparisons)
    lines = []
    for one, (arm, reference), outcome in zip(comparisons, pairs, outcomes, strict=True):
        what = name(one.metric) + (f" of {one.group}" if one.group else "")
        says = sentence(arm, reference, outcome, one.metric, what=what)
        lines.append(f"{one.question}: {says}" if one.question else says)
    return ["The comparisons that a file names:", Bullets(lines)]


# one sentence -----------------------------------------------------------------------------------
def sentence(
    arm: Arm, reference: Arm, outcome: Comparison, metric: Metric, *, what: str = ""
) -> str:
    """What one comparison says; `what` is the metric's name, by default its own."""
    what = what or (metric.title if metric.scale == "log" else name(metric))
    if outcome.difference is None:
        both = f"{arm.name} and {reference.name}"
        if reason := unlike(arm, reference, metric):
            return f"{both} {reason}"
        return f"{_missing([arm, reference])}: {both} cannot be compared"
    digits = decimals(outcome, metric)
    text = f"{arm.name} ends {_gap(outcome.difference, reference, metric, what, digits)}"
    if outcome.p is None or outcome.low is None or outcome.high is None:
        if (outcome.n or min(outcome.n_arm, outcome.n_reference)) > 1:
            return f"{text}; {outcome.note}"  # which names lost seeds, too
        return f"{text}; one seed: no interval{_lost(outcome)}"
    ends = _ends(outcome.low, outcome.high, metric, digits)
    adjusted = outcome.p if outcome.p_holm is None else outcome.p_holm
    if adjusted >= SIGNIFICANT:
        unit = " points" if metric.percent else ""
        kind = "ratio" if metric.scale == "log" else "difference"
        alone = f", {p_text(outcome.p)} alone" if outcome.p < SIGNIFICANT else ""
        return (
            f"we cannot tell {arm.name} and {reference.name} apart: {kind} {ends}{unit} (95 % "
            f"interval, {_seeds(outcome)}{alone}, {p_text(adjusted)} after Holm)" + _lost(outcome)
        )
    low, high = outcome.low, outcome.high
    if metric.scale == "linear":  # the words say the sign
        low, high = sorted((abs(low), abs(high)))
        ends = _ends(low, high, metric, digits)
    return (
        f"{text} (95 % interval {ends}, {_seeds(outcome)}, {p_text(adjusted)} after Holm)"
        + _lost(outcome)
    )


def p_text(p: float) -> str:
    """`p = 0.31`, `p = 0.004`, `p < 0.001`."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3f}"


def decimals(outcome: Comparison, metric: Metric) -> int:
    """So many that half the interval has a digit, and its ends do not round to no difference."""
    unit = 100.0 if metric.percent else 1.0
    least = 1 if metric.percent else 2
    if outcome.low is None or outcome.high is None or not outcome.difference:
        return least + 1
    width = (outcome.high - outcome.low) * unit
    if not math.isfinite(width):
        return least
    digits = math.ceil(-math.log10(width / 2)) if width > 0 else EXACT
    digits = max(least, min(EXACT, digits))
    neutral = 1.0 if metric.scale == "log" else 0.0
    ends = [outcome.low * unit, outcome.high * unit]
    while digits < EXACT and any(f"{end:.{digits}f}" == f"{neutral:.{digits}f}" for end in ends):
        digits += 1
    return digits


def _gap(value: float, reference: Arm, metric: Metric, what: str, digits: int) -> str:
    if metric.scale == "log":
        return f"at {value:.{digits}f} times the {what} of {reference.name}"
    side = "above" if value > 0 else "below"
    if value == 0:
        return f"level with {reference.name} in {what}"
    unit = " points" if metric.percent else ""
    return f"{_amount(abs(value), metric, digits)}{unit} {side} {reference.name} in {what}"


def _amount(value: float, metric: Metric, digits: int) -> str:
    return f"{value * (100.0 if metric.percent else 1.0):.{digits}f}"


def _ends(low: float, high: float, metric: Metric, digits: int) -> str:
    return f"{_amount(low, metric, digits)} to {_amount(high, metric, digits)}"


def _seeds(outcome: Comparison) -> str:
    if outcome.kind == "paired":
        return f"{plural(outcome.n, 'seed')} paired"
    if outcome.kind == "one-sample":
        return f"{plural(outcome.n, 'seed')} against one value"
    return f"{outcome.n_arm} and {outcome.n_reference} seeds, unpaired"


def _lost(outcome: Comparison) -> str:
    """What the reader must know of seeds without a number; begins with a comma."""
    if not outcome.not_finite:
        return ""
    seeds = joined(map(str, outcome.not_finite))
    return f", of the survivors only: no finite value at seed {seeds}"


def _missing(arms: Sequence[Arm]) -> str:
    """Why these cannot be compared."""
    reasons = []
    for arm in arms:
        if arm.runs and all(run.state == State.DIVERGED for run in arm.runs):
            reasons.append(f"every run of {arm.name} diverged")
        elif not arm.finished:
            reasons.append(f"no run of {arm.name} has finished")
    return " and ".join(dict.fromkeys(reasons)) or "a value is missing"


# several ----------------------------------------------------------------------------------------
def best(sweep: Sweep, metric: Metric) -> str:
    """The arm with the best mean, and the two after it; empty where texts differ."""
    if differing_texts(sweep) or not all(run.trained for run in sweep.runs):
        return ""
    estimates = [(arm, one) for arm in sweep.arms if (one := arm.estimate(metric)) and one.n]
    sign = 1.0 if metric.better == "lower" else -1.0
    estimates.sort(key=lambda pair: sign * pair[1].mean)
    if not estimates:
        return ""
    (first, estimate), *rest = estimates
    what = "Lowest" if metric.better == "lower" else "Highest"
    if not rest:
        return f"{name(metric)} of {first.name}: {estimate_text(metric, estimate)}."
    after = " and ".join(f"{arm.name}, {value_text(metric, one.mean)}" for arm, one in rest[:2])
    return (
        f"{what} {name(metric)}: {first.name}, {estimate_text(metric, estimate)}; then {after}. "
        "Whether neighbours differ is another question: see Comparisons."
    )


def estimate_text(metric: Metric, estimate: Interval) -> str:
    """`133.8 (95 % interval 132.6 to 134.9, 3 seeds)`."""
    unit = " %" if metric.percent else ""
    return f"{value_text(metric, estimate.mean)}{unit} ({certainty(metric, estimate)})"


def summary(pairs: Sequence[Pair], metric: Metric) -> str:
    """How many comparisons differ in a further metric, and by how much; empty without tests."""
    outcomes = [
        (arm, reference, outcome)
        for (arm, reference), outcome in zip(pairs, compared(pairs, metric), strict=True)
        if outcome.p_holm is not None
    ]
    if not outcomes:
        return ""
    differing = [one for one in outcomes if (one[2].p_holm or 0.0) < SIGNIFICANT]
    many = plural(len(outcomes), "comparison")
    if not differing:
        return f"{name(metric)}: none of {many} is significant after Holm"
    _, one_reference = title_end(pairs)
    lines = []
    for arm, reference, outcome in differing:
        who = arm.name if one_reference else f"{arm.name} against {reference.name}"
        digits = decimals(outcome, metric)
        value = outcome.difference or 0.0
        sign = "" if metric.scale == "log" or value < 0 else "+"
        lines.append(f"{who} {sign}{_amount(value, metric, digits)}")
    unit = {True: " (ratios)", False: " (points)" if metric.percent else ""}[metric.scale == "log"]
    return (
        f"{name(metric)}: {len(differing)} of {many} significant after Holm{unit}: "
        f"{joined(lines, most=MOST)}"
    )


def _sentences(pairs: Sequence[Pair], metric: Metric, *, most: int) -> list[str]:
    outcomes = compared(pairs, metric)
    _, one_reference = title_end(pairs)
    lines = []
    for (arm, reference), outcome in zip(pairs, outcomes, strict=True):
        if outcome.difference is None and not reference.finished:
            lines.append(f"{_missing([reference])}: nothing can be compared with it")
            continue
        if one_reference and len(reference.name) > LONGEST:  # the line above has its name
            reference = replace(reference, name="the reference")
        lines.append(sentence(arm, reference, outcome, metric))
    lines = list(dict.fromkeys(lines))
    left = len(lines) - most
    more = [f"{plural(left, 'further comparison')}: see Comparisons"] if left > 0 else []
    return lines[:most] + more
