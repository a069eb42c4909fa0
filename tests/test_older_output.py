"""An output folder of an earlier version (commit 8b9fd4e) stays valid: resumed, shown, reported.

It holds one finished run and one that was killed at step 33, in a sweep tracked in its own
mlflow.db. Their checkpoints but the killed run's newest were removed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tarfile
from pathlib import Path

import pytest

from experiments.disk.output_dir import all_runs
from experiments.disk.run_dir import RunDir
from tests import warm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (
    "model=nano relora.r=4 train.steps=40 train.batch_size=2 data.seq_len=16 "
    "relora.reset_frequency=10 relora.restart_warmup_steps=2 schedule.warmup_steps=4 "
    "checkpoint.every_steps=10 runtime.log_every_steps=1 runtime.device=cpu "
    "eval.paloma.max_documents=20 eval.blimp.max_pairs=20 relora=corrected,as_coded seed=0"
)
FINISHED = "nano-relora-r4-t10-grammar-s0-a43cfc4ad88072e5"
KILLED = "nano-relora-r4-t10-grammar-s0-1c8b952256fafc74"
LOSSES = (5.768680, 5.708299, 5.721190, 5.538562, 5.543318, 5.645657, 5.650249, 5.692374)
"""Of updates 31 to 38, as that version computed them without a kill."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(ROOT / "tests" / "data" / "output_8b9fd4e.tar.xz") as file:
        file.extractall(folder, filter="data")
    lock = folder / "outputs" / "runs" / KILLED / "lock"
    holder = json.loads(lock.read_text()) | {"host": socket.gethostname()}
    lock.write_text(json.dumps(holder))
    return folder / "outputs"


def call(*words: str, out: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = warm.run(words, cwd=out.parent, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sweeps(*words: str, out: Path) -> str:
    return call("-m", "sweeps", *words, "--output-dir", str(out), out=out)


def losses(run: RunDir) -> dict[int, float]:
    train = [event for event in run.events() if event["kind"] == "train"]
    return {event["step"]: event["metrics"]["train/loss"] for event in train}


def test_its_runs_are_shown_resumed_reported_and_synced(out: Path) -> None:
    before = {path: path.read_bytes() for path in out.glob(f"runs/{FINISHED}/*.json*")}
    shown = json.loads(sweeps("status", "--json", out=out))["runs"]
    states = {run["run_id"]: (run["state"], run["step"]) for run in shown}
    assert states == {FINISHED: ("finished", 40), KILLED: ("failed", 20)}

    text = call(str(ROOT / "run.py"), "-m", *COMMAND.split(), f"output_dir={out}", out=out)
    assert "finished relora=as_coded" in text
    assert sorted(run.run_id for run in all_runs(out)) == sorted([FINISHED, KILLED])
    run = RunDir(out / "runs" / KILLED)
    assert run.ended() == "finished"
    assert [record["start_step"] for record in run.attempt_records()] == [0, 30]
    resumed = losses(run)
    assert [resumed[step] for step in range(31, 39)] == pytest.approx(LOSSES, abs=1e-4)
    kept = [path for path in before if path.name not in ("mlflow.json", "status.json")]
    assert {path: path.read_bytes() for path in kept} == {path: before[path] for path in kept}

    assert "2 runs" in sweeps("sync", out=out)
    page = Path(sweeps("report", "relora", out=out).split()[-1])
    assert "as_coded" in (out.parent / page).read_text()
    assert "nothing to run" in call(
        str(ROOT / "run.py"), "-m", *COMMAND.split(), f"output_dir={out}", out=out
    )
    shutil.rmtree(out.parent)
