"""How each arm of a search responds to what it tunes: its best, the loss over the rate, the edges.

Not for: one arm in full (`results.py`), nor files (`response_files.py`).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import stats
from sweeps.search import results, samplers
from sweeps.search.arms import arm_folders
from sweeps.search.config import Objective
from sweeps.search.results import Best, Results, TrialRow
from sweeps.search.space import Choice, Dimension, Float
from sweeps.search.spec import Spec

RATE = "train.lr"
NEAR = 0.05
"""Share of an interval within which a value is at its end."""
TESTED = ("complete", "pruned", "learnt")
"""States of trials that say something about their values."""


@dataclass(kw_only=True, slots=True)
class Arm:
    """One arm as far as it is tuned."""

    name: str
    results: Results
    space: dict[str, Dimension]
    seeds: list[int]
    """That each trial ran."""
    n_trials: int
    """In all; of a grid not more than it has points."""

    @property
    def best(self) -> Best | None:
        return self.results.best[0] if self.results.best else None

    @property
    def done(self) -> int:
        """Trials that have ended."""
        return sum(n for state, n in self.results.counts.items() if state != "running")

    @property
    def edges(self) -> list[str]:
        """Keys at which the best lies at an end of what was tried, in words."""
        return list(_edges(self))


def read(folder: Path | str) -> list[Arm]:
    """The arms of the search in `folder`, OUTPUT_DIR/sweeps/NAME/study. Reads only."""
    arms = []
    for name, place in arm_folders(folder).items():
        spec = Spec.read(place / "study.json")
        arms.append(
            Arm(
                name=str(name),
                results=results.read(place)[0],
                space=spec.space,
                seeds=spec.config.seeds,
                n_trials=samplers.n_trials(spec.config, space=spec.space),
            )
        )
    return arms


# edges ------------------------------------------------------------------------------------------
def _edges(arm: Arm) -> Iterator[str]:
    if arm.best is None:
        return
    for key, value in arm.best.params.items():
        dimension = arm.space.get(key)
        if dimension is None or (end := _end(key, value, arm, dimension)) is None:
            continue
        yield f"{key}={value:.4g} is the {end} of {dimension.text()}"


def _end(key: str, value: Any, arm: Arm, dimension: Dimension) -> str | None:
    """`lowest` or `highest`, if nothing beyond the value was tried, or it is at the very end."""
    listed = dimension.values if isinstance(dimension, Choice) else None
    if listed is not None and (len(listed) < 3 or not all(map(_is_number, listed))):
        return None  # an end of two values says nothing, and words have none
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


# lines ------------------------------------------------------------------------------------------
def rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """A row for each trial that has a value, by arm and rate."""
    found = []
    for arm in arms:
        goal = arm.results.goals[0]
        for trial in arm.results.trials:
            if trial.state in TESTED and trial.values:
                found.append(_row(arm, trial, goal))
    return found


def _row(arm: Arm, trial: TrialRow, goal: Objective) -> dict[str, Any]:
    values = seed_values(trial)
    interval = stats.mean_interval(values) if values else None
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
    """An arm's best: what it is worth, its interval, its settings, whether at an edge."""
    goal, best = arm.results.goals[0], arm.best
    row: dict[str, Any] = {"arm": arm.name, "trials": arm.done, "of": arm.n_trials}
    low, high = best.intervals.get(goal.metric, (None, None)) if best else (None, None)
    row |= {
        "metric": goal.metric,
        "mean": best.values[goal.metric] if best else None,
        "low": low,
        "high": high,
        "seeds": " ".join(map(str, arm.seeds)),
        "trial": best.number if best else None,
    }
    return row | {"edges": "; ".join(arm.edges)} | (best.params if best else {})


def to_csv(table: Sequence[dict[str, Any]]) -> str:
    """A line a row; what a row does not have is empty."""
    text, heads = io.StringIO(), list(dict.fromkeys(key for row in table for key in row))
    writer = csv.DictWriter(text, heads, restval="")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def rates(arm: Arm) -> list[float]:
    """Different rates of its trials that have a value."""
    dimension = arm.space.get(RATE)
    if not isinstance(dimension, (Float, Choice)):
        return []
    trials = [trial for trial in arm.results.trials if trial.values and trial.state in TESTED]
    return sorted({trial.params[RATE] for trial in trials if RATE in trial.params})
