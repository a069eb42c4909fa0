"""Killed at any file operation or any time, again and again, a run ends as an undisturbed one.

Promised: the same command again finishes it, with the same final metrics, record, weights, moments
and generators, bit for bit, and leaves no file behind that `python -m sweeps gc` does not name.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import KILLED, assert_sound
from tests.faults.inject import Runner, small_run

PHASES = (  # of a run's life, in this order, as the operation at which it ends there
    "link run/.lock",
    "write run/events",
    "write run/checkpoints/.tmp-step/optimizer",
    "rename run/checkpoints/.tmp-step",
    "open run/checkpoints/step-N/evaluated",
    "rename run/checkpoints/step",
    "fsync run/.result",
    "unlink run/lock",
)


class Victim:
    """A run that is killed a few times, finished and compared; then another one takes its place."""

    def __init__(self, runner: Runner, folder: Path, *, undisturbed: Path, most: int) -> None:
        self.runner, self.folder, self.undisturbed, self.most = runner, folder, undisturbed, most
        self.kills = self.number = self.run_kills = 0

    @property
    def out(self) -> Path:
        return self.folder / str(self.number)

    def kill(self, **fault: Any) -> list[str]:
        """The operations up to the one at which it died; empty where it had ended before."""
        killed = self.runner.attempt(small_run(self.out), **fault)
        if killed.code == KILLED:
            self.kills += 1
            self.run_kills += 1
            if self.run_kills == self.most:
                self.finish()
            return killed.trace
        assert killed.code == 0, killed.output
        self.finish()
        return []

    def finish(self) -> None:
        again = self.runner.attempt(small_run(self.out))
        assert again.code == 0, again.output
        assert_sound(self.out, undisturbed=self.undisturbed)
        self.number, self.run_kills = self.number + 1, 0


@pytest.mark.slow
def test_killed_in_each_phase(warm_runner, undisturbed, tmp_path):
    victim = Victim(warm_runner, tmp_path, undisturbed=undisturbed, most=len(PHASES))
    for phase in PHASES:
        assert victim.kill(at=1, on=f"^{phase}")
    assert victim.number == 1


def exactly(label: str) -> str:
    return f"^{re.escape(label)}$"


@pytest.mark.slow
def test_killed_at_every_distinct_operation(warm_runner, undisturbed, tmp_path):
    """What only a run's beginning does is the first fault of a run, all else befalls it later."""
    trace = Counter(warm_runner.attempt(small_run(tmp_path / "traced")).trace)
    config = small_run(tmp_path / "resumed")
    warm_runner.attempt(config, at=1, on=f"^{PHASES[3]}")
    resumed = set(warm_runner.attempt(config).trace)
    early, later = [k for k in trace if k not in resumed], [k for k in trace if k in resumed]
    random.Random(0).shuffle(later)
    victim, reached = Victim(warm_runner, tmp_path, undisturbed=undisturbed, most=8), set()
    while early or later:
        label = (early if early and not victim.run_kills else later or early).pop()
        # A run that goes on does the less the later it was killed.
        at = 1 + (trace[label] > 2 and len(later) % 2)
        died = victim.kill(on=exactly(label), at=at) or victim.kill(on=exactly(label), at=1)
        reached |= set(died[-1:])
    victim.finish()
    assert reached == set(trace)
    assert victim.kills >= len(reached)


@pytest.mark.slow
def test_killed_at_random_operations_and_times(warm_runner, undisturbed, tmp_path):
    """Those of attempts that resume, too: what torn and stale files are there differs each time."""
    draw = random.Random(1)
    victim = Victim(warm_runner, tmp_path, undisturbed=undisturbed, most=6)
    for _ in range(12):
        victim.kill(at=draw.randint(1, 200), on=".")
        victim.kill(kill_after_s=draw.uniform(0.02, 0.6))
    victim.finish()
    assert victim.kills >= 12
