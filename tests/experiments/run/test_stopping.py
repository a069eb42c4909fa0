"""When a run is told to end early, and that nobody else is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import scheduler
from experiments.disk.run_dir import RunDir
from experiments.errors import RunLocked
from experiments.run import stopping
from experiments.run.single import carry_out
from experiments.run.stopping import SIGNALS, StopFlag, shielded

ROOT = Path(__file__).resolve().parents[3]
ALL = (signal.SIGINT, *SIGNALS)


@pytest.fixture
def run(nano, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 0.0)
    run_dir = RunDir(tmp_path / "runs" / "a")
    run_dir.create(nano())
    return run_dir


def handlers():
    return [signal.getsignal(number) for number in ALL]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_does_nothing_else(number, capfd):
    with StopFlag().installed() as flag:
        assert not flag()
        os.kill(os.getpid(), number)
        assert flag()
        assert flag()
    assert flag.reason == signal.Signals(number).name
    assert capfd.readouterr() == ("", "")


def test_the_first_reason_stays():
    with StopFlag(deadline=0.0).installed() as flag:
        assert flag()
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag()
    assert flag.reason == "time limit"


def test_a_forked_child_is_no_run():
    """A DataLoader's worker: a warning to the job leaves it alone, SIGTERM ends it."""
    read, write = os.pipe()
    with StopFlag().installed() as flag:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
            os.write(write, b"stopped" if flag() else b"at work")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert not flag()
    os.close(write)
    with open(read, "rb") as pipe:
        assert pipe.read() == b"at work"
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_the_deadline():
    assert not StopFlag(deadline=time.time() + 3600)()
    flag = StopFlag(deadline=time.time() - 1)
    assert flag()
    assert flag.reason == "time limit"


def test_the_users_cancel(run):
    flag = StopFlag()
    run.cancel_path.touch()
    assert not flag()  # it holds no run yet
    flag.run_dir = run
    with run.lock():
        assert flag()
    assert flag.reason == "cancelled"


def test_the_same_command_typed_again_leaves_the_users_cancel_to_the_process_at_work(run):
    with run.lock():
        run.cancel_path.touch()
        with pytest.raises(RunLocked):
            carry_out(run.config(), run, typed="out")
    assert run.cancel_path.exists()


def test_the_disk_is_asked_now_and_then(run, monkeypatch):
    """A file system shared by a cluster is not asked at every step."""
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 3600.0)
    flag = StopFlag()
    flag.run_dir = run
    flag._looked = time.monotonic()
    run.cancel_path.touch()
    with run.lock():
        assert not flag()
        flag._looked -= 3601
        assert flag()


def test_a_run_that_was_given_away_is_left_at_once(run):
    flag = StopFlag()
    flag.run_dir = run
    other = {"host": "elsewhere", "pid": 1, "started": 0.0, "job_id": "7"}
    with run.lock():
        assert not flag()
        (run.path / "lock").write_text(json.dumps(other))
        with pytest.raises(RunLocked, match="has been given to another process"):
            flag()
    assert run.lock_holder() == other  # which is not ours to take away


@pytest.mark.parametrize(
    ("mine", "theirs", "dead", "taken"),
    [
        ("7_1", "7_1", False, True),  # an earlier life of this job
        ("7_1", "7_2", False, False),
        ("7_1", "7_2", True, True),
        (None, None, False, False),
        (None, None, True, True),
    ],
)
def test_who_may_take_a_lock_over(run, monkeypatch, mine, theirs, dead, taken):
    monkeypatch.setattr(scheduler, "_job", mine and f"s.0123abcd/{mine}")
    holder = {"host": "elsewhere", "pid": 1, "started": 0.0, "job_id": theirs}
    (run.path / "lock").write_text(json.dumps(holder))
    refused = pytest.raises(RunLocked, match="process 1 on elsewhere")
    with contextlib.nullcontext() if taken else refused, run.lock(is_dead=lambda holder: dead):
        assert run.is_mine()
    assert run.lock_holder() == (None if taken else holder)


def test_ctrl_c_once_and_twice(capfd):
    with StopFlag().installed(*ALL) as flag:
        os.kill(os.getpid(), signal.SIGINT)
        assert flag()
        assert "stopping after this step (Ctrl-C again: at once)" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert flag.reason == "SIGINT"


def test_handlers_are_put_back():
    before = handlers()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with contextlib.suppress(ValueError), StopFlag().installed(*ALL):
        assert before != handlers()
        raise ValueError
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert handlers() == before


def test_handlers_are_the_main_threads_business():
    before, seen = handlers(), []

    def enter():
        with StopFlag().installed(), shielded():
            seen.append(handlers())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def ends_by(process, number, *, within):
    """Whether the signal ends the process."""
    process.send_signal(number)
    try:
        return process.wait(within) == -number
    except subprocess.TimeoutExpired:
        return False


@pytest.mark.parametrize("number", SIGNALS)
def test_a_shielded_process_survives_the_schedulers_signals(number):
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with shielded():
        inside = subprocess.Popen(["sleep", "60"])
    outside = subprocess.Popen(["sleep", "60"])
    try:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
        assert ends_by(outside, number, within=120)
        assert not ends_by(inside, number, within=0.2)
        assert ends_by(inside, signal.SIGKILL, within=120)
    finally:
        for process in (inside, outside):
            process.kill()
            process.wait()


LISTENS = """
import sys, time
from experiments.run.stopping import StopFlag
with StopFlag().installed() as flag:
    print("ready", flush=True)
    until = time.monotonic() + 120
    while not flag() and time.monotonic() < until:
        time.sleep(0.01)
print(flag.reason)
"""


@pytest.mark.parametrize("early", [False, True])
def test_a_shielded_process_that_listens_hears_them(early):
    """A packed run is told to end by the job; told before it listens, it hears that as well."""
    with shielded():
        process = subprocess.Popen(
            [sys.executable, "-c", LISTENS], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
    assert process.stdout is not None
    if not early:
        assert process.stdout.readline() == "ready\n"
    process.terminate()
    output, _ = process.communicate(timeout=240)
    assert output.splitlines()[-1] == "SIGTERM"
    assert process.returncode == 0
