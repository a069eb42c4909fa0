"""Evaluations as jobs of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitting import CPU, HUGE, arrays, job_ids

from experiments.disk.output_dir import all_runs, plan_folder
from relora_core.config import (
    ConfigError,
    ResourcesConfig,
    TrackingConfig,
)
from sweeps.launchers import load_launcher, store_launcher
from sweeps.slurm import cluster, evals
from sweeps.slurm.launcher import SlurmLauncher
from sweeps.slurm.options import SlurmOptions
from sweeps.slurm.submission import read_submissions


def submit_evals(requests: Sequence[Path], *, sweep: str, output_dir: Path, after: bool) -> None:
    launcher = load_launcher(plan_folder(output_dir, name=sweep))
    evals.submit_evals(requests, sweep=sweep, launcher=launcher, output_dir=output_dir, after=after)


@pytest.fixture
def requests(submit, slurm, out):
    """Of evaluations of a sweep of three runs, one of them finished."""
    submit([0, 1, (2, HUGE)])
    for run in all_runs(out):
        if run.config().seed == 0:
            run.write_result({"state": "finished", "step": 4, "metrics": {}})
    return ask(out)


def ask(out):
    """A request to evaluate each run below `out`."""
    paths = [run.evals / "again" / "request.json" for run in all_runs(out)]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    return paths


def evaluations(out):
    """Submissions of evaluations, oldest first."""
    return [s for s in read_submissions(plan_folder(out, name="s") / "jobs") if s.kind == "eval"]


def test_evaluations_are_an_array_on_one_process_each(requests, slurm, out):
    before = job_ids(out)
    submit_evals(requests, sweep="s", output_dir=out, after=False)
    (one,) = evaluations(out)
    asked = slurm.options(str(one.job_id))
    assert arrays(slurm)[str(one.job_id)] == 3
    assert [out / name for (name,) in one.tasks] == requests
    assert (asked["nodes"], asked["ntasks-per-node"]) == ("1", "1")
    assert "dependency" not in asked
    assert job_ids(out) == before


def test_each_evaluation_gets_the_most_that_any_of_their_runs_asked_for(submit, slurm, out):
    sizes = [
        ResourcesConfig(time="2:00:00", cpus_per_task=1),  # the longest is the smallest
        ResourcesConfig(time="0:30:00", cpus_per_task=6, mem_gb=24, gpus_per_node=2),
        ResourcesConfig(time="0:40:00", mem_gb=8),
    ]
    submit(list(enumerate(sizes)), partition="gpu")
    submit_evals(ask(out), sweep="s", output_dir=out, after=False)
    (one,) = evaluations(out)
    asked = slurm.options(str(one.job_id))
    assert {key: asked[key] for key in ("time", "cpus-per-task", "mem", "gpus-per-node")} == {
        "time": "120",
        "cpus-per-task": "6",
        "mem": "24576M",
        "gpus-per-node": "1",
    }


def test_evaluations_wait_for_the_runs_that_are_in_flight(requests, slurm, out):
    before = job_ids(out)
    submit_evals(requests, sweep="s", output_dir=out, after=True)
    (one,) = evaluations(out)
    kind, *waits = slurm.options(str(one.job_id))["dependency"].split(":")
    assert kind == "afterany"
    assert sorted(waits) == sorted([str(before[1]), str(before[2])])


@pytest.mark.parametrize("after", [True, False])
def test_the_same_evaluations_are_queued_once(requests, slurm, out, capsys, after):
    submit_evals(requests, sweep="s", output_dir=out, after=after)
    submit_evals(requests, sweep="s", output_dir=out, after=after)
    (one,) = evaluations(out)
    assert "3 of 3 evaluations are queued already" in capsys.readouterr().out
    slurm.set_state(f"{one.job_id}_1", "FAILED")  # it may be asked for again
    submit_evals(requests, sweep="s", output_dir=out, after=after)
    assert evaluations(out)[-1].tasks == [one.tasks[1]]


def test_evaluations_that_would_come_too_early_do_not_count(requests, slurm, out):
    submit_evals(requests, sweep="s", output_dir=out, after=False)
    submit_evals(requests, sweep="s", output_dir=out, after=True)
    later = evaluations(out)[-1]
    assert len(later.tasks) == 2  # of the runs in flight: the first may begin before they end
    slurm.set_state(str(later.job_id), "RUNNING")
    submit_evals(requests, sweep="s", output_dir=out, after=True)
    assert len(evaluations(out)[-1].tasks) == 2


def test_the_cap_holds_for_evaluations_and_trainings_apart(requests, slurm, out):
    launcher = SlurmLauncher(options=SlurmOptions(**CPU, max_parallel=1))
    store_launcher(launcher, plan_folder(out, name="s"))
    submit_evals(requests[:1], sweep="s", output_dir=out, after=False)
    submit_evals(requests[1:], sweep="s", output_dir=out, after=False)
    first, second = evaluations(out)
    assert [one.waits_for for one in (first, second)] == [[], [first.job_id]]


def test_a_refused_evaluation_is_written_down_as_refused(requests, slurm, out):
    slurm.fail("sbatch", "Batch job submission failed: Invalid qos specification")
    with pytest.raises(cluster.SlurmError, match="Invalid qos"):
        submit_evals(requests, sweep="s", output_dir=out, after=False)
    (one,) = evaluations(out)
    assert (one.state, one.job_id) == ("refused", None)
    assert "Invalid qos" in (one.error or "")


def test_of_more_than_the_site_queues_as_many_as_may_be_are_submitted(requests, slurm, out, capsys):
    slurm.config(max_submit=len(slurm.jobs()) + 2)
    with pytest.raises(cluster.SlurmError, match="QOSMaxSubmitJobPerUserLimit"):
        submit_evals(requests, sweep="s", output_dir=out, after=False)
    taken = [one for one in evaluations(out) if one.state == "submitted"]
    assert sum(len(one.tasks) for one in taken) == 2
    slurm.config(max_submit=len(slurm.jobs()) + 1)
    submit_evals(requests, sweep="s", output_dir=out, after=False)
    assert "2 of 3 evaluations are queued already" in capsys.readouterr().out


def test_evaluations_of_a_local_sweep_are_refused(requests, out):
    Path(plan_folder(out, name="s") / "launcher.json").unlink()
    with pytest.raises(ConfigError, match=r"--slurm must be left out for s"):
        submit_evals(requests, sweep="s", output_dir=out, after=False)


def test_mlflows_part_begins_when_the_jobs_are_submitted_and_nobody_waits_for_it(
    submit, slurm, out, monkeypatch
):
    asked = []

    def start(words, **options):
        asked.append((words[3:], len(slurm.jobs()), options["start_new_session"]))

    def waits(*words, **options):
        raise AssertionError("submitting waits for a store")

    stand_in = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr("sweeps.slurm.launcher.subprocess", stand_in)
    monkeypatch.setattr("experiments.tracking.tracker.Tracker.bring_up_to_date", waits)
    done, text = submit([0, 1], changes={"tracking": TrackingConfig(enabled=True)})
    assert done == 0
    words = ["sweeps", "sync", "s", "--output-dir", out.absolute()]
    assert asked == [(words, 2, True)]
    assert f"(log: {out.absolute()}/logs/mlflow-sync.log)" in text
    submit([2], changes={"tracking": TrackingConfig(enabled=False)})
    assert len(asked) == 1
