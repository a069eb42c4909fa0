"""What a job does on its node: its runs, their shares, and how it goes on after an early end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import scheduler
from experiments.disk.output_dir import jobs_folder
from experiments.disk.run_dir import RunDir
from relora_core.data.grammar import VOCAB_SIZE
from sweeps import attempt, job
from sweeps.slurm.sbatch import FOR_SCRIPT
from sweeps.slurm.submission import Submission, read_submissions, record_job
from sweeps.slurm.survey import survey
from sweeps.worker import CANCELLED, FAILED, FINISHED, INTERRUPTED, LOCKED
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
JOB = "12_0"
WORKER = '''
"""A worker without training; the seed says how it ends."""
import json, os, signal, sys, time
from experiments.disk.run_dir import RunDir
from experiments.run.stopping import StopFlag

run = RunDir(sys.argv[1])
seed = run.config().seed
attempt = run.status().attempts + 1
keys = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
(run.path / f"share-{attempt}.json").write_text(json.dumps({k: os.environ.get(k) for k in keys}))
with StopFlag().installed() as stop, run.lock():
    run.update_status(state="running", attempts=attempt)
    print("at work", flush=True)
    if seed == 9 and attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 7:
        run.update_status(state="failed", error="RuntimeError: boom")
        sys.exit(1)
    until = time.monotonic() + 120
    while seed == 8 and attempt == 1 and time.monotonic() < until:
        if stop():
            run.update_status(state="failed", error="stopped")
            sys.exit(5)
        time.sleep(0.02)
    run.write_result({"state": "finished", "metrics": {}, "step": 4})
    run.update_status(state="finished")
'''


@pytest.fixture
def slurm(slurm, monkeypatch):
    """A cluster on which this process is task 0 of the array 12."""
    monkeypatch.setattr(job, "WAIT_S", 0.0)
    slurm.add(JOB, name="s.0123abcd", state="RUNNING")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setattr(scheduler, "_job", f"s.0123abcd/{JOB}")
    return slurm


@pytest.fixture
def submitted(make, tmp_path):
    """A submission of tasks, each of some seeds; its file."""

    def go(*tasks, config=make, **fields):
        out = tmp_path / "out"
        for seed in (seed for task in tasks for seed in task):
            RunDir(out / "runs" / f"r{seed}").create(config(seed=seed))
        one = Submission(
            submission="0123abcd",
            name="s.0123abcd",
            tasks=[[f"r{seed}" for seed in task] for task in tasks],
            **fields,
        )
        folder = jobs_folder(out, name="s") / one.submission
        one.write(folder)
        return folder / "submission.json"

    return go


@pytest.fixture
def work(submitted):
    def go(*seeds, **fields):
        return job.read(submitted(seeds, **fields), index=0)

    return go


@pytest.fixture
def packed(work, tmp_path, monkeypatch):
    """Work whose runs have workers that do not train."""
    package = tmp_path / "fake" / "sweeps"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fake'}{os.pathsep}{ROOT}")
    return work


def requeued(slurm):
    return [call[-1] for call in slurm.calls("scontrol") if "requeue" in call]


def states(work):
    return [run.status().state for run in work.runs]


def test_a_task_finds_its_runs(submitted, tmp_path, monkeypatch):
    file = submitted((0, 1), (2, 3), (4,), max_stalled=3, signal_delay_s=40.0)
    for index, seeds in enumerate([(0, 1), (2, 3), (4,)]):
        monkeypatch.setattr(scheduler, "_job", f"s.0123abcd/12_{index}")
        found = job.read(file, index=job.task_index())
        assert [run.config().seed for run in found.runs] == list(seeds)
        assert (found.max_stalled, found.signal_delay_s, found.requests) == (3, 40.0, [])
    monkeypatch.setattr(scheduler, "_job", "s.0123abcd/12")
    assert job.task_index() == 0


def test_a_task_finds_its_evaluation(tmp_path):
    one = Submission(submission="a", name="s.a", kind="eval", tasks=[["runs/x/r.json"], ["y"]])
    one.write(jobs_folder(tmp_path, name="s") / "a")
    found = job.read(jobs_folder(tmp_path, name="s") / "a" / "submission.json", index=0)
    assert (found.runs, found.requests) == ([], [tmp_path / "runs/x/r.json"])


# whose job it is ---------------------------------------------------------------------------------
AROUND = {"SLURM_JOB_ID": "20", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.fixture
def inside(slurm, monkeypatch):
    """This process is in job 20, submitted from inside a task of the array 12."""
    monkeypatch.setattr(scheduler, "_job", None)
    slurm.add("20", name="s.0123abcd", state="RUNNING")
    slurm.set_state(JOB, "PENDING")
    slurm.add("12_3", name="around", state="RUNNING")
    for name, value in AROUND.items():
        monkeypatch.setenv(name, value)
    return slurm


def test_a_job_goes_by_its_own_id_not_by_that_of_the_job_around(
    inside, submitted, monkeypatch, tmp_path
):
    monkeypatch.setenv("RELORA_JOB", "s.0123abcd/20")
    monkeypatch.setattr(job.worker, "work", lambda path, stop: INTERRUPTED)
    assert job.main([str(submitted((0,)))]) == INTERRUPTED
    assert requeued(inside) == ["20"]
    assert read_submissions(jobs_folder(tmp_path / "out", name="s"))[0].job_id == "20"


@pytest.mark.parametrize("token", [None, "s.0123abcd/12_3", "around/20", "s.0123abcd/21", ""])
@pytest.mark.parametrize("after", [(), ("--after", "137")])
def test_a_process_that_is_not_in_the_job_touches_nothing(
    inside, submitted, monkeypatch, capsys, tmp_path, token, after
):
    if token is not None:
        monkeypatch.setenv("RELORA_JOB", token)
    if token == "s.0123abcd/12_3":  # right for SLURM, and a submission of one task has no fourth
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    file = submitted((0,))
    before = file.read_text()
    assert job.main([*after, str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"RELORA_JOB must name {file}" in line
    assert (requeued(inside), inside.calls("scancel")) == ([], [])
    assert (file.read_text(), RunDir(tmp_path / "out/runs/r0").status().state) == (
        before,
        "planned",
    )


def test_a_job_leaves_an_id_that_is_written_down_alone(work, slurm, monkeypatch, tmp_path):
    folder = jobs_folder(tmp_path / "out", name="s")
    work(0, job_id="7", state="submitted")
    record_job(folder / "0123abcd" / "submission.json", "12_0")
    assert read_submissions(folder)[0].job_id == "7"
    work(0, state="refused", error="a controller that was slow")
    record_job(folder / "0123abcd" / "submission.json", "12_0")
    (one,) = read_submissions(folder)
    assert (one.job_id, one.state, one.error) == ("12", "submitted", None)


# a group of processes ----------------------------------------------------------------------------
LEAKED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
LEAKED |= {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x"}
LEAKED |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}


def group(monkeypatch, *, processes, **more):
    """What is left and set of a group's variables."""
    named = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": str(processes), "SLURM_JOB_NUM_NODES": "1"}
    named |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "n[3-4]"}
    with monkeypatch.context() as patch:
        for name, value in {**named, "SUBMITIT_EXECUTOR": "slurm", **LEAKED, **more}.items():
            patch.setenv(name, value)
        job.join_group(processes=processes)
        found = {name: os.environ.get(name) for name in LEAKED}
        for name in LEAKED:
            os.environ.pop(name, None)
    return found


def test_one_process_is_alone_whatever_it_has_inherited(monkeypatch):
    assert set(group(monkeypatch, processes=1).values()) == {None}


def test_several_processes_are_a_group_of_their_own(monkeypatch):
    expected = dict.fromkeys(LEAKED) | {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "n3"}
    expected |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "20077"}
    assert group(monkeypatch, processes=2) == expected


def test_jobs_of_one_time_have_ports_of_their_own(monkeypatch):
    ids = range(987_000, 987_300)
    ports = {
        str(group(monkeypatch, processes=2, SLURM_JOB_ID=str(one))["MASTER_PORT"]) for one in ids
    }
    assert len(ports) == len(ids)
    assert all(1024 < int(port) < 32768 for port in ports)


# several runs in a job --------------------------------------------------------------------------
def test_packed_runs_share_gpus_and_cores(packed, slurm, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    work = packed(0, 1, 2)
    assert job.run(work) == FINISHED
    assert states(work) == ["finished"] * 3
    shares = [json.loads((run.path / "share-1.json").read_text()) for run in work.runs]
    assert [share.pop("CUDA_VISIBLE_DEVICES") for share in shares] == ["3", "5", "3"]
    assert {n for share in shares for n in share.values()} == {"2"}
    assert all("at work" in run.log_path(1).read_text() for run in work.runs)
    assert requeued(slurm) == []


@pytest.mark.usefixtures("packed", "slurm")
def test_a_short_packs_runs_have_the_share_of_any_other(submitted, monkeypatch):
    """The numbers of a run depend on its threads, so on no chance of where it was packed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    made = job.read(submitted((0, 1, 2), (3,)), index=1)
    assert job.run(made) == FINISHED
    share = json.loads((made.runs[0].path / "share-1.json").read_text())
    assert {share[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} == {"2"}


PACK = """
import sys
from pathlib import Path
from sweeps import job
job.run(job.read(Path(sys.argv[1]), index=0))
"""


@pytest.mark.slow
def test_a_packs_workers_end_with_it(packed, slurm, tmp_path):
    """A kill -9 of the job's own process, as for want of memory."""
    made = packed(8, 8, 0)
    (file,) = tmp_path.glob("out/sweeps/s/jobs/*/submission.json")
    process = subprocess.Popen([sys.executable, "-c", PACK, str(file)])
    run = made.runs[0]
    try:
        wait_for(run.lock_holder)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: run.lock_holder() is None)


def test_a_run_killed_in_a_pack_goes_on_and_the_others_stay(packed, slurm):
    work = packed(0, 9, 1)
    assert job.run(work) == INTERRUPTED
    assert requeued(slurm) == [JOB]
    assert states(work) == ["finished", "queued", "finished"]
    slurm.set_state(JOB, "RUNNING")  # its next life
    assert job.run(work) == FINISHED
    assert states(work) == ["finished"] * 3
    assert work.runs[1].status().attempts == 2
    assert requeued(slurm) == [JOB]


def test_a_failure_in_a_pack_is_kept_and_the_others_finish(packed, slurm):
    work = packed(0, 7, 1)
    code = job.run(work)
    assert code == FAILED
    assert job.after(work, code=code) == FAILED
    assert states(work) == ["finished", "failed", "finished"]
    assert work.runs[1].status().error == "RuntimeError: boom"
    assert requeued(slurm) == []


def test_packed_runs_are_told_to_end_and_go_on_later(packed, slurm):
    """SLURM's warning reaches the job alone, which passes it on, waits, and requeues itself."""
    work = packed(8, 0)

    def warn():
        wait_for(lambda: states(work)[0] == "running")
        os.kill(os.getpid(), signal.SIGUSR2)

    thread = threading.Thread(target=warn)
    thread.start()
    assert job.run(work) == INTERRUPTED
    thread.join()
    assert states(work) == ["queued", "finished"]
    assert work.runs[0].status().phase == "stopped: SIGUSR2"
    assert requeued(slurm) == [JOB]


# a run of its own -------------------------------------------------------------------------------
@pytest.fixture
def alone(work, slurm, monkeypatch):
    """The job's run, whose worker gives these codes in turn; (work, job.run)."""

    def go(*codes, rank=0):
        made = work(0)
        left = list(codes)
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setattr(job.time, "sleep", lambda seconds: None)

        def worker(path, *, stop):
            return left.pop(0)

        monkeypatch.setattr(job.worker, "work", worker)
        return made

    return go


@pytest.mark.parametrize("code", [FINISHED, FAILED, CANCELLED, 3])
def test_the_workers_code_is_the_jobs(alone, slurm, code):
    work = alone(code)
    assert job.run(work) == code
    assert requeued(slurm) == []


def test_an_early_end_requeues_the_job(alone, slurm):
    work = alone(INTERRUPTED)
    assert job.run(work) == INTERRUPTED
    assert requeued(slurm) == [JOB]
    assert states(work) == ["queued"]
    assert survey(work.runs)["r0"].state == "queued"


@pytest.mark.parametrize("end", ["run", "after"])
def test_a_container_without_slurms_tools_leaves_the_requeue_to_the_script(
    alone, slurm, monkeypatch, end
):
    work = alone(INTERRUPTED)
    monkeypatch.setenv("PATH", "/nowhere")
    code = job.run(work) if end == "run" else 137
    assert job.after(work, code=code) == FOR_SCRIPT
    assert states(work) == ["queued"]
    assert requeued(slurm) == []


@pytest.mark.parametrize("tool", ["squeue", "scontrol"])
def test_a_controller_away_at_the_warning_is_asked_again(alone, slurm, monkeypatch, tool, capsys):
    """For as long as SLURM's grace lasts: a restart of the controller takes seconds."""
    work = alone(INTERRUPTED)
    pauses = []
    monkeypatch.setattr(job.time, "sleep", pauses.append)
    for at in range(1, 12):
        slurm.fail(tool, "Unable to contact slurm controller (connect failure)", at=at)
    assert job.run(work) == INTERRUPTED
    assert requeued(slurm)[-1:] == [JOB]
    assert states(work) == ["queued"]
    assert capsys.readouterr().err.count("trying again") >= 3


def test_a_controller_that_stays_away_is_a_failure_in_its_words(alone, slurm):
    work = alone(INTERRUPTED)
    work.signal_delay_s = -1.0  # the grace is over
    slurm.fail("squeue", "Unable to contact slurm controller (connect failure)")
    assert job.run(work) == INTERRUPTED
    assert states(work) == ["failed"]
    assert "not requeued: squeue: Unable to contact" in str(work.runs[0].status().error)


def test_ranks_above_0_leave_that_to_rank_0_and_end_in_peace(alone, slurm):
    """An exit code other than 0 would have srun kill rank 0."""
    work = alone(INTERRUPTED, rank=1)
    assert job.run(work) == FINISHED
    assert requeued(slurm) == []
    assert states(work) == ["planned"]


def test_an_earlier_life_of_the_job_is_waited_for(alone, slurm, monkeypatch):
    monkeypatch.setattr(job, "WAIT_S", 60.0)
    work = alone(LOCKED, LOCKED, FINISHED)
    holder = {"host": "elsewhere", "pid": 1, "started": 0.0, "job_id": JOB}
    (work.runs[0].path / "lock").write_text(json.dumps(holder))
    assert job.run(work) == FINISHED


def test_another_job_at_work_on_the_run_is_left_alone(alone, slurm, monkeypatch):
    monkeypatch.setattr(job, "WAIT_S", 60.0)
    work = alone(LOCKED)
    holder = {"host": "elsewhere", "pid": 1, "started": 0.0, "job_id": "99"}
    (work.runs[0].path / "lock").write_text(json.dumps(holder))
    work.runs[0].update_status(state="running")
    code = job.run(work)
    assert job.after(work, code=code) == LOCKED
    assert states(work) == ["running"]
    assert requeued(slurm) == []


def test_the_time_limit_is_known_where_slurm_says_it(work, slurm):
    made = work(0, signal_delay_s=100.0)
    slurm.update(JOB, left="1:00:00")
    deadline = job._deadline(made)
    assert deadline == pytest.approx(time.time() + 3500, abs=30)
    slurm.update(JOB, left="UNLIMITED")
    assert job._deadline(made) is None


# no progress ------------------------------------------------------------------------------------
records = st.lists(st.tuples(st.sampled_from(["12_0", "13"]), st.sampled_from([0, 3])), max_size=7)


@settings(
    max_examples=min(60, settings.default.max_examples),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(records=records, newest=st.sampled_from([0, 3]), limit=st.integers(1, 4))
def test_attempts_without_progress(make, tmp_path, slurm, records, newest, limit):
    """Stalled: the record ends with `limit` attempts by this job that began where it is now."""
    folder = tmp_path / f"{time.monotonic_ns()}"
    run = RunDir(folder)
    run.create(make())
    for number, (job_id, step) in enumerate(records, 1):
        run.write_attempt(number, {"job_id": job_id, "start_step": step})
    if newest:
        (run.checkpoints / f"step-{newest:08d}").mkdir(parents=True)
    streak = 0
    for record in reversed(records):
        if record != (JOB, newest):
            break
        streak += 1
    assert attempt.is_stalled(run, limit=limit) == (streak >= limit)


def exhausted(work):
    for number in (1, 2, 3):
        work.runs[0].write_attempt(number, {"job_id": JOB, "start_step": 0})


def test_a_run_that_gets_nowhere_is_given_up(alone, slurm):
    work = alone()  # no worker is started
    work.max_stalled = 3
    exhausted(work)
    code = job.run(work)
    assert code == FAILED
    assert job.after(work, code=code) == FAILED
    status = work.runs[0].status()
    assert status.state == "failed"
    assert "3 attempts of this job ended at step 0 without a new checkpoint" in (status.error or "")
    assert "sweeps retry r0" in (status.error or "")
    assert requeued(slurm) == []


def test_a_killed_run_that_gets_nowhere_is_not_requeued(work, slurm):
    made = work(0, max_stalled=3)
    exhausted(made)
    assert job.after(made, code=137) == 137
    assert (states(made), requeued(slurm)) == (["failed"], [])


def test_another_job_begins_to_count_anew(alone, slurm, monkeypatch):
    work = alone(FINISHED)
    work.max_stalled = 3
    exhausted(work)
    slurm.add("20", state="RUNNING")
    monkeypatch.setattr(scheduler, "_job", "s.0123abcd/20")
    assert job.run(work) == FINISHED


def test_a_finished_run_is_not_given_up(packed, slurm):
    work = packed(0)
    exhausted(work)
    work.max_stalled = 3
    work.runs[0].write_result({"state": "finished", "step": 4, "metrics": {}})
    assert not job._give_up(work.runs[0], max_stalled=3)


# the end ----------------------------------------------------------------------------------------
def at_work(work):
    work.runs[0].update_status(state="running", attempts=1, job_id=JOB)
    return work


def test_a_kill_without_a_word_goes_on_from_the_checkpoint(work, slurm):
    made = at_work(work(0))
    job.after(made, code=137)
    assert requeued(slurm) == [JOB]
    status = made.runs[0].status()
    assert (status.state, status.phase) == ("queued", "stopped: killed by signal 9")
    assert survey(made.runs)["r0"].state == "queued"


def test_a_killed_pack_goes_on_but_for_what_has_failed_in_it(work, slurm):
    made = at_work(work(0, 1, 2))
    made.runs[1].update_status(state="failed", attempts=1, job_id=JOB, error="boom")
    made.runs[2].update_status(state="running", attempts=1, job_id=JOB)
    job.after(made, code=137)
    assert requeued(slurm) == [JOB]
    assert states(made) == ["queued", "failed", "queued"]
    assert made.runs[1].status().error == "boom"


def test_a_worker_that_ended_before_its_first_word_is_told(work, slurm):
    made = at_work(work(0))
    assert job.after(made, code=2) == 2
    status = made.runs[0].status()
    assert (status.state, status.error) == ("failed", "its worker ended with exit code 2")


@pytest.mark.parametrize("code", [FINISHED, 137, 143, CANCELLED])
def test_a_finished_run_needs_nothing(work, slurm, code):
    made = at_work(work(0))
    made.runs[0].write_result({"state": "finished", "step": 4, "metrics": {}})
    before = made.runs[0].status()
    assert job.after(made, code=code) == code
    assert (made.runs[0].status(), requeued(slurm)) == (before, [])


@pytest.mark.parametrize("code", [CANCELLED, 137, 143])
def test_a_cancelled_run_is_not_requeued(work, slurm, code):
    made = at_work(work(0))
    made.runs[0].cancel_path.touch()
    slurm.set_state(JOB, "CANCELLED")
    assert job.after(made, code=code) == code
    assert requeued(slurm) == []
    assert survey(made.runs)["r0"].state == "cancelled"


@pytest.mark.parametrize(
    ("state", "reason", "told"),
    [
        ("CANCELLED", "None", "cancelled"),  # by scancel
        ("PENDING", "BeginTime", "queued"),  # preempted: SLURM itself has requeued it
        ("COMPLETING", "None", "queued"),
        ("NODE_FAIL", "None", "failed"),
    ],
)
@pytest.mark.parametrize("code", [137, INTERRUPTED])
def test_where_slurm_decides_its_word_counts(alone, slurm, state, reason, told, code):
    """By whatever end: after a kill, or after the worker has saved and left."""
    work = at_work(alone(INTERRUPTED))
    slurm.set_state(JOB, state, reason=reason)
    if code == INTERRUPTED:
        assert job.run(work) == INTERRUPTED
    job.after(work, code=code)
    assert requeued(slurm) == []
    assert survey(work.runs)["r0"].state == told


def test_a_requeue_at_the_time_limit(work, slurm):
    made = at_work(work(0))
    slurm.set_state(JOB, "COMPLETING", reason="TimeLimit")
    job.after(made, code=137)
    assert requeued(slurm) == [JOB]


@pytest.mark.parametrize("end", ["run", "after"])
def test_a_refused_requeue_is_a_failure_with_its_reason(alone, slurm, end):
    work = at_work(alone(INTERRUPTED))
    slurm.fail("scontrol", "Requested operation is presently disabled for job 12")
    code = job.run(work) if end == "run" else 137
    job.after(work, code=code)
    status = work.runs[0].status()
    assert status.state == "failed"
    assert "not requeued: Requested operation is presently disabled" in (
        (status.error or "").replace("scontrol: ", "")
    )
    slurm.set_state(JOB, "COMPLETED")
    assert survey(work.runs)["r0"].state == "failed"


def test_slurms_own_exit_code_of_an_evaluation_is_passed_on(tmp_path, slurm, monkeypatch):
    one = Submission(submission="a", name="s.a", kind="eval", tasks=[["runs/x/r.json"]])
    one.write(jobs_folder(tmp_path, name="s") / "a")
    file = jobs_folder(tmp_path, name="s") / "a" / "submission.json"
    monkeypatch.setenv("RELORA_JOB", f"s.a/{JOB}")
    assert job.main(["--after", "137", str(file)]) == 137
    assert requeued(slurm) == []


def test_wrong_words_are_refused(capsys):
    assert job.main([]) == 2
    assert "usage: python -m sweeps.job" in capsys.readouterr().err


# with real workers ------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_pack_trains(nano, submitted, slurm, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def config(seed):
        return nano(seed=seed, model={"vocab_size": VOCAB_SIZE}, train={"steps": 4})

    file = submitted((0, 1), config=config)
    monkeypatch.setenv("RELORA_JOB", f"s.0123abcd/{JOB}")
    assert job.main([str(file)]) == FINISHED
    work = job.read(file, index=0)
    assert states(work) == ["finished", "finished"]
    assert Counter((run.result() or {})["step"] for run in work.runs) == {4: 2}
    for run in work.runs:  # what `logs` shows of a run without trouble
        assert f"{run.run_id}  4/4  loss " in run.log_path(1).read_text()
    assert {r["job_id"] for run in work.runs for r in run.attempt_records()} == {JOB}
