"""Asked to end, a run is on disk at that very step and goes on as if nothing had been."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training import assert_same_state, run

from experiments.disk.run_dir import RunDir
from experiments.identity import config_to_json
from experiments.run import stopping
from experiments.run.runner import run_experiment
from experiments.run.stopping import StopFlag
from relora_core import checkpoint
from relora_core.config import BlimpConfig
from relora_core.data.grammar import VOCAB_SIZE
from tests import warm

STEPS = 12
EVALS = {"blimp": BlimpConfig(enabled=True, every_steps=4, max_pairs=2)}


def at_look(number: int):
    """A stop that becomes true when it is asked for the `number`-th time, from 1."""
    looks = itertools.count(1)
    return lambda: next(looks) >= number


@pytest.fixture
def config(nano):
    def make(**changes):
        changes.setdefault("checkpoint", {"every_steps": 1000})
        changes.setdefault("train", {"steps": STEPS})
        changes.setdefault("relora", {"dropout": 0.2})
        return nano(model={"vocab_size": VOCAB_SIZE}, **changes)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("method", ["relora", "full_rank"])
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(stops=st.lists(st.integers(1, STEPS), min_size=1, max_size=3))
def test_stopped_and_resumed_equals_undisturbed(
    config, undisturbed, tmp_path_factory, method, stops
):
    """Bit for bit, at any step, several times; restarts are at 4 and 8, a warm-up after each."""
    setting, folder = config(method=method), tmp_path_factory.mktemp("stopped")
    full, expected = undisturbed(setting)
    seen, done = {}, 0
    for after in stops:
        left = STEPS - done
        record = run(setting, folder, stop=at_look(min(after, max(left, 1))))
        seen |= record.metrics()
        if not left:
            assert record.state == "finished"
            break
        done += min(after, left)
        assert record.state == "interrupted"
        assert record.of("train")[-1] == done  # not a step more
        assert checkpoint.complete(folder / "checkpoints")[-1].name == f"step-{done:08d}"
    record = run(setting, folder)
    assert record.state == "finished"
    assert record.events[0].step == done
    assert seen | record.metrics() == full.metrics()
    assert_same_state(folder, expected)


@pytest.mark.parametrize("step", [4, 5])
def test_around_a_restart(config, undisturbed, tmp_path, step):
    setting = config(method="relora")
    full, expected = undisturbed(setting)
    assert full.of("restart") == [4, 8]
    first = run(setting, tmp_path, stop=at_look(step))
    second = run(setting, tmp_path)
    assert first.of("restart") + second.of("restart") == [4, 8]
    assert first.metrics() | second.metrics() == full.metrics()
    assert_same_state(tmp_path, expected)


def evaluations(record):
    return [e.step for e in record.events if e.kind == "eval"]


@pytest.mark.parametrize("step", [0, 4, STEPS])
def test_a_stop_during_an_eval(config, tmp_path, step):
    """The checkpoint is there already; the resumed run begins with the evals of that step."""
    setting = config(eval=EVALS)
    full = run(setting, tmp_path / "full")
    assert evaluations(full) == [0, 4, 8, STEPS]
    begun = []

    def seen(event):
        if event.kind == "phase" and event.step == step:
            begun.append(event)

    first = run(setting, tmp_path / "run", stop=lambda: bool(begun), seen=seen)
    assert first.state == "interrupted"
    assert step not in evaluations(first)
    second = run(setting, tmp_path / "run")
    assert second.state == "finished"
    assert second.events[0].step == step
    assert evaluations(first) + evaluations(second) == evaluations(full)
    assert first.metrics() | second.metrics() == full.metrics()
    assert_same_state(tmp_path / "run", tmp_path / "full")


@pytest.mark.parametrize("die_at", [("checkpoint", STEPS), ("phase", STEPS), ("eval", STEPS)])
def test_a_kill_between_the_last_checkpoint_and_the_result(config, tmp_path, die_at):
    setting = config(eval=EVALS)
    full = run(setting, tmp_path / "full")
    first = run(setting, tmp_path / "run", die_at=die_at)
    second = run(setting, tmp_path / "run")
    assert second.state == "finished"
    assert (second.events[0].step, evaluations(second)) == (STEPS, [STEPS])
    assert first.metrics() | second.metrics() == full.metrics()


def test_evals_that_are_in_the_record_are_not_repeated(config, tmp_path):
    setting = config(eval=EVALS)
    run(setting, tmp_path, die_at=("train", 6))  # evals of 4 done
    second = run(setting, tmp_path)
    assert (second.events[0].step, evaluations(second)) == (4, [8, STEPS])


def test_checkpoints_by_the_clock(config, tmp_path, monkeypatch):
    """A minute passes with each step: 2.5 minutes are over at every third."""
    setting = config(checkpoint={"every_steps": 1000, "every_minutes": 2.5, "keep_last": 99})
    now = [0.0]
    monkeypatch.setattr("relora_core.train.time.monotonic", lambda: now[0])

    def stop():
        now[0] += 60.0
        return False

    record = run(setting, tmp_path, stop=stop)
    assert record.state == "finished"
    assert record.of("checkpoint") == [3, 6, 9, STEPS]


# the whole run ----------------------------------------------------------------------------------
@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 0.0)
    return RunDir(tmp_path / "runs" / "a")


class Deadline(StopFlag):
    """Its time is up when it is asked for the fourth time."""

    looks = 0

    def __call__(self) -> bool:
        self.looks += 1
        self.deadline = 0.0 if self.looks >= 4 else None
        return super().__call__()


def in_folder(config, tmp_path, **changes):
    made = config(**changes)
    made.output_dir = str(tmp_path)
    return made


def test_an_early_end_is_told_and_the_same_again_finishes(config, run_dir, tmp_path):
    setting = in_folder(config, tmp_path)
    assert run_experiment(setting, run_dir, stop=Deadline()) == "interrupted"
    status = run_dir.status()
    assert (status.state, status.step, run_dir.newest_step()) == ("failed", 4, 4)
    assert status.error == "stopped (time limit); the same command resumes it"
    assert run_dir.lock_holder() is None
    assert run_dir.result() is None
    assert run_experiment(setting, run_dir, stop=StopFlag()) == "finished"
    status = run_dir.status()
    assert (status.state, status.attempts, status.error) == ("finished", 2, None)
    other = RunDir(tmp_path / "runs" / "b")
    run_experiment(setting, other)
    one, two = (
        {k: v for k, v in (r.result() or {})["metrics"].items() if not k.startswith("perf/")}
        for r in (run_dir, other)
    )
    assert one == two


class Canceller(StopFlag):
    """The user cancels the run while it is at its third step."""

    looks = 0

    def __call__(self) -> bool:
        self.looks += 1
        if self.looks == 3:
            assert self.run_dir is not None
            self.run_dir.cancel_path.touch()
        return super().__call__()


def test_a_cancelled_run_says_so_and_stays_so(config, run_dir, tmp_path):
    setting = in_folder(config, tmp_path)
    assert run_experiment(setting, run_dir, stop=Canceller()) == "cancelled"
    status = run_dir.status()
    assert (status.state, status.error, run_dir.newest_step()) == ("cancelled", None, 3)
    assert run_dir.lock_holder() is None
    assert run_experiment(setting, run_dir, stop=StopFlag()) == "cancelled"
    assert run_dir.status().attempts == 1
    run_dir.cancel_path.unlink()  # as a new launch does
    assert run_experiment(setting, run_dir, stop=StopFlag()) == "finished"
    steps = [e["step"] for e in run_dir.events() if e["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))


# several processes ------------------------------------------------------------------------------
RANK = """
import os, sys
from pathlib import Path
from experiments.identity import config_from_json
from relora_core import train as module

class Silent:
    def emit(self, event):
        pass

def counted(optimizer, lr):  # once a step; ranks that wait for each other ask `stop`, too
    global steps
    steps += 1
    set_lr_(optimizer, lr)

folder, steps = Path(sys.argv[1]), 0
set_lr_, module.set_lr_ = module.set_lr_, counted
config = config_from_json((folder / "config.json").read_text())
stops = os.environ["RANK"] == "1" and len(sys.argv) > 2
stop = lambda: stops and steps >= 5
folders = {"checkpoints": folder / "checkpoints", "cache_dir": folder}
print(module.train(config, **folders, sink=Silent(), stop=stop))
"""


def two_processes(folder: Path, *words: str) -> list[str]:
    """What each rank said last."""
    done = warm.ranks(2, ["-c", RANK, folder, *words], cwd=folder)
    assert [rank.returncode for rank in done] == [0, 0], done
    return [rank.stdout.split()[-1] for rank in done]


@pytest.mark.slow
def test_one_rank_that_is_told_stops_all_at_the_same_step(config, tmp_path):
    setting = config()
    for name in ("full", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config_to_json(setting))
    assert two_processes(tmp_path / "run", "stop") == ["interrupted"] * 2
    newest = checkpoint.complete(tmp_path / "run" / "checkpoints")[-1]
    assert json.loads((newest / "progress.json").read_text())["step"] == 5
    assert two_processes(tmp_path / "run") == ["finished"] * 2
    assert two_processes(tmp_path / "full") == ["finished"] * 2
    assert_same_state(tmp_path / "run", tmp_path / "full")
