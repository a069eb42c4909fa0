"""How each arm of a search responds to what it tunes: its best, objective over rate, edges.

Not for: one arm in full (`results.py`), nor files (`response_files.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import stats
from experiments.metrics import scale_of
from sweeps.search import results, samplers
from sweeps.search.arms import open_studies
from sweeps.search.results import Best, Results, TrialRow
from sweeps.search.space import Choice
from sweeps.search.spec import Spec

RATE = "train.lr"
NEAR = 0.05
"""A value is at an end of an interval within this share of it."""
TESTED = ("complete", "pruned", "learnt")
"""States of trials that have tested their settings."""


@dataclass(kw_only=True, slots=True)
class Arm:
    """One arm, as far as it is tuned."""

    name: str
    results: Results
    spec: Spec
    finished: bool
    """Whether no trial is left or running."""

    @property
    def n_trials(self) -> int:
        """In all; of a grid not more than it has points."""
        return samplers.n_trials(self.spec.config, space=self.spec.space)

    @property
    def best(self) -> Best | None:
        return self.results.best[0] if self.results.best else None

    @property
    def done(self) -> int:
        """How many trials have ended."""
        return sum(n for state, n in self.results.counts.items() if state != "running")

    @property
    def edges(self) -> list[str]:
        """A line for each key at which the best is at an end of what was tried."""
        return [
            f"{key}={value:.4g} is the {end} of {self.spec.space[key].text()}"
            for key, value in (self.best.params if self.best else {}).items()
            if key in self.spec.space and (end := _end(key, value, self))
        ]


def read(folder: Path | str) -> list[Arm]:
    """The arms of the search in `folder`, OUTPUT_DIR/sweeps/NAME/study. Reads only."""
    return [
        Arm(
            name=str(study.arm), results=results.read(study), spec=study.spec, finished=study.done()
        )
        for study in open_studies(folder)
    ]


# edges ------------------------------------------------------------------------------------------
def _end(key: str, value: Any, arm: Arm) -> str | None:
    """`lowest` or `highest` if nothing beyond the value was tried, or the interval ends there."""
    dimension = arm.spec.space[key]
    listed = dimension.values if isinstance(dimension, Choice) else None
    if listed is not None and (len(listed) < 3 or not all(map(_is_number, listed))):
        return None  # one of two values is always at an end, and text has no order
    rows = [row for row in arm.results.trials if row.state in TESTED]
    tried = [row.params[key] for row in rows if key in row.params]
    if len(set(tried)) < 3:
        return None
    at = 0.5 if listed is not None else _share(value, dimension)
    if value <= min(tried) or at <= NEAR:
        return "lowest"
    return "highest" if value >= max(tried) or at >= 1 - NEAR else None


def _share(value: float, dimension: Any) -> float:
    """Where in its interval a value lies, from 0 to 1."""
    ends = (dimension.low, value, dimension.high)
    low, middle, high = map(math.log, ends) if dimension.log else ends
    return (middle - low) / (high - low)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# tables -----------------------------------------------------------------------------------------
def rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """A row for each trial that has a value."""
    return [_row(arm, trial) for arm in arms for trial in arm.results.trials if trial.values]


def _row(arm: Arm, trial: TrialRow) -> dict[str, Any]:
    goal, values = arm.results.goals[0], seed_values(trial)
    # of all seeds or none: the mean is that of all
    finite = values and all(map(math.isfinite, values))
    interval = stats.interval(values, scale=scale_of(goal.metric)) if finite else None
    return {
        "arm": arm.name,
        "trial": trial.number,
        **trial.params,
        "metric": goal.metric,
        "mean": trial.values[0] if trial.values else math.nan,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "n": len(values),
        "values": " ".join(f"{value:.8g}" for value in values),
    }


def seed_values(trial: TrialRow) -> list[float]:
    """The first objective of each seed."""
    return [run.values[0] for run in trial.runs if run.values]


def best_row(arm: Arm) -> dict[str, Any]:
    """An arm's best trial: its value with interval, its settings, the edges."""
    goal, best = arm.results.goals[0], arm.best
    low, high = best.intervals.get(goal.metric, (None, None)) if best else (None, None)
    row = {
        "arm": arm.name,
        "trials": arm.done,
        "of": arm.n_trials,
        "metric": goal.metric,
        "mean": best.values[goal.metric] if best else None,
        "low": low,
        "high": high,
        "seeds": " ".join(map(str, arm.spec.config.seeds)),
        "trial": best.number if best else None,
        "edges": "; ".join(arm.edges),
    }
    return row | (best.params if best else {})


def rates(arm: Arm) -> list[float]:
    """The rates of its trials that have a value, each once, ascending."""
    trials = arm.results.trials
    return sorted({t.params[RATE] for t in trials if t.values and RATE in t.params})
