"""`run.py -m` killed at any time, and the same command again: each run once, with its numbers.

Workers outlive their launcher; the next one finds them at work and awaits them.
"""

from __future__ import annotations

import os
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest

from experiments.disk.output_dir import all_runs, plan_folder
from experiments.disk.state import state_of
from sweeps.planning.plan import load
from tests.faults.conftest import KILLED, numbers
from tests.faults.inject import Outcome, Runner

WORDS = [
    *("-m", "model=nano", "relora.r=2,4", "seed=0,1", "train.steps=60", "train.batch_size=2"),
    *("data.seq_len=8", "relora.reset_frequency=15", "relora.restart_warmup_steps=2"),
    *("schedule.warmup_steps=5", "checkpoint.every_steps=10", "runtime.log_every_steps=5"),
    *("runtime.threads=1", "runtime.device=cpu", "eval=none", "tracking=none", "sweep.name=s"),
    *("hydra.launcher.max_parallel=2", "relora.dropout=0.1"),
]
ON = (  # where a launcher changes files
    "replace sweeps/s/.plan",
    "(rename|replace) sweeps/s/code/",
    "open sweeps/s/.launcher",
    "mkdir run$",
    "replace run/.status",
)


def swept(runner: Runner, out: Path, **faults: Any) -> list[Outcome]:
    return runner.command([*WORDS, f"output_dir={out}"], output_dir=out, **faults)


def numbers_below(out: Path) -> dict[str, object]:
    return {run.run_id: numbers(run) for run in all_runs(out)}


@pytest.fixture(scope="module")
def numbers_of(warm_runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """run_id -> numbers of a sweep that nothing disturbed."""
    undisturbed = tmp_path_factory.mktemp("swept") / "out"
    (done,) = swept(warm_runner, undisturbed)
    assert done.code == 0, done.output
    return numbers_below(undisturbed)


@pytest.mark.slow
def test_a_launcher_that_is_killed_again_and_again(warm_runner, numbers_of, tmp_path):
    out, kills = tmp_path / "out", 0
    in_time = [{"kill_after_s": seconds} for seconds in (0.5, 1.5)]
    for fault in [*({"at": 1, "on": f"^{on}"} for on in ON), *in_time]:
        kills += swept(warm_runner, out, **fault)[0].code == KILLED
    (again,) = swept(warm_runner, out)
    assert again.code == 0, again.output
    assert_finished_once(out, numbers_of)
    assert len(load(plan_folder(out, name="s") / "plan.json").cells) == 4
    assert kills >= len(ON)


def assert_finished_once(out: Path, numbers_of: dict[str, object]) -> None:
    assert numbers_below(out) == numbers_of
    for run in all_runs(out):
        assert state_of(run).state == "finished"
        attempts = [event["attempt"] for event in run.raw_events()]
        assert attempts == sorted(attempts), "two wrote at the same time"


@pytest.mark.slow
def test_a_launcher_whose_disk_is_full_says_so_in_one_line(warm_runner, numbers_of, tmp_path):
    """The first four before any run; then each time that it queues them, and in its report."""
    out = tmp_path / "out"
    for on in (*ON, "open run/attempts/N.log", "(open|write) sweeps/s/report/tables"):
        (done,) = swept(warm_runner, out, at=1, on=f"^{on}", errno=ENOSPC)
        assert "Traceback" not in done.output
        assert os.strerror(ENOSPC) in done.output, on
        assert done.code or "report" in on  # the runs are done
    (again,) = swept(warm_runner, out)
    assert again.code == 0, again.output
    assert_finished_once(out, numbers_of)


@pytest.mark.slow
def test_launchers_that_begin_at_once_on_one_plan(warm_runner, numbers_of, tmp_path):
    both = swept(warm_runner, tmp_path / "out", copies=2)
    assert [one.code for one in both] == [0, 0], [one.output for one in both]
    assert_finished_once(tmp_path / "out", numbers_of)
