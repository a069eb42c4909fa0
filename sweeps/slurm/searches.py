"""A search's processes as SLURM jobs: an array with a task for each trial that is left."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from relora_core.config import ConfigError, RunConfig
from sweeps.planning.plan import command
from sweeps.slurm.batches import arrays
from sweeps.slurm.cluster import SlurmError
from sweeps.slurm.launcher import SlurmLauncher
from sweeps.slurm.options import shape_of
from sweeps.slurm.queue import Queue, in_parts
from sweeps.slurm.submission import alive, only_submitter, recover


def submit_search(
    launcher: SlurmLauncher, study: Path, *, left: int, config: RunConfig, console: Console
) -> int:
    """Submit a task for each trial that no queued or running job is for; the exit code."""
    output_dir, name = study.absolute().parents[2], study.parent.name
    options = launcher.options
    sent, count = 0, left
    with only_submitter(output_dir, console):
        try:
            # Each of these jobs has a trial, or will take one.
            submissions = recover(output_dir, name, write=True)
            taken = len(alive(one for one in submissions if one.kind == "search"))
            if taken:
                console.print(f"{taken} jobs of this search are in flight", highlight=False)
            if (count := left - taken) <= 0:
                return 0
            queue = Queue.open(output_dir, name, kind="search", options=options, console=console)
            tasks = [[str(study.absolute().relative_to(output_dir))]] * count
            for batch in arrays(tasks, shape=shape_of(config, options), cap=queue.cap):
                for _, one in in_parts(batch, lambda part: queue.submit(part, part.tasks)):
                    sent += len(one.tasks)
                    array = f" (array of {len(one.tasks)})" if len(one.tasks) > 1 else ""
                    line = f"submitted job {one.job_id}{array}, a trial each"
                    console.print(line, highlight=False)
        except SlurmError as error:
            raise ConfigError(
                f"SLURM took {sent} of {count} jobs of this search: {error}"
            ) from None
    watch = command("search", name, output_dir=output_dir)
    console.print(f"watch: {watch}", markup=False, highlight=False, soft_wrap=True)
    return 0
