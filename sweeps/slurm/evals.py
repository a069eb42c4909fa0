"""Evaluations as SLURM jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from experiments.disk.run_dir import RunDir
from relora_core.config import ConfigError
from sweeps import display
from sweeps.slurm import cluster
from sweeps.slurm.batches import arrays
from sweeps.slurm.launcher import SlurmLauncher
from sweeps.slurm.options import Shape, shape_of
from sweeps.slurm.queue import Queue, in_parts
from sweeps.slurm.sbatch import print_environment
from sweeps.slurm.submission import only_submitter, recover


def submit_evals(
    requests: Sequence[Path], *, sweep: str, launcher: object, output_dir: Path, after: bool
) -> None:
    """Submit an array, a task per request, with the options of the sweep's launcher; print its id.

    With `after` it waits for the jobs of the runs that are still in flight.
    """
    if not isinstance(launcher, SlurmLauncher):
        raise ConfigError(
            f"--slurm must be left out for {sweep}, which was launched locally: nothing says what "
            "to ask SLURM for"
        )
    print_environment(launcher.options)
    output_dir = output_dir.absolute()
    runs = [RunDir(request.absolute().parents[2]) for request in requests]
    configs = [run.config() for run in runs]
    options = dataclasses.replace(launcher.options, runs_per_job=1)
    shape = _shape_for_all([shape_of(config, options) for config in configs])
    names = [str(request.absolute().relative_to(output_dir)) for request in requests]
    with only_submitter(output_dir, display.make_console()):
        jobs_of = {
            name: str(run.status().job_id)
            for name, run in zip(names, runs, strict=True)
            if after and not run.ended() and run.status().job_id
        }
        queued = _queued_evals(output_dir, sweep, ended=[r.run_id for r in runs if r.ended()])
        todo = [n for n in names if n not in queued or not {jobs_of.get(n)} - {None} <= queued[n]]
        if len(todo) < len(names):
            print(f"{len(names) - len(todo)} of {len(names)} evaluations are queued already")
        if not todo:
            return
        waits = sorted({jobs_of[name] for name in todo if name in jobs_of})
        queue = Queue.open(output_dir, sweep, kind="eval", options=options)
        for batch in arrays([[name] for name in todo], shape=shape, cap=queue.cap):
            for _, one in in_parts(batch, lambda part: queue.submit(part, part.tasks, after=waits)):
                print(f"submitted job {one.job_id}: {len(one.tasks)} evaluations")


def _shape_for_all(shapes: Sequence[Shape]) -> Shape:
    """One process and at most one GPU, which scoring uses; else the most that any of them has."""
    return Shape(
        nodes=1,
        gpus_per_node=min(1, max(one.gpus_per_node for one in shapes)),
        tasks_per_node=1,
        cpus_per_task=max(one.cpus_per_task for one in shapes),
        mem_gb=max((one.mem_gb for one in shapes if one.mem_gb is not None), default=None),
        minutes=max(one.minutes for one in shapes),
        by_gpu=any(one.by_gpu for one in shapes),
    )


def _queued_evals(
    output_dir: Path, sweep: str, *, ended: Collection[str]
) -> dict[str, set[str | None]]:
    """Request -> the jobs that its job waits for, of requests that need not be queued again.

    A job that has begun may have listed checkpoints before the newest was there: it counts only if
    the run has `ended`.
    """
    evals = [one for one in recover(output_dir, sweep, write=True) if one.kind == "eval"]
    jobs = cluster.jobs([job_id for one in evals for job_id in one.task_ids()])
    queued: dict[str, set[str | None]] = {}
    for one in evals:
        for job_id, names in zip(one.task_ids(), one.tasks, strict=False):
            job = jobs.get(job_id)
            if job is None or not job.alive:
                continue
            for name in names:
                if job.waiting or Path(name).parts[1] in ended:
                    queued[name] = {*queued.get(name, ()), *one.waits_for}
    return queued
