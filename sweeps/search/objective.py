"""The value of a trial: metrics of its runs, reduced over time and averaged over seeds.

A run that diverged has its objective's worst value, +-inf. Samplers learn from that to avoid its
settings; from a failed trial they would learn nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from experiments.disk.run_dir import RunDir
from experiments.disk.states import State
from relora_core import costs
from relora_core.config import RunConfig, nearest
from sweeps.planning import budget
from sweeps.search.config import Constraint, Objective, SearchConfig, constraints_of

REPORTS = 50
"""Most points of a curve that are reported to the study: each is a line of its journal."""


@dataclass(kw_only=True, slots=True)
class Verdict:
    """The result of a trial."""

    values: list[float] | None = None
    """One per objective, the mean over seeds; None if a seed has none."""
    constraints: dict[str, float] = field(default_factory=dict)
    """Text of each constraint -> how far its metric is beyond the bound (<= 0: it is met)."""
    by_seed: dict[str, list[float]] = field(default_factory=dict)
    """Seed -> its value of each objective."""
    reason: str | None = None
    """Why there are no values."""


def value(objective: Objective, events: Sequence[dict[str, Any]]) -> float | None:
    """The objective's number from a run's events; None if it was never logged.

    NaN counts as the worst.
    """
    logged = [e["metrics"][objective.metric] for e in events if objective.metric in e["metrics"]]
    logged = [objective.worst if math.isnan(number) else float(number) for number in logged]
    if not logged:
        return None
    if objective.reduce == "best":
        return min(logged) if objective.direction == "minimize" else max(logged)
    return fmean(logged[-objective.k :]) if objective.reduce == "mean" else logged[-1]


def run_value(objective: Objective, run_dir: RunDir) -> float | None:
    """Of a run that has ended; the worst value if it diverged."""
    if objective.metric == "cost/gpu_hours":
        return _device_hours(run_dir)
    if objective.metric.startswith("cost/"):
        return config_cost(objective.metric, run_dir.config())
    if run_dir.ended() is State.DIVERGED:
        return objective.worst
    return value(objective, run_dir.events())


def seed_value(search: SearchConfig, run_dir: RunDir) -> float | None:
    """What Wilcoxon's test compares of a run that has ended: where it diverged the worst value."""
    assert search.prune_metric is not None  # normalise has set it
    goal = Objective(metric=search.prune_metric, direction=search.objectives[0].direction)
    return run_value(goal, run_dir)


def config_cost(metric: str, config: RunConfig) -> float:
    """A cost that follows from the config: parameters, or FLOPs of all training steps."""
    if metric == "cost/flops":
        return budget.training_flops(config)
    counted = costs.parameters(config)
    return float(counted.trainable if metric == "cost/trainable" else counted.total)


def _device_hours(run_dir: RunDir) -> float | None:
    """Training time times processes (one per GPU): GPU-hours, or process-hours on the CPU."""
    seconds = ((run_dir.result() or {}).get("metrics") or {}).get("perf/train_seconds")
    records = run_dir.attempt_records()
    if seconds is None or not records:
        return None
    return seconds * int(records[-1].get("world", 1)) / 3600


def curve(metric: str, events: Sequence[dict[str, Any]], *, steps: int) -> dict[int, float]:
    """Step -> value, at most REPORTS of them: what pruners get of a run of so many steps."""
    points: dict[int, float] = {}
    for event in events:
        due = max(points, default=-math.inf) + steps / REPORTS
        if metric in event["metrics"] and (event["step"] >= due or not points):
            points[event["step"]] = event["metrics"][metric]
    return points


def judge(search: SearchConfig, runs: Sequence[RunDir]) -> Verdict:
    """Values and constraints of a trial from the run directories of its seeds."""
    bounds = constraints_of(search)
    rows = [[_value_or_reason(goal, run_dir) for goal in search.objectives] for run_dir in runs]
    bounded = [[_value_or_reason(as_objective(b), run_dir) for run_dir in runs] for b in bounds]
    entries = itertools.chain(*rows, *bounded)
    if missing := next((entry for entry in entries if isinstance(entry, str)), None):
        return Verdict(reason=missing)
    return Verdict(
        values=[_mean(column) for column in zip(*rows, strict=True)],
        constraints={
            bound.text(): bound.excess(_mean(values))
            for bound, values in zip(bounds, bounded, strict=True)
        },
        by_seed={str(run.config().seed): row for run, row in zip(runs, rows, strict=True)},
    )


def as_objective(constraint: Constraint) -> Objective:
    """Its metric's last value; if a run diverged, a value that breaks the constraint."""
    direction = "minimize" if constraint.at_most else "maximize"
    return Objective(metric=constraint.metric, direction=direction)


def _value_or_reason(objective: Objective, run_dir: RunDir) -> Any:
    """The run's value, or as text why there is none."""
    if run_dir.ended() is None:
        status = run_dir.status()
        return f"{run_dir.run_id} is {status.state}" + (f": {status.error}" * bool(status.error))
    value = run_value(objective, run_dir)
    if value is None:
        logged = sorted({name for event in run_dir.events() for name in event["metrics"]})
        return (
            f"{objective.metric} was never logged by {run_dir.run_id}."
            f"{nearest(objective.metric, logged)}"
        )
    return value


def _mean(values: Any) -> float:
    """Of numbers that may be infinite, all to the same side."""
    return float(sum(values) / len(values))
