"""What a plan will cost in device-hours, by the speed of finished runs; and the check of a budget.

A run takes its training FLOPs over the FLOP/s of finished runs, and what they took for start-up,
evals and dynamics. Not for: memory and disk (`relora_core/costs.py`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.disk.output_dir import all_runs, runs_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.state import RunState
from experiments.disk.states import State
from relora_core import costs
from relora_core.config import EVALS, ConfigError, RunConfig, runs_eval
from sweeps.planning.plan import Cell

CPU = "cpu"
SPREAD = 0.3
"""Margin of one measured run: equal runs on one machine were 0.75 to 1.3 times as fast as their
median, depending on its load. Of n runs it is this over the root of n."""
SCALED = 3.0
"""Margin, as a factor up and down, for a run of another shape: a model of 11 M parameters reached
half the FLOP/s of one of 65 M, and one of 40 k a fifth."""


@dataclass(kw_only=True, slots=True)
class Rate:
    """How fast a finished run was."""

    run_id: str
    label: str
    """Name of its model."""
    device: str
    """Name of the GPU, or `cpu`."""
    shape: str
    forward_flops: int
    """Per token."""
    flops_per_s: float
    """Training FLOPs of each process in a second of training."""
    overhead_s: float | None
    """Process-seconds of each pause (start, eval, dynamics); None: unknown."""


@dataclass(kw_only=True, slots=True)
class Estimate:
    """Device-hours of one run, or of several."""

    hours: float
    low: float
    high: float
    basis: str
    """What it is estimated from, as text for the user."""
    bound: bool = False
    """Nothing was measured: `hours` is the time limit of one attempt."""


@dataclass(kw_only=True, slots=True)
class Place:
    """What one run gets, on all its nodes together."""

    processes: int = 1
    gpus: float = 0
    """A fraction of one if runs are packed."""
    time_limit_h: float | None = None
    """Of one attempt."""


ONE_PROCESS = Place()


def tokens(config: RunConfig) -> int:
    """Training tokens from first to last step."""
    return config.train.steps * config.train.batch_size * config.data.seq_len


def training_flops(config: RunConfig) -> float:
    """From first to last step."""
    return float(costs.flops_per_token(config).train * tokens(config))


# what was measured ------------------------------------------------------------------------------
def read_rates(output_dir: Path | str) -> list[Rate]:
    """Of runs below `output_dir` that have ended and recorded what they ran on."""
    return [rate for run_dir in all_runs(output_dir) if (rate := _rate(run_dir))]


def _rate(run_dir: RunDir) -> Rate | None:
    result = run_dir.result() or {}
    if result.get("state") not in (State.FINISHED, State.DIVERGED):
        return None
    try:
        config, records = run_dir.config(), run_dir.attempt_records()
        places = {(_device(record, config), int(record["world"])) for record in records}
        trained = result["metrics"]["train/tokens"]
        seconds = result["metrics"]["perf/train_seconds"]
    except (KeyError, TypeError, ValueError):  # an earlier version did not record it
        return None
    if len(places) != 1 or not seconds > 0:  # attempts on different machines have no one speed
        return None
    device, world = places.pop()
    flops = costs.flops_per_token(config)
    overhead = None
    if result["attempts"] == 1 and result["state"] == State.FINISHED:
        overhead = max(result["attempt_seconds"] - seconds, 0.0) * world / count_pauses(config)
    return Rate(
        run_id=run_dir.run_id,
        label=config.model.name,
        device=device,
        shape=shape(config, processes=world),
        forward_flops=flops.forward,
        flops_per_s=flops.train * trained / seconds / world,
        overhead_s=overhead,
    )


def _device(record: Mapping[str, Any], config: RunConfig) -> str:
    """The device of an attempt; KeyError if it is not recorded."""
    gpus = record["gpus"]
    return CPU if config.runtime.device == "cpu" or not gpus else str(gpus[0])


def shape(config: RunConfig, *, processes: int) -> str:
    """Model, method, lengths, evals and dynamics: where equal, so is the speed in FLOP/s."""
    model = dataclasses.replace(config.model, name="")
    evals = [getattr(config.eval, name) for name in EVALS]
    evals = [dataclasses.replace(section, every_steps=None, path=None) for section in evals]
    dynamics = config.dynamics if config.dynamics.every_steps else None
    kinds = dynamics and (dynamics.what, dynamics.kinds)
    micro = config.train.micro_batch_size or config.train.batch_size // processes
    train = (config.method, config.data.seq_len, micro, config.train.precision, processes)
    return repr((model, train, *evals, kinds))


def count_pauses(config: RunConfig, *, done: int = 0) -> int:
    """How often a run stops training after step `done`: its start, evals, measures of dynamics."""
    steps, count = config.train.steps, 1

    def times(every: int) -> int:
        return steps // every - done // every + (done == 0)

    for name in EVALS:
        if runs_eval(config, name):
            every = getattr(config.eval, name).every_steps
            count += times(every) + bool(steps % every) if every else 1
    if every := config.dynamics.every_steps:
        count += times(every)
    return count


# what is to come --------------------------------------------------------------------------------
def estimate(
    config: RunConfig, *, rates: Sequence[Rate], place: Place = ONE_PROCESS, done: int = 0
) -> Estimate | None:
    """Device-hours of a run from step `done` on: GPU-hours if it has GPUs, else process-hours.

    Without a measured run on such a device it is what the time limit allows; None without a limit.
    """
    devices = place.gpus or place.processes
    similar, basis, factor = _similar_rates(config, rates=rates, place=place)
    if not similar:
        if place.time_limit_h is None:
            return None
        hours = place.time_limit_h * devices
        return Estimate(hours=hours, low=0.0, high=hours, basis="the time limit", bound=True)
    seconds = _predict_seconds(config, similar, done=done)
    middle = statistics.median(seconds)
    margin = SPREAD / math.sqrt(len(seconds))
    tenths = statistics.quantiles([*seconds, *seconds], n=10, method="inclusive")
    low = min(tenths[0], middle * (1 - margin)) / factor
    high = max(tenths[-1], middle * (1 + margin)) * factor
    hours = devices / place.processes / 3600
    return Estimate(hours=middle * hours, low=low * hours, high=high * hours, basis=basis)


def _similar_rates(
    config: RunConfig, *, rates: Sequence[Rate], place: Place
) -> tuple[list[Rate], str, float]:
    """Rates of the most similar runs, their description, and the margin as a factor."""
    candidates = [rate for rate in rates if (rate.device != CPU) == (place.gpus > 0)]
    if not candidates:
        return [], "", 1.0
    own = shape(config, processes=place.processes)
    if same := [rate for rate in candidates if rate.shape == own]:
        return same, _describe(same), 1.0
    flops = costs.flops_per_token(config).forward
    nearest = min(candidates, key=lambda rate: abs(math.log(rate.forward_flops / flops)))
    group = [rate for rate in candidates if rate.shape == nearest.shape]
    return group, f"{_describe(group)}, scaled by FLOPs", SCALED


def _describe(rates: Sequence[Rate]) -> str:
    """`3 finished runs of tiny on cpu`."""
    runs = f"{len(rates)} finished run{'s' if len(rates) > 1 else ''}"
    devices = " and ".join(sorted({rate.device for rate in rates}))
    return f"{runs} of {rates[0].label} on {devices}"


def _predict_seconds(config: RunConfig, rates: Sequence[Rate], *, done: int) -> list[float]:
    """Process-seconds of the run from step `done` on, by each of the rates."""
    flops = costs.flops_per_token(config)
    steps = max(config.train.steps - done, 0)
    work = flops.train * steps * config.train.batch_size * config.data.seq_len
    overheads = [r.overhead_s and r.overhead_s / r.forward_flops for r in rates]
    measured = [overhead for overhead in overheads if overhead is not None]
    typical = statistics.median(measured) if measured else 0.0
    rest = flops.forward * count_pauses(config, done=done)
    return [
        work / rate.flops_per_s + rest * (typical if overhead is None else overhead)
        for rate, overhead in zip(rates, overheads, strict=True)
    ]


def total(estimates: Iterable[Estimate | None]) -> Estimate | None:
    """The sum of those that are not None; None if all are.

    Low and high are added, too: estimates from the same measurements err together.
    """
    parts = [part for part in estimates if part is not None]
    if not parts:
        return None
    return Estimate(
        hours=sum(part.hours for part in parts),
        low=sum(part.low for part in parts),
        high=sum(part.high for part in parts),
        basis="; ".join(dict.fromkeys(part.basis for part in parts)),
        bound=any(part.bound for part in parts),
    )


# a plan -----------------------------------------------------------------------------------------
def to_run(state: RunState | None) -> bool:
    """Whether the command would run it: it is neither done nor in flight."""
    return state is None or not (state.state.done or state.state.in_flight)


def estimates(
    cells: Sequence[Cell],
    *,
    states: Mapping[str, RunState],
    output_dir: Path | str,
    rates: Sequence[Rate],
    place: Callable[[RunConfig], Place] = lambda config: ONE_PROCESS,
) -> dict[str, Estimate | None]:
    """run_id -> cost of the rest of each run that the command would queue; None: unknown."""
    hours: dict[str, Estimate | None] = {}
    for cell in cells:
        if to_run(states.get(cell.run_id)):
            done = RunDir(runs_folder(output_dir) / cell.run_id).newest_step()
            config, where = cell.config, place(cell.config)
            hours[cell.run_id] = estimate(config, rates=rates, place=where, done=done)
    return hours


def check_budget(
    estimates: Mapping[str, Estimate | None], *, max_gpu_hours: float | None, unit: str = "GPU"
) -> None:
    """ConfigError if the runs to queue are expected to take more than the budget.

    The middle of the estimate decides. A run without an estimate is refused, as it may exceed any
    budget.
    """
    if max_gpu_hours is None or not estimates:
        return
    runs, key = len(estimates), "sweep.max_gpu_hours"
    unknown = sum(one is None for one in estimates.values())
    if unknown:
        raise ConfigError(
            f"{key} must be null while nothing is known of the cost of {unknown} of {runs} runs, "
            f"got {max_gpu_hours:g}; {_how_to_measure(unit)}, or give the launcher a time limit"
        )
    asked = total(estimates.values())
    # Rounding may take a sum that equals the budget above it.
    if asked is None or asked.hours <= max_gpu_hours * (1 + 1e-9):
        return
    fits = _count_fitting([one.hours for one in estimates.values() if one], limit=max_gpu_hours)
    help_ = f"; {_how_to_measure(unit)}" if asked.bound else ""
    raise ConfigError(
        f"{key} must be >= {_round_up(asked.hours)} for {runs} runs ({interval(asked)} {unit}-hours"
        f" by {asked.basis}), got {max_gpu_hours:g}; {fits} of them fit{help_}"
    )


def _how_to_measure(unit: str) -> str:
    """Advice: how to get an estimate."""
    return f"finish one run on a {unit} first (fewer train.steps will do)"


def _count_fitting(hours: Iterable[float], *, limit: float) -> int:
    """How many runs fit at most: the cheapest ones."""
    spent, count = 0.0, 0
    for one in sorted(hours):
        spent += one
        count += spent <= limit
    return count


def _round_up(value: float) -> str:
    """To three digits, upwards: the advised value must suffice."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit - 1e-9) * unit:.12g}"


def interval(one: Estimate) -> str:
    """`1.2 (0.9-1.6)`, or `<= 48` if it is a bound; the middle has two digits."""
    if one.high < 0.001:
        return "< 0.001"
    places = min(max(1 - math.floor(math.log10(one.hours)), 0), 4)
    if one.bound:
        return f"<= {one.high:.{places}f}"
    return f"{one.hours:.{places}f} ({one.low:.{places}f}-{one.high:.{places}f})"
