"""The fixture is a real cluster: jobs, GPUs, failures and preemption happen, and nothing stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import slurm_packages
from cluster import Cluster, alive

TRAP = '''
"""Writes the name of each signal it gets, then sleeps on."""
import os, signal, sys, time
def note(number, frame):
    with open(sys.argv[1], "a") as out:
        print(signal.Signals(number).name, file=out)
for name in ("SIGTERM", "SIGUSR2"):
    signal.signal(getattr(signal, name), note)
with open(sys.argv[1], "a") as out:
    print("start", os.environ["SLURMD_NODENAME"], file=out)
time.sleep(600)
'''


@pytest.fixture
def trap(tmp_path: Path) -> tuple[Path, Path]:
    """A batch script whose task writes down what happens to it, and where it writes."""
    task, script, out = tmp_path / "trap.py", tmp_path / "trap.sh", tmp_path / "happened"
    task.write_text(TRAP)
    script.write_text(f"#!/bin/bash\nexec srun '{sys.executable}' '{task}' '{out}'\n")
    return script, out


def words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def test_a_job_completes_and_sacct_knows_it_only_with_accounting(cluster: Cluster) -> None:
    job = cluster.sbatch("--wrap", "true")
    cluster.wait_until(lambda: cluster.state(job) == "COMPLETED", f"{job} completed")
    ask = ["sacct", "-n", "-X", "-P", "-j", job, "-o", "state"]
    if cluster.accounting:
        done = lambda: cluster.sh(*ask).stdout.split() == ["COMPLETED"]  # noqa: E731
        cluster.wait_until(done, "sacct knows")
    else:
        assert cluster.sh(*ask).returncode != 0


def test_this_process_speaks_to_the_cluster_of_the_test(cluster: Cluster) -> None:
    conf = subprocess.check_output(["scontrol", "show", "config"], text=True)
    assert str(cluster.folder) in conf


def test_preemption_sends_sigterm_alone(bare: Cluster, trap: tuple[Path, Path]) -> None:
    """The requeue, by the job or by SLURM: `test_life.py`."""
    script, out = trap
    job = bare.sbatch("--signal=USR2@90", script)
    bare.wait_until(lambda: len(words(out)) == 2, "the task runs")
    bare.preempt(words(out)[1])
    bare.wait_until(lambda: words(out)[2:] == ["SIGTERM"], "SIGTERM, and no USR2")
    assert bare.state(job) == "RUNNING"  # for GraceTime


def test_preemption_sends_usr2_where_the_site_has_it_so(
    bare: Cluster, trap: tuple[Path, Path]
) -> None:
    bare.send_user_signal(True)
    script, out = trap
    bare.sbatch("--signal=USR2@90", script)
    bare.wait_until(lambda: len(words(out)) == 2, "the task runs")
    bare.preempt(words(out)[1])
    bare.wait_until(lambda: "SIGUSR2" in words(out), "USR2")


def test_nothing_stays_of_a_cluster_that_is_stopped_while_jobs_run(
    slurm: None, trap: tuple[Path, Path]
) -> None:
    script, out = trap
    with Cluster(accounting=True) as cluster:
        script.write_text("#!/bin/bash\nsetsid -f sleep 300\n" + script.read_text())
        cluster.sbatch(script)
        cluster.wait_until(lambda: len(words(out)) == 2, "the task runs")
        daemons = [process.pid for process in cluster.daemons.values()]
        inside = cluster.steps()
        assert any(psutil.Process(pid).name() == "sleep" for pid in inside)
    assert len(daemons) == 6
    assert not [pid for pid in daemons + inside if alive(pid)]
    assert not cluster.folder.exists()
    assert not [p for p in psutil.process_iter(["cmdline"]) if named(p, cluster.folder)]


def named(process: psutil.Process, folder: Path) -> bool:
    return any(str(folder) in word for word in process.info["cmdline"] or [])


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv (util-linux) is not here")
def test_daemons_end_with_a_pytest_that_is_killed(slurm: None) -> None:
    code = """
from cluster import Cluster
cluster = Cluster(accounting=False).__enter__()
print(cluster.folder, *(d.pid for d in cluster.daemons.values()), flush=True)
input()
"""
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=here, env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with started:
        assert started.stdout is not None
        folder, *pids = started.stdout.readline().split()
        assert all(alive(int(pid)) for pid in pids)
        started.kill()
    psutil.wait_procs([psutil.Process(int(p)) for p in pids if alive(int(p))], 120)
    shutil.rmtree(folder)
    assert not [pid for pid in pids if alive(int(pid))]


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(slurm: None) -> None:
    cluster = Cluster(accounting=False, extra_conf="NoSuchKey=1")
    with pytest.raises(RuntimeError, match="NoSuchKey"):
        cluster.__enter__()
    assert not cluster.folder.exists()
    assert all(process.poll() is not None for process in cluster.daemons.values())


def test_slurm_is_left_out_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELORA_SLURM", "off")
    assert slurm_packages.install() == "RELORA_SLURM=off"


def test_an_ordinary_user_without_slurm_is_told_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RELORA_SLURM", raising=False)
    monkeypatch.setattr(slurm_packages, "PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    reason = slurm_packages.install()
    assert reason is not None
    assert "slurmctld" in reason
    assert "root" in reason


def test_packages_install_with_no_daemon_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An apt-get on PATH that notes its arguments and whether the policy file was there."""
    policy, noted, programs = tmp_path / "policy-rc.d", tmp_path / "noted", tmp_path / "bin"
    programs.mkdir()
    apt = programs / "apt-get"
    make = f"cd '{programs}'; touch {' '.join(slurm_packages.PROGRAMS)}; chmod +x *"
    apt.write_text(
        f"#!/bin/sh\ntest -x '{policy}' && echo $* >> '{noted}'\n[ $1 = update ] || ({make})"
    )
    apt.chmod(0o755)
    monkeypatch.delenv("RELORA_SLURM", raising=False)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setattr(slurm_packages, "PATH", str(programs))
    monkeypatch.setattr(slurm_packages, "POLICY", policy)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert slurm_packages.install() is None
    update, install = noted.read_text().splitlines()
    assert update.startswith("update")
    assert "--no-install-recommends" in install
    assert not policy.exists()
    assert slurm_packages.install() is None  # nothing is missing now
    assert len(noted.read_text().splitlines()) == 2
