"""A job is ours only if we submitted it: SLURM's variables alone make no process part of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from experiments import scheduler
from experiments.disk.run_dir import RunDir
from experiments.environment import attempt_record
from experiments.errors import RunLocked
from experiments.scheduler import JOB, current_job, enter_job, job_environment

SINGLE = {"SLURM_JOB_ID": "12"}
TASK = {"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    monkeypatch.setattr(scheduler, "_job", None)
    for name in [*TASK, JOB]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "token", "name", "expected"),
    [
        ({}, None, None, None),
        (SINGLE, None, None, None),  # an interactive allocation, somebody's own script
        (TASK, None, None, None),
        (SINGLE, "s.ab/12", None, "12"),
        (SINGLE, "s.ab/12", "s.ab", "12"),
        (SINGLE, "a/b/c.ab/12", "a/b/c.ab", "12"),
        (TASK, "s.ab/12_3", "s.ab", "12_3"),
        (TASK, "s.ab/14", "s.ab", "14"),  # what is left of a task around it says nothing
        (SINGLE, "s.ab/12", "s.cd", None),  # another submission's
        (SINGLE, "s.ab/11", "s.ab", None),  # of a job around the allocation
        (TASK, "s.ab/12_2", "s.ab", None),
        (SINGLE, "s.ab/12_0", "s.ab", None),
        ({}, "s.ab/12", "s.ab", None),
        ({}, "s.ab/_", "s.ab", None),
        ({}, "s.ab/", "s.ab", None),
        (SINGLE, "/12", None, None),
        (SINGLE, "12", None, None),
        (SINGLE, "12", "s.ab", None),
    ],
)
def test_a_process_is_in_a_job_where_its_token_names_this_very_job(
    monkeypatch, variables, token, name, expected
):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    if token is not None:
        monkeypatch.setenv(JOB, token)
    assert enter_job(name=name) == expected
    assert current_job() == expected
    assert job_environment() == ({} if expected is None else {JOB: token})
    assert attempt_record()["job_id"] == expected
    assert JOB not in os.environ


def test_what_a_job_starts_is_not_the_job_unless_it_is_told_so(monkeypatch):
    for name, value in (SINGLE | {JOB: "s.ab/12"}).items():
        monkeypatch.setenv(name, value)
    enter_job(name="s.ab")
    code = "from experiments.scheduler import enter_job; print(enter_job())"

    def child(**more):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **more},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert child() == "None"
    assert child(**job_environment()) == "12"


@pytest.mark.parametrize("job_id", [None, "4242"])
def test_two_processes_of_one_allocation_do_not_take_each_others_runs(
    monkeypatch, tmp_path, nano, job_id
):
    """On two nodes of it; an earlier version wrote the allocation down for a job."""
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    run = RunDir(tmp_path / "runs" / "a")
    run.create(nano())
    holder = {"host": "n2", "pid": 1, "started": 0.0, "job_id": job_id}
    (run.path / "lock").write_text(json.dumps(holder))
    with pytest.raises(RunLocked, match="process 1 on n2"), run.lock():
        pass
    assert run.lock_holder() == holder
