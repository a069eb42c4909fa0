"""Jobs whose Python is a container's, which has none of SLURM's tools: an `apptainer` that is a
stand-in runs what it is given on a PATH without them."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import pytest
from submitting import arrays

from experiments.disk.output_dir import all_runs
from sweeps.slurm.sbatch import FOR_SCRIPT
from tests import warm
from tests.recipes import NANO

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def apptainer(tmp_path, monkeypatch):
    """Puts an `apptainer` on PATH for which `python` in an image is this one; the option."""

    def install(python: str | Path) -> str:
        image, tool = tmp_path / "image.sif", tmp_path / "bin" / "apptainer"
        image.touch()
        tool.parent.mkdir()
        inside = tmp_path / "inside"
        inside.mkdir()
        (inside / "python3").symlink_to(os.path.realpath(sys.executable))
        tool.write_text(
            "#!/bin/sh\n"
            f'[ "$1 $2 $3 $4" = "exec --nv {image} python" ] || exit 99\n'
            f'shift 4; PATH={inside} exec {shlex.quote(str(python))} "$@"\n'
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
        return f"apptainer exec --nv {image} python"

    return install


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("state", ["RUNNING", "CANCELLED"])
def test_the_script_requeues_a_job_that_cannot_unless_it_was_cancelled(
    submit, slurm, python, apptainer, runs, state
):
    path, words = python
    cancel = 'scancel -Q "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"'
    setup = [cancel] if state == "CANCELLED" else []
    submit(range(runs), python=apptainer(path), setup=setup)
    (base,) = arrays(slurm)
    slurm.run(base, CODE=str(FOR_SCRIPT))
    assert [w[2:4] + w[4:6] * ("--after" in w) for w in words()] == [
        ["-m", "sweeps.job"],
        ["-m", "sweeps.job", "--after", str(FOR_SCRIPT)],
    ] * runs
    requeued = [call[-1] for call in slurm.calls("scontrol") if "requeue" in call]
    assert requeued == (sorted(slurm.jobs()) if state == "RUNNING" else [])


@pytest.mark.slow
def test_a_run_in_a_container_is_stopped_requeued_and_goes_on(slurm, apptainer, tmp_path):
    out = tmp_path / "out"
    words = ["run.py", "-m", *NANO, "seed=3", "tracking=none", "eval=none", f"output_dir={out}"]
    words += ["hydra/launcher=slurm_cpu", f"hydra.launcher.python='{apptainer(sys.executable)}'"]
    done = warm.run(words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (base,) = slurm.jobs()
    slurm.run(base, SLURM_JOB_END_TIME=str(int(time.time())))  # its limit is over
    (run,) = all_runs(out)
    assert slurm.jobs()[base]["state"] == "PENDING"
    assert run.status().state == "queued"
    assert 0 < run.newest_step() < 60
    slurm.run(base)
    assert run.result()["state"] == "finished"
    assert [record["job_id"] for record in run.attempt_records()] == [base] * 2
