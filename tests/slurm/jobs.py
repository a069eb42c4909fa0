"""Sweeps of small real runs, as a user starts them, and what became of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import WAIT_S, Cluster

from experiments.disk.output_dir import all_runs
from experiments.disk.run_dir import RunDir
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
GATE = Path(__file__).parent / "gate"
NANO = [
    *("model=nano", "relora.r=4", "train.steps=100", "train.batch_size=4", "data.seq_len=16"),
    *("relora.reset_frequency=20", "relora.restart_warmup_steps=2", "schedule.warmup_steps=5"),
    *("checkpoint.every_steps=10", "runtime.device=cpu", "eval=none", "tracking=none"),
]
SLURM = ["hydra/launcher=slurm_cpu", "hydra.launcher.cpus_per_task=1"]
HELD = "+hydra.launcher.extra.hold=true"


def user(**env: str) -> dict[str, str]:
    """A user's environment on a cluster with one core for everything."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **env}


@dataclass(kw_only=True)
class Sweep:
    """One command over one output_dir. Its runs wait at a gate until `open()`."""

    cluster: Cluster
    out: Path
    words: list[str]
    root: Path = ROOT
    gate: Path = field(init=False)

    def __post_init__(self) -> None:
        self.gate = self.out.with_suffix(".open")

    @property
    def command(self) -> list[str]:
        return [
            sys.executable,
            "run.py",
            "-m",
            *NANO,
            *SLURM,
            *self.words,
            f"output_dir={self.out}",
        ]

    @property
    def env(self) -> dict[str, str]:
        return user(PYTHONPATH=str(GATE), RELORA_GATE=str(self.gate))

    def open(self) -> None:
        self.gate.touch()

    def try_launch(self) -> subprocess.CompletedProcess[str]:
        return self._sh(self.command)

    def launch(self) -> str:
        """What the command prints; it must succeed."""
        return self._ok(self.try_launch())

    def tool(self, *words: str) -> str:
        """`python -m sweeps ...`; it must succeed."""
        command = [sys.executable, "-m", "sweeps", *words, "--output-dir", str(self.out)]
        return self._ok(self._sh(command))

    def _sh(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        if self.root == ROOT:
            return warm.start(command[1:], cwd=ROOT, env=self.env).wait(timeout_s=WAIT_S)
        return subprocess.run(  # a copy's own modules
            command, cwd=self.root, env=self.env, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=WAIT_S,
        )  # fmt: skip

    def _ok(self, done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # what became of it --------------------------------------------------------------------------
    @property
    def runs(self) -> dict[int, RunDir]:
        """seed -> run."""
        return {run.config().seed: run for run in all_runs(self.out)}

    @property
    def name(self) -> str:
        (plan,) = (self.out / "sweeps").glob("*/plan.json")
        return plan.parent.name

    def job(self, seed: int) -> str:
        job_id = self.runs[seed].status().job_id
        assert job_id is not None
        return job_id

    def submissions(self) -> list[dict[str, Any]]:
        files = sorted((self.out / "sweeps").glob("*/jobs/*/submission.json"))
        return [json.loads(path.read_text()) for path in files]

    def jobs(self) -> dict[str, str]:
        """Job or array task -> state, of every job that this sweep ever had."""
        names = {one["name"] for one in self.submissions()}
        rows = self.cluster.sh("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%j").stdout
        cells = [row.split("|", 2) for row in rows.splitlines()]
        return {job: state for job, state, name in cells if name in names}

    def said(self) -> dict[int, dict[str, Any]]:
        """seed -> the run as `sweeps status --json` tells it."""
        return {run["seed"]: run for run in json.loads(self.tool("status", "--json"))["runs"]}

    def wait_at_gate(self, seeds: Iterable[int] | None = None, *, attempt: int = 1) -> None:
        """Until these runs (all) wait at the gate in this attempt."""
        runs = [self.runs[seed] for seed in seeds or self.runs]
        self.cluster.wait_until(
            lambda: all(self._waits(run, attempt=attempt) for run in runs),
            lambda: f"runs at the gate\n{self.told()}",
        )  # fmt: skip

    def _waits(self, run: RunDir, *, attempt: int) -> bool:
        records = run.attempt_records()
        return len(records) >= attempt and Path(f"{self.gate}.{records[-1]['pid']}").exists()

    def pass_an_hour(self, seed: int) -> None:
        """On the clock of the run that waits at the gate: the time of its job is up."""
        Path(f"{self.gate}.{self.runs[seed].attempt_records()[-1]['pid']}.late").touch()

    def wait_done(self, seeds: Iterable[int] | None = None) -> None:
        runs = [self.runs[seed] for seed in seeds or self.runs]
        self.cluster.wait_until(
            lambda: all(run.ended() for run in runs), lambda: f"runs finished\n{self.told()}"
        )

    def told(self) -> str:
        """For messages: how every run stands, and its newest log."""
        text = f"{self.jobs()}\n"
        for seed, run in sorted(self.runs.items()):
            logs = sorted(run.attempts.glob("*.log"))
            tail = logs[-1].read_text(errors="replace")[-800:] if logs else ""
            text += f"seed {seed}: {run.status()}\n{tail}\n"
        for out in sorted((self.out / "sweeps").glob("*/jobs/*/*.out")):
            text += f"{out.name}: {out.read_text(errors='replace')[-400:]}\n"
        return text


def numbers(run: RunDir) -> dict[str, float]:
    """The final metrics, less the timings."""
    metrics = (run.result() or {"metrics": {}})["metrics"]
    return {key: value for key, value in metrics.items() if not key.startswith("perf/")}


def weights(run: RunDir) -> bytes:
    """Those of the newest checkpoint."""
    newest = max(run.checkpoints.glob("step-*"))
    return (newest / "model.safetensors").read_bytes()
