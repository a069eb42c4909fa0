"""Learning-rate factors and restart steps as pure functions of the step. Imports no torch.

The schedule and the restarts come from one knob, `relora.reset_frequency`, so they cannot drift
apart. Not for: applying a factor to an optimizer (`train.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator

from relora_core.config import (
    ADAPTERS,
    RunConfig,
    ScheduleConfig,
    adapted_shapes,
    linear_shapes,
)


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
    trained, no adapter has had an update. That merges zero, is no restart and takes nobody's turn.
    """
    found: dict[int, int | None] = {}
    last = restarts = 0
    for k in restart_multiples(config):
        step = k + config.relora.restart_offset
        if step == config.train.steps:
            break
        if _follows_full_rank(step, config=config, last=last):
            found[step] = None
        else:
            found[step] = restarts
            restarts += 1
        last = step
    return found


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


def scheduled_rank(step: int, *, config: RunConfig) -> int:
    """Rank of an adapter that is drawn anew when `step` updates are complete."""
    relora = config.relora
    return [relora.r, *(rank for at, rank in relora.rank_schedule if at <= step)][-1]


class Draws:
    """When each adapter was drawn, and of what rank at most its matrices are, by the config alone.

    An adapter's index is its place in `adapted_shapes`.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.redraws = config, redraws(config)
        self._steps = list(self.redraws)
        self._index = {name: i for i, name in enumerate(adapted_shapes(config))}

    def due(self, step: int, index: int) -> bool:
        """Whether this adapter is drawn anew at a step of `redraws`."""
        number, groups = self.redraws[step], self.config.relora.restart_groups
        return number is None or number % groups == index % groups

    def last(self, step: int, index: int) -> int:
        """Newest step before `step` at which a redraw renewed this adapter; 0 where none has."""
        before = reversed(self._steps[: bisect_left(self._steps, step)])
        return next((at for at in before if self.due(at, index)), 0)

    def rank(self, step: int, index: int) -> int:
        """Of an adapter just before the redraw at `step`; the most it can be where it adapts."""
        last = self.last(step, index)
        return scheduled_rank(last, config=self.config) if last else self.config.relora.r

    def update_rank(self, step: int, name: str) -> int:
        """The most that W + s B A of a linear can have moved by since the newest redraw, as a rank.

        Just before the redraw at `step`, if there is one. What was folded or trained at full rank
        in between is of any rank; an adapter that was not renewed at that redraw moves by
        s B A - s_0 B_0 A_0, which may be of twice its rank.
        """
        size = min(linear_shapes(self.config.model)[name])
        at = bisect_left(self._steps, step)
        since = self._steps[at - 1] if at else 0
        config = self.config
        full = (is_full_rank(update, config=config) for update in range(since, step))
        if config.method not in ADAPTERS or name not in self._index or any(full):
            return size
        index = self._index[name]
        rank = self.rank(step, index)
        return min(size, rank if not at or self.due(since, index) else 2 * rank)


def idle_adapters(config: RunConfig) -> list[str]:
    """Adapted linears whose adapter no update of the run can move.

    Where A is 0 as B is, neither has a gradient until A is drawn; and an update may have rate 0.
    """
    adapted = adapted_shapes(config)
    if not adapted or not config.relora.r:
        return []
    if _begins_inert(config):
        draws, never = Draws(config), config.train.steps
        first = [
            next((at for at in draws.redraws if draws.due(at, index)), never)
            for index in range(len(adapted))
        ]
    else:
        first = [config.relora.warm_start_steps] * len(adapted)
    moves = {update: _moves(update, config=config) for update in set(first)}
    return [name for name, update in zip(adapted, first, strict=True) if not moves[update]]


def _begins_inert(config: RunConfig) -> bool:
    """Whether the first adapters are A = B = 0; after a full-rank phase A is drawn in any case."""
    return config.relora.init_a == "zero" and not is_full_rank(0, config=config)


def _moves(first: int, *, config: RunConfig) -> bool:
    return any(
        not is_full_rank(update, config=config) and lr_factor(update, config=config) > 0
        for update in range(first, config.train.steps)
    )


def _never(config: RunConfig) -> list[str]:
    """What is asked for and lies beyond the run's end."""
    found, steps, relora = [], config.train.steps, config.relora
    end, floor = config.schedule.total_steps or steps, config.schedule.min_ratio
    if end < steps - 1 and (config.schedule.name == "linear" or not floor):
        found.append(
            f"the learning rate is 0 from step {end} of train.steps={steps} on: "
            f"schedule.total_steps={end}"
        )
    if (every := config.dynamics.every_steps) and every > steps:
        found.append(
            f"weights are measured before the first step alone: dynamics.every_steps={every} of "
            f"train.steps={steps}"
        )
    if config.method != "relora":
        return found
    if not (at := restart_steps(config)):
        first = _first_multiple(config)
        why = f"the first would be at step {first}" if first >= steps else "it has none to merge"
        found.append(
            f"no restart within train.steps={steps}: {why} (relora.reset_frequency="
            f"{relora.reset_frequency}), so method=relora does what method=lora does"
        )
    elif len(at) < relora.restart_groups:
        found.append(
            f"relora.restart_groups={relora.restart_groups} take turns in {len(at)} restarts: "
            "the others never restart"
        )
    for step, rank in relora.rank_schedule:
        if at and step > max(redraws(config)):
            found.append(
                f"relora.rank_schedule never comes to [{step}, {rank}]: the last restart is at "
                f"step {max(redraws(config))}"
            )
    return found


def _first_multiple(config: RunConfig) -> int:
    """The first step at which the knobs would have a restart, however long the run."""
    relora = config.relora
    first = max(relora.first_restart or 0, relora.reset_frequency)
    return -(-first // relora.reset_frequency) * relora.reset_frequency


def notices(config: RunConfig) -> list[str]:
    """What a plan should say of a valid config that may not do what its author expects."""
    found = []
    relora = config.relora
    kept = relora.optimizer_state == "keep" or (
        relora.optimizer_state != "zero" and relora.prune_ratio == 0
    )
    if config.method == "relora" and kept and relora.reset_adam_step:
        found.append(
            "relora.reset_adam_step has no say where no moment is pruned; runs of such a setting "
            "that earlier versions made had Adam's step reset"
        )
    n = config.train.steps
    factors = (lr_factor(step, config=config) for step in range(n))
    if not any(factors):
        return [*found, f"nothing is learnt: every update of train.steps={n} has learning rate 0"]
    if idle := idle_adapters(config):
        why = "every update of them has learning rate 0"
        if _begins_inert(config):
            why = (
                "relora.init_a=zero leaves them without a gradient until a restart draws A, and "
                f"none does within train.steps={config.train.steps}"
            )
        of = len(adapted_shapes(config))
        found.append(f"{len(idle)} of {of} adapters learn nothing: {why}")
    return found + _never(config)
