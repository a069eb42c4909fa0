"""What arms reach for what they take: metrics against costs, and the arms that none beats in both.

Not for: the picture (`figures/fronts.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from experiments.report.comparisons import alike, unlike_text
from experiments.report.data import Arm, Sweep
from experiments.report.document import Block, Table, number
from experiments.report.tables import charts, hours_per_run, mean_cell, value_text
from experiments.stats import Interval, interval
from relora_core import costs
from relora_core.config import EvaluatedConfig, RunConfig, method_config
from relora_core.events import Metric

SAME = 1e-3
"""Relative difference below which arms take the same."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Cost:
    """One thing that an arm takes."""

    key: str
    title: str
    letter: str
    """That marks its front in the table."""
    of: Callable[[Arm], Interval | None]
    """Over the finished runs; an interval where they differ."""


@dataclass(kw_only=True, slots=True)
class Point:
    """An arm with one cost and one metric, over its finished seeds."""

    arm: Arm
    cost: Interval
    value: Interval


def _fixed(value: float) -> Interval:
    return Interval(mean=value, low=None, high=None, n=1, sd=None)


def _largest(arm: Arm) -> RunConfig:
    """The arm's config; one of full rank if it has phases of that, which then take the most."""
    config = arm.runs[0].config
    phases = method_config(config).has_phases(config)
    return dataclasses.replace(config, method="full_rank") if phases else config


def _counted(arm: Arm, *, count: Callable[[RunConfig], float]) -> Interval | None:
    """None for a config that does not say its vocabulary, as a planned one does."""
    config = _largest(arm)
    if isinstance(config, EvaluatedConfig):  # how it was trained is not known
        return None
    return None if config.model.vocab_size is None else _fixed(count(config))


def _tokens(arm: Arm) -> Interval | None:
    tokens = [run.cost.tokens for run in arm.finished]
    return interval(tokens, scale="linear") if tokens else None


_trainable = partial(_counted, count=lambda config: costs.parameters(config).trainable)
_moments = partial(_counted, count=lambda config: costs.memory_bytes(config)["moments"])
COSTS = (
    Cost(key="trainable", title="trained parameters", letter="p", of=_trainable),
    Cost(key="moment_bytes", title="optimizer state (bytes)", letter="s", of=_moments),
    Cost(key="tokens", title="training tokens", letter="t", of=_tokens),
    Cost(key="gpu_hours", title="device-hours of training", letter="h", of=hours_per_run),
)


def has_tradeoffs(sweep: Sweep) -> bool:
    """Whether its arms are of more than one method, optimizer or size."""
    kinds = set()
    for arm in sweep.arms:
        config = arm.runs[0].config
        model = dataclasses.replace(config.model, name="")
        kinds.add((config.method, config.train.optimizer, repr(model)))
    return len(kinds) > 1


def points(sweep: Sweep, *, cost: Cost, metric: Metric) -> list[Point]:
    """Of each arm that has finished runs with the metric."""
    made = []
    for arm in sweep.arms:
        value, taken = arm.estimate(metric), cost.of(arm)
        if value is not None and value.n and taken is not None and taken.mean > 0:
            made.append(Point(arm=arm, cost=taken, value=value))
    return made


def front(made: Sequence[Point], *, metric: Metric) -> list[Point]:
    """The points that no other beats, cheapest first: none is as cheap and as good, and better in
    one of the two. By means; intervals may overlap."""
    sign = 1.0 if metric.better == "lower" else -1.0

    def beats(one: Point, two: Point) -> bool:
        a = (one.cost.mean, sign * one.value.mean)
        b = (two.cost.mean, sign * two.value.mean)
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    best = [one for one in made if not any(beats(other, one) for other in made)]
    return sorted(best, key=lambda one: (one.cost.mean, sign * one.value.mean))


def fronts(made: Sequence[Point], *, metric: Metric) -> list[list[Point]]:
    """The front of each group of points whose metric may be compared, but not of one that could be
    compared with none."""
    groups = alike([one.arm for one in made], metric)
    if len(groups) < 2:
        return [front(made, metric=metric)]
    by_id = {one.arm.arm_id: one for one in made}
    return [
        front([by_id[arm.arm_id] for arm in group], metric=metric)
        for group in groups
        if len(group) > 1
    ]


def differ(sweep: Sweep, cost: Cost) -> bool:
    """Whether arms take different amounts of it."""
    taken = [cost.of(arm) for arm in sweep.arms if arm.finished]
    means = [one.mean for one in taken if one is not None]
    return bool(means) and max(means) > min(means) * (1 + SAME)


def tradeoffs(sweep: Sweep) -> list[Block]:
    """A table of what each arm reaches and takes; of each metric, the fronts that the arm is on."""
    metrics = charts(sweep)
    if not has_tradeoffs(sweep) or not metrics:
        return []
    costs_shown = [cost for cost in COSTS if differ(sweep, cost)]
    on_fronts = {
        (metric.key, cost.key): {
            one.arm.arm_id
            for best in fronts(points(sweep, cost=cost, metric=metric), metric=metric)
            for one in best
        }
        for metric in metrics
        for cost in costs_shown
    }
    rows, data = [], []
    for arm in (arm for arm in sweep.arms if arm.finished):
        taken = {cost.key: cost.of(arm) for cost in COSTS}
        cells = [_cost_text(taken[cost.key], len(arm.finished)) for cost in COSTS]
        for metric in metrics:
            value = arm.estimate(metric)
            on = [c for c in costs_shown if arm.arm_id in on_fronts[metric.key, c.key]]
            cell = mean_cell(value, partial(value_text, metric), expected=len(arm.finished))
            cells.append(cell + (f" *{''.join(cost.letter for cost in on)}" if on else ""))
            data.append(_row(arm, metric, value, taken, on=[cost.key for cost in on]))
        rows.append([arm.name, *cells])
    letters = ", ".join(f"{cost.letter} {cost.title}" for cost in costs_shown)
    same = [cost.title for cost in COSTS if cost not in costs_shown]
    return [
        Table(
            name="tradeoffs",
            title="What arms reach for what they take",
            columns=["arm", *(cost.title for cost in COSTS), *(metric.title for metric in metrics)],
            rows=rows,
            data=data,
            note="* marks arms that no other beats in the metric and in a cost "
            f"({letters or 'none'}): the Pareto front, by means, whatever their intervals. Trained "
            "parameters and optimizer state follow from the config; of arms with full-rank phases "
            "they are those of the phases."
            + (f" All arms take the same: {', '.join(same)}." if same else "")
            + unlike_text(sweep.arms, metrics, so="Fronts are of arms that may be compared."),
        )
    ]


def _cost_text(taken: Interval | None, expected: int) -> str:
    if taken is not None and taken.mean >= 100 and taken.low in (None, taken.high):
        return f"{taken.mean:,.0f}"
    return mean_cell(taken, partial(number, digits=3), expected=expected)


def _row(
    arm: Arm,
    metric: Metric,
    value: Interval | None,
    taken: dict[str, Interval | None],
    *,
    on: Sequence[str],
) -> dict[str, Any]:
    """The CSV row of one arm and metric."""
    hours = taken["gpu_hours"]
    return {
        "arm": arm.name,
        "arm_id": arm.arm_id,
        **{key: one.mean if one else None for key, one in taken.items()},
        **{f"gpu_hours_{end}": getattr(hours, end, None) for end in ("low", "high")},
        "metric": metric.key,
        **{part: getattr(value, part, None) for part in ("mean", "low", "high")},
        "n": value.n if value else 0,
        "fronts": " ".join(on),
    }
