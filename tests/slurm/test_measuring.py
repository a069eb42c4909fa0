"""`run.py --plan --measure` on SLURM: one short job, waited for, and cancelled by Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from cluster import Cluster
from jobs import HELD, NANO, ROOT, SLURM, user


def words(out: Path, *more: str) -> list[str]:
    """The command."""
    given = [*NANO, *SLURM, *more, f"output_dir={out}"]
    return [sys.executable, "run.py", "--plan", "--measure", *given]


def test_one_job_times_the_shapes_of_runs_with_two_processes(bare: Cluster, tmp_path: Path):
    out = tmp_path / "out"
    command = words(out, "method=full_rank,relora", "resources.tasks_per_node=2")
    done = subprocess.run(
        command, cwd=ROOT, env=user(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("submitted job ")]) == 1, lines
    assert len([line for line in lines if line.startswith("timed method=")]) == 2, lines
    assert re.search(r"CPU-hours by \d+ timed steps of nano on cpu", done.stdout)
    rates = [json.loads(file.read_text()) for file in (out / ".measure" / "rates").iterdir()]
    assert len(rates) == 2
    assert not (out / "runs").exists()
    assert [path.name for path in (out / ".measure").iterdir()] == ["rates"]


def test_ctrl_c_leaves_no_job(bare: Cluster, tmp_path: Path):
    def queued() -> str:
        return bare.sh("squeue", "-h", "-o", "%i %T").stdout

    with subprocess.Popen(
        words(tmp_path / "out", HELD), cwd=ROOT, env=user(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as command:  # fmt: skip
        bare.wait_until(lambda: "PENDING" in queued() or command.poll() is not None, "a job")
        os.killpg(command.pid, signal.SIGINT)  # as a terminal does
        _, printed = command.communicate()
    assert (command.returncode, "Traceback" in printed) == (130, False), printed
    bare.wait_until(lambda: not queued(), queued)
    assert not (tmp_path / "out" / ".measure").exists()
