"""The states of a run, and how one attempt at it ends: as words in files, MLflow and tables.

Not for: finding out which state a run is in (`state.py`, `sweeps/slurm/survey.py`).
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """What is true of a run."""

    PLANNED = "planned"
    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    DIVERGED = "diverged"
    PRUNED = "pruned"
    """A search has ended it early; a grid that meets it goes on from its checkpoint."""
    CANCELLED = "cancelled"
    LOST = "lost"
    """Judged, never written: the run has long been silent and SLURM does not know its job."""

    @property
    def done(self) -> bool:
        """The run has its result: the same command again leaves it alone."""
        return self in (State.FINISHED, State.DIVERGED)

    @property
    def in_flight(self) -> bool:
        """Somebody is to run it, or does: it must not be launched again."""
        return self in (State.QUEUED, State.RUNNING)

    @property
    def bad(self) -> bool:
        """It has ended, and not as planned; a pruned run has ended as its search wanted."""
        return self in (State.FAILED, State.DIVERGED, State.CANCELLED, State.LOST)


class Outcome(StrEnum):
    """How an attempt ended that did not fail; each but INTERRUPTED is the run's state then."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    PRUNED = "pruned"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """All is on disk, and the run is to go on later."""
