"""One run, whatever is about it: other processes, an earlier boot, a clock set anew, a slow disk.

Promised: one process at a time works on a run, a lock counts as long as its process lives and no
longer, and neither clocks nor odd paths nor late files change a number.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiments.disk import flock, process
from experiments.disk import run_dir as run_dir_module
from experiments.disk.run_dir import SILENT_AFTER_S, RunDir, Status
from experiments.disk.state import state_of
from experiments.disk.states import State
from experiments.errors import RunLocked
from experiments.run.complete import complete
from experiments.run.runner import run_experiment
from relora_core import checkpoint
from sweeps.commands import cancel
from sweeps.retention import Policy, judge, remove
from tests.faults.conftest import KILLED, assert_sound, numbers, only_run
from tests.faults.inject import small_run


@pytest.fixture
def run(nano, tmp_path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "a")
    run.create(nano())
    return run


# the lock -----------------------------------------------------------------------------------------
def left(run: RunDir, **changes: Any) -> dict[str, Any]:
    """A lock as this process leaves it when it is killed, with `changes`."""
    with run.lock():
        holder = json.loads((run.path / "lock").read_text())
    holder |= changes
    (run.path / "lock").write_text(json.dumps(holder))
    return holder


@pytest.mark.parametrize("living", [lambda: 1, os.getppid, os.getpid])
def test_a_lock_of_another_boot_is_stale_though_its_pid_lives(run, living):
    left(run, pid=living(), birth="00000000-0000-0000-0000-000000000000/17")
    assert run.lock_holder() is None
    with run.lock():
        pass


def test_a_lock_from_before_births_were_recorded(run):
    holder = left(run)
    for started, held in ((holder["started"], True), (holder["started"] - 60, False)):
        old = {"host": holder["host"], "pid": holder["pid"], "started": started}
        (run.path / "lock").write_text(json.dumps(old))
        assert (run.lock_holder() is not None) == held


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="only Linux tells births")
def test_setting_the_clock_takes_no_run_from_its_process(run, monkeypatch):
    """psutil's create_time is the boot's time plus ticks, and the former moves with the clock."""
    with run.lock():
        real = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 7200)
        with pytest.raises(RunLocked), run.lock():
            pass


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="only Linux tells births")
def test_a_process_that_the_system_hides_from_others_still_holds_its_run(run, monkeypatch):
    """With hidepid, as on login nodes, another user's process is not in /proc; kill knows of it."""

    def hidden(pid: int) -> psutil.Process:
        raise psutil.NoSuchProcess(pid)

    def denied(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    def gone(pid: int, number: int) -> None:
        raise ProcessLookupError(3, "No such process")

    birth = left(run)["birth"]
    monkeypatch.setattr(process.psutil, "Process", hidden)
    for kill, born, held in (
        (denied, birth, True),
        (denied, "another boot/1", False),
        (gone, birth, False),
    ):
        left_lock = json.loads((run.path / "lock").read_text()) | {"birth": born}
        (run.path / "lock").write_text(json.dumps(left_lock))
        monkeypatch.setattr(os, "kill", kill)
        assert (run.lock_holder() is not None) == held


ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import os, socket, subprocess, sys, time
name, path = sys.argv[1:]
socket.gethostname = lambda: name
from experiments.disk.run_dir import RunDir
run = RunDir(path)
with run.lock():
    run.update_status(state="running", host=name, pid=os.getpid())
    forked = os.fork()
    if forked == 0:
        time.sleep(600)
        os._exit(0)
    started = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
    print(forked, started.pid, flush=True)
    time.sleep(600)
"""
"""Locks a run on a host of this name, and has two children."""
births = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="only Linux tells births")


@contextmanager
def held(run: RunDir, *, host: str) -> Iterator[Callable[[], None]]:
    """A process of this machine that has the run; gives what kills it and leaves its children."""
    command = [sys.executable, "-c", HOLDER, host, str(run.path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None
        children = [int(pid) for pid in other.stdout.readline().split()]

        def kill() -> None:
            other.kill()
            other.wait()

        try:
            yield kill
        finally:
            kill()
            for pid in children:
                os.kill(pid, signal.SIGKILL)


@births
@pytest.mark.parametrize("host", ["3f2a17c0de", os.uname().nodename])
def test_a_lock_of_this_machine_counts_as_long_as_its_process_lives(run, host):
    """Of a container, or from before the machine was renamed; children that outlive the process,
    such as a loader's workers, do not keep it."""
    with held(run, host=host) as kill:
        assert state_of(run).state == "running"
        with pytest.raises(RunLocked, match=f"is being run by process .* on {host}"), run.lock():
            pass
        kill()
        assert (state_of(run).state, run.lock_holder()) == ("failed", None)
        with run.lock():
            pass


@births
def test_containers_of_one_name_do_not_take_each_others_runs(run):
    """In each of them pids begin at 1."""
    host = os.uname().nodename
    with held(run, host=host) as kill:
        holder = json.loads((run.path / "lock").read_text())
        boot = holder["birth"].partition("/")[0]
        in_place = holder | {"pid": os.getpid(), "birth": f"{boot}/1"}
        (run.path / "lock").write_text(json.dumps(in_place))
        with pytest.raises(RunLocked), run.lock():
            pass
        assert not cancel.terminate(run), "the pid is ours, and no container's"
        kill()
        with run.lock():
            pass


@pytest.mark.parametrize(
    "changes",
    [
        {"birth": "00000000-0000-0000-0000-000000000000/17"},  # a node that shares the disk
        {"birth": None},
        {"flock": False},  # its disk has no locks
        {"flock": None},  # an earlier version
    ],
)
def test_a_lock_of_which_this_machine_cannot_know_counts(run, changes):
    holder = left(run, host="elsewhere", **changes)
    assert run.lock_holder() == holder
    removal = f"on elsewhere; if that has ended for certain, remove {run.path}/lock"
    with pytest.raises(RunLocked, match=removal), run.lock():
        pass


@births
@pytest.mark.parametrize("device", [-1, None])
def test_a_lock_that_this_mount_may_not_show_counts_until_its_run_is_silent(run, device):
    """Of a container that mounts the disk for itself, where flock is the mount's own; or of an
    earlier version, which did not say which mount it had."""
    holder = left(run, host="3f2a17c0de", pid=2**22 + 1, device=device)
    long_ago = time.time() - 2 * SILENT_AFTER_S
    for heartbeat, taken in ((time.time(), long_ago), (long_ago, time.time())):
        run.write_status(Status(state=State.RUNNING, host="3f2a17c0de", heartbeat=heartbeat))
        os.utime(run.path / "lock", (taken, taken))
        assert (state_of(run).state, run.torn()) == ("running", [])
        with pytest.raises(RunLocked, match="on 3f2a17c0de"), run.lock():
            pass
        assert run.lock_holder() == holder
    os.utime(run.path / "lock", (long_ago, long_ago))
    assert (state_of(run).state, run.lock_holder()) == ("failed", None)
    with run.lock():
        pass


def test_a_machine_that_is_renamed_takes_no_run_from_its_process(run, monkeypatch):
    with run.lock():
        monkeypatch.setattr("socket.gethostname", lambda: "dhcp-17")
        assert run.is_mine()
        with pytest.raises(RunLocked), RunDir(run.path).lock():
            pass
    assert not (run.path / "lock").exists()


def test_a_lock_of_the_same_name_and_pid_is_another_if_its_birth_is(run):
    with run.lock():
        lock = json.loads((run.path / "lock").read_text())
        (run.path / "lock").write_text(json.dumps(lock | {"birth": "this boot/2"}))
        assert not run.is_mine()


def test_a_fork_is_not_its_parent(run):
    with run.lock():
        child = os.fork()
        if child == 0:
            os._exit(run.is_mine())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert run.is_mine()


def test_a_disk_without_locks(run, monkeypatch):
    def none(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with run.lock():
        assert run.is_mine()
        assert json.loads((run.path / "lock").read_text())["flock"] is False
        with pytest.raises(RunLocked), run.lock():
            pass
    assert not (run.path / "lock").exists()
    left(run, pid=2**22 + 1)
    assert run.lock_holder() is None


def test_a_disk_on_which_a_locked_file_cannot_be_read(run, monkeypatch):
    """As CIFS, where the kernel's locks are mandatory."""
    read = Path.read_bytes

    def mandatory(path: Path) -> bytes:
        if path.name == "lock" and flock.is_held(path):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", mandatory)
    with run.lock():
        assert run.torn() == []
        assert state_of(run).state == "running"
        assert json.loads((run.path / "lock").read_text())["flock"] is False
        with pytest.raises(RunLocked), run.lock():
            pass
        assert run.is_mine()
    assert not (run.path / "lock").exists()


def test_of_many_that_find_a_stale_lock_one_takes_the_run(run, monkeypatch):
    """Each looks, and only then removes what it has found: without a guard, another's new lock."""
    left(run, birth="another boot/1")
    look, taken, refused = RunDir.lock_holder, [], []

    def slowly(self):
        holder = look(self)
        time.sleep(0.02)
        return holder

    monkeypatch.setattr(RunDir, "lock_holder", slowly)
    over = threading.Barrier(5)

    def work():
        over.wait()
        try:
            with run.lock():
                taken.append(1)
                over.wait()
        except RunLocked:
            refused.append(1)
            over.wait()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 4)


def test_a_kill_never_leaves_an_empty_lock(run, monkeypatch):
    """It would shut the run for as long as somebody may be about to fill it."""

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(KeyboardInterrupt), run.lock():
        pass
    assert not (run.path / "lock").exists()


def test_file_systems_without_links(run, monkeypatch):
    def refused(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with run.lock(), pytest.raises(RunLocked), run.lock():
        pass
    assert not list(run.path.glob("*lock*"))


def test_gc_removes_what_kills_left_and_nothing_younger(run, monkeypatch):
    left(run, birth="another boot/1")
    old, young = run.path / ".status.json.aaaaaaaa.tmp", run.attempts / ".001.json.bbbbbbbb.tmp"
    for path in (old, young):
        path.write_text("{")
    os.utime(old, (0, 0))
    verdict = judge(run, state="failed", policy=Policy())
    assert set(verdict.torn) == {old, run.path / "lock"}
    remove(verdict, run=run)
    assert not old.exists()
    assert not (run.path / "lock").exists()
    assert young.exists()


def test_an_attempt_never_has_the_number_of_another(run):
    """MLflow tells lives of a run apart by it; status.json may be lost or written by two."""
    run.write_attempt(7, {"host": "a"})
    run.status_path.unlink()
    assert run.next_attempt() == 8
    run.update_status(attempts=9)
    assert run.next_attempt() == 10


# several at once ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_workers_that_begin_at_once_on_a_stale_lock(warm_runner, undisturbed, tmp_path):
    for number in range(5):
        config = small_run(tmp_path / str(number))
        on = ("link run/.lock", "write run/events", "fsync run/checkpoints", "unlink run/lock")
        killed = warm_runner.attempt(config, at=1, on=f"^{on[number % len(on)]}")
        assert killed.code == KILLED
        done = warm_runner.together(config, copies=4)
        assert 0 in [one.code for one in done]
        for one in done:
            assert one.code == 0 or "is being run by process" in one.output
        assert_sound(tmp_path / str(number), undisturbed=undisturbed)
        begun = [e["attempt"] for e in only_run(tmp_path / str(number)).raw_events()]
        assert begun == sorted(begun), "two wrote at the same time"


# clocks, paths, late files ------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_is_set_between_attempts(warm_runner, undisturbed, tmp_path, days):
    config = small_run(tmp_path / "out")
    for number, on in enumerate(("write run/checkpoints/.tmp-step/rng", "fsync run/.result")):
        killed = warm_runner.attempt(config, at=1, on=on, clock_s=number * days * 86400)
        assert killed.code == KILLED
    done = warm_runner.attempt(config, clock_s=days * 43200)
    assert done.code == 0, done.output
    assert_sound(tmp_path / "out", undisturbed=undisturbed)


NAMES = ("a b", 'it\'s "so"', "two\nlines", "für_π_☃", "-r *?[x]{y}%20#&;$(z)`~\\", "a=b,c:d")


@pytest.mark.parametrize("name", [NAMES[2], pytest.param("".join(NAMES), marks=pytest.mark.slow)])
def test_odd_output_folders(warm_runner, undisturbed, tmp_path, name):
    config = small_run(tmp_path / name)
    killed = warm_runner.attempt(config, at=1, on="open run/checkpoints/step-N/evaluated")
    assert killed.code == KILLED, killed.output
    done = warm_runner.attempt(config)
    assert done.code == 0, done.output
    assert_sound(tmp_path / name, undisturbed=undisturbed)
    assert os.listdir(tmp_path) == [name]


@pytest.fixture
def begun(warm_runner, tmp_path):
    """A run that was killed at its last checkpoint but one, and its config."""
    config = complete(small_run(tmp_path / "out"))
    killed = warm_runner.attempt(config, at=6, on="mkdir run/checkpoints/.tmp-step")
    assert killed.code == KILLED
    return only_run(tmp_path / "out"), config


@pytest.mark.slow
@pytest.mark.parametrize("seen", [0, 1])
def test_checkpoints_that_appear_late(begun, undisturbed, monkeypatch, seen):
    """The run goes on from an older one and meets the newer ones on its way."""
    run, config = begun
    real, looks = checkpoint.complete, []

    def late(folder):
        looks.append(folder)
        return real(folder)[:seen] if len(looks) <= 2 else real(folder)

    monkeypatch.setattr(checkpoint, "complete", late)
    assert run_experiment(config, run) == "finished"
    assert_sound(run.path.parents[1], undisturbed=undisturbed)


@pytest.mark.slow
def test_a_result_that_appears_late(undisturbed, tmp_path, monkeypatch):
    shutil.copytree(undisturbed, tmp_path / "out")
    run, config = only_run(tmp_path / "out"), complete(small_run(tmp_path / "out"))
    before = numbers(run)
    real = run_dir_module.RunDir.result
    looks: list[int] = []

    def late(self):
        looks.append(1)
        return None if len(looks) == 1 else real(self)

    monkeypatch.setattr(RunDir, "result", late)
    assert run_experiment(config, run) == "finished"
    assert numbers(run) == before
