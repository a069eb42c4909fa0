"""Worker processes in slots: started, watched, stopped."""

from __future__ import annotations

import contextlib
import signal
import sys
import time

import pytest

from sweeps.local import processes
from sweeps.local.launcher import WORKERS
from sweeps.local.processes import Workers, open_processes
from sweeps.local.slots import Slots

WORKER = """
import os, pathlib, signal, sys, time
path = pathlib.Path(sys.argv[1])
asked = signal.SIG_IGN if path.name == "deaf" else lambda *_: sys.exit(7)
signal.signal(signal.SIGTERM, asked)
(path / "gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
while not (path / "end").exists():
    time.sleep(0.02)
"""


@pytest.fixture
def two(tmp_path):
    """No process so far, in two slots with a GPU each; `start` waits until one is at work."""
    workers = Workers(command=[sys.executable, "-c", WORKER])
    slots = Slots(parallel=2, threads=1, gpus=["3", "5"])
    with open_processes(workers, slots=slots, runs=2, say=print) as ours:

        def start(name: str) -> str:
            (tmp_path / name).mkdir()
            ours.start(name, tmp_path / name, log=tmp_path / f"{name}.log")
            gpu, deadline = tmp_path / name / "gpu", time.monotonic() + 60
            while not (gpu.exists() and gpu.read_text()) and time.monotonic() < deadline:
                time.sleep(0.02)
            return gpu.read_text()

        yield ours, start
        for _, process in ours.running.values():
            process.kill()
            process.wait()


def test_a_slot_is_free_again_when_its_process_has_ended(two, tmp_path):
    ours, start = two
    assert (start("a"), ours.ready, start("b"), ours.ready) == ("3", True, "5", False)
    assert (ours.reap(), ours.work) == ([], ["a", "b"])
    (tmp_path / "a" / "end").touch()
    deadline = time.monotonic() + 60
    while not (ended := ours.reap()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (ended, ours.work, ours.ready) == ([("a", 0)], ["b"], True)
    assert start("c") == "3"


@pytest.mark.parametrize(
    ("name", "grace_s", "code"), [("kind", 60.0, 7), ("deaf", 0.0, -signal.SIGKILL)]
)
def test_who_does_not_end_when_asked_is_killed(two, monkeypatch, name, grace_s, code):
    ours, start = two
    monkeypatch.setattr(processes, "GRACE_S", grace_s)
    start(name)
    assert (ours.stop(), ours.work) == ([(name, code)], [])


def test_tests_can_replace_how_a_warm_parent_is_opened(monkeypatch):
    """tests/forks.py has forks in place of parents: where that fails unseen, each takes seconds."""
    opened = []

    def open_parent(command, *, environment):
        opened.append(command)
        return contextlib.nullcontext()

    monkeypatch.setattr(processes.warm, "open_parent", open_parent)
    slots = Slots(parallel=2, threads=1, gpus=[])
    with open_processes(WORKERS, slots=slots, runs=2, say=print):
        assert opened == [WORKERS.parent]
