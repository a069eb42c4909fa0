"""`run.py -m hydra/launcher=slurm` and `python -m sweeps` as a user meets them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from cluster import Cluster, environment
from jobs import GATE, HELD, NANO, ROOT, Sweep

from experiments.disk.evaluations import evaluations
from experiments.disk.run_dir import RunDir


def spans(run: RunDir) -> tuple[float, float]:
    """From the start of the run's work to its end, seconds since the epoch."""
    times = [event["time"] for event in run.events()]
    return times[0], times[-1]


def most_at_once(runs: list[RunDir]) -> int:
    edges = [(t, sign) for run in runs for t, sign in zip(spans(run), (1, -1), strict=True)]
    now, most = 0, 0
    for _, sign in sorted(edges):
        now += sign
        most = max(most, now)
    return most


def mlflow_runs(out: Path) -> dict[str, tuple[str, float | None]]:
    """Name -> (status, final loss) of each run in the sweep's MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{out}/mlflow.db")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(ids, max_results=100)
    return {
        run.info.run_name or "": (run.info.status, run.data.metrics.get("train/loss"))
        for run in found
        if run.data.tags.get("kind") == "run"  # not the sweep's and its arms' own
    }


def test_a_grid_becomes_finished_runs_in_mlflow(bare: Cluster, tmp_path: Path) -> None:
    words = ["relora.r=2,4,8", "seed=0", "train.steps=30", "tracking=mlflow"]
    cap = "hydra.launcher.max_parallel=2"
    sweep = Sweep(cluster=bare, out=tmp_path / "out", words=[*words, cap])
    printed = sweep.launch()
    (submission,) = sweep.submissions()
    assert f"submitted job {submission['job_id']} (array of 3)" in printed
    log = sweep.out / "logs" / "mlflow-sync.log"  # of the process that shows it
    bare.wait_until(lambda: "points sent" in log.read_text(), sweep.told)
    before = mlflow_runs(sweep.out)
    states = Counter(status for status, _ in before.values())
    assert (states.total(), states.keys() <= {"SCHEDULED", "RUNNING"}) == (3, True)
    assert states["SCHEDULED"] >= 1  # two may have begun before MLflow was told
    sweep.open()
    runs = [sweep.out / "runs" / run_id for (run_id,) in submission["tasks"]]
    bare.wait_until(lambda: all((run / "result.json").exists() for run in runs), sweep.told)
    assert most_at_once([RunDir(run) for run in runs]) <= 2
    sweep.tool("sync")
    after = mlflow_runs(sweep.out)
    assert after.keys() == before.keys()
    assert {status for status, _ in after.values()} == {"FINISHED"}
    losses = [
        json.loads((run / "result.json").read_text())["metrics"]["train/loss"] for run in runs
    ]
    assert sorted(loss or 0.0 for _, loss in after.values()) == pytest.approx(sorted(losses))


def test_queued_runs_are_submitted_once_even_where_the_job_id_was_lost(
    bare: Cluster, tmp_path: Path
) -> None:
    """squeue has them all: accounting is not asked."""
    sweep = Sweep(cluster=bare, out=tmp_path / "out", words=["seed=range(8)", HELD])
    sweep.launch()
    jobs = sweep.jobs()
    assert Counter(jobs.values()) == {"PENDING": 8}
    assert "8 runs are done or in flight: nothing to submit" in sweep.launch()
    said = sweep.said()
    assert {one["state"] for one in said.values()} == {"queued"}
    assert all("held" in one["reason"] for one in said.values())
    for path in (sweep.out / "sweeps").glob("*/jobs/*/submission.json"):
        lost = {**json.loads(path.read_text()), "state": "submitting", "job_id": None}
        path.write_text(json.dumps(lost))
    for run in sweep.runs.values():
        run.update_status(state="planned", job_id=None)
    assert "nothing to submit" in sweep.launch()
    assert sweep.jobs() == jobs
    assert {run.status().job_id for run in sweep.runs.values()} == set(jobs)
    sweep.tool("cancel", sweep.name, "--yes")
    assert set(sweep.jobs().values()) == {"CANCELLED"}
    assert {one["state"] for one in sweep.said().values()} == {"cancelled"}


def running_with(folder: Path) -> list[int]:
    """Processes that look for programs in this folder."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if str(folder) in environment(pid).get("PATH", "")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_command_that_is_stopped_leaves_its_jobs_and_the_next_submits_the_rest(
    bare: Cluster, tmp_path: Path, number: int
) -> None:
    """Three arrays, and the command ends while it submits the first or second of them."""
    slow = tmp_path / "bin" / "sbatch"
    slow.parent.mkdir()
    slow.write_text(f"#!/bin/sh\nsleep 2\nexec '{shutil.which('sbatch')}' \"$@\"\n")
    slow.chmod(0o755)
    sweep = Sweep(cluster=bare, out=tmp_path / "out", words=["seed=range(14)", HELD])
    env = {**sweep.env, "PATH": f"{slow.parent}{os.pathsep}{sweep.env['PATH']}"}
    with subprocess.Popen(
        sweep.command, cwd=sweep.root, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as command:  # fmt: skip
        begun = lambda: sweep.submissions() or command.poll() is not None  # noqa: E731
        bare.wait_until(begun, "the first submission is written")
        if number == signal.SIGINT:  # as a terminal does: to what the command has started, too
            os.killpg(command.pid, number)
        else:
            os.kill(command.pid, number)
        _, printed = command.communicate()
    bare.wait_until(lambda: not running_with(slow.parent), "an sbatch that outlives its command")
    assert command.returncode != 0
    assert "Traceback" not in printed
    before = sweep.jobs()
    assert len(before) < 14
    sweep.launch()
    jobs = sweep.jobs()
    assert before.items() <= jobs.items()
    assert Counter(jobs.values()) == {"PENDING": 14}
    assert {run.status().job_id for run in sweep.runs.values()} == set(jobs)


def test_evaluations_are_jobs_of_their_own(accounted: Cluster, tmp_path: Path) -> None:
    """Of runs that train yet (`--after`), then with other settings of those that have finished."""
    sweep = Sweep(cluster=accounted, out=tmp_path / "out", words=["seed=0,1", "train.steps=30"])
    sweep.launch()
    few = ["eval.blimp.max_pairs=2", "eval.paloma.max_documents=1"]
    sweep.tool("eval", sweep.name, "eval=paloma_blimp", *few, "--slurm", "--after")
    evals = [one for one in sweep.submissions() if one["kind"] == "eval"]
    jobs = sweep.jobs()
    assert [jobs[f"{evals[0]['job_id']}_{task}"] for task in (0, 1)] == ["PENDING"] * 2
    sweep.open()

    def measured(name: str) -> bool:
        found = [evaluations(run).get(30, {}) for run in sweep.runs.values()]
        return all(f"{name}/blimp/no_bos/accuracy" in metrics for metrics in found)

    accounted.wait_until(lambda: measured("eval"), sweep.told)
    again = ["eval.blimp.max_pairs=3", "--as", "again", "--slurm"]
    sweep.tool("eval", sweep.name, *again)
    accounted.wait_until(lambda: measured("again"), sweep.told)
    for run in sweep.runs.values():
        assert "eval/paloma/perplexity" in evaluations(run)[30]
        assert len(run.attempt_records()) == 1  # nobody trained


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("partition=mian", "Did you mean 'main'?"),
        ("gpus_per_node=5", "gpu:4"),
        ("nodes=3", "2 nodes"),
    ],
)
def test_what_slurm_would_refuse_is_refused_first(
    bare: Cluster, tmp_path: Path, asked: str, told: str
) -> None:
    words = ["seed=0,1", f"hydra.launcher.{asked}", "train.batch_size=60"]
    sweep = Sweep(cluster=bare, out=tmp_path / "out", words=words)
    done = sweep.try_launch()
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: hydra.launcher")
    assert told in line
    assert not sweep.out.exists()


AROUND = """#!/bin/bash
export SBATCH_PARTITION=urgent SBATCH_TIMELIMIT=1 SBATCH_JOB_NAME=mine SLURM_CPU_BIND=none
export PYTHONPATH={gate} RELORA_GATE={open} OMP_NUM_THREADS=1 COLUMNS=200
cd {root}
WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=1 {submit} > {log}.submit 2>&1
{local} > {log}.local 2>&1
sleep 600
"""


def test_a_job_around_is_not_ours_and_reaches_none_of_ours(bare: Cluster, tmp_path: Path) -> None:
    """Somebody's array task submits a sweep, then runs a run of its own, which is cancelled."""
    asks = ["hydra.launcher.partition=main", "hydra.launcher.mem_gb=0.5"]
    sweep = Sweep(cluster=bare, out=tmp_path / "out", words=["seed=0", "train.steps=30", *asks])
    local = [sys.executable, "run.py", *NANO, "seed=9", f"output_dir={sweep.out}"]
    script, log = tmp_path / "around.sh", tmp_path / "log"
    script.write_text(
        AROUND.format(
            gate=GATE,
            open=sweep.gate,
            root=ROOT,
            log=log,
            submit=shlex.join(sweep.command),
            local=shlex.join(local),
        )
    )
    # a task of index 1: a job that took its parent's index for its own had no such run
    around = bare.sbatch("--array=1", "--mem-per-cpu=100", "-c2", str(script)) + "_1"
    told = lambda: "\n".join(p.read_text() for p in tmp_path.glob("log.*")) + sweep.told()  # noqa: E731
    bare.wait_until(lambda: 9 in sweep.runs, told)
    sweep.wait_at_gate()
    (one,) = sweep.submissions()
    assert sweep.jobs() == {one["job_id"]: "RUNNING"}
    asked = bare.sh("squeue", "-h", "-j", one["job_id"], "-o", "%P %l %j").stdout.split()
    assert asked == ["main", "4:00:00", one["name"]]
    assert "SBATCH_JOB_NAME, SBATCH_PARTITION, SBATCH_TIMELIMIT" in told()
    assert {seed: run.status().job_id for seed, run in sweep.runs.items()} == {
        0: one["job_id"],
        9: None,
    }
    sweep.tool("cancel", sweep.runs[9].run_id, "--yes")
    assert sweep.said()[9]["state"] == "cancelled"
    sweep.open()
    sweep.wait_done([0])
    assert bare.state(around) == "RUNNING"
    shown = bare.sh("scontrol", "-o", "show", "job", around).stdout
    assert "Restarts=0" in shown
    assert [r["job_id"] for r in sweep.runs[0].attempt_records()] == [one["job_id"]]
