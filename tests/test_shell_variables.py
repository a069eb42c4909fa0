"""What a user's shell, or another launcher, happens to say does not decide what a run computes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
NANO = [
    *("model=nano", "schedule.warmup_steps=2", "relora.reset_frequency=10"),
    *("relora.restart_warmup_steps=2", "train.steps=20", "train.batch_size=8"),
    *("checkpoint.every_steps=10", "runtime.log_every_steps=1", "tracking=none", "eval=none"),
]
LOSS, GRAD_NORM = 5.5619, 0.34508
"""Of seed 0: mean loss of the last ten updates (of the last one 5.542), and the first norm."""
SEED_0 = "nano-relora-r16-t10-grammar-s0-37d205cbf448530f"
ONE = os.environ | {"OMP_NUM_THREADS": "1"}


def run(out: Path, *words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = ("run.py", *NANO, *words, f"output_dir={out}")
    done = warm.run(words, cwd=ROOT, env=ONE | env, figures=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def losses(out: Path) -> dict[str, float]:
    """run_id -> last loss, of the runs that ended."""
    found = (json.loads(file.read_text()) for file in sorted(out.glob("runs/*/result.json")))
    return {result["run_id"]: result["metrics"]["train/loss"] for result in found}


def first_norm(run_dir: Path) -> float:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    norms = [json.loads(line)["metrics"].get("train/grad_norm") for line in lines]
    return next(norm for norm in norms if norm is not None)


@pytest.mark.slow
def test_a_run_is_what_its_config_says_whatever_else_the_shell_does(tmp_path):
    stray = {
        "RANK": "8",
        "MASTER_PORT": "29500",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_TORCH_DEVICE": "meta",
        "ACCELERATE_DEBUG_MODE": "true",
        "FSDP_VERSION": "2",
    }
    done = run(tmp_path, env=stray)
    assert done.returncode == 0, done.stderr
    (aside,) = [line for line in done.stderr.splitlines() if "set aside" in line]
    assert all(name in aside for name in stray)
    assert losses(tmp_path) == {SEED_0: pytest.approx(LOSS, abs=5e-4)}
    assert first_norm(tmp_path / "runs" / SEED_0) == pytest.approx(GRAD_NORM, abs=5e-6)


@pytest.mark.slow
def test_a_sweep_in_a_shell_with_a_rank_of_its_own_finishes_every_run(tmp_path):
    done = run(tmp_path, "-m", "seed=0,1", env={"RANK": "8", "ACCELERATE_DEBUG_MODE": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("set aside") == 1  # not by each worker
    assert len(losses(tmp_path)) == 2
    assert losses(tmp_path)[SEED_0] == pytest.approx(LOSS, abs=5e-4)
    assert not any("set aside" in log.read_text() for log in tmp_path.glob("runs/*/logs/*"))


SHARDED = {"ACCELERATE_USE_DEEPSPEED": "true"}
TASK = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "env", "line"),
    [
        (["-m", "seed=0,1"], warm.places(2)[0], "a sweep (-m) must be started as one process"),
        (["-m", "seed=0,1"], warm.places(2)[1], "got rank 1 of 2 processes at 127.0.0.1:"),
        (["-m", "seed=0,1"], {"RANK": "0", "WORLD_SIZE": "2"}, "got RANK=0 WORLD_SIZE=2 without"),
        ([], TASK, "got OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 alone"),
        ([], SHARDED, "distributed type must be DDP or a single process, got ACCELERATE_USE_DEEP"),
        ([], {"ACCELERATE_MIXED_PRECISION": "bf16"}, "nearest valid: train.precision=bf16"),
        (["-m", "seed=0,1"], {"ACCELERATE_MIXED_PRECISION": "bf16"}, "train.precision must be"),
    ],
)
def test_what_is_in_doubt_is_refused_in_a_line_and_leaves_nothing(tmp_path, words, env, line):
    done = run(tmp_path / "out", *words, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    (said,) = done.stderr.splitlines()
    assert line in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_runs_at_one_address_are_refused_and_nothing_of_either_is_lost(tmp_path):
    started = [
        warm.start(["run.py", *NANO, f"train.lr={lr}", f"output_dir={tmp_path}"], cwd=ROOT, env=env)
        for lr, env in zip(("0.003", "0.01"), warm.places(2), strict=True)
    ]
    both = [one.wait() for one in started]
    for done in both:
        assert done.returncode == 2, done
        assert "error: all processes of a run must have the same run, got " in done.stderr
        assert "Traceback" not in done.stderr
    assert losses(tmp_path) == {}
    assert run(tmp_path, env={}).returncode == 0
    assert losses(tmp_path) == {SEED_0: pytest.approx(LOSS, abs=5e-4)}
