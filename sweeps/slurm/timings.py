"""Steps that are timed as SLURM jobs: one short job for all that need the same resources."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console

from experiments.disk.output_dir import jobs_folder
from experiments.run.stopping import stop_requested
from experiments.run.timing import Result, write_result
from relora_core.config import ConfigError
from sweeps import display, snapshot
from sweeps.slurm import cluster
from sweeps.slurm.cluster import SlurmError
from sweeps.slurm.options import Shape, SlurmOptions, shape_of
from sweeps.slurm.sbatch import submit
from sweeps.slurm.submission import Submission
from sweeps.timing import EACH_S, Timings, last_line

LEAST_MIN = 10
POLL_S = 3.0


def time_on_slurm(
    options: SlurmOptions, work: Timings, *, name: str, output_dir: Path, console: Console
) -> None:
    """Submit, with the sweep's own options, and wait; Ctrl-C, or an error, cancels the jobs.

    The jobs and their files are in the folder of the timings, where no other command looks.
    """
    code = snapshot.freeze(
        work.folder / "code", output_dir=output_dir, limit_mb=options.snapshot_limit_mb
    )
    by_shape: dict[Shape, list[int]] = {}
    for index, config in enumerate(work.configs):
        by_shape.setdefault(shape_of(config, options), []).append(index)
    sent: list[Submission] = []
    jobs: dict[str, list[int]] = {}  # the id of one that is not over -> what it times
    with stop_requested() as stop:
        try:
            for shape, indices in by_shape.items():
                if stop.is_set():
                    break
                files = [work.files[index] for index in indices]
                sent.append(_submission(files, work=work, name=name, options=options))
                _submit(sent[-1], work, shape=shape, options=options, code=code, count=len(files))
                jobs[str(sent[-1].job_id)] = indices
                names = _names(work, indices)
                display.say(console, f"submitted job {sent[-1].job_id} to time {names}")
            _wait(jobs, work, stop=stop, console=console)
        except SlurmError as error:
            if not stop.is_set():  # else Ctrl-C has ended SLURM's tool, too
                raise ConfigError(f"SLURM did not time the shapes: {error}") from None
        finally:
            _cancel(sent, jobs)
    if stop.is_set():
        raise KeyboardInterrupt


def _cancel(sent: Sequence[Submission], jobs: Collection[str]) -> None:
    """End the jobs that are not over, and those whose sbatch was interrupted."""
    with contextlib.suppress(SlurmError):
        unclear = [cluster.find(one.name) for one in sent if one.state == "submitting"]
        if ids := [*jobs, *filter(None, unclear)]:
            cluster.cancel(ids)


def _names(work: Timings, indices: list[int]) -> str:
    names = [work.names[index] for index in indices]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}; Ctrl-C cancels it"


def _submission(
    files: list[Path], *, work: Timings, name: str, options: SlurmOptions
) -> Submission:
    names = [str(file.relative_to(work.folder)) for file in files]
    return Submission.new(name, [names], kind="timing", options=options, at_once=None, waits_for=[])


def _submit(
    one: Submission,
    work: Timings,
    *,
    shape: Shape,
    options: SlurmOptions,
    code: Path,
    count: int,
) -> None:
    """As a run's job, but short, and without what belongs to a run: mail, what it waits for."""
    minutes = min(shape.minutes, max(LEAST_MIN, math.ceil(count * EACH_S / 60)))
    gpus = shape.gpus_per_node if options.runs_per_job == 1 else min(1, shape.gpus_per_node)
    shape = dataclasses.replace(shape, minutes=minutes, gpus_per_node=gpus)
    options = dataclasses.replace(
        options, runs_per_job=1, dependency=None, mail_type=None, mail_user=None, signal_delay_s=30
    )
    folder = jobs_folder(work.folder, name=one.name.rpartition(".")[0]) / one.submission
    submit(one, folder, shape=shape, options=options, code=code)


def _wait(
    jobs: dict[str, list[int]],
    work: Timings,
    *,
    stop: threading.Event,
    console: Console,
) -> None:
    """Until `stop`, or no job is left; what one has not timed when it is over counts as failed."""
    shown: dict[str, str] = {}
    while jobs and not stop.is_set():
        stop.wait(POLL_S)
        work.collect()
        try:
            seen = cluster.jobs(jobs)
        except SlurmError as error:
            if not error.passing:
                raise
            continue  # it may answer later
        for job_id in sorted(jobs):
            job = seen.get(job_id)
            state = "over" if job is None or job.over else job.state.lower()
            if state != shown.get(job_id) and state != "over":
                why = f" ({job.reason})" if job and job.waiting and job.reason else ""
                display.say(console, f"job {job_id} is {state}{why}")
            shown[job_id] = state
            if state == "over":
                end = f"job {job_id} {job.state if job else 'ended'}"
                _fail_rest(job_id, jobs.pop(job_id), work, end=end)
    work.collect()


def _fail_rest(job_id: str, indices: list[int], work: Timings, *, end: str) -> None:
    """A failure for each config that a job, which is over, has not timed."""
    work.collect()
    logs = sorted(work.folder.glob(f"sweeps/*/jobs/*/{job_id}_*.out"))
    reason = next((line for log in logs if (line := last_line(log))), "")
    for index in set(indices) & set(work.left):
        write_result(work.files[index], Result(error=f"{end}: {reason}" if reason else end))
