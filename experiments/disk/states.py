"""The states of a run and the outcomes of an attempt, as files, MLflow and tables name them.

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
    """A search has ended it early; a grid that includes it resumes it from its checkpoint."""
    CANCELLED = "cancelled"
    LOST = "lost"
    """Never written to a file: no heartbeat for long, and SLURM does not list its job."""

    @property
    def done(self) -> bool:
        """The run has its result: the same command again leaves it alone."""
        return self in (State.FINISHED, State.DIVERGED)

    @property
    def in_flight(self) -> bool:
        """A process runs it, or will: it must not be launched again."""
        return self in (State.QUEUED, State.RUNNING)

    @property
    def bad(self) -> bool:
        """It did not end as planned. A pruned run did: its search ended it."""
        return self in (State.FAILED, State.DIVERGED, State.CANCELLED, State.LOST)


class Outcome(StrEnum):
    """How an attempt without an error ended; all but INTERRUPTED become the run's state."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    PRUNED = "pruned"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """All is on disk, and the run can be resumed."""
