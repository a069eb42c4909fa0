"""The runs of one sweep on this machine: which starts next, and what is recorded when it ends."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.disk.output_dir import run_at
from experiments.disk.process import process_start
from experiments.disk.run_dir import RunDir, Status
from experiments.disk.state import RunState, state_of
from experiments.disk.states import State
from sweeps import display
from sweeps.attempt import record_end
from sweeps.local.processes import POLL_S, Processes
from sweeps.local.progress import Progress
from sweeps.planning.plan import Cell
from sweeps.worker import LOCKED


@dataclass(kw_only=True, slots=True)
class Pool:
    """Starts workers while there are runs and free slots, and records how their runs ended."""

    output_dir: Path
    processes: Processes[Cell]
    progress: Progress
    pending: list[Cell] = field(default_factory=list)
    elsewhere: list[Cell] = field(default_factory=list)
    """Runs that another process of this host works on: we wait for them, no more."""
    before: dict[str, Status] = field(default_factory=dict)
    """run_id -> status before it was queued."""
    ends: list[str] = field(default_factory=list)
    """States of the runs that have ended."""

    def run(self, cells: Sequence[Cell], *, done: int, stop: threading.Event) -> None:
        """Run `cells` in this order until all have ended or `stop` is set."""
        self.ends = ["done"] * done
        self.pending = list(cells)
        for cell in cells:
            self._queue(cell)
        try:
            while (self.pending or self._active) and not stop.is_set():
                self._start_next()
                self._reap()
                self._check_elsewhere()
                self.progress.tick(self._active, counts=self._counts())
                stop.wait(POLL_S)
        finally:
            self._stop_all()

    @property
    def _active(self) -> list[Cell]:
        return self.processes.work + self.elsewhere

    def _counts(self) -> dict[str, int]:
        counts = {state: self.ends.count(state) for state in dict.fromkeys(self.ends)}
        return counts | {State.RUNNING: len(self._active), State.QUEUED: len(self.pending)}

    def _dir(self, cell: Cell) -> RunDir:
        return run_at(self.output_dir, cell.run_id)

    def _queue(self, cell: Cell) -> None:
        run_dir = self._dir(cell)
        self.before[cell.run_id] = run_dir.status()
        if run_dir.lock_holder() is None:
            pid, host = os.getpid(), socket.gethostname()
            here = {"host": host, "pid": pid, "birth": process_start(pid), "job_id": None}
            run_dir.update_status(state=State.QUEUED, error=None, **here)

    def _start_next(self) -> None:
        while self.pending and self.processes.ready:
            cell = self.pending.pop(0)
            run_dir = self._dir(cell)
            now = state_of(run_dir)
            if run_dir.lock_holder() is not None:
                self.elsewhere.append(cell)
            elif now.state.done or self._failed_meanwhile(cell, now):
                self._record_end(cell, now)
            elif run_dir.cancel_path.exists():
                run_dir.update_status(state=State.CANCELLED, error=None)
                self._record_end(cell, state_of(run_dir))
            else:
                self._start(cell)

    def _failed_meanwhile(self, cell: Cell, now: RunState) -> bool:
        """Whether it has failed in another launcher since it was queued."""
        return now.state is State.FAILED and now.attempts > self.before[cell.run_id].attempts

    def _start(self, cell: Cell) -> None:
        run_dir = self._dir(cell)
        attempt = run_dir.next_attempt()
        self.processes.start(cell, run_dir.path, log=run_dir.log_path(attempt))
        self.progress.started(cell, attempt=attempt)

    def _reap(self) -> None:
        for cell, code in self.processes.reap():
            if code == LOCKED:
                self.elsewhere.append(cell)
            else:
                record_end(self._dir(cell), code=code)
                self._record_end(cell, state_of(self._dir(cell)))

    def _check_elsewhere(self) -> None:
        """Go on waiting for runs of this host; those of other hosts count as they are now."""
        for cell in list(self.elsewhere):
            run_dir = self._dir(cell)
            holder = run_dir.lock_holder()
            if holder is not None and holder["host"] in ("?", socket.gethostname()):
                continue
            self.elsewhere.remove(cell)
            now = state_of(run_dir)
            if holder is not None or now.state.done or now.state in (State.FAILED, State.CANCELLED):
                self._record_end(cell, now)
            else:
                self.pending.append(cell)

    def _record_end(self, cell: Cell, now: RunState) -> None:
        self.ends.append(now.state)
        reason = now.reason
        if now.state is State.FAILED:
            reason = display.error_line(self._dir(cell), attempts=now.attempts, reason=reason)
        self.progress.ended(cell, state=now.state, reason=reason)

    def _stop_all(self) -> None:
        """End our own workers. The same command resumes their runs."""
        for cell, code in self.processes.stop():
            record_end(self._dir(cell), code=code, reason="stopped; the same command resumes it")
        for cell in self.pending:
            self._unqueue(cell)
        self.pending = []

    def _unqueue(self, cell: Cell) -> None:
        now, before = self._dir(cell).status(), self.before[cell.run_id]
        if now.state is State.QUEUED and now.pid == os.getpid():
            again = State.PLANNED if before.state.in_flight else before.state
            self._dir(cell).update_status(state=again, error=before.error)
