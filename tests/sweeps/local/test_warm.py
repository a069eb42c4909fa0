"""Workers forked from a warm parent: isolated like processes of their own, with their numbers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections import Counter

import psutil
import pytest
from rich.console import Console

from experiments.disk.output_dir import plan_folder, runs_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.state import state_of
from experiments.environment import ROOT
from experiments.run.complete import complete
from relora_core.config import BlimpConfig, PalomaConfig
from sweeps.local import warm
from sweeps.local.launcher import WORKERS, launch_local
from sweeps.local.processes import Workers
from sweeps.local.slots import Slots
from sweeps.planning.plan import store
from tests.conftest import nano_config
from tests.sweeps.conftest import planned
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(not warm.available(), reason="forking is not safe here")

MODULE = """
import os, runpy, sys
def main(argv):
    print("session", os.getsid(0) == os.getpid(), "stdin", os.readlink("/proc/self/fd/0"))
    sys.argv = ["worker", *argv]
    try:
        runpy.run_path({script!r}, run_name="__main__")
    except SystemExit as end:
        return end.code
"""


@pytest.fixture
def parent(worker, tmp_path, monkeypatch):
    """The command of a warm parent whose children behave as the fake worker does."""
    (tmp_path / "fake_module.py").write_text(MODULE.format(script=worker[-1]))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    return [sys.executable, "-m", "sweeps.local.warm", "fake_module"]


@pytest.fixture
def launch(worker, parent, tmp_path):
    """launch_local over forks; gives (summary, what was printed)."""

    def go(plan, *, parent=parent, **options):
        console = Console(file=io.StringIO(), width=200)
        options["workers"] = Workers(command=worker, parent=parent)
        summary = launch_local(plan, output_dir=tmp_path / "out", console=console, **options)
        return summary, console.file.getvalue()  # type: ignore[attr-defined]

    return go


def folders(plan, tmp_path):
    return {
        cell.config.seed: RunDir(tmp_path / "out" / "runs" / cell.run_id) for cell in plan.cells
    }


def executed(tmp_path):
    """Starts and ends by run."""
    path = tmp_path / "out" / "runs" / "executed"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(tuple(line.split()[:2]) for line in lines)


def parents():
    """Warm parents below this process; forks of one have its command line, too."""
    found = psutil.Process().children(recursive=True)
    ours = [p for p in found if "sweeps.local.warm" in " ".join(_command(p))]
    return [p for p in ours if p.ppid() not in {q.pid for q in ours}]


def _is_alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _command(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


@pytest.mark.slow
def test_every_end_of_a_run_is_told_as_of_a_process_of_its_own(make, launch, tmp_path):
    plan = planned(make, [5, 7, 9, 0, 1])
    summary, text = launch(plan, max_parallel=2)
    found = {seed: state_of(run) for seed, run in folders(plan, tmp_path).items()}
    assert {seed: one.state for seed, one in found.items()} == {
        5: "diverged",
        7: "failed",
        9: "failed",
        0: "finished",
        1: "finished",
    }
    assert found[9].reason == "killed by signal 9"
    assert found[7].reason == "RuntimeError: boom"
    assert summary.exit_code == 1
    assert "one by one" not in text
    assert len({one.pid for one in found.values()}) == 5


def test_each_fork_is_a_session_with_its_log_threads_and_gpu(make, launch, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("sweeps.local.slots._installed_gpus", lambda: ["3", "4", "5"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("FAKE_COMPANY", "2")  # both slots are taken
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    plan = planned(make, [0, 1])
    launch(plan)
    logs = sorted(run.log_path(1).read_text() for run in folders(plan, tmp_path).values())
    session = "session True stdin /dev/null\n"
    assert logs == [f"{session}threads 4 3\n", f"{session}threads 4 5\n"]


@pytest.mark.slow
def test_a_parent_that_dies_costs_no_run(make, launch, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_GATE", str(tmp_path / "gate"))
    plan = planned(make, [0, 1, 2, 3])
    got = []
    thread = threading.Thread(target=lambda: got.append(launch(plan, max_parallel=2)))
    thread.start()
    wait_for(lambda: sum(executed(tmp_path).values()) == 2)
    killed = parents()
    for one in killed:
        one.kill()
    wait_for(lambda: not any(map(_is_alive, killed)))
    (tmp_path / "gate").touch()
    thread.join(240)
    summary, text = got[0]
    assert {state.state for state in summary.states.values()} == {"finished"}
    assert set(executed(tmp_path).values()) == {1}  # two were forked, two were not; none twice
    assert "one by one from here: no warm one (it ended with signal 9)" in text


THREAD = """
import threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
"""


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (THREAD, "it has 2 threads after its imports"),
        ("raise ImportError", "it ended with exit code 1"),
    ],
    ids=["thread", "import"],
)
def test_where_forking_is_not_safe_workers_are_plain_processes(
    make, launch, parent, tmp_path, odd, why
):
    (tmp_path / "odd_module.py").write_text(f"{odd}\n{(tmp_path / 'fake_module.py').read_text()}")
    plan = planned(make, [0, 1])
    summary, text = launch(plan, parent=[*parent[:-1], "odd_module"])
    assert {state.state for state in summary.states.values()} == {"finished"}
    assert f"no warm one ({why})" in text
    logs = [run.log_path(1).read_text() for run in folders(plan, tmp_path).values()]
    assert not any("session" in log for log in logs)


LAUNCHER = """
import sys
from pathlib import Path
from sweeps.local.launcher import launch_local
from sweeps.local.processes import Workers
from sweeps.planning.plan import load
workers = Workers(command=sys.argv[3:5], parent=sys.argv[5:])
plan, out = load(Path(sys.argv[1])), sys.argv[2]
summary = launch_local(plan, output_dir=out, max_parallel=2, workers=workers)
sys.exit(summary.exit_code)
"""


@pytest.fixture
def background(make, worker, parent, tmp_path, monkeypatch):
    """A launcher process with two long runs at work; gives (process, run dirs)."""
    monkeypatch.setenv("FAKE_S", "60")
    out = tmp_path / "out"
    plan = store(planned(make, [0, 1, 2]), output_dir=out)
    path = plan_folder(out, name=plan.name) / "plan.json"
    words = [str(path), str(out), *worker, *parent]
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, *words])
    runs = list(folders(plan, tmp_path).values())
    wait_for(lambda: sum(bool(run.lock_holder()) for run in runs) == 2)
    children = psutil.Process(process.pid).children(recursive=True)
    yield process, runs
    process.kill()
    process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def test_a_stopped_sweep_takes_its_forks_and_their_parent_along(background):
    process, runs = background
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    found = Counter((s.state, s.reason) for s in map(state_of, runs))
    assert found == {("failed", "stopped; the same command resumes it"): 2, ("planned", None): 1}
    assert not psutil.wait_procs(family, timeout=60)[1]


@pytest.mark.slow
def test_forks_outlive_a_launcher_that_is_killed(background):
    process, runs = background
    [parent] = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    parent.wait(60)
    assert Counter(state_of(run).state for run in runs) == {"running": 2, "planned": 1}


def test_a_killed_fork_touches_no_other(background):
    process, runs = background
    victim = next(run for run in runs if run.lock_holder())
    other = next(run for run in runs if run.lock_holder() and run is not victim)
    pid = other.lock_holder()["pid"]
    os.kill(victim.lock_holder()["pid"], signal.SIGKILL)
    third = next(run for run in runs if run not in (victim, other))
    wait_for(third.lock_holder)  # the free slot is forked into
    assert state_of(victim).reason == "killed by signal 9"
    assert other.lock_holder()["pid"] == pid
    assert process.poll() is None


@pytest.mark.slow
def test_a_warm_worker_computes_what_a_cold_one_does_bit_for_bit(tmp_path):
    """Two threads, evals and dynamics included: all that a run's numbers pass through."""
    slots = Slots(parallel=1, threads=2, gpus=[])
    runs = {}
    with warm.open_parent(warm.COMMAND, environment=slots.shared()) as forks:
        for way in ("cold", "warm", "again"):
            config = complete(_numeric(tmp_path / way))
            run = RunDir(runs_folder(tmp_path / way) / "run")
            run.create(config)
            runs[way] = run
            if way == "cold":
                command = [*WORKERS.command, str(run.path)]
                assert subprocess.call(command, env=slots.environment(0)) == 0
                continue
            wait_for(lambda: not forks.importing)
            worker = forks.fork(run.path, log=run.log_path(1), environment=slots.environment(0))
            assert worker.wait(120) == 0, run.log_path(1).read_text()
    weights = {_weights(run) for run in runs.values()}
    numbers = {repr(_numbers(run)) for run in runs.values()}
    assert (len(weights), len(numbers)) == (1, 1)


def _numeric(output_dir):
    return nano_config(
        output_dir=str(output_dir),
        model={"vocab_size": None},
        dynamics={"every_steps": 4, "what": ["weight", "gradient"]},
        tracking={"enabled": False},
        eval={
            "paloma": PalomaConfig(enabled=True, max_documents=2),
            "blimp": BlimpConfig(enabled=True, max_pairs=2),
        },
        runtime={"threads": 2},
        relora={"dropout": 0.1},
    )


def _weights(run):
    files = sorted(run.checkpoints.glob("step-00000012/*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _numbers(run):
    metrics = run.result()["metrics"]
    assert any(name.startswith("eval/blimp") for name in metrics)
    assert any(name.startswith("dynamics/") for name in metrics)
    return sorted((k, v) for k, v in metrics.items() if not k.startswith(("perf/", "system/")))
