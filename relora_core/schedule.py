"""Learning-rate factors and restart steps as pure functions of the step. Imports no torch.

The schedule and the restarts come from one knob, `relora.reset_frequency`, so they cannot drift
apart. Not for: applying a factor to an optimizer (`train.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relora_core.config import RunConfig, ScheduleConfig


def decay_factor(step: int, *, schedule: ScheduleConfig, total_steps: int) -> float:
    """Factor of update `step` (0-based) without restarts: linear warm-up, then the decay.

    cosine: D(k) = m + (1 - m) (1 + cos(pi (k - w) / (N - w))) / 2; linear: (N - k) / (N - w), not
    below 0; both stay at their end value beyond N.
    """
    w, n = schedule.warmup_steps, total_steps
    if step < w:
        return step / w
    progress = min(1.0, (step - w) / (n - w)) if n > w else 1.0
    if schedule.name == "linear":
        return 1.0 - progress
    m = schedule.min_ratio
    return m + (1 - m) * 0.5 * (1 + math.cos(math.pi * progress))


def lr_factor(step: int, *, config: RunConfig) -> float:
    """Factor of update `step` (0-based) of a run: jagged at the restarts of `relora`.

    With F = reset_frequency and R = restart_warmup_steps, the R updates from a multiple of F on
    rise linearly from 0 to the decay's value where the rise ends (Lialin et al. 2023, Sec. 3).
    """
    schedule, relora = config.schedule, config.relora
    n = schedule.total_steps or config.train.steps
    f, r = relora.reset_frequency, relora.restart_warmup_steps
    start = step - step % f
    if config.method == "relora" and step % f < r and _is_restart(start, config=config):
        target = decay_factor(start + r, schedule=schedule, total_steps=n)
        return step % f / r * target
    return decay_factor(step, schedule=schedule, total_steps=n)


def _is_restart(step: int, *, config: RunConfig) -> bool:
    """Whether the run restarts at this multiple of F: not too early, and not at full rank."""
    first = config.relora.first_restart or config.relora.reset_frequency
    return step >= first and not is_full_rank(step, config=config)


def restart_multiples(config: RunConfig) -> Iterator[int]:
    """Multiples of F within the run from which on `relora` re-warms, and at which it draws anew."""
    steps, f = config.train.steps, config.relora.reset_frequency
    if config.method == "relora":
        yield from (k for k in range(f, steps, f) if _is_restart(k, config=config))


def redraws(config: RunConfig) -> dict[int, int | None]:
    """Completed steps at which `relora` draws A and B anew -> the restart's number from 0, or None.

    Multiples of F (plus the offset), never the end, none at full rank. The update whose 0-based
    index is a multiple of F has factor 0 where there is a re-warm-up; adapters are drawn just
    before it, or, with restart_offset = 1 as published, just after it. None: since the base was
    trained, no adapter has had an update. That merges zero: no restart, and no group's turn.
    """
    numbers: dict[int, int | None] = {}
    last = restarts = 0
    for k in restart_multiples(config):
        step = k + config.relora.restart_offset
        if step == config.train.steps:
            break
        if _follows_full_rank(step, config=config, last=last):
            numbers[step] = None
        else:
            numbers[step] = restarts
            restarts += 1
        last = step
    return numbers


def _follows_full_rank(step: int, *, config: RunConfig, last: int) -> bool:
    """Whether the base was trained after `last`, and no adapter moved between that and `step`."""
    if is_full_rank(step, config=config):  # the adapters have just been folded into the base
        return True
    for update in range(step - 1, last - 1, -1):
        if is_full_rank(update, config=config):
            return True
        if lr_factor(update, config=config) > 0:
            return False
    return False


def restart_steps(config: RunConfig) -> list[int]:
    """Completed steps at which `relora` restarts: those of `redraws` that merge something."""
    return [step for step, number in redraws(config).items() if number is not None]


def is_full_rank(step: int, *, config: RunConfig) -> bool:
    """Whether update `step` (0-based) of a method with adapters trains the base instead of them."""
    relora = config.relora
    if step < relora.warm_start_steps:
        return True
    cycle = relora.full_rank_steps + relora.low_rank_steps
    return cycle > 0 and (step - relora.warm_start_steps) % cycle < relora.full_rank_steps


def phase_changes(config: RunConfig) -> list[int]:
    """The first steps of the run at which full and low rank take turns; the others follow."""
    relora = config.relora
    warm, full, low = relora.warm_start_steps, relora.full_rank_steps, relora.low_rank_steps
    return [
        step
        for step in sorted({0, warm, warm + full, warm + full + low, warm + 2 * full + low})
        if step <= config.train.steps
        and is_full_rank(step, config=config)
        != (step > 0 and is_full_rank(step - 1, config=config))
    ]


def rank_changes(config: RunConfig) -> list[tuple[int, int]]:
    """(step, rank) of each redraw at which `rank_schedule` gives another rank than before."""
    relora = config.relora
    ranks = [(0, relora.r)]
    for step in redraws(config) if relora.rank_schedule else ():
        if (rank := scheduled_rank(step, config=config)) != ranks[-1][1]:
            ranks.append((step, rank))
    return ranks[1:]


def switch_rate(step: int, *, config: RunConfig) -> float:
    """Vectors of B, and as many of A, that `switchlora` switches in an adapter after `step`
    updates, on average: r / interval * 0.3^((step + 1) / (decay * train.steps))."""
    switch = config.switchlora
    if switch.interval is None:
        return 0.0
    first = switch.r / switch.interval
    if switch.decay is None:
        return first
    return first * 0.3 ** ((step + 1) / (switch.decay * config.train.steps))


def expected_switches(config: RunConfig) -> float:
    """Vectors of B, and as many of A, that `switchlora` switches in an adapter over the run, on
    average: the sum of `switch_rate` after 1, 2, ... train.steps - 1 updates."""
    n, decay = config.train.steps, config.switchlora.decay
    first = switch_rate(1, config=config)
    if decay is None:
        return first * (n - 1)
    fall = math.log(0.3) / (decay * n)
    return first * math.expm1((n - 1) * fall) / math.expm1(fall)


def scheduled_rank(step: int, *, config: RunConfig) -> int:
    """Rank of an adapter that is drawn anew when `step` updates are complete."""
    relora = config.relora
    return [relora.r, *(rank for at, rank in relora.rank_schedule if at <= step)][-1]
