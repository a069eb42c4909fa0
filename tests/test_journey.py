"""From a command to a tracked, evaluated run, as a user goes: processes of their own, real data."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.tracking.store import connect
from tests import warm
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[1]
NANO = [
    *("model=nano", "relora.r=4", "train.steps=60", "train.batch_size=4", "data.seq_len=16"),
    *("relora.reset_frequency=15", "schedule.warmup_steps=5", "checkpoint.every_steps=10"),
    *("relora.restart_warmup_steps=2", "relora.dropout=0.1", "runtime.log_every_steps=1"),
    *("eval.blimp.max_pairs=2", "eval.paloma.max_documents=1", "eval.blimp.every_steps=30"),
    *("runtime.threads=1", "runtime.device=cpu"),
]


def command(out: Path, *overrides: str) -> list[str]:
    return ["run.py", *overrides, f"output_dir={out}"]


def run(out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return warm.run(command(out, *overrides), cwd=ROOT)


def only_run(out: Path) -> Path:
    (folder,) = (out / "runs").iterdir()
    return folder


def numbers(out: Path) -> dict[str, float]:
    """Final metrics, less the timings."""
    metrics = json.loads((only_run(out) / "result.json").read_text())["metrics"]
    return {k: v for k, v in metrics.items() if not k.startswith("perf/")}


@pytest.mark.slow
def test_a_run_that_was_killed_twice_ends_as_an_undisturbed_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed twice"
    assert run(whole, *NANO, "tracking=none").returncode == 0
    for step in (12, 25):  # long before the end: a kill takes a moment
        started = warm.start(command(killed, *NANO, "tracking=none"), cwd=ROOT)
        wait_for(lambda step=step: has_done(killed, step))
        started.process.kill()
        assert started.wait().returncode == -signal.SIGKILL
    done = run(killed, *NANO, "tracking=none")
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    assert numbers(killed) == numbers(whole)
    attempts = [json.loads(p.read_text()) for p in sorted(only_run(killed).glob("attempts/*.json"))]
    assert len(attempts) == 3
    again = run(whole, *NANO, "tracking=none")
    assert "nothing to do" in again.stdout


def has_done(out: Path, step: int) -> bool:
    files = out.glob("runs/*/events.jsonl")
    return any(f'"step": {step},' in events.read_text() for events in files)


@pytest.mark.slow
def test_torchrun_shares_one_run_between_processes(tmp_path):
    """One record, and the losses of one process up to rounding, dropout included."""
    settings = [*NANO, "tracking=none", "eval=none"]
    assert run(tmp_path / "one", *settings).returncode == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    free = ["--master-addr", "127.0.0.1", "--master-port", "0", "--rdzv-backend", "c10d"]
    both = [*launcher, *free, *command(tmp_path / "two", *settings)]
    done = subprocess.run(both, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-3)
    assert two["restart/rank_spread"] == 0.0
    record = (only_run(tmp_path / "two") / "events.jsonl").read_text()
    kinds = [json.loads(line)["kind"] for line in record.splitlines()]
    assert kinds.count("start") == 1
    assert json.loads(record.splitlines()[0])["data"]["world"] == 2


@pytest.mark.slow
def test_real_text_tokenizer_and_evals_to_mlflow(shared_data, tmp_path, migrated):
    """Real rows of Dolma-like text, the real tokenizer, Paloma's layout and BLiMP, in small."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(migrated, out / "mlflow.db")
    done = run(
        out,
        *("experiment=laptop", "model=nano", "relora.r=4", "data=pretokenized", "data.seq_len=64"),
        f"data.path={shared_data}/pretokenized/dolma-mini",
        f"data.tokenizer={shared_data}/tokenizer",
        f"eval.paloma.path={shared_data}/paloma_standin",
        f"eval.blimp.path={shared_data}/blimp/blimp_data.tar.xz",
        *("eval.paloma.max_documents=1", "eval.blimp.max_pairs=2", "sweep.name=real"),
        *("train.steps=12", "relora.reset_frequency=3", "relora.restart_warmup_steps=1"),
        *("schedule.warmup_steps=2", "runtime.threads=1", "runtime.log_every_steps=1"),
    )
    assert done.returncode == 0, done.stderr
    found = numbers(out)
    assert found["restart/count"] == 3
    assert found["train/loss"] < 10.98  # ln 50304 + 1/6 = 10.99 at the start; mean of ten
    assert {"eval/blimp/no_bos/accuracy", "eval/blimp/eos_prefix/accuracy"} <= set(found)
    phenomena = {k for k in found if k.startswith("eval/blimp/no_bos/")} - {
        "eval/blimp/no_bos/accuracy"
    }
    assert len(phenomena) == 12
    sources = [k for k in found if k.endswith("/perplexity") and k.count("/") == 3]
    assert len(sources) == 14
    config = json.loads((only_run(out) / "config.json").read_text())
    assert config["model"]["vocab_size"] == 50304
    assert tracked(out / "mlflow.db", "real") == pytest.approx(found)


def tracked(database: Path, experiment: str) -> dict[str, float]:
    """Final metrics of the only run that MLflow has, less the timings."""
    client = connect(f"sqlite:///{database}")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    assert run.info.status == "FINISHED"
    metrics = dict(run.data.metrics)
    assert metrics.pop("train/gpu_hours") > 0  # MLflow's own, for its axes
    return {k: v for k, v in metrics.items() if not k.startswith("perf/")}
