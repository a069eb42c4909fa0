"""Nothing is submitted twice, whatever happens in between."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shlex
import socket
import threading
import time
from collections import Counter

import pytest
from rich.console import Console
from submitting import BIG, CPU, HUGE, arrays, forget_job_ids, job_ids

from experiments.disk.output_dir import all_runs, plan_folder
from experiments.disk.run_dir import RunDir
from relora_core.config import (
    ConfigError,
)
from sweeps.__main__ import main
from sweeps.launch import relaunch
from sweeps.planning.plan import load
from sweeps.slurm import cluster
from sweeps.slurm.launcher import SlurmLauncher
from sweeps.slurm.options import SlurmOptions
from sweeps.slurm.searches import submit_search
from sweeps.slurm.submission import read_submissions
from sweeps.slurm.survey import survey


class Killed(BaseException):
    """The command ends here and now."""


def test_submitting_twice_submits_nothing(submit, slurm, out):
    submit([0, 1])
    before, calls = slurm.jobs(), len(slurm.calls("sbatch"))
    done, text = submit([0, 1])
    assert (done, slurm.jobs()) == (0, before)
    assert "2 runs are done or in flight: nothing to submit" in text
    real = [c for c in slurm.calls("sbatch")[calls:] if "--test-only" not in c]
    assert real == []


def test_of_more_than_the_site_queues_as_many_as_may_be_are_submitted(submit, slurm, out):
    slurm.config(max_submit=3)
    done, text = submit(range(8))
    assert (done, len(slurm.jobs())) == (1, 3)
    assert "refused job array 1 of 1" in text, "its parts are one array of the plan"
    assert "3 runs are submitted and stay so, 5 are not: the same command submits them" in text
    for job in slurm.jobs():
        slurm.set_state(job, "COMPLETED")
    for run in all_runs(out):
        if run.status().job_id is not None:
            run.write_result({"state": "finished", "step": 4, "metrics": {}})
            run.update_status(state="finished")
    assert submit(range(8))[0] == 1
    assert len(slurm.jobs()) == 6


POLICY = (
    "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's "
    "size and/or time limits)"
)
"""SLURM's text for every limit of an account or a QOS."""


@pytest.mark.parametrize(
    ("limit", "halved"),
    [
        ("", True),
        ("AssocGrpSubmitJobsLimit", True),
        ("MaxSubmitJobsPerAccount", True),
        ("QOSMaxCpuPerUserLimit", False),
        ("AssocMaxWallDurationPerJobLimit", False),
        ("QOSMinGRES", False),
    ],
)
def test_an_array_is_halved_at_a_limit_of_jobs_alone(submit, slurm, limit, halved):
    slurm.fail("sbatch", f"{limit}\nsbatch: error: {POLICY}", at=2)
    done, text = submit(range(4))
    assert (done, sorted(arrays(slurm).values())) == ((0, [2, 2]) if halved else (1, []))
    assert halved or f"refused job array 1 of 1: {limit}" in text


def test_of_a_searchs_jobs_as_many_as_may_be_are_submitted(slurm, code, out, make):
    slurm.config(max_submit=3)
    launcher, console = SlurmLauncher(options=SlurmOptions(**CPU)), Console(file=io.StringIO())
    study = plan_folder(out, name="s") / "study"
    for left, jobs in ((8, 3), (5, 6)):
        with pytest.raises(ConfigError, match=rf"SLURM took 3 of {left} jobs .*SubmitJobPerUser"):
            submit_search(launcher, study, left=left, config=make(), console=console)
        assert len(slurm.jobs()) == jobs
        for job in slurm.jobs():
            slurm.set_state(job, "COMPLETED")
    submit_search(launcher, study, left=2, config=make(), console=console)
    assert len(slurm.jobs()) == 8


@pytest.mark.parametrize("known", [True, False])
def test_a_dead_jobs_lock_is_gone_before_the_next_job(submit, slurm, out, known):
    """A job in a container could not ask SLURM whether the holder lives."""
    submit([0])
    (job,), (run,) = slurm.jobs(), all_runs(out)
    run.update_status(state="running", host="n1", job_id=job)
    lock = {"host": "n1", "pid": 7, "started": 0.0, "job_id": job if known else None}
    (run.path / "lock").write_text(json.dumps(lock))
    slurm.set_state(job, "FAILED")
    assert submit([0])[0] == 0
    assert (run.path / "lock").exists() != known, "of nobody knows whom, it stays"


def test_slurm_is_asked_once_of_all_dead_jobs_locks(submit, slurm, out):
    asked = []
    for seeds in ([0], [1, 2, 3]):
        submit(seeds)
        for run in all_runs(out):
            if run.config().seed in seeds:
                job = run.status().job_id
                run.update_status(state="running", host="n1", job_id=job)
                lock = {"host": "n1", "pid": 7, "started": 0.0, "job_id": job}
                (run.path / "lock").write_text(json.dumps(lock))
                slurm.set_state(str(job), "NODE_FAIL")
        before = len(slurm.calls("squeue"))
        assert submit(seeds)[0] == 0
        asked.append(len(slurm.calls("squeue")) - before)
        assert not [run for run in all_runs(out) if (run.path / "lock").exists()]
    assert asked[1] == asked[0]


def test_a_dead_lock_of_this_host_is_gone_before_the_job(submit, slurm, out):
    """A node could not tell that the process on the login node is dead."""
    submit([0])
    (run,) = all_runs(out)
    slurm.set_state(str(run.status().job_id), "FAILED")
    run.update_status(state="running", host=socket.gethostname(), job_id=None)
    lock = {"host": socket.gethostname(), "pid": os.getpid(), "started": 0.0, "job_id": None}
    (run.path / "lock").write_text(json.dumps(lock))
    assert submit([0])[0] == 0
    assert run.status().state == "queued"
    assert not (run.path / "lock").exists()


def test_a_cancel_is_left_to_a_process_whose_job_slurm_has_lost(submit, slurm, out):
    """It writes on, so that it may see the request, though its run is submitted again."""
    submit([0])
    (job,), (run,) = slurm.jobs(), all_runs(out)
    run.update_status(state="running", host="n1", job_id=job)
    lock = {"host": "n1", "pid": 7, "started": 0.0, "job_id": job}
    (run.path / "lock").write_text(json.dumps(lock))
    run.cancel_path.touch()
    slurm.forget(job, by=["squeue", "sacct", "scontrol"])
    assert submit([0])[0] == 0
    assert len(slurm.jobs()) == 2
    assert run.cancel_path.exists()


@pytest.mark.parametrize("end", ["FAILED", "CANCELLED"])
def test_failed_and_cancelled_runs_are_submitted_again(submit, slurm, out, end):
    submit([0, 1, 2])
    lost = RunDir(next(r.path for r in all_runs(out) if r.config().seed == 1))
    job_id = str(lost.status().job_id)
    lost.cancel_path.touch()
    slurm.set_state(job_id, end)
    assert submit([0, 1, 2])[0] == 0
    assert sorted(arrays(slurm).values()) == [1, 3]
    assert lost.status().job_id not in (None, job_id)
    assert (lost.status().state, lost.cancel_path.exists()) == ("queued", False)


def test_done_runs_are_left_alone(submit, slurm, out):
    submit([0, 1])
    for run in all_runs(out):
        run.write_result({"state": "finished", "step": 4, "metrics": {}})
        run.update_status(state="finished")
    slurm.set_state(next(iter(arrays(slurm))), "COMPLETED")
    submit([0, 1, 2])
    assert sorted(arrays(slurm).values()) == [1, 2]


def test_retry_launches_as_before(submit, slurm, out):
    submit([0, 1], partition="gpu", time="7")
    slurm.set_state(next(iter(arrays(slurm))), "FAILED")
    plan = load(plan_folder(out, name="s") / "plan.json")
    assert relaunch(plan, [plan.cells[0].run_id], output_dir=out) == 0
    new = [i for i, job in slurm.jobs().items() if job["state"] == "PENDING"]
    assert len(new) == 1
    assert (slurm.options(new[0])["partition"], slurm.options(new[0])["time"]) == ("gpu", "7")


def test_a_refusal_half_way_is_told_and_mended_by_the_same_command(submit, slurm, out):
    runs = [0, (1, BIG), (2, BIG), (3, HUGE)]
    refusal = "Batch job submission failed: Job violates accounting/QOS policy"
    slurm.fail("sbatch", refusal, at=5)  # three questions, then the second array
    done, text = submit(runs)
    assert done == 1
    assert "refused job array 2 of 3" in text
    assert "Job violates accounting/QOS policy" in text
    assert "1 runs are submitted and stay so, 3 are not" in text
    (first,) = slurm.jobs()
    assert f"submitted job {first}" in text
    assert job_ids(out) == {0: first, 1: None, 2: None, 3: None}
    states = survey(all_runs(out))
    assert Counter(s.state for s in states.values()) == {"queued": 1, "planned": 3}
    refused = [s for s in read_submissions(plan_folder(out, name="s") / "jobs") if s.error]
    assert [(s.state, s.job_id) for s in refused] == [("refused", None)]
    done, text = submit(runs)
    assert done == 0
    assert sorted(arrays(slurm).values()) == [1, 1, 2]
    assert job_ids(out)[0] == first


def test_a_time_out_after_acceptance_is_no_second_job(submit, slurm, out):
    slurm.fail("sbatch", "Socket timed out on send/recv operation", at=2, after=True)
    done, _ = submit([0, 1])
    assert (done, list(arrays(slurm).values())) == (0, [2])
    assert set(job_ids(out).values()) == set(slurm.jobs())


def test_a_busy_controller_is_asked_again(submit, slurm, out):
    for at in (2, 3):
        slurm.fail("sbatch", "Unable to contact slurm controller (connect failure)", at=at)
    done, _ = submit([0, 1])
    assert (done, list(arrays(slurm).values())) == (0, [2])
    assert set(job_ids(out).values()) == set(slurm.jobs())


def test_a_controller_that_stays_away_is_a_refusal(submit, slurm, out):
    for at in range(2, 7):
        slurm.fail("sbatch", "Unable to contact slurm controller (connect failure)", at=at)
    done, text = submit([0, 1])
    assert (done, slurm.jobs()) == (1, {})
    assert "0 runs are submitted and stay so, 2 are not" in text
    slurm.heal()
    assert submit([0, 1])[0] == 0
    assert list(arrays(slurm).values()) == [2]


def test_ctrl_c_says_what_was_submitted_and_cancel_ends_it(submit, slurm, out, interrupt, capsys):
    with interrupt(number=2):
        submit([0, (1, BIG), (2, HUGE)])
    text = submit.console.file.getvalue()
    cancel = f"python -m sweeps cancel s --output-dir {out}"
    assert "Ctrl-C: 2 runs are submitted and go on, 1 are not: the same command submits" in text
    assert f"to end what is submitted: {cancel}" in text
    assert Counter(job_ids(out).values()) == Counter([*slurm.jobs(), None])
    assert main([*shlex.split(cancel)[3:], "--yes"]) == 0
    assert {job["state"] for job in slurm.jobs().values()} == {"CANCELLED"}
    assert "now: 2 cancelled" in capsys.readouterr().out


def test_ctrl_c_inside_the_sbatch_of_a_search(submit, slurm, out, make, interrupt, capsys):
    submit([0])
    launcher = SlurmLauncher(options=SlurmOptions(**CPU))
    study = plan_folder(out, name="s") / "study"
    with interrupt():
        submit_search(launcher, study, left=2, config=make(), console=Console(file=io.StringIO()))
    job_id = max(arrays(slurm), key=int)
    line = f"Ctrl-C: job {job_id} is submitted and goes on; to end it: python -m sweeps cancel s"
    assert line in capsys.readouterr().err
    assert main(["cancel", "s", "--yes", "--output-dir", str(out)]) == 0
    assert {job["state"] for job in slurm.jobs().values()} == {"CANCELLED"}


def test_a_search_without_a_trial_is_cancelled_by_its_name(submit, slurm, out, make, capsys):
    launcher = SlurmLauncher(options=SlurmOptions(**CPU))
    study = plan_folder(out, name="lr") / "study"
    submit_search(launcher, study, left=2, config=make(), console=Console(file=io.StringIO()))
    assert main(["cancel", "lr", "--yes", "--output-dir", str(out)]) == 0
    assert "to cancel: jobs that have no run yet\n" in capsys.readouterr().out
    assert {job["state"] for job in slurm.jobs().values()} == {"CANCELLED"}


def test_cancel_after_a_kill_inside_sbatch_finds_the_jobs(submit, slurm, out, interrupt, capsys):
    """Nothing was written down: no run knows that it is queued."""
    with interrupt(Killed):
        submit([0, 1])
    assert {run.status().state for run in all_runs(out)} == {"planned"}
    assert main(["cancel", "s", "--yes", "--output-dir", str(out)]) == 0
    assert {job["state"] for job in slurm.jobs().values()} == {"CANCELLED"}
    assert "now: 2 cancelled" in capsys.readouterr().out


def test_cancel_while_sbatch_may_still_be_heard_asks_its_jobs_to_end(
    submit, slurm, out, interrupt, monkeypatch, capsys
):
    monkeypatch.setattr(cluster, "PAUSE_S", 0.01)
    with interrupt(taken=False):
        submit([0, 1])
    assert main(["cancel", "s", "--yes", "--output-dir", str(out)]) == 0
    assert "2 runs: the command that submitted them was interrupted" in capsys.readouterr().out
    assert all(run.cancel_path.exists() for run in all_runs(out))
    monkeypatch.setattr("sweeps.slurm.submission.APPEARS_S", 0.0)
    assert main(["cancel", "s", "--yes", "--output-dir", str(out)]) == 0
    assert "nothing to cancel" in capsys.readouterr().out


def test_cancel_without_an_answer_does_not_say_that_there_is_nothing(submit, slurm, out, capsys):
    submit([0])
    forget_job_ids(out)
    slurm.fail("squeue", "Unable to contact slurm controller")
    assert main(["cancel", "s", "--yes", "--output-dir", str(out)]) == 1
    assert "there may be jobs of theirs" in capsys.readouterr().err


def test_an_old_job_is_not_taken_for_that_of_a_refused_submission(submit, slurm, out):
    submit([0])
    slurm.set_state("102", "FAILED")
    slurm.forget("102", by=["squeue", "scontrol", "sacct"])
    (run,) = all_runs(out)
    run.update_status(state="failed")
    slurm.fail("sbatch", "Batch job submission failed: Job violates accounting/QOS policy", at=2)
    assert submit([0])[0] == 1
    assert submit([0])[0] == 0
    assert len(slurm.jobs()) == 2


@pytest.mark.parametrize("accounting", [True, False])
def test_a_kill_before_the_job_id_is_written_down(submit, slurm, out, interrupt, accounting):
    slurm.config(accounting=accounting)
    with interrupt(Killed):
        submit([0, 1])
    assert len(slurm.jobs()) == 2
    assert set(job_ids(out).values()) == {None}
    done, text = submit([0, 1, 2])
    assert done == 0
    assert sorted(arrays(slurm).values()) == [1, 2]
    assert set(job_ids(out).values()) == set(slurm.jobs())
    assert "2 runs are done or in flight: 1 to submit" in text


def test_ctrl_c_before_sbatch_leaves_nothing_behind_that_blocks(submit, slurm, interrupt):
    with interrupt(taken=False):
        submit([0, 1])
    assert submit([0, 1])[0] == 0
    assert list(arrays(slurm).values()) == [2]


def test_no_answer_to_whether_runs_are_in_flight_submits_nothing(submit, slurm, interrupt):
    """A lost job id and a silent squeue: the job may exist."""
    with interrupt(Killed):
        submit([0])
    slurm.fail("squeue", "Unable to contact slurm controller (connect failure)")
    with pytest.raises(ConfigError, match=r"nothing was submitted: .*Unable to contact"):
        submit([0])
    slurm.heal()
    submit([0])
    assert len(slurm.jobs()) == 1


def test_two_commands_at_once_submit_once(submit, slurm, out):
    slurm.fail("sbatch", sleep=0.3, code=0)
    done = []
    threads = [threading.Thread(target=lambda: done.append(submit([0, 1]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [code for code, _ in done] == [0, 0]
    assert list(arrays(slurm).values()) == [2]
    assert sum("nothing to submit" in text for _, text in done) == 1


def _open_files():
    """Of this process, as os.stat has them."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            yield os.fstat(int(name))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="only Linux lists open files")
def test_a_second_command_says_that_it_waits(submit, slurm, out):
    (out / "sweeps").mkdir(parents=True)
    done = []
    with open(out / "sweeps" / ".submit.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: done.append(submit([0])))
        thread.start()
        lock, until = os.fstat(file.fileno()).st_ino, time.monotonic() + 120
        while [f.st_ino for f in _open_files()].count(lock) < 2:  # it has come to the lock
            assert thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.02)
        thread.join(timeout=1.0)
        assert thread.is_alive()
        assert slurm.jobs() == {}
    thread.join(timeout=60)
    assert "another command submits below this output_dir: waiting" in done[0][1]
    assert len(slurm.jobs()) == 1
