"""What is true of each run, from its directory: status, lock and heartbeat. Reads only.

A run says of itself what it does; who holds its lock says whether it still can. Absence of word is
not death: only a process of this host that is gone for certain makes a running run a failed one.
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

from experiments.disk import inputs
from experiments.disk.output_dir import all_runs
from experiments.disk.run_dir import DONE, RunDir, Status
from relora_core.config import ConfigError

SILENT_AFTER_S = 300.0
"""A running run without word for so long gets a note."""


@dataclass(kw_only=True, slots=True)
class RunState(Status):
    """One run as it is now: what it last said of itself, judged."""

    run_id: str
    reason: str | None = None
    """Why it failed, or what is odd about it; one line."""


def state_of(run_dir: RunDir) -> RunState:
    """The run as it is now; nothing on disk is changed."""
    status = run_dir.status()
    state, reason = _judge(run_dir, status)
    again = run_dir.status()
    if again.state != status.state:  # it ended between the two looks: judge what it left
        status = again
        state, reason = _judge(run_dir, status)
    if reason is None and run_dir.changes_path.exists():
        with contextlib.suppress(ConfigError):
            reason = inputs.said(run_dir)
    said: dict[str, Any] = dataclasses.asdict(status) | {"state": state}
    return RunState(**said, run_id=run_dir.run_id, reason=reason)


def _judge(run_dir: RunDir, status: Status) -> tuple[str, str | None]:
    holder = run_dir.lock_holder()
    if holder is not None:
        return "running", _silence(status)
    ended = run_dir.ended()
    if ended is not None:
        return ended, status.error
    if status.state in DONE:
        damaged = run_dir.result_path.exists()
        what = "its result.json is damaged" if damaged else "left no result"
        return "failed", f"says {status.state} but {what}; the same command goes on with it"
    if status.state == "running":
        if status.host in ("", socket.gethostname()):
            return "failed", f"killed (no process; last heartbeat {_ago(status)})"
        return "running", _silence(status)
    if status.state == "queued" and _abandoned(status):
        return "planned", "its launcher is gone; the same command runs it"
    return status.state, status.error


def _abandoned(status: Status) -> bool:
    """Queued by a process of this host that is gone, and by no scheduler."""
    here = status.host in ("", socket.gethostname())
    return here and status.job_id is None and not psutil.pid_exists(status.pid or os.getpid())


def _silence(status: Status) -> str | None:
    if not status.heartbeat or time.time() - status.heartbeat < SILENT_AFTER_S:
        return None
    where = f" from {status.host}" if status.host else ""
    return f"no word{where} for {(time.time() - status.heartbeat) / 60:.0f} min"


def _ago(status: Status) -> str:
    if not status.heartbeat:
        return "never"
    return f"{max(0.0, time.time() - status.heartbeat):.0f} s ago"


def states(output_dir: Path | str) -> list[RunState]:
    """Every run below `output_dir`, by run_id."""
    return [state_of(run_dir) for run_dir in all_runs(output_dir)]
