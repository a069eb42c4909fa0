"""A run's own word, then SLURM's; absence is not death, and reading changes nothing."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.disk.output_dir import jobs_folder
from experiments.disk.run_dir import SILENT_AFTER_S, RunDir, Status
from experiments.disk.state import Seen, look
from experiments.disk.states import State
from sweeps.slurm import cluster
from sweeps.slurm import survey as module
from sweeps.slurm.cluster import Job, SlurmError
from sweeps.slurm.submission import Submission, read_submissions, recover
from sweeps.slurm.survey import is_dead, judge_job, survey

ELSEWHERE = "a-node-elsewhere"


@pytest.fixture
def run(make, tmp_path):
    """Queued as job 12_3, on a node elsewhere."""
    run_dir = RunDir(tmp_path / "out" / "runs" / "nano-relora-s0-abc")
    run_dir.create(make())
    run_dir.update_status(state="queued", job_id="12_3", host=ELSEWHERE, pid=1)
    return run_dir


def says(run_dir, state, *, silent=0.0, **changes):
    run_dir.update_status(state=state, **changes)
    status = run_dir.status()
    status.heartbeat = time.time() - silent
    run_dir.write_status(status)


def lock(run_dir, **fields):
    holder = {"host": ELSEWHERE, "pid": 1, "started": 0.0, "job_id": "12_3"} | fields
    (run_dir.path / "lock").write_text(json.dumps(holder))
    return holder


def now(run_dir):
    state = survey([run_dir])[run_dir.run_id]
    return state.state, state.reason


def files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_process_gone_from_this_host_is_no_failure_while_its_job_runs(slurm, run, tmp_path):
    submitted(tmp_path / "out", job_id="12", tasks=[[], [], [], [run.run_id]])
    says(run, "running", host=socket.gethostname(), pid=2**22 + 1)
    slurm.add("12_3", state="RUNNING")
    state, reason = now(run)
    assert state == "running"
    assert reason is not None
    assert reason.endswith("but SLURM: RUNNING")


# over -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("state", "judged"), [("TIMEOUT", "failed"), ("CANCELLED", "cancelled")])
def test_the_queue_and_then_the_accounting_say_how_a_job_ended(slurm, run, state, judged):
    says(run, "running")
    lock(run)
    slurm.add("12_3", state=state)
    assert now(run) == (judged, SAYS.format(state))
    slurm.forget("12_3")
    assert now(run) == (judged, SAYS.format(state))


@pytest.mark.parametrize("job", ["RUNNING", "PENDING", "COMPLETED"])
def test_a_job_that_nobody_submitted_says_nothing_of_a_process_of_this_host(slurm, run, job):
    """As an earlier version wrote it down inside an allocation."""
    slurm.add("4242", name="interactive", state=job)
    says(run, "running", host=socket.gethostname(), pid=2**22 + 1, job_id="4242")
    state, reason = now(run)
    assert (state, str(reason)[:20]) == ("failed", "killed (no process; ")
    assert survey([run])[run.run_id].job_id is None


def test_a_run_with_a_result_needs_no_scheduler(slurm, run):
    run.write_result({"state": "finished"})
    assert now(run)[0] == "finished"
    assert slurm.calls("squeue") == []


def test_a_result_written_while_slurm_was_asked_counts(slurm, run, monkeypatch):
    says(run, "running")

    def ends_meanwhile(job_ids):
        run.write_result({"state": "finished"})
        return {"12_3": Job(job_id="12_3", state="COMPLETED")}

    monkeypatch.setattr(cluster, "jobs", ends_meanwhile)
    assert now(run)[0] == "finished"


# unknown ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("accounting", [True, False])
@pytest.mark.parametrize("word", ["queued", "running"])
def test_absence_is_not_death_until_the_run_has_long_been_silent(slurm, run, word, accounting):
    slurm.config(accounting=accounting)
    says(run, word, silent=60)
    assert now(run) == (word, "SLURM does not list job 12_3")
    says(run, word, silent=12 * 60)
    assert now(run) == (
        "lost",
        "no heartbeat for 12 min and SLURM does not know job 12_3; "
        f"`python -m sweeps retry {run.run_id} --output-dir {run.path.parents[1]}` runs it again",
    )


# of an array whose other tasks are listed ---------------------------------------------------------
@pytest.mark.parametrize("accounting", [True, False])
@pytest.mark.parametrize("sibling", ["PENDING", "RUNNING", "COMPLETED"])
def test_a_task_taken_out_of_its_array_is_cancelled_at_once(slurm, run, accounting, sibling):
    """scancel of a pending task leaves no record of it, with the controller or the accounting."""
    slurm.config(accounting=accounting)
    slurm.add("12_1", state=sibling)
    assert now(run) == ("cancelled", "SLURM does not list job 12_3 with its array any more")
    slurm.add("12_3")
    assert now(run)[0] == "queued"


def test_a_job_alone_and_an_array_that_is_gone_are_no_such_case(slurm, run):
    slurm.add("13_1")
    assert now(run) == ("queued", NOT_LISTED)
    run.update_status(job_id="12")
    slurm.add("12_1")
    assert now(run) == ("queued", "SLURM does not list job 12")


def test_a_task_that_began_and_is_not_listed_has_failed(slurm, run, tmp_path):
    submitted(tmp_path / "out", job_id="12", tasks=[[], [], [], [run.run_id]])
    slurm.add("12_1")
    assert now(run)[0] == "cancelled"
    folder = next(tmp_path.glob("out/sweeps/*/jobs/*"))
    (folder / "12_3_0_log.out").touch()  # SLURM makes it at the job's begin
    assert now(run) == ("failed", "its job 12_3 ended without a result")
    says(run, "running")
    assert now(run)[0] == "failed"


def test_a_node_that_saw_nothing_is_told_of_shared_file_systems(slurm, run, tmp_path):
    submitted(tmp_path / "out", job_id="12", tasks=[[], [], [], [run.run_id]])
    slurm.add("12_3", state="FAILED", node="n7")
    assert now(run) == (
        "failed",
        "SLURM: FAILED (job 12_3) and its node n7 wrote nothing: output_dir must be on a shared "
        f"file system that the nodes see, got {tmp_path / 'out'}",
    )
    folder = next(tmp_path.glob("out/sweeps/*/jobs/*"))
    (folder / "12_3_0_log.out").touch()
    assert now(run) == ("failed", "SLURM: FAILED (job 12_3)")
    said = "hydra.launcher.setup failed with exit code 127: module load x"
    (folder / "12_3_0_log.out").write_text(f"module: command not found\nerror: {said}\n")
    assert now(run) == ("failed", f"SLURM: FAILED (job 12_3); {said}")


def test_when_slurm_does_not_answer_the_runs_own_word_stands(slurm, run):
    says(run, "running", silent=60)
    slurm.fail("squeue", "Unable to contact slurm controller (connect failure)")
    assert now(run) == (
        "running",
        "SLURM does not answer: squeue: Unable to contact slurm controller (connect failure)",
    )


def test_without_squeue_the_runs_own_word_stands(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    state, reason = now(run)
    assert state == "queued"
    assert reason is not None
    assert "no squeue" in reason


# many -------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_hundreds_of_runs_cost_one_question_and_local_runs_none(slurm, make, tmp_path):
    runs = []
    for number in range(200):
        run_dir = RunDir(tmp_path / "out" / "runs" / f"r{number}")
        run_dir.create(make())
        run_dir.update_status(state="queued", job_id=f"12_{number}", host=ELSEWHERE)
        slurm.add(f"12_{number}")
        runs.append(run_dir)
    local = RunDir(tmp_path / "out" / "runs" / "local")
    local.create(make())
    states = survey([*runs, local])
    assert [state.state for state in states.values()] == ["queued"] * 200 + ["planned"]
    assert len(slurm.calls("squeue")) == 1
    slurm.fail("squeue", "not to be asked")
    assert survey([local])["local"].reason is None


def test_a_run_at_work_outside_slurm_is_running_whatever_its_old_job_is(slurm, run):
    lock(run, job_id=None)
    slurm.add("12_3", state="CANCELLED")
    assert now(run)[0] == "running"


def test_an_older_job_that_still_holds_the_run_is_running(slurm, run):
    lock(run, job_id="9")
    slurm.add("9", state="RUNNING")
    slurm.add("12_3")
    assert now(run)[0] == "running"
    slurm.set_state("9", "COMPLETED")
    assert now(run) == ("queued", "SLURM: Priority")


# judging: what was seen, what SLURM says, what follows ------------------------------------------
NOW, LONG = 1e6, 2 * SILENT_AFTER_S
BY_12_3 = {"host": ELSEWHERE, "pid": 1, "job_id": "12_3"}
SAYS = "SLURM: {} (job 12_3)"


def seen(state="running", *, silent=60.0, attempts=1, phase="", error=None, holder=None, **of):
    status = Status(
        state=State(state),
        host=ELSEWHERE,
        job_id="12_3",
        heartbeat=NOW - silent,
        attempts=attempts,
        phase=phase,
        error=error,
    )
    path = Path("/out/runs/r")
    return Seen(path=path, status=status, holder=holder, ended=of.pop("ended", None), **of)


HOST = socket.gethostname()
NOT_LISTED = "SLURM does not list job 12_3"
RELEASE = "held (SLURM: {}); `scontrol release 12_3` lets it go on"
NEVER = (
    "never starts (SLURM: {}); `python -m sweeps cancel r --output-dir /out`, then launch it again"
)


def waits(reason, state="PENDING"):
    return Job(job_id="12_3", state=state, reason=reason)


TABLE = [
    # nothing that SLURM says changes a result, a pruned run, or one that is certainly at work
    (seen(ended=State.FINISHED), "NODE_FAIL", "finished", None),
    (seen(ended=State.DIVERGED), "NODE_FAIL", "diverged", None),
    (seen("pruned"), "COMPLETED", "pruned", None),
    (seen(holder={"host": ELSEWHERE, "pid": 1}), "FAILED", "running", None),
    (seen("queued", holder={**BY_12_3, "host": HOST}, host=HOST), "FAILED", "running", None),
    (seen("queued", holder=BY_12_3), "RUNNING", "running", None),
    # a lock of a job that waits or is over is a dead one's
    (seen(holder=BY_12_3), "PENDING", "queued", "requeued, SLURM: PENDING"),
    (seen(holder=BY_12_3), waits("BeginTime"), "queued", "requeued, SLURM: BeginTime"),
    (seen(holder=BY_12_3), "TIMEOUT", "failed", SAYS.format("TIMEOUT")),
    (seen("queued", holder=BY_12_3), "CANCELLED", "cancelled", SAYS.format("CANCELLED")),
    # it waits
    (seen("queued"), "PENDING", "queued", "SLURM: PENDING"),
    (seen("queued"), waits("Resources"), "queued", "SLURM: Resources"),
    (seen("queued", phase="requeued: node"), "PENDING", "queued", "requeued: node, SLURM: PENDING"),
    (seen("cancelled"), "PENDING", "queued", "requeued, SLURM: PENDING"),
    (seen("cancelled", cancelled=True), "PENDING", "cancelled", None),
    (seen("queued", cancelled=True), waits("Priority"), "queued",  # where scancel was denied
     "asked to end: it does so when it begins (SLURM: Priority)"),
    # it waits for ever, and says what to do
    *((seen("queued"), waits(why), "queued", RELEASE.format(why))
      for why in ("launch failed requeued held", "launch_failed_requeued_held", "JobHeldUser")),
    *((seen("queued"), waits("None", state), "queued", RELEASE.format(state))
      for state in ("REQUEUE_HOLD", "SPECIAL_EXIT")),
    (seen("queued"), waits("JobHeldAdmin"), "queued",
     "held by an administrator (SLURM: JobHeldAdmin)"),
    *((seen("queued"), waits(why), "queued", NEVER.format(why))
      for why in ("DependencyNeverSatisfied", "PartitionTimeLimit", "PartitionNodeLimit",
                  "BadConstraints", "AssocMaxWallDurationPerJobLimit")),
    # it has a node
    (seen("queued"), "RUNNING", "queued", "starting"),
    (seen("queued"), Job(job_id="12_3", state="RUNNING", node="n7"), "queued", "starting on n7"),
    (seen("planned"), "COMPLETING", "queued", "ending"),
    (seen("running"), "RUNNING", "running", None),
    (
        seen("running", silent=LONG),
        "RUNNING",
        "running",
        f"no heartbeat from {ELSEWHERE} for 10 min",
    ),
    (seen("failed", error="boom"), "RUNNING", "failed", "boom"),
    (seen("cancelled"), "RUNNING", "cancelled", None),
    # it is over
    (seen("failed", error="boom"), "FAILED", "failed", "boom"),
    (seen("failed"), "FAILED", "failed", SAYS.format("FAILED")),
    (seen(cancelled=True), "FAILED", "cancelled", SAYS.format("FAILED")),
    (seen("queued"), "CANCELLED", "cancelled", SAYS.format("CANCELLED")),
    (seen("queued"), "OUT_OF_MEMORY", "failed", SAYS.format("OUT_OF_MEMORY")),
    (seen(), "NODE_FAIL", "failed", SAYS.format("NODE_FAIL")),
    (seen(), "COMPLETED", "failed", "its job 12_3 ended without a result"),
    (seen("queued"), "COMPLETED", "failed", "its job 12_3 ended without a result"),
    (seen(), "PREEMPTED", "failed", "preempted and not requeued (job 12_3)"),
    (seen(), "UNLISTED", "failed", "its job 12_3 ended, and SLURM does not know how"),
    (seen("queued"), "UNLISTED", "cancelled", f"{NOT_LISTED} with its array any more"),
    # SLURM does not know it
    (seen("failed", error="boom", silent=LONG), None, "failed", "boom"),
    (seen("cancelled", silent=LONG), None, "cancelled", None),
    (seen("planned", silent=LONG), None, "planned", None),
    (seen(silent=LONG, cancelled=True), None, "cancelled", None),
    (seen(), None, "running", NOT_LISTED),
    (seen("queued"), None, "queued", NOT_LISTED),
]  # fmt: skip


@pytest.mark.parametrize(("files", "job", "state", "reason"), TABLE)
def test_what_was_seen_and_what_slurm_says_decide_the_state(files, job, state, reason):
    job = Job(job_id="12_3", state=job) if isinstance(job, str) else job
    judged = judge_job(files, jobs={"12_3": job} if job else {}, now=NOW)
    assert (judged.state, judged.reason) == (state, reason)


def test_a_run_in_a_living_job_is_looked_at_once_and_any_other_again(slurm, run, monkeypatch):
    looks = []
    monkeypatch.setattr(module, "look", lambda run: looks.append(run.run_id) or look(run))
    slurm.add("12_3", state="RUNNING")
    assert now(run)[0] == "queued"
    assert looks == [run.run_id]
    slurm.set_state("12_3", "FAILED")
    assert now(run)[0] == "failed"
    assert looks == [run.run_id] * 3


JOB_STATES = sorted({*cluster.OVER, *cluster.WAITING, "RUNNING", "COMPLETING", "NEW_WORD"})


@settings(
    max_examples=2 * settings.default.max_examples,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    word=st.sampled_from(["planned", "queued", "running", "failed", "cancelled"]),
    job=st.none() | st.sampled_from(JOB_STATES),
    silent=st.sampled_from([0.0, 1e4]),
    locked=st.booleans(),
    cancel=st.booleans(),
)
def test_whatever_is_said_a_judgement_is_safe_and_changes_nothing(
    run, word, job, silent, locked, cancel
):
    (run.path / "lock").unlink(missing_ok=True)
    run.cancel_path.unlink(missing_ok=True)
    says(run, word, silent=silent)
    if locked:
        lock(run)
    if cancel:
        run.cancel_path.touch()
    known = {"12_3": Job(job_id="12_3", state=job)} if job else {}
    before = files(run.path)
    judged = judge_job(look(run), jobs=known, now=time.time())
    assert files(run.path) == before
    assert judged.state in list(State)
    if known and known["12_3"].over:  # else a run would wait for ever for a job that is over
        assert judged.state in ("failed", "cancelled")
    if known and known["12_3"].alive and word in ("planned", "queued", "running"):
        assert judged.state in ("queued", "running")  # else two jobs would run it
    given_up = not known and silent > 0 and word in ("queued", "running") and not cancel
    assert (judged.state == "lost") == given_up


# locks ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("state", "dead"),
    [("RUNNING", False), ("COMPLETING", False), ("PENDING", True), ("NODE_FAIL", True)],
)
def test_a_holder_is_dead_where_slurm_says_that_its_job_is_over_or_waits(slurm, run, state, dead):
    slurm.add("12_3", state=state)
    assert is_dead(lock(run), heartbeat=time.time()) == dead


def test_a_holder_of_an_unknown_job_is_dead_only_after_long_silence(slurm, run):
    assert not is_dead(lock(run), heartbeat=time.time() - 60)
    assert is_dead(lock(run), heartbeat=time.time() - 2 * SILENT_AFTER_S)


def test_in_doubt_a_holder_lives(slurm, run):
    slurm.add("12_3", state="FAILED")
    assert not is_dead(lock(run, job_id=None), heartbeat=0.0)
    assert not is_dead(lock(run, host=socket.gethostname()), heartbeat=0.0)
    slurm.fail("squeue", "Unable to contact slurm controller")
    assert not is_dead(lock(run), heartbeat=0.0)


# submissions ------------------------------------------------------------------------------------
def submitted(tmp_path, **changes):
    one = Submission(submission="0a1b2c3d", name="it's a grid.0a1b2c3d", tasks=[["a", "b"], ["c"]])
    for key, value in changes.items():
        setattr(one, key, value)
    one.write(jobs_folder(tmp_path, name="it's a grid") / one.submission)
    return one


def test_each_run_of_a_submission_has_its_tasks_job(tmp_path):
    array = submitted(tmp_path, job_id="12", state="submitted")
    assert array.job_ids() == {"a": "12_0", "b": "12_0", "c": "12_1"}
    assert Submission(submission="1", name="n", tasks=[["a", "b"]], job_id="7").job_ids() == {
        "a": "7",
        "b": "7",
    }
    assert Submission(submission="1", name="n", tasks=[["a"]]).job_ids() == {}


def test_submissions_are_read_back_oldest_first_with_fields_of_a_later_release_left_out(tmp_path):
    second = submitted(tmp_path, submission="aa", created=2.0)
    first = submitted(tmp_path, submission="ff", created=1.0)
    folder = jobs_folder(tmp_path, name="it's a grid")
    path = folder / "aa" / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_2031": 1}))
    assert read_submissions(folder) == [first, second]
    assert read_submissions(tmp_path / "nothing here") == []


def test_an_id_lost_after_sbatch_is_found_by_name_and_written_only_when_asked_to(slurm, tmp_path):
    one = submitted(tmp_path)
    before = files(jobs_folder(tmp_path, name="it's a grid"))
    slurm.add("44_0", name=one.name)
    slurm.add("44_1", name=one.name)
    [found] = recover(tmp_path, "it's a grid")
    assert (found.job_id, found.state) == ("44", "submitted")
    assert files(jobs_folder(tmp_path, name="it's a grid")) == before
    assert recover(tmp_path, "it's a grid", write=True) == [found]
    slurm.fail("squeue", "not to be asked again")
    assert recover(tmp_path, "it's a grid") == [found]


def test_what_never_reached_slurm_stays_without_a_job(slurm, tmp_path):
    one = submitted(tmp_path)
    refused = submitted(tmp_path, submission="ff", state="refused", created=9.0, error="no")
    assert recover(tmp_path, "it's a grid", write=True) == [one, refused]


def test_a_lost_id_and_a_silent_slurm_are_an_error_not_a_missing_job(slurm, tmp_path):
    submitted(tmp_path)
    slurm.fail("squeue", "Unable to contact slurm controller")
    with pytest.raises(SlurmError):
        recover(tmp_path, "it's a grid")
