"""Whatever happens to a job: its run ends with the same numbers, or it is told why not."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cluster import WAIT_S, Cluster
from jobs import HELD, NANO, ROOT, Sweep, numbers, user, weights

from experiments.disk.output_dir import all_runs
from experiments.disk.run_dir import RunDir
from tests import warm

SEEDS = 8


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, RunDir]:
    """seed -> the same runs without SLURM and without trouble."""
    out = tmp_path_factory.mktemp("undisturbed")
    words = [f"seed=range({SEEDS})", "hydra/launcher=local", f"output_dir={out}"]
    command = ["run.py", "-m", *NANO, *words]
    done = warm.start(command, cwd=ROOT, env=user(), figures=False).wait(timeout_s=4 * WAIT_S)
    assert done.returncode == 0, done.stderr
    return {run.config().seed: run for run in all_runs(out)}


Same = Callable[[RunDir], None]


@pytest.fixture
def same(undisturbed: dict[int, RunDir]) -> Same:
    """Asserts that a run ended as the undisturbed one of its seed: to the last bit."""

    def check(run: RunDir) -> None:
        alone = undisturbed[run.config().seed]
        assert run.ended() == "finished"
        assert numbers(run) == numbers(alone)
        assert weights(run) == weights(alone)

    return check


def interrupt(cluster: Cluster, job_id: str) -> None:
    cluster.sh("scancel", "--signal=USR2", job_id, check=True)


def requeue(cluster: Cluster, job_id: str) -> None:
    cluster.sh("scontrol", "requeue", job_id, check=True)


def kill(cluster: Cluster, job_id: str) -> None:
    (pid,) = cluster.tasks_of(job_id)
    os.kill(pid, signal.SIGKILL)


def hold(cluster: Cluster, job_id: str) -> None:
    cluster.sh("scontrol", "requeuehold", job_id, check=True)


def cancel(cluster: Cluster, job_id: str) -> None:
    cluster.sh("scancel", job_id, check=True)


def time_out(cluster: Cluster, job_id: str) -> None:
    cluster.sh("scontrol", "update", f"jobid={job_id}", "endtime=now", check=True)


def more_time(cluster: Cluster, job_id: str) -> None:
    """The limit that `time_out` has set outlives a requeue."""
    cluster.wait_until(lambda: cluster.state(job_id) == "PENDING", f"{job_id} requeued")
    cluster.sh("scontrol", "update", f"jobid={job_id}", "timelimit=60", check=True)


def test_disturbed_runs_end_as_undisturbed_ones(
    accounted: Cluster, tmp_path: Path, same: Same
) -> None:
    """Each run meets another fate, in two arrays. Where sacct fails: `test_search.py`."""
    cluster = accounted
    fates = [interrupt, requeue, kill, hold, cancel, None, time_out, interrupt]
    later = [0, 1, 2, 6, 7]
    words = [f"seed=range({len(fates)})"]
    sweep = Sweep(cluster=cluster, out=tmp_path / "a b", words=words)
    sweep.launch()
    assert sorted(len(one["tasks"]) for one in sweep.submissions()) == [2, 6]
    sweep.wait_at_gate()
    first = {seed: sweep.job(seed) for seed in range(len(fates))}
    for seed, fate in sorted(enumerate(fates), key=lambda pair: pair[1] is not time_out):
        if fate:
            fate(cluster, first[seed])
    assert "cancelled" in sweep.tool("cancel", sweep.runs[5].run_id, "--yes")
    cluster.wait_until(
        lambda: {cluster.state(first[seed]) for seed in (4, 5)} == {"CANCELLED"},
        lambda: f"4 and 5 cancelled\n{sweep.told()}",
    )  # fmt: skip
    more_time(cluster, first[6])
    sweep.wait_at_gate(later, attempt=2)
    said = sweep.said()
    assert [said[seed]["state"] for seed in (4, 5)] == ["cancelled"] * 2
    assert {said[seed]["state"] for seed in later} == {"running"}
    assert said[3]["state"] == "queued"
    assert f"scontrol release {first[3]}" in said[3]["reason"]

    cluster.sh("scontrol", "release", first[3], check=True)
    assert f"{len(fates) - 2} runs are done or in flight: 2 to submit" in sweep.launch()
    sweep.open()
    sweep.wait_done()
    for seed, run in sweep.runs.items():
        assert len(run.attempt_records()) == 2
        assert run.attempt_records()[1]["start_step"] >= 10
        assert (sweep.job(seed) != first[seed]) == (seed in (4, 5))
        same(run)
    jobs = sweep.jobs()
    assert "nothing to submit" in sweep.launch()
    assert sweep.jobs().keys() == jobs.keys()
    assert {one["state"] for one in sweep.said().values()} == {"finished"}


def test_preempted_twice_and_a_node_lost(accounted: Cluster, tmp_path: Path, same: Same) -> None:
    """SIGTERM only, then USR2 as some sites have it, then no word at all."""
    cluster = accounted
    sweep = Sweep(cluster=cluster, out=tmp_path / "out", words=["seed=0,1"])
    sweep.launch()

    def node() -> str:
        asked = ["squeue", "-h", "-o", "%N", "-j", ",".join(map(sweep.job, (0, 1)))]
        (one,) = set(cluster.sh(*asked).stdout.split())
        return one

    for attempt, with_signal in ((1, False), (2, True)):
        sweep.wait_at_gate(attempt=attempt)
        cluster.send_user_signal(with_signal)
        urgent = cluster.preempt(node())
        sweep.wait_at_gate(attempt=attempt + 1)
        for run in sweep.runs.values():  # saved in the grace: not one step was done twice
            assert run.attempt_records()[attempt]["start_step"] == 25 * attempt
        cluster.sh("scancel", urgent)
    cluster.wait_until(lambda: cluster.state(urgent) == "CANCELLED", "the urgent job is gone")
    lost = node()
    for run in sweep.runs.values():
        cluster.wait_until(
            lambda run=run: run.newest_step() == 70, "the checkpoint before the gate"
        )
    cluster.crash(lost)
    cluster.down(lost)
    sweep.open()
    sweep.wait_done()
    for run in sweep.runs.values():
        assert len(run.attempt_records()) == 4
        assert run.attempt_records()[-1]["start_step"] == 70  # of a checkpoint that it had anyway
        same(run)


def test_two_processes_equal_one(
    bare: Cluster, tmp_path: Path, undisturbed: dict[int, RunDir]
) -> None:
    """On one node, and on two where they stop together: their own watch says that time is up."""
    one = Sweep(
        cluster=bare, out=tmp_path / "one", words=["seed=0", "hydra.launcher.tasks_per_node=2"]
    )
    limit = "hydra.launcher.time=59"  # less than the hour that passes: SLURM never says it is up
    two = Sweep(
        cluster=bare, out=tmp_path / "two", words=["seed=0", "hydra.launcher.nodes=2", limit]
    )
    one.open()
    for sweep in (two, one):
        sweep.launch()
    two.wait_at_gate()
    two.pass_an_hour(0)
    two.wait_at_gate(attempt=2)
    two.open()
    for sweep in (one, two):
        sweep.wait_done()
        (run,) = sweep.runs.values()
        assert {record["world"] for record in run.attempt_records()} == {2}
        found = numbers(run)
        assert found.pop("restart/rank_spread") == 0.0
        expected = numbers(undisturbed[0])
        for metrics in (found, expected):  # one rounding error
            assert metrics.pop("restart/logit_change_max") < 1e-5
        assert found == pytest.approx(expected, rel=1e-5)
    assert len(one.runs[0].attempt_records()) == 1
    # Where they stopped, not a checkpoint before.
    assert [record["start_step"] for record in two.runs[0].attempt_records()] == [0, 25]


def test_packed_runs_share_a_job_and_one_that_is_killed_goes_on(
    bare: Cluster, tmp_path: Path, same: Same
) -> None:
    words = ["seed=0,1,2", "hydra.launcher.runs_per_job=3", "hydra.launcher.gpus_per_node=2"]
    sweep = Sweep(cluster=bare, out=tmp_path / "out", words=words)
    sweep.launch()
    sweep.wait_at_gate()
    assert len(set(map(sweep.job, (0, 1, 2)))) == 1
    workers = [run.attempt_records()[0]["pid"] for run in sweep.runs.values()]
    devices = [psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] for pid in workers]
    assert sorted(map(devices.count, devices)) == [1, 2, 2]
    psutil.Process(sweep.runs[1].attempt_records()[0]["pid"]).kill()
    sweep.open()
    sweep.wait_done()
    assert [len(sweep.runs[seed].attempt_records()) for seed in (0, 1, 2)] == [1, 2, 1]
    for run in sweep.runs.values():
        same(run)


def test_edits_after_submission_reach_no_job(bare: Cluster, tmp_path: Path, same: Same) -> None:
    copy = tmp_path / "my copy"
    leave = shutil.ignore_patterns(".*", "outputs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=leave)
    sweep = Sweep(cluster=bare, out=tmp_path / "out", words=["seed=0", HELD], root=copy)
    sweep.open()
    sweep.launch()
    for edited in ("relora_core/train.py", "experiments/run/runner.py", "sweeps/job.py"):
        (copy / edited).write_text("raise RuntimeError('edited')\n")
    nano = copy / "conf" / "model" / "nano.yaml"
    nano.write_text(nano.read_text().replace("n_layers: 2", "n_layers: 1"))
    bare.sh("scontrol", "release", sweep.job(0), check=True)
    sweep.wait_done()
    for run in sweep.runs.values():
        same(run)
