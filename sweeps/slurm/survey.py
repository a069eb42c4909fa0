"""What is true of each run of a sweep: its own word first, then SLURM's. Reads only.

Absence from squeue is not death: a run is given up (`lost`) only when nobody in SLURM knows its
job and the run itself has been silent for long; and even that is judged anew each time.
"""

from __future__ import annotations

import dataclasses
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.disk.run_dir import RunDir, Status
from experiments.disk.state import SILENT_AFTER_S, RunState, state_of
from sweeps.planning.plan import command
from sweeps.slurm import cluster
from sweeps.slurm.cluster import Job, SlurmError
from sweeps.slurm.submission import _sound, submitted_jobs

HELD = re.compile(r"held|hold|special.?exit", re.IGNORECASE)
NEVER = re.compile(
    r"DependencyNeverSatisfied|PartitionTimeLimit|PartitionNodeLimit|BadConstraints|"
    r"MaxWallDurationPerJob\w*|MaxTimeLimit|TimeLimitExceeded"
)
"""Reasons that do not pass by themselves: what was asked for is beyond what there is."""


def survey(runs: Sequence[RunDir]) -> dict[str, RunState]:
    """run_id -> the run as it is now; SLURM is asked once, for the runs of its that have not ended.

    Where SLURM does not answer the run's own word stands, with a note in `reason`.
    """
    own = _Own()
    states = {run.run_id: own(run) for run in runs}
    unsure = {run: _jobs_of(run) for run in runs if _unsure(run, states[run.run_id])}
    if not unsure:
        return states
    try:
        jobs = _ask({job_id for job_ids in unsure.values() for job_id in job_ids})
    except SlurmError as error:
        for run in unsure:
            states[run.run_id] = _noted(states[run.run_id], f"SLURM does not answer: {error}")
        return states
    for run in unsure:
        # Read again: it may have ended while SLURM was asked.
        said = own(run)
        states[run.run_id] = judge(run, own=said, jobs=jobs) if _unsure(run, said) else said
    return states


class _Own:
    """Runs' own word, where a job that is not ours says nothing of a process of this host.

    Earlier versions wrote down whatever job a run was inside of; a queued run's is a launcher's.
    """

    def __init__(self) -> None:
        self._ours: dict[Path, set[str]] = {}

    def __call__(self, run: RunDir) -> RunState:
        state = state_of(run)
        here = state.host in ("", socket.gethostname()) and state.state != "queued"
        if state.job_id is None or not here or state.job_id in self._submitted(run.path.parents[1]):
            return state
        return dataclasses.replace(state, job_id=None)

    def _submitted(self, output_dir: Path) -> set[str]:
        if output_dir not in self._ours:
            self._ours[output_dir] = submitted_jobs(output_dir)
        return self._ours[output_dir]


def gone(holder: dict[str, Any], *, heartbeat: float) -> bool:
    """Is the holder of a run's lock, on another host, certainly dead? In doubt: no.

    `heartbeat` is the newest word of the run, seconds since the epoch.
    """
    job_id = holder.get("job_id")
    if job_id is None or holder["host"] in ("?", socket.gethostname()):
        return False  # RunDir.lock_holder() has looked for processes of this host
    try:
        job = _ask({job_id}).get(job_id)
    except SlurmError:
        return False
    if job is None:
        return time.time() - heartbeat > SILENT_AFTER_S
    return job.over or job.waiting


def _ask(job_ids: set[str]) -> dict[str, Job]:
    if not cluster.available():
        raise SlurmError("there is no squeue on this machine's PATH")
    return cluster.jobs(job_ids)


def _unsure(run: RunDir, own: RunState) -> bool:
    return own.job_id is not None and run.ended() is None and own.state != "pruned"


def _jobs_of(run: RunDir) -> list[str]:
    """The job that the run was given to and the one that holds its lock: mostly the same."""
    ids = (run.status().job_id, (run.lock_holder() or {}).get("job_id"))
    return [job_id for job_id in ids if job_id is not None]


# judging ----------------------------------------------------------------------------------------
def judge(run: RunDir, *, own: RunState, jobs: dict[str, Job]) -> RunState:
    """The run's own word in the light of what SLURM says of its job."""
    holder = run.lock_holder()
    if holder is not None:
        at_work = jobs.get(holder.get("job_id", ""))
        here = holder["host"] in ("?", socket.gethostname())
        if (
            here
            or holder.get("job_id") is None
            or (at_work and at_work.alive and not at_work.waiting)
        ):
            return own
    word = run.status()  # `own` may be "running" only because of a dead holder's lock
    job_id = own.job_id or ""
    job = jobs.get(job_id)
    if job is None:
        return _unknown(run, own, word=word.state, job_id=job_id)
    if word.state == "cancelled" and (job.over or not job.waiting or run.cancel_path.exists()):
        return _said(own, "cancelled", word.error)
    if job.waiting:
        return _said(own, "queued", _waits(job, word=word, run=run))
    if job.state == cluster.UNLISTED and word.state in ("queued", "planned"):
        return _never_listed(run, own, job=job)
    if job.over:
        return _over(run, own, word=word.state, error=word.error, job=job)
    if word.state == "failed":
        return _said(own, "failed", word.error)
    if word.state == "running":
        odd = own.reason if own.state == "running" else f"{own.reason}, but SLURM: {job.state}"
        return _said(own, "running", odd)
    where = f" on {job.node}" if job.node else ""
    return _said(own, "queued", f"{'ending' if job.state == 'COMPLETING' else 'starting'}{where}")


def _unknown(run: RunDir, own: RunState, *, word: str, job_id: str) -> RunState:
    if word in ("failed", "cancelled", "planned"):
        return _said(own, word, run.status().error)
    if run.cancel_path.exists():
        return _said(own, "cancelled", None)
    silent = time.time() - own.heartbeat
    if silent <= SILENT_AFTER_S:
        return _noted(own, f"SLURM does not list job {job_id}")
    since = f"no word for {silent / 60:.0f} min" if own.heartbeat else "no word ever"
    return _said(
        own,
        "lost",
        f"{since} and SLURM does not know job {job_id}; `{_command('retry', run)}` runs it again",
    )


def _over(run: RunDir, own: RunState, *, word: str, error: str | None, job: Job) -> RunState:
    """The job has ended and left no result."""
    if word == "failed":
        return _said(own, "failed", error or f"SLURM: {job.state} (job {job.job_id})")
    if job.state == "CANCELLED" or run.cancel_path.exists():
        return _said(own, "cancelled", f"SLURM: {job.state} (job {job.job_id})")
    if job.state == "COMPLETED":
        return _said(own, "failed", f"its job {job.job_id} ended without a result")
    if job.state == "PREEMPTED":
        return _said(own, "failed", f"preempted and not requeued (job {job.job_id})")
    if job.state == cluster.UNLISTED:
        return _said(own, "failed", f"its job {job.job_id} ended without a word: SLURM forgot it")
    reason = f"SLURM: {job.state} (job {job.job_id})"
    if job.state == "FAILED" and not own.attempts and (line := _last_error(run, job.job_id)):
        reason += f"; {line}"
    elif job.state == "FAILED" and not own.attempts and _began(run, job.job_id) is False:
        reason += (
            f" and its node {job.node or ''} wrote nothing: output_dir must be on a shared file "
            f"system that the nodes see, got {run.path.absolute().parents[1]}"
        ).replace("  ", " ")
    return _said(own, "failed", reason)


def _never_listed(run: RunDir, own: RunState, *, job: Job) -> RunState:
    """SLURM lists the array without this task: it was taken out before it had a node, or it is
    long over. SLURM writes a file when it begins."""
    if _began(run, job.job_id):
        return _said(own, "failed", f"its job {job.job_id} ended without a result")
    return _said(own, "cancelled", f"SLURM does not list job {job.job_id} with its array any more")


def _began(run: RunDir, job_id: str) -> bool | None:
    """Whether SLURM has begun this job of ours: it then makes the file that submitit has named.

    None where no submission names the job.
    """
    log = _log_of(run, job_id)
    return None if log is None else log.exists()


def _last_error(run: RunDir, job_id: str) -> str | None:
    """Of the lines of a job's script itself, such as one of `setup` that has failed."""
    log = _log_of(run, job_id)
    if log is None or not log.exists():
        return None
    lines = log.read_text(encoding="utf-8", errors="replace")[-4096:].splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return said[-1] if said else None


def _log_of(run: RunDir, job_id: str) -> Path | None:
    """What submitit has SLURM call the job's output; None where no submission names the job."""
    for folder, one in _sound(run.path.parents[1]):
        if job_id in one.task_ids():
            return folder / f"{job_id}_0_log.out"
    return None


def _waits(job: Job, *, word: Status, run: RunDir) -> str:
    """Why it has no node; where it would wait for ever, what to do."""
    why = job.reason if job.reason not in ("", "None") else job.state
    if "admin" in why.lower():
        return f"held by an administrator (SLURM: {why})"
    if HELD.search(why) or HELD.search(job.state):
        return f"held (SLURM: {why}); `scontrol release {job.job_id}` lets it go on"
    if NEVER.search(why):
        return f"never starts (SLURM: {why}); `{_command('cancel', run)}`, then launch it again"
    if run.cancel_path.exists():
        return f"asked to end: it does so when it begins (SLURM: {why})"
    if word.phase.startswith("requeued"):
        return f"{word.phase}, SLURM: {why}"
    return f"SLURM: {why}" if word.state in ("planned", "queued") else f"requeued, SLURM: {why}"


def _command(name: str, run: RunDir) -> str:
    return command(name, run.run_id, output_dir=run.path.parents[1])


def _said(own: RunState, state: str, reason: str | None) -> RunState:
    return dataclasses.replace(own, state=state, reason=reason)


def _noted(own: RunState, note: str) -> RunState:
    return dataclasses.replace(own, reason=f"{own.reason}; {note}" if own.reason else note)
