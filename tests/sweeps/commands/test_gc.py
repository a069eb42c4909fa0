"""What is kept whatever is asked for, what goes, and that nothing goes by halves."""

from __future__ import annotations

import argparse
import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.disk.output_dir import jobs_folder
from experiments.disk.run_dir import RunDir
from relora_core.config import ConfigError
from sweeps import retention
from sweeps.commands import gc
from sweeps.retention import COMPLETE, Policy, discard, judge
from sweeps.slurm import cluster
from sweeps.slurm.submission import Submission
from tests.sweeps.records import store_runs


def checkpoint(run, step, *, files=COMPLETE):
    folder = run.checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_bytes(b"x" * 100)
    return folder


def record(run, **metrics):
    """events.jsonl with `metric={step: value}`; `/` is written `__`."""
    with open(run.events_path, "w") as file:
        for name, values in metrics.items():
            for step, value in values.items():
                kind = "eval" if name.startswith("eval") else "train"
                event = {"kind": kind, "step": step, "metrics": {name.replace("__", "/"): value}}
                file.write(json.dumps({"attempt": 1, "data": {}, **event}) + "\n")


def steps(run):
    return sorted(int(p.name[5:]) for p in run.checkpoints.glob("step-*"))


@pytest.fixture
def sweep(make, tmp_path):
    """Five runs by seed with checkpoints 1 to 4: finished, failed, diverged, queued, running."""
    points = [({"seed": str(s)}, make(seed=s)) for s in range(5)]
    runs = store_runs(points, name="s", output_dir=tmp_path / "out")
    for run in runs:
        for step in (1, 2, 3, 4):
            checkpoint(run, step)
    for run, state in ((runs[0], "finished"), (runs[2], "diverged")):
        run.write_result({"state": state, "metrics": {}, "step": 4})
        run.update_status(state=state)
    runs[1].update_status(state="failed")
    runs[3].update_status(state="queued", host="elsewhere")
    runs[4].update_status(state="running", host="elsewhere")
    return runs


@pytest.fixture
def call(tmp_path):
    def call(*words):
        parser = argparse.ArgumentParser()
        gc.configure(parser)
        args = parser.parse_args(words)
        args.output_dir = str(tmp_path / "out")
        return gc.run(args)

    return call


def test_a_file_counts_once_and_only_where_its_last_link_goes(make, tmp_path):
    run = RunDir(tmp_path / "out" / "runs" / "linked")
    run.create(make())
    made = [checkpoint(run, step) for step in (1, 2, 3)]
    for name, size, steps_of in (("both_go", 1000, made[:2]), ("one_stays", 5000, made)):
        (tmp_path / name).write_bytes(b"x" * size)
        for folder in steps_of:
            os.link(tmp_path / name, folder / name)
        (tmp_path / name).unlink()
    verdict = judge(run, state="finished", policy=Policy())
    assert [retention.step_of(path) for path in verdict.remove] == [1, 2]
    before = _used(run.checkpoints)
    assert verdict.bytes == 2 * 100 * len(COMPLETE) + 1000
    retention.remove(verdict, run=run)
    assert before - _used(run.checkpoints) == verdict.bytes


def _used(folder):
    """Bytes of the distinct files below a folder."""
    files = {p.stat().st_ino: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return sum(files.values())


def test_without_yes_nothing_changes(sweep, call, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert call() == 0
    assert sorted(tmp_path.rglob("*")) == before
    text = capsys.readouterr().out
    assert "9 checkpoints" in text
    assert "3.6k bytes" in text
    assert "nothing was removed" in text


def test_each_run_keeps_its_newest_and_runs_at_work_keep_all(sweep, call):
    assert call("--yes") == 0
    assert [steps(run) for run in sweep] == [[4], [4], [4], [1, 2, 3, 4], [1, 2, 3, 4]]


def test_words_choose_the_runs(sweep, call):
    assert call(sweep[1].run_id, "--yes") == 0
    assert [len(steps(run)) for run in sweep] == [4, 1, 4, 4, 4]
    assert call("s", "--yes") == 0
    assert [len(steps(run)) for run in sweep] == [1, 1, 1, 4, 4]


def test_best_is_by_the_metric_at_the_checkpoint_itself(sweep, call):
    for run in sweep[:3]:
        record(run, train__loss={1: 9.0, 2: 1.0, 3: 5.0, 4: 6.0})
    # Seed 1 has perplexities, one of them between checkpoints and one that is not a number.
    record(
        sweep[1],
        train__loss={2: 1.0, 3: 5.0},
        eval__paloma__perplexity={1: 7.0, 2: 8.0, 3: float("nan"), 4: 9.0, 5: 0.1},
    )
    assert call("--keep-latest", "0", "--keep-best", "1", "--yes") == 0
    assert steps(sweep[0]) == [2]
    assert steps(sweep[1]) == [1, 4]  # not finished: it goes on from 4
    assert steps(sweep[2]) == [2, 4]


def test_accuracies_are_better_when_higher_unless_said_otherwise(sweep, call):
    for run in sweep:
        record(run, eval__blimp__no_bos__accuracy={1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6})
    best = ["--keep-latest", "0", "--keep-best", "2", "--metric", "eval/blimp/no_bos/accuracy"]
    assert call(sweep[0].run_id, *best, "--yes") == 0
    assert steps(sweep[0]) == [2, 3]
    assert call(sweep[1].run_id, *best, "--no-maximize", "--yes") == 0
    assert steps(sweep[1]) == [1, 4]


def test_without_a_value_at_any_checkpoint_all_stay(sweep, call, capsys):
    record(sweep[0], train__loss={7: 1.0})
    assert call(sweep[0].run_id, "--keep-best", "1", "--yes") == 0
    assert steps(sweep[0]) == [1, 2, 3, 4]
    assert "all stay" in capsys.readouterr().out


def test_torn_leftovers_go_unless_somebody_may_be_writing_them(sweep, call):
    for run in sweep:
        (run.checkpoints / ".tmp-step-00000005-77").mkdir()
        checkpoint(run, 5, files=("optimizer.pt",))  # a removal was killed
        checkpoint(run, 6, files=("model.safetensors", "progress.json"))  # weights kept by hand
    assert call("--keep-latest", "9", "--yes") == 0
    for run in sweep[:3]:
        assert steps(run) == [1, 2, 3, 4, 6]
        assert not list(run.checkpoints.glob(".tmp*"))
    for run in sweep[3:]:
        assert steps(run) == [1, 2, 3, 4, 5, 6]
        assert list(run.checkpoints.glob(".tmp*"))


def test_a_run_that_began_to_work_meanwhile_is_left_alone(sweep, call, capsys, monkeypatch):
    show = gc._show

    def meanwhile(*args, **kwargs):
        sweep[1].update_status(state="running", host="elsewhere")
        show(*args, **kwargs)

    monkeypatch.setattr(gc, "_show", meanwhile)
    assert call("--yes") == 0
    assert (len(steps(sweep[0])), len(steps(sweep[1]))) == (1, 4)
    assert "is running by now" in capsys.readouterr().err


def test_a_kill_while_removing_leaves_no_half_checkpoint(sweep, call, monkeypatch):
    def killed(path, **_):
        (path / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            call("--yes")
    for run in sweep:
        for folder in run.checkpoints.glob("step-*"):
            assert {p.name for p in folder.iterdir()} == set(COMPLETE)
    assert call("--yes") == 0
    assert [p.name for p in sweep[0].checkpoints.iterdir()] == ["step-00000004"]


def test_what_cannot_be_removed_is_said_and_the_rest_goes(sweep, call, capsys, monkeypatch):
    real = discard

    def full(path):
        if sweep[0].run_id in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        real(path)

    monkeypatch.setattr(retention, "discard", full)
    assert call("--yes") == 1
    assert "Permission denied" in capsys.readouterr().err
    assert len(steps(sweep[1])) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--keep-latest", "-1"], "--keep-latest must be >= 0"),
        (["--keep-latest", "0"], "--keep-latest must be >= 1"),
        (["--metric", "train/loss"], "--metric needs --keep-best"),
        (["--keep-best", "1", "--metric", "train/los"], "Did you mean 'train/loss'?"),
        (["nobody"], "got 'nobody'"),
    ],
)
def test_mistakes_are_one_line(sweep, call, words, line):
    record(sweep[0], train__loss={1: 1.0})
    with pytest.raises(ConfigError) as error:
        call(*words)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@given(
    has=st.sets(st.integers(1, 6)),
    state=st.sampled_from(["finished", "failed", "diverged", "cancelled", "planned", "running"]),
    latest=st.integers(0, 7),
    best=st.integers(0, 7),
    losses=st.dictionaries(st.integers(1, 6), st.floats(allow_nan=True)),
)
def test_one_checkpoint_always_stays_and_the_newest_where_it_is_needed(
    tmp_path_factory, has, state, latest, best, losses
):
    if not latest + best:
        return
    run = RunDir(tmp_path_factory.mktemp("run"))
    for step in has:
        checkpoint(run, step)
    record(run, train__loss=losses)
    verdict = judge(run, state=state, policy=Policy(keep_latest=latest, keep_best=best))
    gone = {retention.step_of(path) for path in verdict.remove}
    assert gone | set(verdict.keep) == has
    assert not gone & set(verdict.keep)
    if has:
        assert verdict.keep
        assert state == "finished" or max(has) in verdict.keep
        assert not latest or set(sorted(has)[-latest:]) <= set(verdict.keep)
    if state == "running":
        assert not gone
    assert verdict.bytes == 100 * len(COMPLETE) * len(gone)


# snapshots ----------------------------------------------------------------------------------------
@pytest.fixture
def snapshot(sweep, tmp_path, monkeypatch):
    """A read-only copy of some code; no run of the sweep is at work, and it is not young."""
    for run in sweep[3:]:
        run.update_status(state="failed")
    folder = tmp_path / "out" / "sweeps" / "s" / "code" / "abc"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.py").write_text("1")
    for path in (folder / "sub" / "a.py", folder / "sub", folder):
        path.chmod(0o555)
    monkeypatch.setattr(retention, "SNAPSHOT_AGE_S", -60.0)
    return folder


def submit(tmp_path, **facts):
    folder = jobs_folder(tmp_path / "out", name="s")
    one = Submission(submission="00c0ffee", name="s.00c0ffee", tasks=[["a"], ["b"]], **facts)
    one.write(folder / "00c0ffee")


def test_snapshots_go_on_demand_only(snapshot, call):
    assert call("--yes") == 0
    assert snapshot.exists()
    assert call("--snapshots", "--yes") == 0
    assert list(snapshot.parent.iterdir()) == []


def test_a_snapshot_stays_while_a_run_is_at_work_or_it_is_young(snapshot, sweep, call, monkeypatch):
    sweep[3].update_status(state="queued", host="elsewhere")
    assert call("--snapshots", "--yes") == 0
    assert snapshot.exists()
    sweep[3].update_status(state="failed")
    monkeypatch.setattr(retention, "SNAPSHOT_AGE_S", 60.0)
    assert call("--snapshots", "--yes") == 0
    assert snapshot.exists()


@pytest.mark.parametrize(("state", "stays"), [("PENDING", True), ("COMPLETED", False)])
def test_a_snapshot_stays_while_an_evaluation_of_finished_runs_waits(
    snapshot, call, tmp_path, monkeypatch, state, stays
):
    submit(tmp_path, state="submitted", job_id="7", kind="eval")
    job = cluster.Job(job_id="7_1", state=state, reason="", name="", node="", source="squeue")
    asked = []
    monkeypatch.setattr(cluster, "jobs", lambda ids: asked.extend(ids) or {"7_1": job})
    assert call("--snapshots", "--yes") == 0
    assert sorted(asked) == ["7_0", "7_1"]
    assert snapshot.exists() == stays


@pytest.mark.parametrize(("minutes", "stays"), [(9, True), (11, False)])
def test_a_snapshot_stays_while_the_job_of_an_interrupted_sbatch_may_appear(
    snapshot, call, tmp_path, slurm, minutes, stays
):
    submit(tmp_path, created=time.time() - 60 * minutes)
    assert call("--snapshots", "--yes") == 0
    assert snapshot.exists() == stays


def test_snapshots_stay_where_slurm_does_not_answer(snapshot, call, tmp_path, monkeypatch, capsys):
    submit(tmp_path, state="submitted", job_id="7")

    def silent(ids):
        raise cluster.SlurmError("squeue: timed out")

    monkeypatch.setattr(cluster, "jobs", silent)
    assert call("--snapshots", "--yes") == 0
    assert snapshot.exists()
    assert "left alone (squeue: timed out)" in capsys.readouterr().err
