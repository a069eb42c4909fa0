"""submission.json: what was asked of SLURM, and the job that it made."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from experiments import json_files
from experiments.disk import flock
from experiments.disk.output_dir import jobs_folder, run_at
from experiments.disk.run_dir import SILENT_AFTER_S, RunDir
from experiments.disk.states import State
from relora_core import atomic, shared
from relora_core.config import ConfigError
from sweeps.slurm import cluster
from sweeps.slurm.options import SlurmOptions

APPEARS_S = 600.0
"""For so long after an interrupted sbatch its job may still appear."""


@dataclass(kw_only=True, slots=True)
class Submission:
    """One call of sbatch: what was asked for, and the job that it made."""

    submission: str
    """8 hexadecimal digits."""
    name: str
    """SLURM's name of the job, unique; stored before sbatch is called."""
    created: float = 0.0
    """Seconds since the epoch."""
    state: str = "submitting"
    """`submitting`, `submitted` or `refused`."""
    job_id: str | None = None
    """Of an array: without the task."""
    tasks: list[list[str]] = field(default_factory=list)
    """For each task of the array: run_ids, or paths in the output folder of requests or a study."""
    kind: str = "train"
    max_stalled: int = 5
    """Attempts without a new checkpoint after which the job gives a run up."""
    signal_delay_s: float = 120.0
    """Seconds between SLURM's warning and its kill."""
    error: str | None = None
    """SLURM's reason for refusing it, one line."""
    at_once: int | None = None
    """Tasks of its array that may run at a time; None: all."""
    waits_for: list[str] = field(default_factory=list)
    """Jobs that must have ended before it begins."""

    @classmethod
    def new(
        cls,
        sweep: str,
        tasks: list[list[str]],
        *,
        kind: str,
        options: SlurmOptions,
        at_once: int | None,
        waits_for: list[str],
    ) -> Submission:
        """One that is about to be submitted, with a name that no other job has."""
        number = uuid.uuid4().hex[:8]
        return cls(
            submission=number,
            name=f"{sweep}.{number}",
            created=time.time(),
            tasks=tasks,
            kind=kind,
            max_stalled=options.max_stalled,
            signal_delay_s=options.signal_delay_s,
            at_once=at_once,
            waits_for=waits_for,
        )

    def job_ids(self) -> dict[str, str]:
        """run_id -> its job; empty while there is none."""
        each = zip(self.tasks, self.task_ids(), strict=False)
        return {run_id: job_id for run_ids, job_id in each for run_id in run_ids}

    def task_ids(self) -> list[str]:
        """SLURM's id of each task's job; none while there is no job."""
        if self.job_id is None:
            return []
        if len(self.tasks) == 1:
            return [self.job_id]
        return [f"{self.job_id}_{index}" for index in range(len(self.tasks))]

    def write(self, folder: Path) -> None:
        shared.make_folder(folder)
        atomic.write_json(folder / "submission.json", dataclasses.asdict(self))


def read_submissions(folder: Path) -> list[Submission]:
    """Every `*/submission.json` below `folder`, oldest first."""
    submissions = []
    for path in folder.glob("*/submission.json"):
        try:
            submissions.append(read_submission(path))
        except (ValueError, TypeError) as error:  # unreadable: we cannot tell its jobs
            raise ConfigError(
                f"{path} must be a submission as this version writes it ({error}); `squeue --me` "
                "lists its jobs: when none is left, move it away"
            ) from None
    return sorted(submissions, key=lambda one: (one.created, one.submission))


def read_submission(path: Path) -> Submission:
    raw = json_files.read_fields(Submission, json_files.read(path))
    raw["submission"] = path.parent.name  # whatever the file says
    return Submission(**raw)


def submitted_jobs(output_dir: Path | str) -> set[str]:
    """Every job that a submission below `output_dir` has recorded; no other job is ours."""
    return {job_id for _, one in readable_submissions(output_dir) for job_id in one.task_ids()}


def readable_submissions(output_dir: Path | str) -> Iterator[tuple[Path, Submission]]:
    """All sweeps' submissions and their folders; damaged ones are skipped."""
    for path in Path(output_dir).glob("sweeps/*/jobs/*/submission.json"):
        with contextlib.suppress(ValueError, TypeError, FileNotFoundError):
            yield path.parent, read_submission(path)


def alive(submissions: Iterable[Submission]) -> list[str]:
    """Their jobs that are queued or running."""
    ids = {job_id for one in submissions for job_id in one.task_ids()}
    return [job_id for job_id, job in cluster.jobs(ids).items() if job.alive]


def record_job(file: Path, job_id: str) -> None:
    """Record this job's own id, if the command that submitted it has not."""
    one = read_submission(file)
    if one.job_id is None:
        one.job_id, one.state, one.error = job_id.partition("_")[0], "submitted", None
        one.write(file.parent)


def recover(output_dir: Path | str, name: str, *, write: bool = False) -> list[Submission]:
    """Every submission of a sweep; a job id that a command did not record is looked up by name.

    With `write` (for the launcher) it is stored. SlurmError if an id is missing and SLURM does not
    answer: the job may or may not exist.
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
    """Runs of a recent submission without a job id: its sbatch may still be at work."""
    return {
        run_id
        for one in read_submissions(jobs_folder(output_dir, name=name))
        if one.state == "submitting" and one.job_id is None and one.kind == "train"
        if time.time() - one.created < APPEARS_S
        for task in one.tasks
        for run_id in task
    }


def adopt(output_dir: Path | str, name: str) -> None:
    """Write job ids into runs that lack them: the command died between sbatch and that."""
    newest: dict[str, Submission] = {}
    for one in recover(output_dir, name, write=True):
        if one.kind == "train":  # the newest submission counts, even if it was refused
            newest |= dict.fromkeys((run_id for task in one.tasks for run_id in task), one)
    runs = {run_id: run_at(output_dir, run_id) for run_id, one in newest.items() if one.job_id}
    without = {id_: run for id_, run in runs.items() if run.path.exists() and _lacks_job(run)}
    ids = {run_id: newest[run_id].job_ids()[run_id] for run_id in without}
    jobs = cluster.jobs(ids.values())
    for run_id, run in without.items():
        job = jobs.get(ids[run_id])
        recent = time.time() - newest[run_id].created < SILENT_AFTER_S
        if job.alive if job is not None else recent:
            run.update_status(state=State.QUEUED, job_id=ids[run_id])


def _lacks_job(run: RunDir) -> bool:
    status = run.status()
    return status.state is State.PLANNED and status.job_id is None and run.lock_holder() is None


@contextlib.contextmanager
def only_submitter(output_dir: Path, console: Console) -> Iterator[None]:
    """Wait for another command that submits below output_dir, so that this one sees its jobs."""
    folder = output_dir / "sweeps"
    shared.make_folder(folder)
    with shared.open_file(folder / ".submit.lock", "w") as file:
        try:
            flock.lock(file, wait=False)
        except BlockingIOError:
            console.print("another command submits below this output_dir: waiting for it")
            flock.lock(file)
        yield
