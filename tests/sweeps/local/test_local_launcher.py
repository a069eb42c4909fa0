"""The local launcher with workers that take milliseconds: converging, failures, limits, signals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from experiments.disk.output_dir import plan_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.state import state_of
from experiments.environment import ROOT
from relora_core.config import (
    ConfigError,
    EvalConfig,
    PalomaConfig,
    RuntimeConfig,
    TrackingConfig,
)
from sweeps import display
from sweeps.launch import run_sweep
from sweeps.local import launcher
from sweeps.local import slots as slots_module
from sweeps.local.launcher import LocalLauncher, launch_local
from sweeps.local.processes import Workers
from sweeps.local.slots import Slots, gpu_names, visible_gpus
from sweeps.planning.budget import training_flops
from sweeps.planning.plan import make_plan, store
from tests.sweeps.conftest import planned
from tests.waiting import wait_for


@pytest.fixture
def launch(worker, tmp_path):
    """launch_local with the fake worker; gives (summary, what was printed)."""

    def go(plan, **options):
        console = Console(file=io.StringIO(), width=160)
        summary = launch_local(
            plan,
            output_dir=tmp_path / "out",
            console=console,
            workers=Workers(command=worker),
            **options,
        )
        display.show_closing(
            plan, states=summary.states, output_dir=tmp_path / "out", console=console
        )
        return summary, console.file.getvalue()  # type: ignore[attr-defined]

    return go


def executed(tmp_path):
    """(run_id, "start" or "end", time) of everything that workers did, oldest first."""
    path = tmp_path / "out" / "runs" / "executed"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return sorted(((i, what, float(t)) for i, what, t in lines), key=lambda line: line[2])


def starts(tmp_path):
    return Counter(run_id for run_id, what, _ in executed(tmp_path) if what == "start")


def states(summary):
    return {id_.split("-s")[1][0]: state.state for id_, state in summary.states.items()}


def test_the_same_plan_again_runs_nothing_and_says_so(make, launch, tmp_path):
    plan = planned(make, [0, 1])
    summary, _ = launch(plan)
    assert (states(summary), summary.exit_code) == ({"0": "finished", "1": "finished"}, 0)
    before = executed(tmp_path)
    summary, text = launch(planned(make, [0, 1]))
    assert executed(tmp_path) == before
    assert "nothing to run: all 2 runs are done" in text
    assert summary.exit_code == 0


def test_runs_that_wait_for_slurm_are_left_alone(make, launch, slurm, tmp_path):
    plan = planned(make, [0, 1])
    run = RunDir(tmp_path / "out" / "runs" / plan.cells[0].run_id)
    run.create(plan.cells[0].config)
    run.update_status(state="queued", job_id="12_0", host="login")
    slurm.add("12_0", name="s.aa")
    summary, text = launch(plan)
    assert states(summary) == {"0": "queued", "1": "finished"}
    assert (run.status().job_id, summary.exit_code) == ("12_0", 0)
    assert "1 run waits for SLURM: left alone" in text
    slurm.set_state("12_0", "CANCELLED")
    assert states(launch(plan)[0]) == {"0": "finished", "1": "finished"}


def test_a_widened_grid_runs_only_what_is_new(make, launch, tmp_path):
    launch(planned(make, [0]))
    launch(planned(make, [0, 1, 2]))
    assert sorted(starts(tmp_path).values()) == [1, 1, 1]


@pytest.mark.slow
def test_a_failing_run_stops_no_other_and_is_told(make, launch, tmp_path):
    summary, text = launch(planned(make, [7, 0, 1]), max_parallel=1)
    assert states(summary) == {"7": "failed", "0": "finished", "1": "finished"}
    assert summary.exit_code == 1
    closing = [line for line in text.splitlines() if line.startswith("failed seed=7")][-1]
    assert "RuntimeError: boom" in closing
    assert "error.txt" in closing
    summary, _ = launch(planned(make, [7, 0, 1]))
    assert (states(summary)["7"], summary.exit_code) == ("finished", 0)
    assert sorted(starts(tmp_path).values()) == [1, 1, 2]


def test_a_killed_worker_is_told_and_resumes_at_the_next_command(make, launch, tmp_path):
    summary, text = launch(planned(make, [9, 0]))
    assert states(summary) == {"9": "failed", "0": "finished"}
    assert "killed by signal 9" in text
    summary, _ = launch(planned(make, [9, 0]))
    assert states(summary) == {"9": "finished", "0": "finished"}


def test_a_diverged_run_is_an_outcome_that_is_not_repeated(make, launch, tmp_path):
    for _ in range(2):
        summary, text = launch(planned(make, [5]))
        assert (states(summary), summary.exit_code) == ({"5": "diverged"}, 1)
    assert sum(starts(tmp_path).values()) == 1
    assert "diverged seed=5" in text or "diverged test" in text


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_than_max_parallel_runs_at_once(make, launch, tmp_path, limit, monkeypatch):
    monkeypatch.setenv("FAKE_COMPANY", str(limit))
    launch(planned(make, [0, 1, 2, 3]), max_parallel=limit)
    alive = peak = 0
    for _, what, _ in executed(tmp_path):
        alive += 1 if what == "start" else -1
        peak = max(peak, alive)
    assert peak == limit


@pytest.mark.slow
def test_longest_runs_start_first(make, launch, tmp_path):
    plan = make_plan([({}, make(steps=n)) for n in (4, 40, 400)])
    launch(plan, max_parallel=1)
    order = [run_id for run_id, what, _ in executed(tmp_path) if what == "start"]
    assert order == [cell.run_id for cell in reversed(plan.cells)]


def test_cost_is_proportional_to_the_tokens(make):
    assert training_flops(make(steps=40)) == 10 * training_flops(make(steps=4))


def test_each_worker_has_its_share_of_threads_and_its_gpu(make, launch, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(slots_module, "_installed_gpus", lambda: ["3", "4", "5"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus() == ["3", "5"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    slots = Slots.of(None, runs=6, devices=["auto"])
    assert (slots.parallel, slots.threads) == (2, 4)
    assert [slots.environment(i)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["3", "5"]
    cpu = Slots.of(None, runs=3, devices=["cpu"] * 3)
    assert (cpu.parallel, cpu.threads, cpu.gpus) == (3, 2, [])
    assert cpu.environment(0)["OMP_NUM_THREADS"] == "2"
    plan = planned(make, [0])
    launch(plan)
    log = RunDir(tmp_path / "out" / "runs" / plan.cells[0].run_id).log_path(1)
    assert log.read_text() == "threads 8 3\n"


def test_a_system_without_affinity_shares_all_its_cores(monkeypatch):
    """As macOS, where Python has no os.sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    slots = Slots.of(None, runs=9, devices=["cpu"])
    assert (slots.parallel, slots.threads) == (8, 1)
    assert Slots.of(2, runs=9, devices=["cpu"]).threads == 4


def test_one_run_on_the_cpu_takes_no_other_its_gpu(make, launch, tmp_path, monkeypatch):
    monkeypatch.setattr(slots_module, "_installed_gpus", lambda: ["3", "4", "5"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    devices = ("cpu", "auto", "cuda")
    configs = [make(seed=i, runtime=RuntimeConfig(device=d)) for i, d in enumerate(devices)]
    plan = make_plan([({"seed": str(config.seed)}, config) for config in configs])
    launch(plan)
    logs = [RunDir(tmp_path / "out" / "runs" / c.run_id).log_path(1) for c in plan.cells[1:]]
    assert {log.read_text().split()[-1] for log in logs} <= {"3", "5"}


LISTED = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
  MIG 3g.40gb     Device  0: (UUID: MIG-0d1232cf-9a0e-5ffb-9e5c-7ea6e5ba1b8a)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-e2a3a19c-1b1e-11ee-be56-0242ac120002)
"""
A100 = "NVIDIA A100-SXM4-80GB"


@pytest.mark.parametrize(
    ("chosen", "ids"),
    [
        (None, ["0", "1"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),  # SLURM's, in a job without a GPU
        ("none", []),
        ("1", ["1"]),
        ("1, 0", ["1", "0"]),
        ("0,", ["0"]),
        ("0,-1,1", ["0"]),
        ("0,7,1", ["0"]),
        ("7", []),
        ("0,0", []),
        ("GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f", ["GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f"]),
        ("GPU-e2a3,GPU-5c89", ["GPU-e2a3", "GPU-5c89"]),
        ("GPU-0000", []),
        ("MIG-0d1232cf", ["MIG-0d1232cf"]),
        ("MIG-GPU-e2a3a19c-1b1e-11ee-be56-0242ac120002/1/0",) * 2,
        ("MIG-GPU-0000/1/0", []),
    ],
)
def test_gpus_are_those_that_cuda_would_see(make, monkeypatch, chosen, ids):
    ids = [ids] if isinstance(ids, str) else ids
    slots_module._listed.cache_clear()
    monkeypatch.setattr(
        slots_module.subprocess, "run", lambda *a, **b: SimpleNamespace(stdout=LISTED)
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    try:
        assert visible_gpus() == ids
        slices = [f"{A100} MIG 3g.40gb" for id_ in ids if id_.startswith("MIG-0")]
        others = [A100 for id_ in ids if not id_.startswith("MIG-")]
        assert gpu_names() == tuple(sorted({*slices, *others}))
        assert LocalLauncher().place(make()).kinds == gpu_names()
    finally:
        slots_module._listed.cache_clear()


@pytest.mark.parametrize("chosen", ["NoDevFiles", "0"])
def test_where_there_is_no_gpu_a_sweep_takes_all_cores_and_cpu_hours(make, monkeypatch, chosen):
    monkeypatch.setattr(slots_module, "_installed_gpus", list)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert Slots.of(None, runs=6, devices=["auto"]).parallel == 6
    assert LocalLauncher().place(make()).gpus == 0


@pytest.mark.parametrize(
    ("devices", "unit"), [(["cpu"], "CPU"), (["auto"], "GPU"), (["cpu", "auto"], "device")]
)
def test_hours_are_of_what_the_runs_use_whatever_the_machine_has(make, monkeypatch, devices, unit):
    monkeypatch.setattr(slots_module, "_installed_gpus", lambda: ["0"])
    monkeypatch.setattr(launcher, "gpu_names", lambda: (A100,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    configs = [make(seed=i, runtime=RuntimeConfig(device=d)) for i, d in enumerate(devices)]
    for config in configs:
        config.model.vocab_size = None
    file = io.StringIO()
    points = [({"seed": str(config.seed)}, config) for config in configs]
    run_sweep(points, launcher=LocalLauncher(), plan_only=True, console=Console(file=file))
    assert set(re.findall(r"(\w+)-hours", file.getvalue())) == {unit}


def test_fewer_than_one_at_a_time_is_refused_before_anything_is_written(make, launch, tmp_path):
    with pytest.raises(ConfigError, match="max_parallel must be >= 1, got 0"):
        launch(planned(make, [0]), max_parallel=0)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file_is_one_line(make, launch, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="output_dir must be a folder") as caught:
        launch(planned(make, [0]))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_launchers_on_one_plan_run_each_run_once(make, launch, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_S", "0.3")
    got = []
    threads = [
        threading.Thread(target=lambda: got.append(launch(planned(make, [0, 1, 2]))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert list(starts(tmp_path).values()) == [1, 1, 1]
    assert [set(states(summary).values()) for summary, _ in got] == [{"finished"}] * 2


LAUNCHER = """
import sys
from pathlib import Path
from experiments.identity import config_from_json
from sweeps.local.launcher import launch_local
from sweeps.local.processes import Workers
from sweeps.planning.plan import load
plan = load(Path(sys.argv[1]))
workers = Workers(command=sys.argv[3:])
summary = launch_local(plan, output_dir=sys.argv[2], max_parallel=1, workers=workers)
sys.exit(summary.exit_code)
"""


@pytest.fixture
def background(make, worker, tmp_path, monkeypatch):
    """Starts a launcher process on two long runs, one at a time; gives (process, run dirs)."""
    monkeypatch.setenv("FAKE_S", "60")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = tmp_path / "out"
    plan = store(planned(make, [0, 1]), output_dir=out)
    path = plan_folder(out, name=plan.name) / "plan.json"
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(path), str(out), *worker])
    runs = [RunDir(out / "runs" / cell.run_id) for cell in plan.cells]
    wait_for(lambda: any(run.lock_holder() for run in runs))
    yield process, runs
    process.kill()
    process.wait()
    for run in runs:
        if holder := run.lock_holder():
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder["pid"], signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_takes_its_workers_along_and_can_be_resumed(background, number):
    process, runs = background
    process.send_signal(number)
    assert process.wait(120) == 130
    assert [run.lock_holder() for run in runs] == [None, None]
    found = sorted((s.state, s.reason) for s in map(state_of, runs))
    assert found == [("failed", "stopped; the same command resumes it"), ("planned", None)]
    assert list((runs[0].output_dir / ".processes").iterdir()) == []


def test_workers_outlive_a_launcher_that_is_killed_and_are_not_doubled(background):
    process, runs = background
    process.kill()
    process.wait()
    found = Counter(state_of(run).state for run in runs)
    assert found == {"running": 1, "planned": 1}


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="only Linux tells births")
@pytest.mark.parametrize("host", ["3f2a17c0de", socket.gethostname()])
def test_a_container_knows_whether_the_launcher_in_another_lives(background, monkeypatch, host):
    """Whatever that one's name: pids of another container mean other processes here, or none."""
    process, runs = background
    monkeypatch.setattr("socket.gethostname", lambda: host)
    monkeypatch.setattr("psutil.pid_exists", lambda pid: False)
    assert Counter(state_of(run).state for run in runs) == {"running": 1, "queued": 1}
    process.kill()
    process.wait()
    assert Counter(state_of(run).state for run in runs) == {"running": 1, "planned": 1}


def test_a_run_elsewhere_is_awaited_and_not_started_again(make, launch, tmp_path, monkeypatch):
    plan = planned(make, [0])
    run = RunDir(tmp_path / "out" / "runs" / plan.cells[0].run_id)
    run.create(plan.cells[0].config)

    def other():
        with run.lock():
            ready.set()
            time.sleep(0.6)
            run.write_result({"state": "finished", "metrics": {}})
            run.update_status(state="finished")

    ready = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    ready.wait(120)
    summary, _ = launch(plan)
    thread.join()
    assert states(summary) == {"0": "finished"}
    assert executed(tmp_path) == []


def test_a_lock_of_another_host_is_left_alone(make, launch, tmp_path):
    plan = planned(make, [0, 1])
    run = RunDir(tmp_path / "out" / "runs" / plan.cells[0].run_id)
    run.create(plan.cells[0].config)
    run.update_status(state="running", host="elsewhere", pid=1)
    lock = {"host": "elsewhere", "pid": 1, "started": 0.0}
    (run.path / "lock").write_text(json.dumps(lock))
    summary, _ = launch(plan)
    assert states(summary) == {"0": "running", "1": "finished"}
    assert summary.exit_code == 0


def test_a_cancel_is_left_to_the_process_at_work_and_else_ends_with_the_command(
    make, launch, tmp_path
):
    plan = planned(make, [0, 1])
    runs = [RunDir(tmp_path / "out" / "runs" / cell.run_id) for cell in plan.cells]
    for run, cell in zip(runs, plan.cells, strict=True):
        run.create(cell.config)
        run.cancel_path.touch()
    lock = {"host": "elsewhere", "pid": 1, "started": 0.0}
    (runs[0].path / "lock").write_text(json.dumps(lock))
    assert states(launch(plan)[0]) == {"0": "running", "1": "finished"}
    assert [run.cancel_path.exists() for run in runs] == [True, False]


def test_tracking_stands_before_any_worker_starts(make, launch, tmp_path, monkeypatch):
    order: list[str] = []

    @contextlib.contextmanager
    def track(plan, output_dir):
        order.append(f"track {len(starts(tmp_path))}")
        yield
        order.append(f"untrack {len(starts(tmp_path))}")

    monkeypatch.setattr(launcher, "follow", track)
    launch(planned(make, [0, 1]))
    assert order == ["track 0", "untrack 2"]


def test_runs_wait_for_no_store(make, launch, tmp_path, monkeypatch):
    """The first look at MLflow ends after the last run has; the second shows them as they ended."""
    seen: list[list[str]] = []

    def slow(tracker, names, **_):
        deadline = time.monotonic() + 60
        while not seen and len(executed(tmp_path)) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append([what for _, what, _ in executed(tmp_path)])
        return []

    monkeypatch.setattr("sweeps.tracking.LOCAL_S", 3600.0)
    monkeypatch.setattr("experiments.tracking.tracker.Tracker.bring_up_to_date", slow)
    summary, _ = launch(planned(make, [0, 1], tracking=TrackingConfig(enabled=True)))
    assert states(summary) == {"0": "finished", "1": "finished"}
    assert [len(one) for one in seen] == [4, 4]


def test_the_worker_says_how_the_run_ended_by_its_exit_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sweeps.worker", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(ROOT),
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == f"RUN_DIR must hold config.json, got {tmp_path}"


def test_bad_data_ends_the_command_before_anything_is_planned(make, tmp_path, monkeypatch):
    from relora_core import data
    from relora_core.data.base import DataError

    def bad(config, **options):
        raise DataError("rows.parquet: row 3 holds id 99, expected ids below 64")

    monkeypatch.setattr(data, "prepare", bad)
    config = make(eval=EvalConfig(paloma=PalomaConfig(enabled=False)))
    config.model.vocab_size = None
    with pytest.raises(DataError, match="row 3 holds id 99"):
        run_sweep(
            [({"seed": "0"}, config)], launcher=LocalLauncher(), console=Console(file=io.StringIO())
        )
    assert not (tmp_path / "out" / "sweeps").exists()
    assert not (tmp_path / "out" / "runs").exists()
