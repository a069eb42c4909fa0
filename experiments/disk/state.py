"""The true state of a run: its files are read once, then judged by a pure function.

A run that has long written nothing may still be running: it counts as failed only if its process
was on this host and has certainly ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from experiments.disk import inputs, presence
from experiments.disk.run_dir import SILENT_AFTER_S, RunDir, Status
from experiments.disk.states import State
from relora_core.config import ConfigError


@dataclass(kw_only=True, slots=True)
class RunState(Status):
    """One run as it is now: its last recorded state, checked against its lock and result."""

    run_id: str
    reason: str | None = None
    """Why it failed, or what is odd about it; one line."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Seen:
    """What a run's files say, and what this host knows of the processes that they name."""

    path: Path
    status: Status
    holder: dict[str, Any] | None
    """The process named in its lock; a dead process of this host does not count."""
    ended: State | None
    """FINISHED or DIVERGED if it has a result."""
    damaged: bool = False
    """Its status is done, but its result.json cannot be read."""
    cancelled: bool = False
    """The user has asked it to end."""
    left: bool = False
    """A process that has ended for certain has left its lock."""
    orphaned: bool = False
    """A process of this machine queued it and has ended, so that nothing will start it."""
    changed: str | None = None
    """One line on changed inputs that the user accepted."""
    host: str = ""
    """This host."""

    @property
    def here(self) -> bool:
        """Its status was written on this host, or names no host."""
        return self.status.host in ("", self.host)

    @property
    def locked_here(self) -> bool:
        """A living process of this host has the lock, or some process is writing it."""
        return self.holder is not None and self.holder["host"] in ("?", self.host)


def state_of(run_dir: RunDir) -> RunState:
    """The run as it is now; nothing on disk is changed."""
    return judge(look(run_dir), now=time.time())


# looking ----------------------------------------------------------------------------------------
def look(run_dir: RunDir) -> Seen:
    """Read its files; twice if neither lock nor result confirms the status, since the run may have
    begun or ended in between."""
    seen = _read(run_dir)
    confirmed = seen.holder or seen.ended or judge(seen, now=0.0).state is seen.status.state
    return seen if confirmed else _read(run_dir)


def _read(run_dir: RunDir) -> Seen:
    # The status first: a run that ends now writes its result and then removes its lock.
    status, host = run_dir.status(), socket.gethostname()
    holder, ended = run_dir.lock_holder(), run_dir.ended()
    changed = None
    with contextlib.suppress(ConfigError):
        changed = inputs.describe_accepted(run_dir)
    return Seen(
        path=run_dir.path,
        status=status,
        holder=holder,
        ended=ended,
        damaged=status.state.done and ended is None and run_dir.result_path.exists(),
        cancelled=run_dir.cancel_path.exists(),
        left=holder is None and (run_dir.path / "lock").exists(),
        orphaned=_is_orphan(run_dir, status, host=host),
        changed=changed,
        host=host,
    )


def _is_orphan(run_dir: RunDir, status: Status, *, host: str) -> bool:
    if status.state is not State.QUEUED or status.job_id is not None:
        return False
    place, birth = run_dir.output_dir, status.birth
    shown = presence.is_shown(place, host=status.host, pid=status.pid, birth=birth)
    if shown is not None:
        return not shown
    return status.host in ("", host) and not psutil.pid_exists(status.pid or os.getpid())


# judging ----------------------------------------------------------------------------------------
def judge(seen: Seen, *, now: float) -> RunState:
    """The run's state by its own files alone; the first case that fits counts."""
    status = seen.status
    state, reason = status.state, status.error
    if seen.holder is not None:
        state, reason = State.RUNNING, _silence(status, now=now)
    elif seen.ended is not None:
        state = seen.ended
    elif state.done:
        what = "its result.json is damaged" if seen.damaged else "left no result"
        reason = f"says {state} but {what}; the same command goes on with it"
        state = State.FAILED
    elif state is State.RUNNING and (seen.here or seen.left):
        state, reason = State.FAILED, f"killed (no process; last heartbeat {_ago(status, now=now)})"
    elif state is State.RUNNING:
        reason = _silence(status, now=now)
    elif seen.orphaned:
        state, reason = State.PLANNED, "its launcher has ended; the same command runs it"
    fields: dict[str, Any] = dataclasses.asdict(status) | {"state": state}
    reason = seen.changed if reason is None else reason
    return RunState(**fields, run_id=seen.path.name, reason=reason)


def _silence(status: Status, *, now: float) -> str | None:
    if not status.heartbeat or now - status.heartbeat < SILENT_AFTER_S:
        return None
    where = f" from {status.host}" if status.host else ""
    return f"no heartbeat{where} for {(now - status.heartbeat) / 60:.0f} min"


def _ago(status: Status, *, now: float) -> str:
    return f"{max(0.0, now - status.heartbeat):.0f} s ago" if status.heartbeat else "never"
