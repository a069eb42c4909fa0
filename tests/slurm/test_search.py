"""A search on a cluster: whatever becomes of its jobs, every trial is run once and to its end."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

from cluster import Cluster
from jobs import Sweep

from experiments.disk.output_dir import all_runs, study_folder
from experiments.disk.run_dir import RunDir
from sweeps.search.study import Study

TRIALS = 5
SEARCH = [
    *("hydra/sweeper=search", "search=lr_and_rank", f"search.n_trials={TRIALS}"),
    *("search.objectives=[train/loss min last]", "search.pruner.name=none", "sweep.name=s"),
    *("hydra.launcher.max_parallel=2",),
]


def test_a_search_with_disturbed_jobs_has_exactly_its_trials(bare: Cluster, tmp_path: Path) -> None:
    """USR2, kill -9, scontrol requeue, and a cancelled job whose trial another command takes up.

    Where sacct fails, which is the harder case; it answers in `test_life.py`.
    """
    cluster = bare
    sweep = Sweep(cluster=cluster, out=tmp_path / "a b", words=SEARCH)
    gone_on: dict[str, str] = {}  # run -> its first job

    def waiting() -> list[RunDir]:
        """Runs at the gate in their first attempt, not disturbed yet."""
        runs = [run for run in all_runs(sweep.out) if run.run_id not in gone_on]
        return [r for r in runs if len(r.attempt_records()) == 1 and sweep._waits(r, attempt=1)]

    def next_run() -> tuple[RunDir, str]:
        cluster.wait_until(lambda: bool(waiting()), lambda: f"a run at the gate\n{told()}")
        run = waiting()[0]
        job_id = run.status().job_id
        assert job_id is not None
        gone_on[run.run_id] = job_id
        return run, job_id

    def told() -> str:
        logs = [p.read_text(errors="replace")[-600:] for p in sweep.out.rglob("*.log")]
        return f"{sweep.jobs()}\n" + "\n".join(logs)

    assert f"array of {TRIALS}" in sweep.launch()
    _, job_id = next_run()
    (pid,) = cluster.tasks_of(job_id)
    os.kill(pid, signal.SIGUSR2)  # scancel --signal would wait for tasks that the cap holds back
    _, job_id = next_run()
    (pid,) = cluster.tasks_of(job_id)
    os.kill(pid, signal.SIGKILL)
    _, job_id = next_run()
    cluster.sh("scontrol", "requeue", job_id, check=True)
    cancelled, job_id = next_run()
    cluster.sh("scancel", job_id, check=True)
    cluster.wait_until(lambda: cluster.state(job_id) == "CANCELLED", lambda: f"cancelled\n{told()}")
    assert "submitted job" in sweep.launch()  # one more job, for the trial that was left
    sweep.open()
    study = Study.open(study_folder(sweep.out, name="s"))
    cluster.wait_until(study.done, lambda: f"{study.counts()}\n{told()}")

    assert study.counts() == {"COMPLETE": TRIALS}
    runs = all_runs(sweep.out)
    told_ids = [id_ for frozen in study.trials() for id_ in frozen.user_attrs["run_ids"]]
    assert Counter(told_ids) == Counter(run.run_id for run in runs)
    for run in runs:
        records, disturbed = run.attempt_records(), run.run_id in gone_on
        assert run.ended() == "finished"
        assert len(records) == 1 + disturbed
        assert all(record["start_step"] >= 10 for record in records[1:])
        if run.run_id != cancelled.run_id:
            assert len({record["job_id"] for record in records}) == 1
    assert f"has its {TRIALS} trials" in sweep.launch()
