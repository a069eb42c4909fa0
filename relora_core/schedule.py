"""Learning-rate factors and restart steps as pure functions of the step. Imports no torch.

The schedule and the restarts come from one knob, `relora.reset_frequency`, so they cannot drift
apart. Not for: applying a factor to an optimizer (`train.py`).
"""

from __future__ import annotations

import math

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


def restart_steps(config: RunConfig) -> list[int]:
    """Completed steps at which `relora` restarts: multiples of F (plus the offset), never the end.

    The update whose 0-based index is a multiple of F has factor 0 where there is a re-warm-up; a
    restart comes just before it, or, with restart_offset = 1 as published, just after it.
    """
    if config.method != "relora":
        return []
    relora, steps = config.relora, config.train.steps
    multiples = range(relora.reset_frequency, steps - relora.restart_offset, relora.reset_frequency)
    return [k + relora.restart_offset for k in multiples if _is_restart(k, config=config)]


def is_full_rank(step: int, *, config: RunConfig) -> bool:
    """Whether update `step` (0-based) of a method with adapters trains the base instead of them."""
    relora = config.relora
    if step < relora.warm_start_steps:
        return True
    cycle = relora.full_rank_steps + relora.low_rank_steps
    return cycle > 0 and (step - relora.warm_start_steps) % cycle < relora.full_rank_steps
