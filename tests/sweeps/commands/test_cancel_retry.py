"""`cancel` ends what is asked for and nothing else; `retry` launches again what failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.disk.output_dir import jobs_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.state import state_of
from sweeps import launch
from sweeps.__main__ import main
from sweeps.commands import cancel
from sweeps.commands.retry import begin_anew
from sweeps.slurm.cluster import SlurmError
from sweeps.slurm.submission import Submission
from tests.sweeps.records import store_runs
from tests.waiting import wait_for

ROOT = Path(__file__).parents[3]
HOLD = """
import signal, sys, time
from experiments.disk.run_dir import RunDir
from experiments.scheduler import current_job
run = RunDir(sys.argv[1])
with run.lock():
    run.update_status(state="running", host=__import__("socket").gethostname(), attempts=1,
                      job_id=current_job())
    while True:
        time.sleep(0.05)
"""


@dataclass
class World:
    """A sweep `s` of six runs, seeds 0 to 5."""

    out: Path
    runs: list[RunDir]

    def __call__(self, *words: str) -> int:
        return main([*words, "--output-dir", str(self.out)])

    def states(self) -> list[str]:
        return [state_of(run).state for run in self.runs]


@pytest.fixture
def world(make, tmp_path, monkeypatch):
    monkeypatch.setattr(cancel, "GRACE_S", 0.5)
    points = [({}, make(seed=s)) for s in range(6)]
    runs = store_runs(points, name="s", output_dir=tmp_path / "out")
    return World(out=tmp_path / "out", runs=runs)


@pytest.fixture
def holder_inside(slurm, monkeypatch, request):
    """The same inside somebody's job, with all that is around there."""
    slurm.add("4242_1", name="interactive", state="RUNNING")
    inside = {"SLURM_JOB_ID": "4242", "SLURM_ARRAY_JOB_ID": "4242", "SLURM_ARRAY_TASK_ID": "1"}
    for name, value in inside.items():
        monkeypatch.setenv(name, value)
    return request.getfixturevalue("holder")


@pytest.fixture
def holder(world):
    """A process that works on the first run until it gets a signal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(world.runs[0].path)]
    process = subprocess.Popen(command, env=environment)
    wait_for(lambda: world.runs[0].status().state == "running")
    yield process
    process.kill()
    process.wait()


def queue(run: RunDir, *, job_id: str | None = None, host: str | None = None) -> None:
    pid = os.getpid()  # as a launcher that is alive
    run.update_status(state="queued", job_id=job_id, host=host or os.uname().nodename, pid=pid)


def submit(world: World, job_id: str, *, tasks: int = 1) -> None:
    """The record of a submission of the sweep."""
    one = Submission(submission="aa", name="s.aa", job_id=job_id, state="submitted")
    one.tasks = [[run.run_id] for run in world.runs[:tasks]]
    one.write(jobs_folder(world.out, name="s") / "aa")


# cancel -----------------------------------------------------------------------------------------
def test_a_queued_run_is_cancelled_and_a_finished_one_left_alone(world, capsys):
    queue(world.runs[0])
    world.runs[1].write_result({"state": "finished", "metrics": {}})
    world.runs[1].update_status(state="finished")
    assert world("cancel", "s", "--yes") == 0
    assert world.states() == ["cancelled", "finished", *["planned"] * 4]
    assert world.runs[0].cancel_path.exists()
    assert not any(run.cancel_path.exists() for run in world.runs[1:])
    assert "left alone: 1 finished, 4 planned" in capsys.readouterr().out


def test_only_what_is_named_is_cancelled(world):
    for run in world.runs:
        queue(run)
    assert world("cancel", world.runs[2].run_id, world.runs[4].run_id, "--yes") == 0
    assert [i for i, state in enumerate(world.states()) if state == "cancelled"] == [2, 4]


def test_nothing_is_touched_without_a_yes(world, capsys, monkeypatch):
    queue(world.runs[0])
    assert world("cancel", "s") == 2  # stdin is no terminal under pytest
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer in ("", "n", "no", "what"):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert world("cancel", "s") == 0
    assert world.states()[0] == "queued"
    assert not world.runs[0].cancel_path.exists()
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert world("cancel", "s") == 0
    assert world.states()[0] == "cancelled"


def test_a_worker_of_this_host_is_terminated(world, holder, monkeypatch):
    monkeypatch.setattr(cancel, "GRACE_S", 10.0)
    reaper = threading.Thread(target=holder.wait)  # as its launcher does
    reaper.start()
    assert world("cancel", world.runs[0].run_id, "--yes") == 0
    reaper.join(10)
    assert holder.returncode == -signal.SIGTERM
    assert world.states()[0] == "cancelled"


def test_another_process_with_the_holders_pid_is_spared(world, holder):
    lock = world.runs[0].path / "lock"
    said = json.loads(lock.read_text())
    lock.write_text(json.dumps(said | {"birth": "another boot/1"}))
    assert not cancel.terminate(world.runs[0])
    lock.write_text(json.dumps(said | {"host": "elsewhere"}))
    assert not cancel.terminate(world.runs[0])
    assert holder.poll() is None


def test_a_run_at_work_elsewhere_is_asked_and_not_called_cancelled(world, capsys):
    lock = {"host": "elsewhere", "pid": 1, "started": 0.0}
    (world.runs[0].path / "lock").write_text(json.dumps(lock))
    world.runs[0].update_status(state="running", host="elsewhere")
    assert world("cancel", "s", "--yes") == 0
    assert world.runs[0].cancel_path.exists()
    assert world.states()[0] == "running"
    assert "asked to end, on elsewhere" in capsys.readouterr().out


def test_slurm_jobs_are_cancelled_and_their_runs_say_so(world, slurm):
    submit(world, "12", tasks=3)
    for job in ("12_0", "12_1", "12_2"):
        slurm.add(job, name="s.aa", state="PENDING")
    for index in range(3):
        queue(world.runs[index], job_id=f"12_{index}", host="login")
    assert world("cancel", world.runs[0].run_id, world.runs[1].run_id, "--yes") == 0
    told = {job: record["state"] for job, record in slurm.jobs().items()}
    assert told == {"12_0": "CANCELLED", "12_1": "CANCELLED", "12_2": "PENDING"}
    assert world.states()[:3] == ["cancelled", "cancelled", "queued"]


@pytest.mark.slow
def test_a_packed_job_goes_on_for_the_runs_that_are_not_cancelled(world, slurm):
    slurm.add("12", name="s.aa", state="RUNNING")
    submit(world, "12")
    for run in world.runs[:3]:
        run.update_status(state="running", job_id="12", host="node")
    assert world("cancel", world.runs[0].run_id, "--yes") == 0
    assert slurm.jobs()["12"]["state"] == "RUNNING"
    assert [run.cancel_path.exists() for run in world.runs[:3]] == [True, False, False]
    world.runs[2].write_result({"state": "finished", "metrics": {}})
    assert world("cancel", world.runs[0].run_id, world.runs[1].run_id, "--yes") == 0
    assert slurm.jobs()["12"]["state"] == "CANCELLED"  # its third run needs it no more


@pytest.mark.parametrize("host", [os.uname().nodename, "elsewhere"])
@pytest.mark.parametrize("chosen", ["sweep", "run"])
def test_a_job_that_nobody_submitted_is_never_cancelled(world, slurm, host, chosen):
    """The user's own allocation, in records as an earlier version wrote them."""
    slurm.add("4242", name="interactive", state="RUNNING")
    submit(world, "12")
    run = world.runs[1]
    lock = {"host": host, "pid": 1, "started": 0.0, "job_id": "4242"}
    (run.path / "lock").write_text(json.dumps(lock))
    run.update_status(state="running", host=host, pid=1, job_id="4242")
    queue(world.runs[2], job_id="4242", host=host)
    world("cancel", {"sweep": "s", "run": run.run_id}[chosen], "--yes")
    assert slurm.calls("scancel") == []
    assert slurm.jobs()["4242"]["state"] == "RUNNING"
    assert run.cancel_path.exists() == (host == "elsewhere")  # here it is a process long dead


def test_a_local_run_inside_an_allocation_is_a_process(world, slurm, holder_inside, monkeypatch):
    monkeypatch.setattr(cancel, "GRACE_S", 10.0)
    reaper = threading.Thread(target=holder_inside.wait)
    reaper.start()
    status, lock = world.runs[0].status(), world.runs[0].lock_holder()
    assert (status.job_id, (lock or {})["job_id"]) == (None, None)
    assert world("cancel", world.runs[0].run_id, "--yes") == 0
    reaper.join(10)
    assert (slurm.calls("scancel"), world.states()[0]) == ([], "cancelled")
    assert holder_inside.returncode == -signal.SIGTERM


def test_a_job_whose_id_was_lost_is_found_by_its_name(world, slurm):
    slurm.add("12", name="s.aa", state="PENDING")
    one = Submission(submission="aa", name="s.aa", tasks=[[world.runs[0].run_id]])
    one.write(jobs_folder(world.out, name="s") / "aa")
    queue(world.runs[0])
    assert world("cancel", "s", "--yes") == 0
    assert slurm.jobs()["12"]["state"] == "CANCELLED"


def test_a_searchs_jobs_end_also_before_they_have_taken_a_trial(world, slurm):
    slurm.add("77_0", name="s.bb")
    slurm.add("77_1", name="s.bb")
    slurm.set_state("77_0", "COMPLETED")
    one = Submission(submission="bb", name="s.bb", tasks=[["study"], ["study"]], kind="search")
    one.job_id, one.state = "77", "submitted"
    one.write(jobs_folder(world.out, name="s") / "bb")
    assert world("cancel", "s", "--yes") == 0
    assert slurm.jobs()["77_1"]["state"] == "CANCELLED"
    assert slurm.jobs()["77_0"]["state"] == "COMPLETED"


@pytest.mark.slow
def test_where_slurm_does_not_answer_the_request_stands(world, slurm, capsys):
    slurm.add("12", name="s.aa", state="PENDING")
    submit(world, "12")
    queue(world.runs[0], job_id="12", host="login")
    slurm.fail("scancel", "Unable to contact slurm controller")
    assert world("cancel", "s", "--yes") == 1
    assert world.runs[0].cancel_path.exists()
    assert "SLURM" in capsys.readouterr().err


def test_a_denied_scancel_is_not_cancelled(world, slurm, capsys):
    submit(world, "12", tasks=3)
    slurm.config(denied=True)
    for index in range(3):
        slurm.add(f"12_{index}", name="s.aa", state="RUNNING" if index == 2 else "PENDING")
        queue(world.runs[index], job_id=f"12_{index}", host="login")
    world.runs[2].update_status(state="running", host="n1")
    assert world("cancel", "s", "--yes") == 1
    assert world.states()[:3] == ["queued", "queued", "running"]
    assert all(run.cancel_path.exists() for run in world.runs[:3])  # they end once they see it
    printed = capsys.readouterr()
    assert "Access/permission denied" in printed.err
    assert "now: 2 queued, 1 running" in printed.out
    assert printed.out.count("asked to end, when it begins") == 2
    assert "asked to end, on n1" in printed.out


def test_what_scancel_ended_beside_what_it_was_denied_is_cancelled(world, slurm, monkeypatch):
    submit(world, "12", tasks=2)
    for index in range(2):
        slurm.add(f"12_{index}", name="s.aa")
        queue(world.runs[index], job_id=f"12_{index}", host="login")

    def denied(job_ids):
        slurm.set_state("12_0", "CANCELLED")
        raise SlurmError("scancel: Kill job error on job id 12_1: Access/permission denied")

    monkeypatch.setattr(cancel.cluster, "cancel", denied)
    assert world("cancel", "s", "--yes") == 1
    assert world.states()[:2] == ["cancelled", "queued"]


# retry ------------------------------------------------------------------------------------------
@pytest.fixture
def launched(monkeypatch):
    """(sweep, run_ids) of each relaunch."""
    told = []

    def relaunch(plan, run_ids, *, output_dir):
        assert {cell.run_id for cell in plan.cells} >= set(run_ids)
        told.append((plan.name, list(run_ids)))
        return 0

    monkeypatch.setattr(launch, "relaunch", relaunch, raising=False)
    return told


@pytest.fixture
def ended(world):
    """Runs 0 to 5: failed, cancelled, diverged, finished, lost, planned."""
    first, second, third, fourth, fifth, _ = world.runs
    first.update_status(state="failed", step=3, error="RuntimeError: boom")
    second.update_status(state="cancelled")
    for run, state in ((third, "diverged"), (fourth, "finished")):
        (run.checkpoints / "step-00000002").mkdir(parents=True)
        run.write_result({"state": state, "metrics": {}})
        run.update_status(state=state, step=4)
    status = fifth.update_status(state="running", host="node", job_id="99")
    status.heartbeat = time.time() - 10_000
    fifth.write_status(status)
    return world


@pytest.mark.parametrize(
    ("options", "seeds"),
    [
        ([], [0, 4]),
        (["--cancelled"], [0, 1, 4]),
        (["--diverged"], [0, 2, 4]),
        (["--cancelled", "--diverged"], [0, 1, 2, 4]),
    ],
)
def test_what_failed_or_was_lost_is_launched_again(ended, slurm, launched, capsys, options, seeds):
    assert ended("retry", *options) == 0
    assert launched == [("s", [ended.runs[seed].run_id for seed in seeds])]
    text = capsys.readouterr().out
    assert text.count("retry ") == len(seeds)
    assert "not 1 finished: they have their results" in text
    assert ("--cancelled runs them" in text) == ("--cancelled" not in options)


def test_a_diverged_run_begins_anew_and_keeps_what_it_had(ended):
    run = ended.runs[2]
    (run.path / "checkpoints-mine").mkdir()  # a user's copy
    (run.path / "result-mine.json").touch()
    for number in (1, 2):
        (run.evals / "later").mkdir(parents=True)  # of checkpoints that will not be again
        begin_anew(run)
        assert (run.path / f"evals-{number}" / "later").exists()
        assert not run.evals.exists()
        assert json.loads((run.path / f"result-{number}.json").read_text())["state"] == "diverged"
        assert (run.path / f"checkpoints-{number}" / "step-00000002").exists()
        assert not run.checkpoints.exists()
        assert (state_of(run).state, state_of(run).step) == ("planned", 0)
        (run.checkpoints / "step-00000002").mkdir(parents=True)
        run.write_result({"state": "diverged", "metrics": {}})


def test_retry_leaves_diverged_results_alone_unless_asked(ended, slurm, launched):
    before = ended.runs[2].result_path.read_text()
    ended("retry")
    assert ended.runs[2].result_path.read_text() == before


def test_a_lost_run_that_was_cancelled_is_no_failure(ended, slurm, launched):
    ended.runs[4].cancel_path.touch()
    ended("retry", "s")
    assert launched == [("s", [ended.runs[0].run_id])]


def test_nothing_to_retry_launches_nothing(world, launched, capsys):
    assert world("retry") == 0
    assert launched == []
    assert "nothing to retry" in capsys.readouterr().out


def test_a_single_run_is_told_how_to_go_on(world, launched, make, capsys):
    single = RunDir(world.out / "runs" / "alone")
    single.create(make(seed=77))
    single.update_status(state="failed", error="x")
    assert world("retry", "alone") == 0
    assert launched == []
    assert "python run.py" in capsys.readouterr().out


def test_the_launchers_exit_code_is_passed_on(ended, slurm, monkeypatch):
    monkeypatch.setattr(launch, "relaunch", lambda *_, **__: 1, raising=False)
    assert ended("retry") == 1
