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
    schedule = config.schedule
    n = schedule.total_steps or config.train.steps
    f, r = config.relora.reset_frequency, config.relora.restart_warmup_steps
    if config.method == "relora" and step >= f and step % f < r:
        target = decay_factor(step - step % f + r, schedule=schedule, total_steps=n)
        return step % f / r * target
    return decay_factor(step, schedule=schedule, total_steps=n)


def restart_steps(config: RunConfig) -> list[int]:
    """Completed steps at which `relora` restarts: every multiple of F that an update still follows.

    The update with this 0-based index is the first one after the restart; its factor is 0 where
    there is a re-warm-up.
    """
    if config.method != "relora":
        return []
    return list(
        range(config.relora.reset_frequency, config.train.steps, config.relora.reset_frequency)
    )
