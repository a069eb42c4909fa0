"""What tests of submissions share: sizes of jobs, and what was submitted."""

from __future__ import annotations

import json
from collections import Counter

from experiments.disk.output_dir import all_runs
from relora_core.config import ResourcesConfig

CPU = {"gpus_per_node": 0, "partition": "main"}
BIG = ResourcesConfig(cpus_per_task=8)
HUGE = ResourcesConfig(nodes=2)


def arrays(slurm) -> Counter[str]:
    """Base id -> number of tasks."""
    return Counter(job_id.partition("_")[0] for job_id in slurm.jobs())


def job_ids(out) -> dict[int, str | None]:
    """Seed -> job."""
    return {run.config().seed: run.status().job_id for run in all_runs(out)}


def forget_job_ids(out) -> None:
    """As if the command had been killed before it wrote down what SLURM said."""
    for file in out.glob("sweeps/s/jobs/*/submission.json"):
        lost = {**json.loads(file.read_text()), "state": "submitting", "job_id": None}
        file.write_text(json.dumps(lost))
    for run in all_runs(out):
        run.update_status(state="planned", job_id=None)
