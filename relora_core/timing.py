"""How fast a config trains here: some steps of `train`, timed. Not for: what is worth timing."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from relora_core import costs, graphs, shell
from relora_core.config import EVALS, LARGEST_INT, RunConfig, divisors
from relora_core.events import NullSink
from relora_core.train import train

distributed: Any = torch.distributed  # its stubs leave out what they do
WARM_UP = 3
"""Steps that are not timed: the first ones compile, and reserve memory."""
TIMED, LEAST_S, MOST_S = 10, 3.0, 60.0
"""Steps that are timed; or more, if these take less than LEAST_S; or fewer, within MOST_S, but one
at least. Ten steps of milliseconds were up to 2.6 times as fast as their run, three seconds of
them 1.2 times."""
MOST = 1000
"""Of steps, however short."""
PASSES = 8
"""Passes of a timed step at most: those of a large batch are alike, and would take minutes. The
update then weighs more than it does in the run, a few per cent where a pass is large."""


@dataclass(kw_only=True, slots=True)
class Timing:
    """How long some steps took."""

    steps: int
    seconds: float
    """Without those of compiling."""
    tokens: int
    """Of all processes together."""
    world: int


class _Enough(Exception):
    """The steps are timed."""


def time_steps(config: RunConfig, *, folder: Path, cache_dir: Path) -> Timing:
    """Train a few steps and stop, on every rank alike; nothing is logged, evaluated or saved.

    `folder` is for files of a run, none of which are made. Raises what `train` raises.
    """
    world = shell.take_group().world
    config, watch = _shortened(config, world=world), _Watch(world)
    try:
        train(
            config,
            checkpoints=folder / "checkpoints",
            cache_dir=cache_dir,
            sink=NullSink(),
            stop=watch,
        )
        raise AssertionError("it ends by its watch")
    except _Enough:
        tokens = watch.timed * config.train.batch_size * config.data.seq_len
        return Timing(steps=watch.timed, seconds=watch.seconds, tokens=tokens, world=world)


def _shortened(config: RunConfig, *, world: int) -> RunConfig:
    """The config with nothing but training in it, and no phase at full rank before or between."""
    share, micro = config.train.batch_size // world, costs.micro_batch(config, processes=world)
    passes = max(share // micro, 1)
    fewer = max(n for n in divisors(passes) if n <= PASSES)
    batch = config.train.batch_size // passes * fewer
    sections = {
        name: dataclasses.replace(getattr(config.eval, name), enabled=False) for name in EVALS
    }
    no_phases = {"warm_start_steps": 0, "full_rank_steps": 0, "low_rank_steps": 0}
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=WARM_UP + MOST + 1, batch_size=batch),
        eval=dataclasses.replace(config.eval, **sections),
        relora=dataclasses.replace(config.relora, **no_phases),
        dynamics=dataclasses.replace(config.dynamics, every_steps=None),
        checkpoint=dataclasses.replace(
            config.checkpoint, every_steps=LARGEST_INT, every_minutes=None
        ),
        runtime=dataclasses.replace(config.runtime, log_every_steps=LARGEST_INT),
    )


class _Watch:
    """What `train` calls after each step; raises _Enough on all ranks after the same one."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.timed, self.seconds = TIMED, 0.0
        self._steps, self._start, self._compiled = 0, 0.0, 0.0

    def __call__(self) -> bool:
        if self.world > 1 and not distributed.is_initialized():
            return False  # asked while it waits for the others
        self._steps += 1
        if self._steps == WARM_UP - 1:
            self._restart()
        elif self._steps == WARM_UP:
            [self.timed] = broadcast_object_list([_count(self._lap())])
            self._restart()
        elif self._steps == WARM_UP + self.timed:
            self.seconds = self._lap()
            raise _Enough
        return False

    def _restart(self) -> None:
        self._start, self._compiled = _now(), graphs.seconds()

    def _lap(self) -> float:
        return _now() - self._start - (graphs.seconds() - self._compiled)


def _count(step_s: float) -> int:
    """How many steps of this length are timed."""
    step_s = max(step_s, 1e-9)
    enough = max(TIMED, math.ceil(LEAST_S / step_s))
    return max(1, min(enough, int(MOST_S / step_s), MOST))


def _now() -> float:
    """Seconds, once the GPU has done what it was asked for."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
