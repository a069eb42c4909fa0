"""A search's processes as SLURM jobs: an array with a task for each trial that is left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from experiments.disk.output_dir import plan_folder
from relora_core.config import ConfigError, RunConfig
from sweeps import snapshot
from sweeps.planning.plan import command
from sweeps.slurm import cluster
from sweeps.slurm.batches import Batch, _share_cap
from sweeps.slurm.cluster import SlurmError
from sweeps.slurm.options import shape_of
from sweeps.slurm.submission import Submission, recover

if TYPE_CHECKING:
    pass


from sweeps.slurm.launcher import SlurmLauncher, make_room, send_submission
from sweeps.slurm.submission import only_submitter


def submit_search(
    launcher: SlurmLauncher, study: Path, *, left: int, config: RunConfig, console: Console
) -> int:
    """Arrays with a task for each trial that no living job is to run; the exit code."""
    output_dir, name = study.absolute().parents[2], study.parent.name
    options = launcher.options
    with only_submitter(output_dir, console):
        try:
            alive = _alive(recover(output_dir, name, write=True))
            if alive:
                console.print(f"{alive} jobs of this search are in flight", highlight=False)
            if (count := left - alive) <= 0:
                return 0
            room = make_room(output_dir, name, most=options.max_parallel, console=console)
            code = snapshot.freeze(
                plan_folder(output_dir, name=name) / "code",
                output_dir=output_dir,
                limit_mb=options.snapshot_limit_mb,
            )
            size, shape = cluster.max_array_size(), shape_of(config, options)
            sizes = [min(size, count - start) for start in range(0, count, size)]
            made = [Batch(shape=shape, tasks=[[] for _ in range(n)]) for n in sizes]
            _share_cap(made, jobs=room.runs)
            lanes: dict[int, str] = {}
            for batch in made:
                one = send_submission(
                    name, [[str(study.absolute().relative_to(output_dir))]] * len(batch.tasks),
                    output_dir=output_dir, kind="search", options=options, shape=shape,
                    at_once=batch.at_once, waits_for=room.after(batch, lanes), code=code,
                )  # fmt: skip
                lanes[batch.lane] = one.job_id or ""
                array = f" (array of {len(one.tasks)})" if len(one.tasks) > 1 else ""
                console.print(f"submitted job {one.job_id}{array}, a trial each", highlight=False)
        except SlurmError as error:
            raise ConfigError(f"SLURM did not take the search: {error}") from None
    watch = command("search", name, output_dir=output_dir)
    console.print(f"watch: {watch}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _alive(submissions: Sequence[Submission]) -> int:
    """Jobs of a search that are queued or running: each has a trial, or will take one."""
    ids = [job_id for one in submissions if one.kind == "search" for job_id in one.ids()]
    return sum(job.alive for job in cluster.jobs(ids).values()) if ids else 0
