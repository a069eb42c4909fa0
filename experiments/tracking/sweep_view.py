"""What MLflow shows of a sweep: its arms and their runs, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from experiments.disk.state import RunState
from experiments.disk.states import State
from experiments.metrics import scale_of
from experiments.stats import Interval, interval

NOT_AVERAGED = ("train/lr", "train/grad_norm", "restart/", "perf/tokens_per_s", "perf/mfu")


@dataclass(kw_only=True, slots=True)
class RunView:
    """What the sweep shows of one run."""

    run_id: str
    name: str
    seed: int | None
    state: RunState
    metrics: dict[str, float] = field(default_factory=dict)
    """Its final metrics; empty until it has ended."""


@dataclass(kw_only=True, slots=True)
class ArmView:
    """A setting regardless of seed."""

    arm_id: str
    name: str
    axes: dict[str, str]
    """Key -> value of what varies in the sweep, without the seed."""
    colour: str
    """`#rrggbb`"""
    runs: list[RunView]

    @property
    def finished(self) -> int:
        return sum(run.state.state is State.FINISHED for run in self.runs)


@dataclass(kw_only=True, slots=True)
class SweepView:
    """A plan, and the states of its runs."""

    name: str
    question: str | None = None
    commands: list[str] = field(default_factory=list)
    created: float = 0.0
    """Seconds since the epoch."""
    collapsed: list[str] = field(default_factory=list)
    """Why there are fewer runs than points."""
    arms: list[ArmView]

    @property
    def states(self) -> list[RunState]:
        return [run.state for arm in self.arms for run in arm.runs]


def summary(arm: ArmView) -> dict[str, Interval]:
    """Metric -> mean over the finished runs, if it is a finite number in all of them.

    Geometric for perplexities, as in reports.
    """
    done = [run.metrics for run in arm.runs if run.state.state is State.FINISHED]
    keys = [key for key in (done[0] if done else {}) if not key.startswith(NOT_AVERAGED)]
    complete = [k for k in keys if all(math.isfinite(m.get(k, math.nan)) for m in done)]
    return {key: interval([m[key] for m in done], scale=scale_of(key)) for key in complete}
