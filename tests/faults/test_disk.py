"""Whatever the disk does to a run, it says so in one line, and the same command finishes it after.

Promised: no traceback, exit code 1, no checkpoint lost to a failed write, damaged files noticed and
replaced, and in the end the numbers of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from errno import EIO, ENOSPC, EROFS
from pathlib import Path

import pytest

from experiments.disk.run_dir import RunDir
from experiments.disk.state import state_of
from relora_core import checkpoint
from tests.faults.conftest import KILLED, assert_sound, only_run
from tests.faults.inject import Outcome, Runner, small_run


def assert_one_line(done: Outcome, *, reason: str) -> None:
    """2 where the folder cannot be written to from the start."""
    assert done.code in (1, 2), done.output
    assert "Traceback" not in done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert reason in line


def failed(runner: Runner, out: Path, **fault) -> bool:
    """Whether the fault ended the attempt, and then in one line, with no checkpoint harmed."""
    before = {path: state_of(RunDir(path)).attempts for path in out.glob("runs/*")}
    done = runner.attempt(small_run(out), **fault)
    if done.code:
        reason = os.strerror(fault["errno"])
        assert_one_line(done, reason=reason)
        for path in out.glob("runs/*"):
            run = RunDir(path)
            for one in checkpoint.complete(run.checkpoints):
                assert checkpoint.damage(one) is None
            state = state_of(run)
            assert state.state in ("planned", "failed", "finished")
            begun = state.attempts > before.get(path, 0)
            if begun and state.state == "failed" and not fault.get("lasting"):
                assert reason in (state.reason or "")
                assert reason in run.error_path.read_text()
    return done.code != 0


def finished(runner: Runner, out: Path, *, undisturbed: Path) -> None:
    again = runner.attempt(small_run(out))
    assert again.code == 0, again.output
    assert_sound(out, undisturbed=undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        {"at": 3, "on": "write run/checkpoints/.tmp-step/model", "errno": ENOSPC},
        {"at": 9, "on": "write run/events", "errno": ENOSPC, "lasting": True},
    ],
)
def test_a_full_disk(warm_runner, undisturbed, tmp_path, fault):
    assert failed(warm_runner, tmp_path / "out", **fault)
    finished(warm_runner, tmp_path / "out", undisturbed=undisturbed)


@pytest.mark.slow
def test_an_error_at_every_distinct_operation(warm_runner, undisturbed, tmp_path):
    """At one of the times that it is done, ENOSPC and EIO in turn; not of closing and removing.

    Up to six in a row befall one run, which the same command then finishes.
    """
    trace = warm_runner.attempt(small_run(tmp_path / "traced")).trace
    harmless, runs, faults = [], 0, 0
    tried = [(k, n) for k, n in Counter(trace).items() if not k.startswith(("close", "unlink"))]
    for number, (label, times) in enumerate(tried):
        fault = {"at": 1 + number % times, "on": f"^{re.escape(label)}$"}
        fault["errno"] = (ENOSPC, EIO)[number % 2]
        for at in (fault["at"], 1, 1):  # it may be done less often, or by a run's beginning alone
            out = tmp_path / str(runs)
            if failed(warm_runner, out, **(fault | {"at": at})):
                faults += 1
                break
            assert_sound(out, undisturbed=undisturbed)
            runs, faults = runs + 1, 0
        else:
            harmless.append(label)
        if faults == 6:
            finished(warm_runner, tmp_path / str(runs), undisturbed=undisturbed)
            runs, faults = runs + 1, 0
    finished(warm_runner, tmp_path / str(runs), undisturbed=undisturbed)
    # Done otherwise, or there already; a lock that cannot be held is judged by its process alone.
    spared = ("link ", "open .", "mkdir ", "unlink run/lock", "open run/lock")
    assert [label for label in harmless if not label.startswith(spared)] == []


@pytest.mark.slow
@pytest.mark.parametrize(("errno", "first"), [(ENOSPC, 1), (EROFS, 48), (EIO, 95)])
def test_a_disk_that_stays_broken(warm_runner, undisturbed, tmp_path, errno, first):
    """From some operation on, every one fails, those that would record the failure included."""
    for at in range(first, 420, 140):
        out = tmp_path / str(at)
        assert failed(warm_runner, out, at=at, on=".", errno=errno, lasting=True)
        finished(warm_runner, out, undisturbed=undisturbed)


# damage -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def half(warm_runner, tmp_path_factory) -> Path:
    """The output folder of a run that was killed between its second and its third checkpoint."""
    out = tmp_path_factory.mktemp("half") / "out"
    killed = warm_runner.attempt(small_run(out), at=1, on="open run/checkpoints/step-N/evaluated")
    assert killed.code == KILLED
    return out


@pytest.fixture
def begun(half, tmp_path) -> RunDir:
    """A copy of that run."""
    shutil.copytree(half, tmp_path / "out")
    return only_run(tmp_path / "out")


@pytest.fixture
def finish(warm_runner, undisturbed, tmp_path):
    """What the same command says; the run must be sound after it."""

    def go(**faults) -> str:
        done = warm_runner.attempt(small_run(tmp_path / "out"), **faults)
        assert done.code == 0, done.output
        assert "Traceback" not in done.output
        assert_sound(tmp_path / "out", undisturbed=undisturbed)
        return done.output

    return go


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.unlink()  # a link of it in another checkpoint stays as it is
    file.write_bytes(content)


def started(run: RunDir) -> dict[str, object]:
    return [e for e in run.raw_events() if e["kind"] == "start"][-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model.safetensors", truncate),
        ("optimizer.pt", flip),
        ("checksums.json", flip),
        ("frozen.safetensors", Path.unlink),
        ("checksums.json", Path.unlink),  # as of an older version
    ],
)
def test_a_damaged_checkpoint_is_reported_and_passed_over(begun, finish, name, harm):
    newest = checkpoint.complete(begun.checkpoints)[-1]
    harm(newest / name)
    printed = finish()
    unneeded = (name, harm) == ("checksums.json", Path.unlink)
    assert ("warning: step-00000012 is damaged" in printed) != unneeded
    assert started(begun)["step"] == (12 if unneeded else 8)


def test_a_run_without_any_checkpoint_left_begins_anew(begun, finish):
    for path in checkpoint.complete(begun.checkpoints):
        truncate(path / "optimizer.pt")
    assert finish().count("none is left, so it begins anew") == 2
    assert started(begun)["step"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_torn_last_event(begun, finish, kept):
    *lines, last = begun.events_path.read_bytes().splitlines(keepends=True)
    begun.events_path.write_bytes(b"".join([*lines, last[: int(len(last) * kept)]]))
    finish()
    assert started(begun)["step"] == 12


GARBAGE = (b"", b"\0\xff{", b"[]")


@pytest.mark.slow
@pytest.mark.parametrize("content", GARBAGE)
@pytest.mark.parametrize("name", ["status.json", "result.json", "lock", "attempts/001.json"])
def test_garbage_in_a_file_of_the_run(begun, finish, name, content):
    path = begun.path / name
    path.write_bytes(content)
    os.utime(path, (0, 0))
    finish()
    assert started(begun)["attempt"] == 2


@pytest.mark.parametrize("content", GARBAGE[1:3])
def test_a_damaged_result_is_made_anew(warm_runner, undisturbed, tmp_path, finish, content):
    shutil.copytree(undisturbed, tmp_path / "out")
    run = only_run(tmp_path / "out")
    run.result_path.write_bytes(content)
    assert state_of(run).state == "failed"
    finish()
