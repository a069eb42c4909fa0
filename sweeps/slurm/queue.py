"""Submits the arrays of one command; with the jobs of earlier ones they respect `max_parallel`."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from experiments.disk.output_dir import jobs_folder, plan_folder
from sweeps import snapshot
from sweeps.planning.plan import command
from sweeps.slurm import cluster
from sweeps.slurm.batches import Batch
from sweeps.slurm.cluster import SlurmError
from sweeps.slurm.options import SlurmOptions
from sweeps.slurm.sbatch import Unsure, submit
from sweeps.slurm.submission import Submission, recover

T = TypeVar("T")
LIMIT = re.compile(r"\b(?:Assoc|QOS|Max)[A-Z]\w+")
"""SLURM's name of a limit, as sbatch prints it: `QOSMaxSubmitJobPerUserLimit`."""
SHARING = {"train": ("train", "search"), "search": ("train", "search"), "eval": ("eval",)}
"""Kind of a submission -> the kinds with which it shares `max_parallel`."""


@dataclass(kw_only=True, slots=True)
class Queue:
    """The arrays that a command submits of a sweep."""

    output_dir: Path
    sweep: str
    kind: str
    options: SlurmOptions
    code: Path
    """The frozen copy that the jobs import."""
    cap: int | None = None
    """Runs that may run at a time beside those in flight; None: no limit."""
    behind: list[str] = field(default_factory=list)
    """Jobs to wait for, if the cap allows no run beside theirs."""
    lanes: dict[int, str] = field(default_factory=dict)
    """Lane -> its newest job."""

    @classmethod
    def open(
        cls,
        output_dir: Path,
        sweep: str,
        *,
        kind: str,
        options: SlurmOptions,
        console: Console | None = None,
    ) -> Queue:
        """Freeze the code; deduct what earlier commands have in flight (printed on `console`)."""
        code = snapshot.freeze(
            plan_folder(output_dir, name=sweep) / "code",
            output_dir=output_dir,
            limit_mb=options.snapshot_limit_mb,
        )
        queue = cls(output_dir=output_dir, sweep=sweep, kind=kind, options=options, code=code)
        queue._deduct_in_flight(console)
        return queue

    def _deduct_in_flight(self, console: Console | None) -> None:
        """`max_parallel` is for all commands of the sweep together."""
        most = self.options.max_parallel
        if most is None:
            return
        last, taken = self._in_flight()
        self.cap = most - taken
        if not last:
            return
        if self.cap < self.options.runs_per_job:
            self.cap, self.behind = most, last
        if console is not None:
            how = f"wait for jobs {', '.join(self.behind)}" if self.behind else f"are {self.cap}"
            console.print(
                f"max_parallel={most}: {taken} at a time are in flight, these {how}",
                highlight=False,
            )

    def _in_flight(self) -> tuple[list[str], int]:
        """Of the jobs in flight those that no other waits for, and how many runs all may have at a
        time: a job gets the places of those that it waits for, which have ended by then."""
        kinds = SHARING[self.kind]
        submissions = [one for one in recover(self.output_dir, self.sweep) if one.kind in kinds]
        jobs = cluster.jobs([job_id for one in submissions for job_id in one.task_ids()])
        free: dict[str, int] = {}  # job -> its places that no later one has
        before: dict[str, set[str]] = {}  # job -> all that have ended when it begins
        total = 0
        for one in submissions:
            alive = sum(job_id in jobs and jobs[job_id].alive for job_id in one.task_ids())
            if one.job_id is None or not alive:
                continue
            waits = {job_id for job_id in one.waits_for if job_id in before}
            before[one.job_id] = waits.union(*(before[job_id] for job_id in waits))
            runs = min(one.at_once or alive, alive) * max(len(task) for task in one.tasks)
            new = runs
            for job_id in reversed(free):  # the newest first: later jobs may wait for older alone
                if job_id in before[one.job_id]:
                    given = min(new, free[job_id])
                    free[job_id] -= given
                    new -= given
            free[one.job_id] = runs
            total += new
        waited_for = set[str]().union(*before.values())
        return [job_id for job_id in free if job_id not in waited_for], total

    def submit(
        self, batch: Batch[Any], tasks: list[list[str]], *, after: Sequence[str] = ()
    ) -> Submission:
        """Submit an array with these tasks; it begins when the jobs of `after` have ended, too."""
        options, shape = batch.request(self.options)
        one = Submission.new(
            self.sweep, tasks, kind=self.kind, options=options, at_once=batch.at_once,
            waits_for=[*after, *self._before(batch)],
        )  # fmt: skip
        folder = jobs_folder(self.output_dir, name=self.sweep) / one.submission
        try:
            submit(one, folder, shape=shape, options=options, code=self.code)
        except KeyboardInterrupt:
            if self.kind != "train" and one.job_id is not None:
                end = command("cancel", self.sweep, output_dir=self.output_dir)
                print(
                    f"Ctrl-C: job {one.job_id} is submitted and goes on; to end it: {end}",
                    file=sys.stderr,
                )
            raise
        self.lanes[batch.lane] = one.job_id or ""
        return one

    def _before(self, batch: Batch[Any]) -> list[str]:
        """Jobs that must have ended before this array begins, as the cap demands."""
        if self.cap is None:
            return []
        return [self.lanes[batch.lane]] if batch.lane in self.lanes else self.behind


def in_parts(
    batch: Batch[T], submit: Callable[[Batch[T]], Submission]
) -> Iterator[tuple[Batch[T], Submission]]:
    """Submit an array, or halves of it where the site lets a user queue no more: each part that
    SLURM took. SlurmError at the first that it does not take."""
    try:
        yield batch, submit(batch)
        return
    except SlurmError as error:
        if isinstance(error, Unsure) or not _too_many(str(error)) or len(batch.tasks) == 1:
            raise
    half = len(batch.tasks) // 2
    for tasks in (batch.tasks[:half], batch.tasks[half:]):
        yield from in_parts(dataclasses.replace(batch, tasks=tasks), submit)


def _too_many(message: str) -> bool:
    """Whether sbatch refused an array for the number of jobs that a user may have in the queue."""
    if names := LIMIT.findall(message):
        return any("SubmitJob" in name for name in names)
    return "job submit limit" in message  # which SLURM says of every limit
