"""What is true of a run is judged by what was read once: a table of what is seen and what follows.

Reading the files of real runs: tests/sweeps/test_sweep_state.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import json_files
from experiments.disk.run_dir import SILENT_AFTER_S, RunDir, Status
from experiments.disk.state import Seen, judge, look, state_of
from experiments.disk.states import Outcome, State

HERE, ELSEWHERE, NOW = "here", "elsewhere", 1e6
HELD = {"host": ELSEWHERE, "pid": 1}
FRESH, SILENT = NOW - 1, NOW - 2 * SILENT_AFTER_S


def seen(state="planned", *, host=HERE, heartbeat=FRESH, error=None, holder=None, ended=None, **of):
    status = Status(state=State(state), host=host, heartbeat=heartbeat, error=error)
    return Seen(path=Path("out/runs/r"), status=status, holder=holder, ended=ended, host=HERE, **of)


FINISHED, DIVERGED = State.FINISHED, State.DIVERGED
KILLED = "killed (no process; last heartbeat 1 s ago)"
LEFT_NONE = "says finished but left no result; the same command goes on with it"
DAMAGED = "says diverged but its result.json is damaged; the same command goes on with it"
NO_LAUNCHER = "its launcher has ended; the same command runs it"
CHANGED = "goes on with other data than planned"
TABLE = [
    # who holds the lock is at work, whatever the other files say
    (seen("planned", holder=HELD), "running", None),
    (seen("failed", holder=HELD, error="boom"), "running", None),
    (seen("finished", holder=HELD, ended=FINISHED), "running", None),
    (
        seen("running", holder=HELD, heartbeat=SILENT),
        "running",
        "no heartbeat from here for 10 min",
    ),
    # a result counts, whatever the status says
    (seen("running", ended=FINISHED), "finished", None),
    (seen("queued", ended=DIVERGED), "diverged", None),
    (seen("failed", ended=FINISHED, error="boom"), "finished", "boom"),
    # and without one nothing is done
    (seen("finished"), "failed", LEFT_NONE),
    (seen("diverged", damaged=True), "failed", DAMAGED),
    # only a process of this host is certainly dead
    (seen("running"), "failed", KILLED),
    (seen("running", host=""), "failed", KILLED),
    (seen("running", heartbeat=0.0), "failed", "killed (no process; last heartbeat never)"),
    (seen("running", host=ELSEWHERE), "running", None),
    (
        seen("running", host=ELSEWHERE, heartbeat=SILENT),
        "running",
        "no heartbeat from elsewhere for 10 min",
    ),
    # else the run's own status stands
    (seen("queued"), "queued", None),
    (seen("queued", orphaned=True), "planned", NO_LAUNCHER),
    (seen("failed", error="boom"), "failed", "boom"),
    (seen("pruned"), "pruned", None),
    (seen("cancelled", cancelled=True), "cancelled", None),
    (seen("planned"), "planned", None),
    # what was taken on purpose is said where there is nothing else to say
    (seen("running", holder=HELD, changed=CHANGED), "running", CHANGED),
    (seen("failed", error="boom", changed=CHANGED), "failed", "boom"),
]


@pytest.mark.parametrize(("files", "state", "reason"), TABLE)
def test_what_was_seen_decides_the_state(files, state, reason):
    judged = judge(files, now=NOW)
    assert (judged.state, judged.reason) == (state, reason)
    assert judged.run_id == "r"


def test_every_state_is_in_the_group_that_its_use_asks_for():
    groups = {s.value: [g for g in ("done", "in_flight", "bad") if getattr(s, g)] for s in State}
    assert groups == {
        "planned": [],
        "queued": ["in_flight"],
        "running": ["in_flight"],
        "finished": ["done"],
        "failed": ["bad"],
        "diverged": ["done", "bad"],
        "pruned": [],
        "cancelled": ["bad"],
        "lost": ["bad"],
    }
    assert {o.value for o in Outcome} - {s.value for s in State} == {"interrupted"}


# looking ------------------------------------------------------------------------------------------
@pytest.fixture
def run(nano, tmp_path):
    run_dir = RunDir(tmp_path / "out" / "runs" / "r")
    run_dir.create(nano())
    return run_dir


@pytest.mark.parametrize("state", ["planned", "queued", "running", "failed", "finished"])
def test_a_look_reads_each_file_once(run, state, monkeypatch):
    run.update_status(state=state, host=ELSEWHERE)
    if state == "finished":
        run.write_result({"state": state, "metrics": {}})
    read, names = json_files.read, []
    monkeypatch.setattr(json_files, "read", lambda path: names.append(path.name) or read(path))
    assert state_of(run).state == state
    assert sorted(names) == ["changes.json", "lock", "result.json", "status.json"]


@pytest.mark.parametrize("end", ["cancelled", "finished"])
def test_a_run_that_ends_during_a_look_was_not_killed(run, end, monkeypatch):
    """It lets go of its lock between the reads of its status and of its lock."""
    run.update_status(state="running")
    look_for_holder = RunDir.lock_holder

    def ends_meanwhile(self):
        run.update_status(state=end)
        if end == "finished":
            run.write_result({"state": end, "metrics": {}})
        return look_for_holder(self)

    monkeypatch.setattr(RunDir, "lock_holder", ends_meanwhile)
    assert judge(look(run), now=NOW).state == end
