"""The state of each run of a sweep, by its own files, then by SLURM's answer. Reads only.

A job that squeue does not list need not be dead: a run is `lost` only if no SLURM tool knows its
job and the run has not written for long. No judgement is stored.
"""

from __future__ import annotations

import dataclasses
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.disk.run_dir import SILENT_AFTER_S, RunDir
from experiments.disk.state import RunState, Seen, judge, look
from experiments.disk.states import State
from sweeps.planning.plan import command
from sweeps.slurm import cluster
from sweeps.slurm.cluster import Job, SlurmError
from sweeps.slurm.submission import readable_submissions

HELD = re.compile(r"held|hold|special.?exit", re.IGNORECASE)
NEVER = re.compile(
    r"DependencyNeverSatisfied|PartitionTimeLimit|PartitionNodeLimit|BadConstraints|"
    r"MaxWallDurationPerJob\w*|MaxTimeLimit|TimeLimitExceeded"
)
"""Reasons that never pass: more was asked for than there is."""


def survey(runs: Sequence[RunDir]) -> dict[str, RunState]:
    """run_id -> the run as it is now; SLURM is asked once, about all runs that have a job of ours.

    If SLURM does not answer, the state is that of the run's files, with a note in `reason`.
    """
    look_at = _Looker()
    seen = {run.run_id: look_at(run) for run in runs}
    states = {run_id: judge(one, now=time.time()) for run_id, one in seen.items()}
    with_job = [run for run in runs if _needs_slurm(seen[run.run_id])]
    if not with_job:
        return states
    try:
        jobs = _ask({id_ for run in with_job for id_ in _jobs_of(seen[run.run_id])})
    except SlurmError as error:
        for run in with_job:
            states[run.run_id] = _with_note(states[run.run_id], f"SLURM does not answer: {error}")
        return states
    for run in with_job:
        state = judge_job(seen[run.run_id], jobs=jobs, now=time.time())
        if not state.state.in_flight:  # look again: it may have ended while SLURM was asked
            again = look_at(run)
            trace = look_at.trace(again, jobs=jobs)
            state = judge_job(again, jobs=jobs, trace=trace, now=time.time())
        states[run.run_id] = state
    return states


class _Looker:
    """Looks at runs, without the ids of jobs that are not ours; reads submissions once.

    Earlier versions recorded any job around a run's process on this host. A queued run's job was
    recorded by its launcher, so it is ours.
    """

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, Path]] = {}

    def __call__(self, run: RunDir) -> Seen:
        seen = look(run)
        if seen.status.job_id is None or not seen.here:
            return seen
        queued = judge(seen, now=0.0).state is State.QUEUED
        if queued or self._folder(seen) is not None:
            return seen
        return dataclasses.replace(seen, status=dataclasses.replace(seen.status, job_id=None))

    def _folder(self, seen: Seen) -> Path | None:
        """The submission's that the run's job belongs to; None if the job is not ours."""
        output_dir = seen.path.parents[1]
        if output_dir not in self._folders:
            submissions = readable_submissions(output_dir)
            self._folders[output_dir] = {
                job_id: folder for folder, one in submissions for job_id in one.task_ids()
            }
        return self._folders[output_dir].get(seen.status.job_id or "")

    def trace(self, seen: Seen, *, jobs: Mapping[str, Job]) -> Trace:
        """Read for a job that failed or is not listed; for others SLURM's answer is enough."""
        job = jobs.get(seen.status.job_id or "")
        if job is None or job.state not in ("FAILED", cluster.UNLISTED):
            return Trace()
        if (folder := self._folder(seen)) is None:
            return Trace()
        log = folder / f"{job.job_id}_0_log.out"  # as submitit names it
        error = None if seen.status.attempts else _newest_error(log)
        return Trace(began=log.exists(), error=error)


def is_dead(holder: dict[str, Any], *, heartbeat: float) -> bool:
    """Whether the holder of a run's lock, on another host, is certainly dead; False in doubt.

    `heartbeat` is when the run last wrote its status, seconds since the epoch.
    """
    return bool(_dead([(holder, heartbeat)]))


def dead_holders(runs: Iterable[RunDir]) -> list[dict[str, Any]]:
    """The holders of these runs' locks that `is_dead` calls dead; SLURM is asked once."""
    held = [(holder, run.status().heartbeat) for run in runs if (holder := run.lock_holder())]
    return _dead(held)


def _dead(held: list[tuple[dict[str, Any], float]]) -> list[dict[str, Any]]:
    """Those of (holder, heartbeat) that are certainly dead."""
    own = ("?", socket.gethostname())  # whose processes are RunDir.lock_holder()'s to judge
    held = [one for one in held if one[0].get("job_id") is not None and one[0]["host"] not in own]
    if not held:
        return []
    try:
        jobs = _ask({holder["job_id"] for holder, _ in held})
    except SlurmError:
        return []
    return [holder for holder, beat in held if _is_over(jobs.get(holder["job_id"]), heartbeat=beat)]


def _is_over(job: Job | None, *, heartbeat: float) -> bool:
    if job is None:
        return time.time() - heartbeat > SILENT_AFTER_S
    return job.over or job.waiting


def _ask(job_ids: set[str]) -> dict[str, Job]:
    if not cluster.available():
        raise SlurmError("there is no squeue on this machine's PATH")
    return cluster.jobs(job_ids)


def _needs_slurm(seen: Seen) -> bool:
    pruned = seen.status.state is State.PRUNED and seen.holder is None
    return seen.status.job_id is not None and seen.ended is None and not pruned


def _jobs_of(seen: Seen) -> list[str]:
    """The job that the run was given to and the one that holds its lock, mostly the same."""
    job_ids = (seen.status.job_id, (seen.holder or {}).get("job_id"))
    return [job_id for job_id in job_ids if job_id is not None]


@dataclass(kw_only=True, frozen=True, slots=True)
class Trace:
    """What a job has left beside its submission."""

    began: bool | None = None
    """Whether its log is there, which SLURM makes when a job begins; None: it has no submission."""
    error: str | None = None
    """The newest error of its script, such as a failed command of `setup`."""


def _newest_error(log: Path) -> str | None:
    if not log.exists():
        return None
    lines = log.read_text(encoding="utf-8", errors="replace")[-4096:].splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else None


# judging ----------------------------------------------------------------------------------------
def judge_job(
    seen: Seen, *, jobs: Mapping[str, Job], trace: Trace | None = None, now: float
) -> RunState:
    """The run by its files and what SLURM says of its job; the first case that fits counts."""
    own, trace = judge(seen, now=now), trace or Trace()
    if not _needs_slurm(seen) or _is_held(seen, jobs=jobs):
        return own
    status = seen.status
    recorded = status.state  # `own` may be RUNNING only because of a dead holder's lock
    job = jobs.get(status.job_id or "")
    if job is None:
        return _unknown(seen, own, now=now)
    if recorded is State.CANCELLED and (seen.cancelled or not job.waiting):
        return _set(own, State.CANCELLED, status.error)
    if job.waiting:
        return _set(own, State.QUEUED, _why_it_waits(seen, job=job))
    if job.state == cluster.UNLISTED and recorded in (State.QUEUED, State.PLANNED):
        if trace.began:
            return _set(own, State.FAILED, f"its job {job.job_id} ended without a result")
        # Cancelled before it had a node, or over for long.
        reason = f"SLURM does not list job {job.job_id} with its array any more"
        return _set(own, State.CANCELLED, reason)
    if job.over:
        return _over(seen, own, job=job, trace=trace)
    if recorded is State.FAILED:
        return _set(own, State.FAILED, status.error)
    if recorded is State.RUNNING:
        agree = own.state is State.RUNNING
        reason = own.reason if agree else f"{own.reason}, but SLURM: {job.state}"
        return _set(own, recorded, reason)
    where = f" on {job.node}" if job.node else ""
    what = "ending" if job.state == "COMPLETING" else "starting"
    return _set(own, State.QUEUED, f"{what}{where}")


def _is_held(seen: Seen, *, jobs: Mapping[str, Job]) -> bool:
    """Whether the process that has the run's lock is at work, as far as SLURM can tell."""
    if seen.holder is None:
        return False
    job_id = seen.holder.get("job_id")
    if seen.locked_here or job_id is None:
        return True
    job = jobs.get(job_id)
    return job is not None and job.alive and not job.waiting


def _unknown(seen: Seen, own: RunState, *, now: float) -> RunState:
    """The run's state if SLURM does not know its job."""
    status = seen.status
    if status.state in (State.FAILED, State.CANCELLED, State.PLANNED):
        return _set(own, status.state, status.error)
    if seen.cancelled:
        return _set(own, State.CANCELLED, None)
    silent = now - status.heartbeat
    if silent <= SILENT_AFTER_S:
        return _with_note(own, f"SLURM does not list job {status.job_id}")
    since = f"no heartbeat for {silent / 60:.0f} min" if status.heartbeat else "no heartbeat ever"
    again = f"`{_command('retry', seen)}` runs it again"
    return _set(own, State.LOST, f"{since} and SLURM does not know job {status.job_id}; {again}")


def _over(seen: Seen, own: RunState, *, job: Job, trace: Trace) -> RunState:
    """The run's state if its job has ended and left no result."""
    by_slurm = f"SLURM: {job.state} (job {job.job_id})"
    if seen.status.state is State.FAILED:
        return _set(own, State.FAILED, seen.status.error or by_slurm)
    if job.state == "CANCELLED" or seen.cancelled:
        return _set(own, State.CANCELLED, by_slurm)
    if job.state == "FAILED" and not own.attempts:
        return _set(own, State.FAILED, by_slurm + _before_the_run(seen, job=job, trace=trace))
    why = {
        "COMPLETED": f"its job {job.job_id} ended without a result",
        "PREEMPTED": f"preempted and not requeued (job {job.job_id})",
        cluster.UNLISTED: f"its job {job.job_id} ended, and SLURM does not know how",
    }
    return _set(own, State.FAILED, why.get(job.state, by_slurm))


def _before_the_run(seen: Seen, *, job: Job, trace: Trace) -> str:
    """Why a job failed before the run began; text that follows what SLURM says."""
    if trace.error:
        return f"; {trace.error}"
    if trace.began is not False:
        return ""
    node = f"node {job.node}" if job.node else "node"
    return (
        f" and its {node} wrote nothing: output_dir must be on a shared file system that the nodes "
        f"see, got {seen.path.absolute().parents[1]}"
    )


def _why_it_waits(seen: Seen, *, job: Job) -> str:
    """Why the job has no node, and what to do if it will never have one."""
    status = seen.status
    why = job.reason if job.reason not in ("", "None") else job.state
    if "admin" in why.lower():
        return f"held by an administrator (SLURM: {why})"
    if HELD.search(why) or HELD.search(job.state):
        return f"held (SLURM: {why}); `scontrol release {job.job_id}` lets it go on"
    if NEVER.search(why):
        return f"never starts (SLURM: {why}); `{_command('cancel', seen)}`, then launch it again"
    if seen.cancelled:
        return f"asked to end: it does so when it begins (SLURM: {why})"
    if status.phase.startswith("requeued"):
        return f"{status.phase}, SLURM: {why}"
    fresh = status.state in (State.PLANNED, State.QUEUED)
    return f"SLURM: {why}" if fresh else f"requeued, SLURM: {why}"


def _command(name: str, seen: Seen) -> str:
    return command(name, seen.path.name, output_dir=seen.path.parents[1])


def _set(own: RunState, state: State, reason: str | None) -> RunState:
    return dataclasses.replace(own, state=state, reason=reason)


def _with_note(own: RunState, note: str) -> RunState:
    return dataclasses.replace(own, reason=f"{own.reason}; {note}" if own.reason else note)
