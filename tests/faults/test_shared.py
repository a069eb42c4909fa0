"""One run, whatever is about it: other processes, an earlier boot, a clock set anew, a slow disk.

Promised: one process at a time works on a run, a lock counts as long as its process lives and no
longer, and neither clocks nor odd paths nor late files change a number.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from typing import Any

import psutil
import pytest

from experiments.disk import process
from experiments.disk import run_dir as run_dir_module
from experiments.disk.run_dir import RunDir
from experiments.errors import RunLocked
from experiments.run.complete import complete
from experiments.run.runner import run_experiment
from relora_core import checkpoint
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
