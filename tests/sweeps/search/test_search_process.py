"""Processes of a search: no trial is lost or run twice, whatever happens; pruning saves steps."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from experiments import scheduler
from experiments.disk.output_dir import all_runs, jobs_folder, study_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.states import Outcome
from experiments.errors import RunLocked
from experiments.identity import run_id
from experiments.run.complete import complete
from experiments.run.runner import run_experiment
from experiments.run.stopping import StopFlag
from relora_core.events import Event
from sweeps import job
from sweeps.local import warm
from sweeps.local.slots import Slots
from sweeps.planning.plan import load
from sweeps.search import process
from sweeps.search.config import normalise
from sweeps.search.processes import search_local
from sweeps.search.space import Choice, Float
from sweeps.search.study import Spec, Study
from sweeps.search.trial import Worker
from sweeps.slurm.submission import Submission
from sweeps.worker import FAILED, FINISHED, INTERRUPTED
from tests import warm as commands
from tests.sweeps.records import end_run
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[3]
LR = {"train.lr": Float(low=1e-3, high=3e-2, log=True)}


@pytest.fixture
def study(nano, tmp_path):
    """A search over nano runs below tmp_path / "out"."""

    def go(*, space=LR, train=None, **search):
        base = nano(
            train={"steps": 12, **(train or {})},
            output_dir=str(tmp_path / "out"),
            tracking={"enabled": False},
            eval={},
        )
        base.eval.paloma.enabled = base.eval.blimp.enabled = False
        base.model.vocab_size = None
        base.sweep.name = "s"
        base = complete(base)
        search = {"n_trials": 3, "objectives": ["train/loss min last"], **search}
        config = normalise({"sampler": {"name": "random"}, **search})
        spec = Spec(config=config, space=space, bases={"": base})
        return Study.open(study_folder(tmp_path / "out", name="s"), create=spec)

    return go


def states(study):
    return Counter(frozen.state.name for frozen in study.trials())


def result(run):
    return run.result() or {}


def steps_trained(runs):
    return sum(run.status().step for run in runs)


@pytest.mark.slow
def test_one_process_takes_all_trials_and_each_is_an_ordinary_run(study, tmp_path):
    made = study(seeds=2)
    assert process.work(made.folder, stop=StopFlag()) == FINISHED
    assert states(made) == {"COMPLETE": 3}
    runs = all_runs(tmp_path / "out")
    cells = load(tmp_path / "out" / "sweeps" / "s" / "plan.json").cells
    assert {r.run_id for r in runs} == {c.run_id for c in cells}
    assert len(runs) == 6
    for frozen in made.trials():
        ids = frozen.user_attrs["run_ids"]
        losses = [result(RunDir(tmp_path / "out" / "runs" / id_))["metrics"]["train/loss"]
                  for id_ in ids]  # fmt: skip
        assert frozen.value == pytest.approx(sum(losses) / 2)
        assert {run.trial_tags()["trial"] for run in runs if run.run_id in ids} == {frozen.number}
    assert process.work(made.folder, stop=StopFlag()) == FINISHED
    assert len(all_runs(tmp_path / "out")) == 6


def test_a_run_that_a_grid_has_finished_is_not_trained_again(study, tmp_path):
    made = study(space={"train.lr": Choice(values=[1e-2])}, n_trials=1)
    config = made.spec.bases[""]
    config.train.lr = 1e-2
    run = RunDir(tmp_path / "out" / "runs" / run_id(config))
    assert run_experiment(config, run) == "finished"
    assert process.work(made.folder, stop=StopFlag()) == FINISHED
    assert len(run.attempt_records()) == 1
    [frozen] = made.trials()
    assert frozen.value == result(run)["metrics"]["train/loss"]
    assert frozen.intermediate_values  # a pruner compares later trials with its curve


def test_a_run_that_another_process_ends_meanwhile_has_its_curve(study, monkeypatch):
    made = study(space={"train.lr": Choice(values=[1e-2])}, n_trials=1)
    monkeypatch.setattr(process, "LOOK_EVERY_S", 0.0)
    real, asked = process.run_experiment, []

    def run(config, run_dir, **options):
        asked.append(run_dir)
        if len(asked) == 1:  # a grid is at work on it
            real(config, run_dir)
            raise RunLocked("by a grid")
        return real(config, run_dir, **options)

    monkeypatch.setattr(process, "run_experiment", run)
    assert process.work(made.folder, stop=StopFlag()) == FINISHED
    [frozen] = made.trials()
    assert (len(asked), frozen.state.name) == (2, "COMPLETE")
    assert frozen.intermediate_values


@pytest.mark.slow
def test_asha_saves_steps_and_a_grid_brings_a_pruned_run_to_its_end(study, tmp_path):
    lrs = [1e-2, 9e-3, 8e-3, 1e-6, 2e-6, 3e-6]
    made = study(
        space={"train.lr": Choice(values=lrs)},
        train={"steps": 24},
        n_trials=6,
        pruner={"name": "asha", "min_resource": 4, "reduction_factor": 2},
        enqueue=[{"train.lr": lr} for lr in lrs],
    )
    assert process.work(made.folder, stop=StopFlag()) == FINISHED
    runs = all_runs(tmp_path / "out")
    steps = steps_trained(runs)
    pruned = [run for run in runs if run.status().state == "pruned"]
    print(f"asha: {steps} steps instead of {24 * 6}, {len(pruned)} of 6 trials pruned")
    assert len(pruned) == states(made)["PRUNED"] >= 3
    assert steps == sum(run.newest_step() for run in runs) <= 24 * 6 * 0.7
    one = pruned[0]
    before = one.newest_step()
    assert one.result() is None
    assert run_experiment(one.config(), one) == "finished"
    assert one.attempt_records()[-1]["start_step"] == before
    assert result(one)["step"] == 24


@pytest.mark.slow
def test_wilcoxon_spares_the_seeds_that_change_nothing(study, tmp_path):
    lrs = [1e-2, 1e-6]
    made = study(
        space={"train.lr": Choice(values=lrs)},
        n_trials=2,
        seeds=6,
        pruner={"name": "wilcoxon", "p_threshold": 0.2},
        enqueue=[{"train.lr": lr} for lr in lrs],
    )
    assert process.work(made.folder, stop=StopFlag()) == FINISHED
    assert states(made) == {"COMPLETE": 1, "PRUNED": 1}
    ended = Counter(run.config().train.lr for run in all_runs(tmp_path / "out") if run.ended())
    assert ended[1e-2] == 6
    assert ended[1e-6] < 6


def test_wilcoxon_compares_with_no_loss_of_a_seed_that_diverged(study):
    """A trial with such a seed has the worst value, so no better one is pruned for its others."""
    made = study(n_trials=2, seeds=6, pruner={"name": "wilcoxon", "p_threshold": 0.2})
    outcomes = []
    for loss in (1.0, 2.0):
        trial = made.take(process.this_process())
        for index, run in enumerate(process.prepare(trial)):
            diverged = (loss, index) == (1.0, 5)
            end_run(run, loss=loss, state="diverged" if diverged else "finished")
            sink = process.SearchSink(trial, stop=StopFlag(), index=index)
            outcome = Outcome.DIVERGED if diverged else Outcome.FINISHED
            outcomes.append(sink.after_seed(outcome, run))
        trial.finish()
    assert outcomes == [Outcome.FINISHED] * 5 + [Outcome.DIVERGED] + [Outcome.FINISHED] * 6
    one, two = made.trials()
    assert one.intermediate_values == dict.fromkeys(range(5), 1.0) | {5: math.inf}
    assert (one.value, two.value) == (math.inf, 2.0)


def test_a_crash_fails_its_trial_only_and_too_many_end_the_search(study, monkeypatch, capsys):
    made = study(n_trials=6, max_failures=3)

    def boom(*args, **options):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(process, "run_experiment", boom)
    assert process.work(made.folder, stop=StopFlag()) == FAILED
    assert states(made) == {"FAIL": 3}
    assert made.failures() == ["RuntimeError: no such luck"] * 3
    assert "search.max_failures=3" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "end"), [(2, "FAIL"), (3, "COMPLETE")])
def test_attempts_without_a_checkpoint_count_as_the_launcher_says(study, limit, end):
    made = study(n_trials=1)
    [run] = process.prepare(made.take(process.this_process()))
    for attempt in (1, 2):
        run.write_attempt(attempt, {"job_id": None, "start_step": 0})
    work = job.Work(study=made.folder, max_stalled=limit, signal_delay_s=0.0)
    assert job.run(work) == FINISHED
    assert states(made) == {end: 1}


def test_a_cancelled_run_fails_its_trial_and_the_search_goes_on(study, monkeypatch):
    made = study(n_trials=2)
    before = process.prepare

    def prepare(trial):
        runs = before(trial)
        if trial.number == 0:
            runs[0].cancel_path.touch()
        return runs

    monkeypatch.setattr(process, "prepare", prepare)
    assert process.work(made.folder, stop=StopFlag()) == FINISHED
    assert states(made) == {"FAIL": 1, "COMPLETE": 1}


@pytest.mark.parametrize(
    ("state", "kept"), [(None, False), ("FAILED", False), ("RUNNING", True)], ids=str
)
def test_a_run_that_was_cancelled_for_another_search_is_trained_unless_that_is_at_work(
    study, tmp_path, slurm, state, kept
):
    """In a job of this state, if any, on another node."""
    rate = [{"train.lr": 1e-3}]
    made = study(n_trials=1, enqueue=rate)
    trial = made.take(process.this_process())
    [run] = process.prepare(trial)
    run.cancel_path.touch()
    process.prepare(trial)
    assert run.cancel_path.exists()  # the trial that it was meant for
    trial.fail("cancelled")
    other = Study.open(
        study_folder(tmp_path / "out", name="other"),
        create=replace(made.spec, config=replace(made.config, n_trials=1)),
    )
    again = other.take(process.this_process())
    assert (again.number, again.run_ids) == (trial.number, trial.run_ids)
    if state:
        slurm.add("12", state=state)
        lock = {"host": "n1", "pid": 1, "started": 0.0, "job_id": "12"}
        (run.path / "lock").write_text(json.dumps(lock))
    process.prepare(again)
    assert run.cancel_path.exists() == kept


@pytest.mark.parametrize(("most", "left"), [(None, 0), (1, 2), (2, 2)])
def test_a_job_takes_another_trial_only_after_one_that_ended_early(study, most, left):
    made = study(n_trials=3)
    assert process.work(made.folder, stop=StopFlag(), most=most) == FINISHED
    assert made.left() == left


# owners -----------------------------------------------------------------------------------------
@pytest.fixture
def slurm(slurm, monkeypatch):
    monkeypatch.setattr(job, "WAIT_S", 0.0)
    return slurm


@pytest.mark.parametrize(
    ("state", "over"),
    [("RUNNING", False), ("PENDING", False), ("COMPLETING", False), ("FAILED", True),
     ("CANCELLED", True), ("TIMEOUT", True), ("NODE_FAIL", True)],
)  # fmt: skip
def test_only_a_job_that_is_over_has_left_its_trial(study, slurm, state, over):
    made = study()
    slurm.add("7_1", name="s.0123abcd", state=state)
    worker = Worker(host="node3", pid=1, job_id="7_1")
    assert made.take(worker) is not None
    assert process.HasEnded(made)(worker) == over


def test_while_slurm_does_not_answer_no_job_has_left_its_trial(study, slurm):
    made = study(n_trials=2)
    workers = [Worker(host="node3", pid=1, job_id=f"7_{task}") for task in (1, 2)]
    assert all(made.take(worker) for worker in workers)
    slurm.fail("squeue", "Unable to contact slurm controller")
    has_ended = process.HasEnded(made)
    assert [has_ended(worker) for worker in workers] == [False, False]


def test_a_process_of_this_host_has_ended_when_it_is_dead_or_another(study):
    made, me = study(), process.this_process()
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    assert not process.HasEnded(made)(me)
    assert process.HasEnded(made)(Worker(host=host, pid=dead.pid, started=1.0))
    assert process.HasEnded(made)(Worker(host=host, pid=os.getpid(), started=me.started - 100))
    for birth in (None, me.birth, "00000000-0000-0000-0000-000000000000/17"):  # no file says so
        assert not process.HasEnded(made)(Worker(host="elsewhere", pid=1, birth=birth))


@contextmanager
def in_container(folder: Path, *, host: str) -> Iterator[Callable[[bool], None]]:
    """A process of the search on this machine that is at a trial; gives what stops or kills it."""
    (taken, at_trial), (told, tell) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(tell)
            socket.gethostname = lambda: host

            def run_trial(*arguments: object, **options: object) -> None:
                os.write(at_trial, b"1")
                os.read(told, 1)

            process.run_trial = run_trial
            os._exit(process.work(folder, stop=StopFlag()))
        finally:
            os._exit(99)
    os.close(at_trial)
    os.close(told)
    ended: list[int] = []

    def end(killed: bool) -> None:
        if killed:
            os.kill(pid, signal.SIGKILL)
        else:
            os.write(tell, b"1")
        ended.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        assert ended == [-signal.SIGKILL if killed else INTERRUPTED]

    try:
        assert os.read(taken, 1), "it has no trial"
        yield end
    finally:
        os.close(taken)
        if not ended:
            end(killed=True)
        os.close(tell)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="only Linux tells births")
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("host", ["3f2a17c0de", socket.gethostname()])
def test_a_trial_of_a_container_goes_on_in_the_next_one(study, monkeypatch, host, killed):
    """And not while it lives, in one of the same name neither."""
    monkeypatch.setattr(process, "is_alive", lambda *_, **__: False)  # here pids mean others
    made = study(n_trials=1)
    with in_container(made.folder, host=host) as end:
        [trial] = made.running()
        assert trial.worker.host == host
        assert not process.HasEnded(made)(trial.worker)
        end(killed)
    assert process.HasEnded(made)(trial.worker)
    assert process.work(made.folder, stop=StopFlag()) == FINISHED
    assert states(made) == {"COMPLETE": 1}


def test_a_process_leaves_its_file_only_with_a_trial_that_is_to_go_on(study, tmp_path, monkeypatch):
    made = study(n_trials=1)
    for ends, code in ((None, INTERRUPTED), (False, FINISHED)):
        monkeypatch.setattr(process, "run_trial", lambda *_, ends=ends, **__: ends)
        assert process.work(made.folder, stop=StopFlag(), most=1) == code
        assert len(list((tmp_path / "out" / ".processes").iterdir())) == (code == INTERRUPTED)


# as a job ---------------------------------------------------------------------------------------
@pytest.fixture
def submitted(study, slurm, monkeypatch, tmp_path):
    """Task 0 of the array 12, which is to take a trial; (work, study)."""
    slurm.add("12_0", name="s.0123abcd", state="RUNNING")
    monkeypatch.setattr(scheduler, "_job", "s.0123abcd/12_0")
    made = study(n_trials=2, train={"steps": 30})
    one = Submission(
        submission="0123abcd", name="s.0123abcd", tasks=[["sweeps/s/study"]] * 2, kind="search"
    )
    folder = jobs_folder(tmp_path / "out", name="s") / one.submission
    one.write(folder)
    return job.read(folder / "submission.json", index=0), made


def requeued(slurm):
    return [call[-1] for call in slurm.calls("scontrol") if "requeue" in call]


def test_a_job_takes_one_trial(submitted, slurm):
    work, made = submitted
    assert job.run(work) == FINISHED
    assert states(made) == {"COMPLETE": 1}
    assert job.after(work, code=FINISHED) == FINISHED
    assert requeued(slurm) == []


def test_a_signalled_job_is_requeued_and_goes_on_with_the_same_trial(submitted, slurm, tmp_path):
    work, made = submitted
    before = process.SearchSink.emit

    def emit(self, event):
        before(self, event)
        if event.kind == "train" and event.step == 9:
            os.kill(os.getpid(), signal.SIGUSR2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process.SearchSink, "emit", emit)
        assert job.run(work) == INTERRUPTED
    assert requeued(slurm) == ["12_0"]
    [run] = all_runs(tmp_path / "out")
    assert run.status().state == "queued"
    assert job.run(job.read(next((tmp_path / "out").rglob("submission.json")), index=0)) == FINISHED
    assert states(made) == {"COMPLETE": 1}
    assert [r["start_step"] for r in run.attempt_records()] == [0, 9]


def test_a_killed_task_is_requeued_only_while_it_has_a_trial(submitted, slurm):
    work, made = submitted
    assert job.after(work, code=128 + 9) == 128 + 9
    assert requeued(slurm) == []
    made.take(process.this_process())
    job.after(work, code=128 + 9)
    assert requeued(slurm) == ["12_0"]


# in earnest -------------------------------------------------------------------------------------
def command(*words, out):
    small = ["model=nano", "relora.r=4,8", "search.enqueue=[]", "train.steps=60", "eval=none",
             "train.batch_size=4", "schedule.warmup_steps=2", "relora.reset_frequency=20",
             "relora.restart_warmup_steps=1", "checkpoint.every_steps=5", "tracking=none",
             "search.objectives=[train/loss min last]", "search.pruner.name=none"]  # fmt: skip
    return ["run.py", "-m", "hydra/sweeper=search", "search=lr_and_rank",
            f"output_dir={out}", *small, *words]  # fmt: skip


@pytest.mark.slow
def test_killed_processes_lose_and_double_no_trial(tmp_path):
    """kill -9 of a process (its trial goes on elsewhere), then of all of them, then once more."""
    out = tmp_path / "out"
    words = command("search.n_trials=6", "hydra.launcher.max_parallel=2", out=out)
    launcher = commands.start(words, cwd=ROOT, figures=False)

    def two_at_work():
        holders = [holder for run in all_runs(out) if (holder := run.lock_holder())]
        return holders if len(holders) > 1 else None

    os.kill(wait_for(two_at_work)[0]["pid"], signal.SIGKILL)
    time.sleep(1)
    family = psutil.Process(launcher.process.pid).children(recursive=True)
    launcher.process.kill()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    assert launcher.wait().returncode == -signal.SIGKILL
    done = commands.run(words, cwd=ROOT, figures=False)
    assert done.returncode == 0, done.stdout + done.stderr
    study = Study.open(study_folder(out, name="lr_and_rank"))
    assert states(study) == {"COMPLETE": 6}
    runs = {id_ for frozen in study.trials() for id_ in frozen.user_attrs["run_ids"]}
    assert runs == {run.run_id for run in all_runs(out)}
    for run in all_runs(out):
        assert result(run)["step"] == 60
    again = commands.run(words, cwd=ROOT, figures=False)
    assert "has its 6 trials" in again.stdout
    assert len(all_runs(out)) == len(runs)


@pytest.mark.slow
@pytest.mark.skipif(not warm.available(), reason="forking is not safe here")
def test_processes_of_a_search_are_forks_and_outlive_their_parent(study, monkeypatch):
    """One import for all of them; where the parent dies, others end what is left to do."""
    made = study(train={"steps": 100}, n_trials=4)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    console = Console(file=io.StringIO(), width=200)
    slots, codes = Slots(parallel=2, threads=1, gpus=[]), []
    thread = threading.Thread(
        target=lambda: codes.append(search_local(made.folder, slots=slots, console=console))
    )
    before = set(psutil.Process().children())
    thread.start()
    deadline, forks = time.monotonic() + 120, []
    while len(forks) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
        family = [p for p in psutil.Process().children() if p not in before]
        forks = [fork for p in family for fork in p.children()]
    [parent] = family
    assert parent.ppid() == os.getpid()
    assert "sweeps.local.warm" in parent.cmdline()
    for fork in forks:  # so that they are at work when their parent dies
        fork.suspend()
    parent.kill()
    for fork in forks:
        fork.resume()
    thread.join(240)
    assert codes == [0]
    assert states(made) == {"COMPLETE": 4}
    assert all(len(run.attempt_records()) == 1 for run in all_runs(made.output_dir))
    assert "one by one from here" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_search_whose_trials_all_fail_says_so_and_exits_with_1(tmp_path):
    words = command(
        "search.n_trials=3", "search.objectives=[train/lossy min last]", "search.max_failures=2",
        out=tmp_path / "out",
    )  # fmt: skip
    done = commands.run(words, cwd=ROOT)
    assert done.returncode == 1
    assert "trials failed" in done.stdout
    assert "train/lossy was never logged" in done.stdout


def test_a_trial_at_its_last_step_is_complete(study, monkeypatch):
    """A pruner that would end it there saves nothing."""
    made = study(train={"steps": 8}, pruner={"name": "percentile", "percentile": 50.0})
    trial = made.take(process.this_process())
    monkeypatch.setattr(type(trial), "should_prune", lambda self: True)
    for step, ended in ((8, False), (7, True)):
        stop = StopFlag()
        sink = process.SearchSink(trial, stop=stop, index=0)
        sink.emit(Event(kind="train", step=step, metrics={"train/loss": 1.0}))
        assert stop() == ended


def test_a_curve_is_reported_in_few_points(study):
    made = study(train={"steps": 1000})
    trial = made.take(process.this_process())
    sink = process.SearchSink(trial, stop=StopFlag(), index=0)
    for step in range(1, 301):
        sink.emit(Event(kind="train", step=step, metrics={"train/loss": 1.0}))
    curve = made.frozen(trial.number).intermediate_values
    assert len(curve) == 15  # of 50 in all
