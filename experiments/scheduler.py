"""Which SLURM job of ours this process takes part in, if any.

SLURM's variables are no proof: all that is started inside an allocation inherits them, a local
sweep of the user's included. A job is ours only if we submitted it, and only a process that its
batch script started takes part in it; any other is a process of its host, with a pid and a start.
Not for: what SLURM says of jobs (`sweeps/slurm/cluster.py`).
"""

from __future__ import annotations

import os

JOB = "RELORA_JOB"
"""Set by the batch script of a job of ours: the submission's name, a slash, the job's id."""
GPUS = "RELORA_GPUS"
"""Likewise: how many GPUs each node of the job was asked for."""
_job: str | None = None


def enter_job(*, name: str | None = None) -> str | None:
    """Take part in the job that has started this process: the job's id, None where there is none.

    JOB must name the submission (`name`, if given) and the very job that SLURM names. It
    leaves the environment: what this process starts is not the job.
    """
    global _job
    token = os.environ.pop(JOB, "")
    of, _, id_ = token.rpartition("/")
    ours = of and name in (None, of) and id_ and id_ == _slurms_id(array="_" in id_)
    _job = token if ours else None
    return current_job()


def _slurms_id(*, array: bool) -> str:
    """SLURM_JOB_ID would not do in an array: that of the last task stands for all of it."""
    if not array:
        return os.environ.get("SLURM_JOB_ID", "")
    base, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{base}_{task}" if base and task else ""


def job_environment() -> dict[str, str]:
    """For processes that are to take part in this job, too; empty outside."""
    return {} if _job is None else {JOB: _job}


def current_job() -> str | None:
    """Id of the job that this process has entered, `123_4` in an array; None elsewhere."""
    return None if _job is None else _job.rpartition("/")[2]


def gpus_asked() -> int:
    """GPUs that the job of this process asked for; 0 outside of one."""
    asked = os.environ.get(GPUS, "")
    return int(asked) if _job is not None and asked.isdecimal() else 0
