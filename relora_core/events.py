"""Events, which are all that the trainer says, their sinks, and how a metric is shown.

Not for: files or servers (`experiments/`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

LOSS_STEPS = 10
"""A run's final train/loss is the mean over this many last updates (all, if there are fewer). It
must not depend on runtime.log_every_steps, though that has the same default."""


@dataclass(kw_only=True, slots=True)
class Event:
    """One line of events.jsonl."""

    kind: str
    """`start`, `train`, `restart`, `method` (another change that it made, or the loss one update
    after a restart), `eval`, `table`, `dynamics`, `checkpoint`, `system` (load of the machine),
    `diverged`, `end`; and `phase`, which says what a long wait is for and is not recorded."""
    step: int
    """Optimizer steps completed when it happened."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metric name (with `/` between group and name) -> value."""
    data: dict[str, Any] = field(default_factory=dict)
    """Anything else that is JSON: tables, texts, counts."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch."""


class Sink(Protocol):
    """Takes events; must not raise for its own reasons, or a full disk kills the run in silence."""

    def emit(self, event: Event) -> None: ...


class NullSink:
    def emit(self, event: Event) -> None:
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A metric that is shown to readers, and how."""

    key: str
    """As events name it."""
    title: str
    """Heading of its column in the report."""
    label: str
    """Of an axis."""
    column: str | None = None
    """Heading where there is room for few; None: it is not there."""
    scale: Literal["linear", "log"] = "linear"
    """`log`: averages are geometric, differences ratios."""
    better: Literal["lower", "higher"] = "lower"
    chance: float | None = None
    """What guessing gives."""
    percent: bool = False
    """A share that the report shows in per cent."""
    charted: bool = True
    """Whether every report, and MLflow's page of a sweep, has a chart of it."""
