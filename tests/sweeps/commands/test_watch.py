"""`watch` follows the runs to their ends, asks SLURM rarely, and harms nothing."""

from __future__ import annotations

import dataclasses
import io
import itertools
import signal
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from experiments.disk.run_dir import RunDir
from experiments.disk.state import state_of
from relora_core.config import TrackingConfig
from sweeps import tracking
from sweeps.__main__ import main
from sweeps.commands import selection, status, watch
from sweeps.commands.selection import Observer, runs_of
from sweeps.planning.plan import make_plan, store
from tests.sweeps.records import store_runs


@pytest.fixture
def runs(make, tmp_path):
    """Three running runs of sweep `s`, on another host."""
    points = [({}, make(seed=s)) for s in range(3)]
    dirs = store_runs(points, name="s", output_dir=tmp_path / "out")
    for run in dirs:
        run.update_status(state="running", host="elsewhere", attempts=1, step=1)
    return dirs


@pytest.fixture
def look(tmp_path):
    return lambda *words: main(["watch", *words, "--output-dir", str(tmp_path / "out")])


@pytest.fixture
def between_looks(monkeypatch):
    """Sets what happens while the watch waits; it gets the seconds."""
    return lambda work: monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=work))


def finish(run: RunDir, state: str = "finished") -> None:
    if state in ("finished", "diverged"):
        run.write_result({"state": state, "metrics": {}, "step": 4})
    run.update_status(state=state, step=4, error="boom" if state == "failed" else None)


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (["finished"] * 3, 0),
        (["finished", "pruned", "finished"], 0),
        (["finished", "failed", "finished"], 1),
        (["finished", "diverged", "cancelled"], 1),
    ],
)
def test_it_ends_by_itself_when_the_runs_have_and_says_how(
    runs, look, between_looks, capsys, ends, code
):
    todo = zip(runs, ends, strict=True)

    def work(seconds):
        for run, state in itertools.islice(todo, 1):
            finish(run, state)

    between_looks(work)
    assert look("s", "--interval", "0.05") == code
    text = capsys.readouterr().out
    for seed, state in enumerate(ends):
        assert f"{state:<9} seed={seed}" in text
    assert text.splitlines()[0].startswith("3 running")


def test_nothing_changed_prints_nothing(runs, look, between_looks, capsys):
    pauses = itertools.count(1)

    def work(seconds):
        if next(pauses) == 20:
            for run in runs:
                finish(run)

    between_looks(work)
    look("--interval", "0.02")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines))


def test_once_looks_once(runs, look, capsys):
    assert look("--once") == 0
    assert "3 running" in capsys.readouterr().out
    finish(runs[0], "failed")
    assert look("--once") == 1


def test_ctrl_c_ends_the_watch_only(runs, look, between_looks, capsys):
    between_looks(lambda seconds: signal.raise_signal(signal.SIGINT))
    assert look("--interval", "0.05") == 130
    assert "the runs go on" in capsys.readouterr().err
    assert {state_of(run).state for run in runs} == {"running"}
    assert not any(run.cancel_path.exists() for run in runs)


def test_a_failure_is_believed_at_the_second_look(runs, look, monkeypatch, capsys):
    """SLURM calls a job failed for a moment before it requeues it."""
    answers = iter([["running"] * 3, ["failed", *["finished"] * 2], ["queued", *["finished"] * 2]])
    last = ["finished"] * 3

    def survey(dirs):
        now = next(answers, last)
        told = {run.run_id: state_of(run) for run in dirs}
        return {
            run.run_id: dataclasses.replace(told[run.run_id], state=state)
            for run, state in zip(dirs, now, strict=True)
        }

    monkeypatch.setattr(selection.scheduler, "survey", survey)
    monkeypatch.setattr(selection, "ASK_S", 0.0)
    assert look("--interval", "0.02") == 0
    assert "queued    seed=0" in capsys.readouterr().out


# the scheduler ----------------------------------------------------------------------------------
@pytest.fixture
def asked(monkeypatch):
    """SLURM's word on every run, to be changed by the test; and how often it was asked."""

    class Asked:
        count = 0
        state, reason = "running", None

    def survey(dirs):
        Asked.count += 1
        return {
            run.run_id: dataclasses.replace(state_of(run), state=Asked.state, reason=Asked.reason)
            for run in dirs
        }

    monkeypatch.setattr(selection.scheduler, "survey", survey)
    return Asked


def test_the_scheduler_is_asked_rarely_and_its_word_is_kept(runs, asked, tmp_path, monkeypatch):
    members = runs_of(tmp_path / "out")
    asked.state, asked.reason = "queued", "requeued, SLURM: BeginTime"
    observer = Observer()
    for step in range(10):
        runs[0].update_status(step=step)
        seen = observer.look(members)[runs[0].run_id]
        assert (seen.state, seen.reason) == ("queued", "requeued, SLURM: BeginTime")
        assert seen.step == step  # fresh from the run itself
    assert asked.count == 1
    monkeypatch.setattr(selection, "ASK_S", 0.0)
    observer.look(members)
    assert asked.count == 2


def test_a_runs_new_word_counts_before_the_scheduler_is_asked_again(runs, asked, tmp_path):
    members = runs_of(tmp_path / "out")
    asked.state = "queued"
    observer = Observer()
    observer.look(members)
    finish(runs[0])
    runs[1].update_status(state="running", attempts=2)  # it has begun again
    seen = observer.look(members)
    assert [seen[run.run_id].state for run in runs] == ["finished", "running", "queued"]
    assert asked.count == 1


# the table --------------------------------------------------------------------------------------
def test_the_live_table_fits_the_screen_and_shows_what_needs_attention(make, tmp_path):
    out = tmp_path / "out"
    grid = [({}, make(r=r, seed=s)) for r in range(1, 9) for s in range(4)]
    for run in store_runs(grid, name="s", output_dir=out):
        config = run.config()
        failed = (config.relora.r, config.seed) == (7, 2)
        finish(run, "failed" if failed else "finished")
    members = runs_of(out)
    buffer = io.StringIO()
    console = Console(file=buffer, width=120, height=9, force_terminal=True, color_system=None)
    console.print(status.view(members, selection.survey(members), height=9))
    text = buffer.getvalue()
    assert len(text.splitlines()) <= 9
    assert "relora.r=7" in text
    assert "more arms" in text


def test_a_terminal_gets_a_live_table(runs, look, capsys, monkeypatch):
    for run in runs:
        finish(run)
    console = Console(force_terminal=True, width=100, height=30)
    monkeypatch.setattr(watch.display, "make_console", lambda: console)
    assert look() == 0
    assert "3 finished" in capsys.readouterr().out


# MLflow -----------------------------------------------------------------------------------------
@pytest.fixture
def tracked(make, tmp_path):
    config = dataclasses.replace(make(), tracking=TrackingConfig(enabled=True))
    (run,) = store_runs([({}, config)], name="s", output_dir=tmp_path / "out")
    return run


def test_a_broken_store_is_one_line_and_the_watch_goes_on(tracked, look, tmp_path, capsys):
    (tmp_path / "out" / "mlflow.db").write_text("this is no database")
    finish(tracked)
    assert look("--interval", "0.05") == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("tracking")
    assert "Traceback" not in captured.out + captured.err


@pytest.mark.slow
def test_the_store_is_up_to_date_when_the_watch_ends(tracked, look, tmp_path):
    from mlflow import MlflowClient

    tracked.update_status(state="running", host="elsewhere", step=1)
    threading.Timer(1.0, finish, [tracked]).start()
    assert look("--interval", "0.1") == 0
    client = MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("s")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["kind"] for run in found} == {"sweep", "arm", "run"}
    assert {run.info.status for run in found} == {"FINISHED"}


def test_tracking_servers_are_left_to_sync(make, tmp_path):
    server = TrackingConfig(enabled=True, uri="http://127.0.0.1:9")
    config = dataclasses.replace(make(), tracking=server)
    store(make_plan([({}, config)], name="s"), output_dir=tmp_path / "out")
    shown = watch.View()
    with tracking.keep_up_to_date(
        tmp_path / "out", None, every_s=3600, report=shown.report, servers=False
    ):
        pass
    assert shown.problem is None
