"""Which job of ours this process takes part in, if any.

SLURM's own variables cannot tell: whatever a user starts inside an allocation inherits them. Not
for: what SLURM says of jobs (`sweeps/slurm/cluster.py`).
"""

from __future__ import annotations

import os

JOB = "RELORA_JOB"
"""Environment variable, set by the batch scripts that we submit: `<submission>/<job id>`."""
GPUS = "RELORA_GPUS"
"""Likewise: GPUs asked for on each node of the job."""
_job: str | None = None


def enter_job(*, name: str | None = None) -> str | None:
    """Take part in the job that started this process; the job's id, or None.

    $JOB must name the job that SLURM names, and the submission `name` if that is given. It is
    removed from the environment, so that processes started from here do not take part.
    """
    global _job
    token = os.environ.pop(JOB, "")
    submission, _, id_ = token.rpartition("/")
    named = submission and name in (None, submission)
    ours = named and id_ and id_ == _slurms_id(array="_" in id_)
    _job = token if ours else None
    return current_job()


def _slurms_id(*, array: bool) -> str:
    # In an array, SLURM_JOB_ID of the last task is the id of the whole array.
    if not array:
        return os.environ.get("SLURM_JOB_ID", "")
    base, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{base}_{task}" if base and task else ""


def job_environment() -> dict[str, str]:
    """Variables for a child process that is to take part in this job, too."""
    return {} if _job is None else {JOB: _job}


def current_job() -> str | None:
    """Id of the job that this process takes part in, `123_4` in an array, or None."""
    return None if _job is None else _job.rpartition("/")[2]


def gpus_asked() -> int:
    """GPUs on each node that this process's job asked for; 0 if there is no job."""
    asked = os.environ.get(GPUS, "")
    return int(asked) if _job is not None and asked.isdecimal() else 0
