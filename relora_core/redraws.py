"""When adapters are drawn anew, and which of them never learn. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left

from relora_core.config import ADAPTERS, RunConfig, adapted_shapes, linear_shapes
from relora_core.schedule import (
    expected_switches,
    is_full_rank,
    lr_factor,
    redraws,
    restart_steps,
    scheduled_rank,
)


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
    """Adapted linears with an adapter that no update of the run can change.

    If A and B are both 0, neither has a gradient until A is drawn; an update may also have rate 0.
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
    """Notes on settings that do not fit the length of the run."""
    lines, steps, relora = [], config.train.steps, config.relora
    end, floor = config.schedule.total_steps or steps, config.schedule.min_ratio
    if end < steps - 1 and (config.schedule.name == "linear" or not floor):
        lines.append(
            f"the learning rate is 0 from step {end} of train.steps={steps} on: "
            f"schedule.total_steps={end}"
        )
    if (every := config.dynamics.every_steps) and every > steps:
        lines.append(
            f"weights are measured before the first step alone: dynamics.every_steps={every} of "
            f"train.steps={steps}"
        )
    if config.method != "relora":
        return lines
    if not (at := restart_steps(config)):
        first = _first_multiple(config)
        why = f"the first would be at step {first}" if first >= steps else "it has none to merge"
        lines.append(
            f"no restart within train.steps={steps}: {why} (relora.reset_frequency="
            f"{relora.reset_frequency}), so method=relora does what method=lora does"
        )
    elif len(at) < relora.restart_groups:
        lines.append(
            f"relora.restart_groups={relora.restart_groups} take turns in {len(at)} restarts: "
            "the others never restart"
        )
    for step, rank in relora.rank_schedule:
        if at and step > max(redraws(config)):
            lines.append(
                f"relora.rank_schedule never comes to [{step}, {rank}]: the last restart is at "
                f"step {max(redraws(config))}"
            )
    return lines


def _first_multiple(config: RunConfig) -> int:
    """The first step at which the knobs would have a restart, however long the run."""
    relora = config.relora
    first = max(relora.first_restart or 0, relora.reset_frequency)
    return -(-first // relora.reset_frequency) * relora.reset_frequency


def notices(config: RunConfig) -> list[str]:
    """Notes of a plan on a valid config that may not do what its author expects."""
    lines = []
    relora = config.relora
    keeps_moments = relora.optimizer_state == "keep" or (
        relora.optimizer_state != "zero" and relora.prune_ratio == 0
    )
    if config.method == "relora" and keeps_moments and relora.reset_adam_step:
        lines.append(
            "relora.reset_adam_step has no say where no moment is pruned; runs of such a setting "
            "that earlier versions made had Adam's step reset"
        )
    n = config.train.steps
    factors = (lr_factor(step, config=config) for step in range(n))
    if not any(factors):
        return [*lines, f"nothing is learnt: every update of train.steps={n} has learning rate 0"]
    if idle := idle_adapters(config):
        why = "every update of them has learning rate 0"
        if _begins_inert(config):
            why = (
                "relora.init_a=zero leaves them without a gradient until a restart draws A, and "
                f"none does within train.steps={config.train.steps}"
            )
        of = len(adapted_shapes(config))
        lines.append(f"{len(idle)} of {of} adapters learn nothing: {why}")
    return lines + _never(config) + _hardly_switches(config)


def _hardly_switches(config: RunConfig) -> list[str]:
    """Of switchlora in a short run, and where its rank is that of the weight."""
    switch = config.switchlora
    if config.method != "switchlora" or switch.interval is None:
        return []
    lines, shapes = [], switch.targets(config).values()
    if full := sum(not switch.spare_vectors(shape) for shape in shapes):
        lines.append(
            f"{full} of {len(shapes)} adapters switch nothing: with switchlora.r={switch.r} their "
            "B·A has full rank, and no vector is left to switch"
        )
    if (expected := expected_switches(config)) < 1:
        decay = "null" if switch.decay is None else f"{switch.decay:g}"
        lines.append(
            f"method=switchlora does nearly what method=lora does: of an adapter's {switch.r} "
            f"vectors {expected:.2g} are switched within train.steps={config.train.steps} on "
            f"average (switchlora.interval={switch.interval}, switchlora.decay={decay})"
        )
    return lines
