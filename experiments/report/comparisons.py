"""Arms against references: which pairs, which of them must not be compared, tests and tables.

Not for: the tests themselves (`stats.py`), nor comparisons that a file names (`registered.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from experiments.metrics import LOSS
from experiments.report.data import (
    Arm,
    Sweep,
    fixed_side,
    other_context,
    reads_other,
    scored_otherwise,
)
from experiments.report.document import Block, Bullets, Table, joined
from experiments.report.tables import name, shown
from experiments.stats import BOOTSTRAP, Comparison, compare, finite, holm
from relora_core.config import ConfigError, nearest
from relora_core.events import Metric

Pair = tuple[Arm, Arm]
"""An arm and its reference."""
SIGNIFICANT = 0.05
"""A difference is stated as one where its adjusted p is below."""
SAME_TASK = ("model.", "data.", "train.", "eval.")
"""Prefixes of settings that should be the same in an arm and its reference."""


# pairs ------------------------------------------------------------------------------------------
def find_arm(
    sweep: Sweep, word: str | None, *, option: str = "--reference", whole: bool = False
) -> Arm | None:
    """The arm with `word` as name or id, or else, if not `whole`, as part of them; ConfigError if
    it is not one.

    For an arm that has no runs of its own, the one that computes the same.
    """
    if word is None:
        return None
    word = sweep.same_arms.get(word, word)
    hits = [arm for arm in sweep.arms if word in (arm.name, arm.arm_id)]
    if not hits and not whole:
        hits = [arm for arm in sweep.arms if word in arm.name or word in arm.arm_id]
    if len(hits) == 1:
        return hits[0]
    names = [arm.name for arm in hits or sweep.arms]
    many = f" that {len(hits)} match" if hits else ""
    raise ConfigError(
        f"{option} must name one arm of {joined(names, most=8)}, got {word!r}{many}."
        f"{nearest(word, names)}"
    )


def against(sweep: Sweep, *, reference: Arm | None) -> list[Pair]:
    """Each arm with its reference, by default a full-rank arm, of AdamW if there is one.

    Of several it is the one with the most settings of SAME_TASK in common. If there is none, or if
    all arms are full-rank, it is the sweep's first arm.
    """
    full = [arm for arm in sweep.arms if arm.runs[0].config.method == "full_rank"]
    full = [a for a in full if a.runs[0].config.train.optimizer == "adamw"] or full
    if reference is None and 0 < len(full) < len(sweep.arms):
        ids = {arm.arm_id for arm in full}
        others = [arm for arm in sweep.arms if arm.arm_id not in ids]
        return [(arm, max(full, key=partial(_shared, arm))) for arm in others]
    first = reference or sweep.arms[0]
    return [(arm, first) for arm in sweep.arms if arm is not first]


def _shared(arm: Arm, other: Arm) -> int:
    keys = [key for key in arm.settings if key.startswith(SAME_TASK)]
    return sum(arm.settings[key] == other.settings.get(key) for key in keys)


def unlike(arm: Arm, reference: Arm, metric: Metric) -> str:
    """Why the metric of the two must not be compared, as a sentence goes on after their names.

    Empty if it may be. The answer, tables and figures have it from here.
    """
    loss = metric.key == LOSS.key
    if loss or metric.scale == "log":
        what = "losses" if loss else "perplexities"
        if reads_other(arm, reference):
            return f"read other texts or tokens: their {what} must not be compared"
        if other_context(arm, reference, training=loss):
            return f"differ in data.seq_len: their {what} must not be compared"
    section = ".".join(metric.key.split("/")[:2])
    keys = [key for key in scored_otherwise(arm, reference) if key.startswith(f"{section}.")]
    return f"differ in {joined(keys)}: their {name(metric)} must not be compared" if keys else ""


def alike(arms: Iterable[Arm], metric: Metric) -> list[list[Arm]]:
    """The arms that have the metric, in groups within each of which it may be compared."""
    groups: list[list[Arm]] = []
    for arm in (arm for arm in arms if arm.values(metric.key)):
        own = next((group for group in groups if not unlike(arm, group[0], metric)), None)
        if own is None:
            groups.append([arm])
        else:
            own.append(arm)
    return groups


def unlike_text(arms: Sequence[Arm], metrics: Iterable[Metric], *, so: str) -> str:
    """What a caption says of arms that are not all `alike`, and what is done about it (`so`);
    empty if they are."""
    reasons: dict[str, None] = {}
    for metric in metrics:
        first, *others = alike(arms, metric) or [[]]
        reasons |= {unlike(group[0], first[0], metric): None for group in others}
    return f" Some arms {'; some '.join(reasons)}. {so}" if reasons else ""


# comparisons ------------------------------------------------------------------------------------
def comparisons(sweep: Sweep, pairs: Sequence[Pair]) -> list[Block]:
    """For each metric a table of arms against their references on common seeds."""
    tables = difference_tables(shown(sweep), pairs)
    if not tables:
        return ["There is nothing to compare: fewer than two arms have finished runs."]
    return ["Arm minus reference on the seeds that both have; of perplexities the ratio.", *tables]


def difference_tables(
    metrics: Iterable[Metric], pairs: Sequence[Pair], *, to: str | None = None
) -> list[Table]:
    """A table for each metric that any pair has; `to` stands for the names of the references."""
    outcomes = {metric: compared(pairs, metric) for metric in metrics}
    return [
        _difference_table(metric, pairs, tests, to=to)
        for metric, tests in outcomes.items()
        if any(test.n_arm and test.n_reference for test in tests)
    ]


def methods(sweep: Sweep, pairs: Sequence[Pair]) -> list[Block]:
    """How the numbers of Results and Comparisons come about, and what their tests assume."""
    metrics = shown(sweep)
    if not metrics:
        return []
    lines = []
    if any(len(arm.finished) > 1 for arm in sweep.arms):
        lines += [
            "Means have a 95 % interval over seeds (Student's t); those of perplexities are "
            "geometric, with the interval of the logarithms.",
        ]
    outcomes = [c for metric in metrics for c in compared(pairs, metric)]
    if any(c.difference is not None for c in outcomes):
        lines += [
            "Comparisons: arm minus reference on the seeds that both have; of perplexities the "
            "ratio of the two.",
            "p (Holm) is adjusted for all comparisons of its table. The answer states a difference "
            f"as one where that p is below {SIGNIFICANT}.",
            "Seeds needed: with so many of each arm a test at 5 % would find the gap seen here "
            "four times in five, if gap and spread are the true ones.",
        ]
    assumed = list(dict.fromkeys(c.assumes for c in outcomes if c.p is not None))
    assumed += [BOOTSTRAP] if any(c.bootstrap for c in outcomes) else []
    assumptions = ["What the tests assume:", Bullets(assumed)] if assumed else []
    return [Bullets(lines), *assumptions] if lines else []


def compared(pairs: Sequence[Pair], metric: Metric) -> list[Comparison]:
    """A comparison of each pair; Holm's adjustment is over all that could be tested."""
    outcomes = [compare_arms(arm, other, metric) for arm, other in pairs]
    for comparison, p in zip(outcomes, holm([c.p for c in outcomes]), strict=True):
        comparison.p_holm = p
    return outcomes


def compare_arms(arm: Arm, reference: Arm, metric: Metric) -> Comparison:
    """Not adjusted by Holm; a model from elsewhere is compared with all seeds of the other."""
    return compare_values(
        arm.values(metric.key), reference.values(metric.key), (arm, reference), metric
    )


def compare_values(
    own: Mapping[int, float], others: Mapping[int, float], pair: Pair, metric: Metric
) -> Comparison:
    """Of a pair's values by seed; of one that is `unlike` no test, and a note that says so."""
    if reason := unlike(*pair, metric):
        n, m = (sum(map(finite, values.values())) for values in (own, others))
        return Comparison(kind="none", scale=metric.scale, n_arm=n, n_reference=m, note=reason)
    return compare(own, others, scale=metric.scale, fixed=fixed_side(*pair))


def title_end(pairs: Sequence[Pair]) -> tuple[str, bool]:
    """(` to REFERENCE`, True) if all pairs have one reference, else ("", False)."""
    names = {reference.name for _, reference in pairs}
    return (f" to {names.pop()}", True) if len(names) == 1 else ("", False)


def names_of(arm: Arm, reference: Arm) -> dict[str, str]:
    """Column -> name, of a pair in a table and its CSV."""
    return {"arm": arm.name, "reference": reference.name}


def _difference_table(
    metric: Metric, pairs: Sequence[Pair], tests: Sequence[Comparison], *, to: str | None
) -> Table:
    """A row for each pair."""
    against_what, one = (f" to {to}", True) if to else title_end(pairs)
    heads = ["arm"] if one else ["arm", "reference"]
    rows, data = [], []
    for (arm, reference), c in zip(pairs, tests, strict=True):
        *test, needed, note = comparison_cells(metric, c)
        bootstrap = "-" if c.bootstrap is None else ends(metric, *c.bootstrap)
        effect = "-" if c.effect is None else f"{c.effect:+.2f}"
        names = names_of(arm, reference)
        rows.append([*(names[head] for head in heads), *test, bootstrap, effect, needed, note])
        data.append(names | comparison_row(metric, c))
    what = "ratio" if metric.scale == "log" else "difference"
    return Table(
        name=f"compare_{slug(metric)}",
        title=f"{metric.title}: {what}{against_what}",
        columns=[
            *(*heads, "seeds", f"{what} [95 %]", "p", "p (Holm)", "bootstrap 95 %", "Hedges' g"),
            *("seeds needed", "note"),
        ],
        rows=rows,
        data=data,
    )


def comparison_cells(metric: Metric, c: Comparison) -> list[str]:
    """Pairs, or values of arm and reference; difference, p and p (Holm); seeds needed and note."""
    return [
        str(c.n) if c.n else f"{c.n_arm} and {c.n_reference}",
        between(metric, c.difference, c.low, c.high),
        *(p_value(c.p), p_value(c.p_holm), c.needed.text if c.p is not None else "-", c.note),
    ]


def comparison_row(metric: Metric, c: Comparison) -> dict[str, Any]:
    """The CSV row of a comparison, without the names of arm and reference."""
    row = asdict(c) | {"needed": c.needed.text, "metric": metric.key}
    row["unmatched"], row["not_finite"] = _seeds(c.unmatched), _seeds(c.not_finite)
    low, high = c.bootstrap or (None, None)
    del row["bootstrap"]
    return row | {"bootstrap_low": low, "bootstrap_high": high}


def _seeds(seeds: Sequence[int]) -> str:
    return " ".join(map(str, seeds))


def slug(metric: Metric) -> str:
    return metric.key.removeprefix("eval/").replace("/", "_")


def difference_text(metric: Metric, value: float | None) -> str:
    """A signed difference, with one more decimal than values have, or a ratio (log scale)."""
    if value is None or math.isnan(value):
        return "-"
    if metric.scale == "log":
        return f"{value:.4f}"
    return f"{100 * value:+,.2f}" if metric.percent else f"{value:+,.4f}"


def between(metric: Metric, value: float | None, low: float | None, high: float | None) -> str:
    """`-0.021 [-0.030, -0.012]`."""
    text = difference_text(metric, value)
    return text if low is None or high is None else f"{text} {ends(metric, low, high)}"


def ends(metric: Metric, low: float, high: float) -> str:
    return f"[{difference_text(metric, low)}, {difference_text(metric, high)}]"


def p_value(p: float | None) -> str:
    if p is None:
        return "-"
    return f"{p:.3f}" if p >= 1e-3 else f"{p:.1e}"
