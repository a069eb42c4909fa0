"""Processes that share a run compute one run, or none: they are compared, and end when asked."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.disk.run_dir import RunDir
from experiments.identity import config_to_json
from relora_core import checkpoint, ranks
from relora_core.config import ConfigError
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.shell import Group
from tests import warm

STEPS = 12
ALONE = Group(rank=1, world=2, address="127.0.0.1:1")  # where nobody serves


@pytest.fixture
def config(nano):
    def make(**changes):
        changes.setdefault("train", {"steps": STEPS})
        return nano(model={"vocab_size": VOCAB_SIZE}, **changes)

    return make


MEETINGS = """
import sys
from pathlib import Path
from experiments.identity import config_from_json
from relora_core import ranks, shell
from relora_core.config import ConfigError

config = config_from_json((Path(sys.argv[1]) / "config.json").read_text())
place, same = shell.take_group(), ranks.facts(config, run="one")
other = place.rank == 1
for change in ({"train.lr": 0.5, "seed": 3}, {"run": "two"}, {"code of relora_core": "new"},
               {"number of processes": 3}, {"data.text_field": "ä", "torch": None}, {}):
    own = same | (change if other else {})
    try:
        print(ranks.form_group(place, own, backend="gloo", stop=lambda: False), flush=True)
    except ConfigError as error:
        print(error, flush=True)
"""


@pytest.mark.slow
def test_ranks_that_differ_are_refused_on_each_of_them_before_they_compute(config, tmp_path):
    """By the first difference, in one line; those that are alike begin."""
    setting = config()
    (tmp_path / "config.json").write_text(config_to_json(setting))
    done = warm.ranks(2, ["-c", MEETINGS, tmp_path], cwd=tmp_path)
    code = ranks.facts(setting, run="one")["code of relora_core"]
    same = "all processes of a run must have the same"
    for rank in done:
        assert rank.stdout.splitlines() == [
            f"{same} seed, got 0 on rank 0 and 3 on rank 1 (and 1 more that differ)",
            f"{same} run, got 'one' on rank 0 and 'two' on rank 1",
            f"{same} code of relora_core, got {code!r} on rank 0 and 'new' on rank 1",
            f"{same} number of processes, got 2 on rank 0 and 3 on rank 1",
            f"{same} torch, got {torch.__version__!r} on rank 0 and None on rank 1 "
            "(and 1 more that differ)",
            "True",
        ], rank


def test_what_ranks_compare_is_every_knob(config):
    a, b = (ranks.facts(config(train={"lr": lr}), run="r") for lr in (1e-3, 2e-3))
    assert {key for key in a if a[key] != b[key]} == {"train.lr"}
    assert {"seed", "relora.r", "data.fingerprint", "runtime.device", "output_dir"} <= a.keys()


def test_a_rank_that_waits_is_asked_to_end(capsys, monkeypatch):
    monkeypatch.setattr(ranks, "SAY_AFTER_S", 0.0)
    looks = iter([False, False, True])
    assert not ranks.form_group(ALONE, {}, backend="gloo", stop=lambda: next(looks))
    line = "waiting for rank 0 at 127.0.0.1:1: this is rank 1 of 2 processes at 127.0.0.1:1\n"
    assert capsys.readouterr().err == line


def test_a_rank_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(ranks, "LONGEST_S", 0.2)
    with pytest.raises(ConfigError, match="2 processes must share this run, got none of rank 0"):
        ranks.form_group(ALONE, {}, backend="gloo", stop=lambda: False)


def test_a_store_answers_as_late_as_rank_0_may_come():
    """A process that connects would have the 60 s of that: NCCL starts after the data are read."""
    server = ranks.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True
    )
    for served, rank in ((True, 0), (True, 1), (False, 1)):  # by torchrun, or by rank 0
        place = Group(rank=rank, world=2, address=f"127.0.0.1:{server.port}", served=served)
        store = ranks._open_store(place, ranks._Wait(place, stop=lambda: False))
        assert store.timeout.total_seconds() == ranks.LONGEST_S
        inner = ranks.distributed.PrefixStore("group", ranks.distributed.PrefixStore("0", store))
        assert inner.timeout.total_seconds() == ranks.LONGEST_S


def test_two_processes_cannot_have_one_rank():
    store, come = ranks.distributed.HashStore(), ranks._Wait(ALONE, stop=lambda: True)
    assert not ranks._compare(store, ALONE, {}, come)
    with pytest.raises(ConfigError, match="each process must have its own RANK, got two of rank 1"):
        ranks._compare(store, ALONE, {}, come)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("sums", "equal"),
    [
        ([1.5, 1.5], True),
        ([1.5, 1.5 + 2**-50], False),
        ([1.5, NAN], False),
        ([NAN, NAN, NAN], True),  # diverged, on every rank
        ([NAN, INF], False),
        ([INF, INF], True),
        ([0.0, 0.0, 1e-30], False),
    ],
)
def test_ranks_are_equal_or_the_run_fails(sums, equal):
    gathered = torch.tensor(sums, dtype=torch.float64)
    accelerator: Any = SimpleNamespace(
        num_processes=len(sums), device=torch.device("cpu"), gather=lambda own: gathered
    )
    model = torch.nn.Linear(2, 2)
    if equal:
        assert ranks.require_equal(accelerator, model, step=3) == 0.0
        return
    with pytest.raises(ranks.RanksDisagree, match="different weights after step 3"):
        ranks.require_equal(accelerator, model, step=3)


APART = """
import os, sys
from pathlib import Path
from experiments.identity import config_from_json
from experiments.disk.run_dir import RunDir
from experiments.errors import one_line; from experiments.run.runner import run_experiment
from relora_core import train

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
set_lr_ = train.set_lr_
if "apart" in sys.argv:  # from the sixth step on, rank 1 learns faster
    train.set_lr_ = lambda optimizer, lr: set_lr_(optimizer, lr * (1 + rank * (next(steps) > 5)))
steps = iter(range(1, 100))
config = config_from_json((folder / "config.json").read_text())
try:
    print(run_experiment(config, RunDir(folder / "run")))
except Exception as error:
    print(one_line(error))
"""


@pytest.mark.slow
def test_ranks_whose_weights_differ_make_the_run_fail(config, tmp_path):
    """No checkpoint has them, no result either; from the one before the run ends as it should."""
    setting = config()
    setting.checkpoint.every_steps = 4
    (tmp_path / "config.json").write_text(config_to_json(setting))
    apart = warm.ranks(2, ["-c", APART, tmp_path, "apart"], cwd=tmp_path)
    run_dir = RunDir(tmp_path / "run")
    for rank in apart:
        assert rank.stdout.startswith("RanksDisagree: the processes of this run have different"), (
            apart
        )
        assert "after step 6" in rank.stdout or "after step 8" in rank.stdout
    assert (run_dir.status().state, run_dir.result()) == ("failed", None)
    assert "have different weights" in (run_dir.status().error or "")
    assert [path.name for path in checkpoint.complete(run_dir.checkpoints)] == ["step-00000004"]
    again = warm.ranks(2, ["-c", APART, tmp_path], cwd=tmp_path)
    assert [rank.stdout for rank in again] == ["finished\n"] * 2, again
    assert run_dir.status().state == "finished"


WAITS = """
import os, sys
from pathlib import Path
from experiments.run import stopping
from experiments.identity import config_from_json
from experiments.disk.run_dir import RunDir
from experiments.run.runner import run_experiment
from experiments.run.stopping import StopFlag
from relora_core import train

stopping.DEAF_S = 1.0
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
config = config_from_json((folder / "config.json").read_text())

def waits(optimizer, lr):
    if rank == 1 and next(steps) == 3:  # as one that takes no part any more
        (folder / "waits").touch()
        while True:
            stopping.time.sleep(60)
    set_lr_(optimizer, lr)

steps, set_lr_ = iter(range(100)), train.set_lr_
train.set_lr_ = waits
stop = StopFlag()
(folder / f"{rank}.pid").write_text(str(os.getpid()))
with stop.installed():
    print(run_experiment(config, RunDir(folder / "run"), stop=stop), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "start"])
def test_a_rank_whose_others_do_not_come_ends_when_it_is_asked_to(config, tmp_path, where):
    """In a collective Python's handlers do not run: without more, kill -9 would be what is left."""
    (tmp_path / "config.json").write_text(config_to_json(config()))
    count = 2 if where == "step" else 1
    places = warm.places(2)[:count]
    started = [warm.start(["-c", WAITS, tmp_path], cwd=tmp_path, env=env) for env in places]
    try:
        _await(tmp_path / ("waits" if where == "step" else "0.pid"))
        time.sleep(2.0 if where == "step" else 4.0)  # as a rule it waits by then
        os.kill(int((tmp_path / "0.pid").read_text()), signal.SIGTERM)
        first = started[0].wait()
    finally:
        for rank in started:
            rank.process.kill()
    if where == "start":  # nothing is at work yet that must be cut off
        assert (first.returncode, first.stdout) == (0, "interrupted\n"), first
        assert RunDir(tmp_path / "run").status().error == (
            "stopped (SIGTERM); the same command resumes it"
        )
    else:
        assert first.returncode == 128 + signal.SIGTERM, first
        assert "SIGTERM: ended while waiting for the others" in first.stderr


def _await(file: Path) -> None:
    deadline = time.monotonic() + 300
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_that_torchrun_starts_again_meet_anew(monkeypatch):
    """Its store still has the keys of those before."""
    monkeypatch.setattr(ranks, "_store", ranks.distributed.HashStore())
    monkeypatch.setattr(ranks, "_turns", None)
    for start in ("0", "1"):
        monkeypatch.setattr(ranks, "_meetings", itertools.count())  # as in a new process
        place = dataclasses.replace(ALONE, served=True, start=start)
        assert not ranks.form_group(place, {}, backend="gloo", stop=lambda: True)
