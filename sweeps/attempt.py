"""Around one attempt of a run: its log, MLflow, and its end if it could not record that itself."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from experiments.disk.run_dir import RunDir
from experiments.disk.states import State
from experiments.run.stopping import shielded
from experiments.scheduler import current_job
from experiments.tracking import follower
from relora_core import shared


@contextlib.contextmanager
def follow(run_dir: RunDir) -> Iterator[None]:
    """Keep MLflow up to date with the run if it is a server: a node must not write a database file.

    A child process does it. A thread would slow down training, training would wait for a slow
    server, and the thread would die with the run before the last points are sent.
    """
    config = run_dir.config()
    if not config.tracking.enabled or not (config.tracking.uri or "").startswith("http"):
        yield
        return
    with contextlib.ExitStack() as stack:
        with shielded():
            stack.enter_context(follower.follow(run_dir, config=config))
        yield


def is_stalled(run_dir: RunDir, *, limit: int) -> bool:
    """Whether the newest `limit` attempts all belong to this job and none wrote a checkpoint."""
    newest = run_dir.attempt_records()[-limit:]
    here = (current_job(), run_dir.newest_step())
    return len(newest) == limit and all(
        (r.get("job_id"), r.get("start_step")) == here for r in newest
    )


# the end ----------------------------------------------------------------------------------------
def record_end(run_dir: RunDir, *, code: int, reason: str | None = None) -> None:
    """Record how a run ended if its worker could not: it was killed, or died while starting."""
    status = run_dir.status()
    if run_dir.ended() or run_dir.lock_holder() is not None:
        return
    if status.state in (State.CANCELLED, State.PRUNED) or (
        status.state is State.FAILED and status.error and not reason
    ):
        return
    if run_dir.cancel_path.exists():
        run_dir.update_status(state=State.CANCELLED, phase="", error=None)
        return
    died = f"killed by signal {-code}" if code < 0 else f"its worker ended with exit code {code}"
    run_dir.update_status(state=State.FAILED, phase="", error=reason or died)


@contextlib.contextmanager
def redirect_output(run_dir: RunDir) -> Iterator[None]:
    """Send all output of this process, native code's too, to the log of the run's next attempt."""
    saved = [os.dup(stream) for stream in (1, 2)]
    _flush()
    with shared.open_file(run_dir.log_path(run_dir.next_attempt()), "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        yield
    finally:
        _flush()
        for stream, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, stream)
            os.close(copy)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
