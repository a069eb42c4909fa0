"""What is true of each run of a sweep: its own word first, then SLURM's. Reads only.

Absence from squeue is not death: a run is given up (`lost`) only when nobody in SLURM knows its
job and the run itself has been silent for long; and even that is judged anew each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import records
from experiments.run_dir import RunDir, Status, run_at
from experiments.state import SILENT_AFTER_S, RunState, state_of
from relora_core import atomic, shared
from relora_core.config import ConfigError
from sweeps import cluster
from sweeps.cluster import Job, SlurmError
from sweeps.plan import command, plan_folder

HELD = re.compile(r"held|hold|special.?exit", re.IGNORECASE)
NEVER = re.compile(
    r"DependencyNeverSatisfied|PartitionTimeLimit|PartitionNodeLimit|BadConstraints|"
    r"MaxWallDurationPerJob\w*|MaxTimeLimit|TimeLimitExceeded"
)
"""Reasons that do not pass by themselves: what was asked for is beyond what there is."""


HEARD_S = 600.0
"""So long after a command that ended inside sbatch its job may still turn up."""


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
        if job_id in one.ids():
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


# submissions ------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Submission:
    """One sbatch: what was asked for, and the job that came of it."""

    submission: str
    """8 hexadecimal digits."""
    name: str
    """SLURM's name of the job, unique; written down before sbatch is called."""
    created: float = 0.0
    """Seconds since the epoch."""
    state: str = "submitting"
    """`submitting`, `submitted` or `refused`."""
    job_id: str | None = None
    """Of an array: without the task."""
    tasks: list[list[str]] = field(default_factory=list)
    """The run_ids of each task of the array."""
    kind: str = "train"
    max_stalled: int = 5
    """Attempts without a new checkpoint after which the job gives a run up."""
    signal_delay_s: float = 120.0
    """Seconds between SLURM's warning and its kill."""
    error: str | None = None
    """One line, where SLURM refused."""
    at_once: int | None = None
    """Tasks of its array that may run at a time; None: all."""
    waits_for: list[str] = field(default_factory=list)
    """Jobs that must have ended before it begins."""

    def job_ids(self) -> dict[str, str]:
        """run_id -> its job; empty while there is none."""
        each = zip(self.tasks, self.ids(), strict=False)
        return {run_id: job_id for run_ids, job_id in each for run_id in run_ids}

    def ids(self) -> list[str]:
        """Every job of it, one for each task; none while there is none."""
        if self.job_id is None:
            return []
        if len(self.tasks) == 1:
            return [self.job_id]
        return [f"{self.job_id}_{index}" for index in range(len(self.tasks))]

    def write(self, folder: Path) -> None:
        """Into `folder`, which is this submission's own."""
        shared.make_folder(folder)
        atomic.write_json(folder / "submission.json", dataclasses.asdict(self))


def jobs_folder(output_dir: Path | str, *, name: str) -> Path:
    return plan_folder(output_dir, name=name) / "jobs"


def read_submissions(folder: Path) -> list[Submission]:
    """Every `*/submission.json` below `folder`, oldest first."""
    found = []
    for path in folder.glob("*/submission.json"):
        try:
            found.append(read_submission(path))
        except (ValueError, TypeError) as error:  # whose jobs it names nobody can say
            raise ConfigError(
                f"{path} must be a submission as this version writes it ({error}); `squeue --me` "
                "lists its jobs: when none is left, move it away"
            ) from None
    return sorted(found, key=lambda one: (one.created, one.submission))


def read_submission(path: Path) -> Submission:
    raw = records.known(Submission, records.read(path), where="")
    raw["submission"] = path.parent.name  # whatever the file says
    return Submission(**raw)


def submitted_jobs(output_dir: Path | str) -> set[str]:
    """Every job that a submission below `output_dir` has recorded: these are ours, no others."""
    return {job_id for _, one in _sound(output_dir) for job_id in one.ids()}


def _sound(output_dir: Path | str) -> Iterator[tuple[Path, Submission]]:
    """All sweeps' submissions and their folders; of a damaged one nobody can say what it names."""
    for path in Path(output_dir).glob("sweeps/*/jobs/*/submission.json"):
        with contextlib.suppress(ValueError, TypeError, FileNotFoundError):
            yield path.parent, read_submission(path)


def record_job(file: Path, job_id: str) -> None:
    """A job's own word on its id, where the command that submitted it has left none."""
    one = read_submission(file)
    if one.job_id is None:
        one.job_id, one.state, one.error = job_id.partition("_")[0], "submitted", None
        one.write(file.parent)


def recover(output_dir: Path | str, name: str, *, write: bool = False) -> list[Submission]:
    """Every submission of a sweep; job ids lost between sbatch and disk are found by job name.

    What is found is written down only with `write` (the launcher's). SlurmError where an id is
    missing and SLURM does not answer: nobody knows then whether the job exists.
    """
    folder = jobs_folder(output_dir, name=name)
    submissions = read_submissions(folder)
    for one in submissions:
        if one.state != "submitting" or one.job_id is not None:
            continue
        one.job_id = cluster.find(one.name)
        if one.job_id is not None:
            one.state = "submitted"
            if write:
                one.write(folder / one.submission)
    return submissions


def unanswered(output_dir: Path | str, name: str) -> set[str]:
    """Runs of a fresh submission without a job so far: its sbatch may be heard yet."""
    return {
        run_id
        for one in read_submissions(jobs_folder(output_dir, name=name))
        if one.state == "submitting" and one.job_id is None and one.kind == "train"
        if time.time() - one.created < HEARD_S
        for task in one.tasks
        for run_id in task
    }


def adopt(output_dir: Path | str, name: str) -> None:
    """Tell runs that do not know it of their job: its sbatch outlived the command around it."""
    newest: dict[str, Submission] = {}
    for one in recover(output_dir, name, write=True):
        if one.kind == "train":  # a run that was asked for anew has no older job, refused or not
            newest |= dict.fromkeys((run_id for task in one.tasks for run_id in task), one)
    runs = {run_id: run_at(output_dir, run_id) for run_id, one in newest.items() if one.job_id}
    lost = {run_id: run for run_id, run in runs.items() if run.path.exists() and _unaware(run)}
    ids = {run_id: newest[run_id].job_ids()[run_id] for run_id in lost}
    jobs = cluster.jobs(ids.values())
    for run_id, run in lost.items():
        job = jobs.get(ids[run_id])
        recent = time.time() - newest[run_id].created < SILENT_AFTER_S
        if job.alive if job is not None else recent:
            run.update_status(state="queued", job_id=ids[run_id])


def _unaware(run: RunDir) -> bool:
    status = run.status()
    return status.state == "planned" and status.job_id is None and run.lock_holder() is None
