"""State is read from what a run left and never guessed; reading changes nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from experiments.disk.named import find_run
from experiments.disk.process import process_start
from experiments.disk.run_dir import SILENT_AFTER_S, RunDir
from experiments.disk.state import state_of
from relora_core.config import ConfigError


@pytest.fixture
def run(make, tmp_path):
    run_dir = RunDir(tmp_path / "out" / "runs" / "nano-relora-s0-abc")
    run_dir.create(make())
    return run_dir


def lock(run_dir, *, host, pid, started=0.0):
    (run_dir.path / "lock").write_text(json.dumps({"host": host, "pid": pid, "started": started}))


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def snapshot(run_dir):
    return {p: p.read_bytes() for p in sorted(run_dir.path.rglob("*")) if p.is_file()}


def test_a_new_run_is_planned(run):
    assert state_of(run).state == "planned"


def test_a_running_run_whose_process_is_gone_has_failed_but_reading_writes_nothing(run):
    pid = dead_pid()
    run.update_status(state="running", host=socket.gethostname(), pid=pid, attempts=1, step=3)
    lock(run, host=socket.gethostname(), pid=pid)
    before = snapshot(run)
    state = state_of(run)
    assert (state.state, state.step, state.attempts) == ("failed", 3, 1)
    assert state.reason is not None
    assert state.reason.startswith("killed (no process; last heartbeat")
    assert snapshot(run) == before


def test_whoever_holds_the_lock_is_running_whatever_the_status_says(run):
    run.update_status(state="queued", host=socket.gethostname(), pid=os.getpid())
    lock(
        run,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
    )
    assert state_of(run).state == "running"


def test_silence_of_another_host_is_a_note_and_not_a_death(run):
    run.update_status(state="running", host="elsewhere", pid=1)
    status = run.status()
    status.heartbeat = time.time() - SILENT_AFTER_S - 60
    run.write_status(status)
    state = state_of(run)
    assert state.state == "running"
    assert state.reason == "no heartbeat from elsewhere for 6 min"


@pytest.mark.parametrize("end", ["finished", "diverged"])
def test_an_end_needs_a_result(run, end):
    run.update_status(state=end)
    assert state_of(run).state == "failed"
    run.write_result({"state": end, "metrics": {}})
    assert state_of(run).state == end


def test_a_result_counts_even_if_the_last_status_was_never_written(run):
    run.update_status(state="running", host=socket.gethostname(), pid=dead_pid())
    run.write_result({"state": "finished", "metrics": {}})
    assert state_of(run).state == "finished"


def test_what_a_dead_launcher_queued_is_planned_again_but_a_schedulers_job_is_queued(run):
    run.update_status(state="queued", host=socket.gethostname(), pid=os.getpid())
    assert state_of(run).state == "queued"
    run.update_status(pid=dead_pid())
    assert state_of(run).state == "planned"
    run.update_status(job_id="17_3")
    assert state_of(run).state == "queued"


@pytest.mark.parametrize(
    "birth", [None, process_start(os.getpid()), "another boot/17"], ids=["none", "ours", "another"]
)
def test_what_another_host_queued_is_queued_where_no_file_says_more(run, birth):
    """By an earlier version, on a disk without locks, or on a machine that shares the disk."""
    run.update_status(state="queued", host="elsewhere", pid=dead_pid(), birth=birth)
    assert state_of(run).state == "queued"


def test_a_run_is_found_by_any_part_that_only_it_has(run, make, tmp_path):
    other = RunDir(tmp_path / "out" / "runs" / "nano-relora-s1-xyz")
    other.create(make(seed=1))
    assert find_run(tmp_path / "out", word="s1").path == other.path
    assert find_run(tmp_path / "out", word=run.run_id).path == run.path
    with pytest.raises(ConfigError, match="2 match"):
        find_run(tmp_path / "out", word="nano")
    with pytest.raises(ConfigError, match="Did you mean 'nano-relora-s1-xyz'"):
        find_run(tmp_path / "out", word="nano-relora-s1-xyy")
