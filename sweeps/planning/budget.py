"""What a plan will cost in device-hours, by measured speeds; and the check of a budget.

A run takes its training FLOPs over the FLOP/s of finished runs, or else of timed steps, and what
finished runs took for start-up, evals and dynamics. Not for: memory and disk
(`relora_core/costs.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.state import RunState
from relora_core import costs
from relora_core.config import ConfigError, RunConfig
from sweeps.planning.kinds import is_kind, peak_ratio
from sweeps.planning.plan import Cell
from sweeps.planning.rates import CPU, Rate, count_pauses, shape

SPREAD = 0.3
"""Margin of one measured run: equal runs on one machine were 0.75 to 1.3 times as fast as their
median, depending on its load. Of n runs it is this over the root of n."""
SCALED = 3.0
"""Margin, as a factor up and down, for a run of another shape: a model of 11 M parameters reached
half the FLOP/s of one of 65 M, and one of 40 k a fifth."""
OTHER_KIND = 2.0
"""Likewise for a GPU of another kind than was measured, scaled by their peaks: a small model
reaches less of a faster GPU's."""
NO_PEAK = 5.0
"""Likewise where one of the peaks is not known: those of GPUs in use differ so much."""


@dataclass(kw_only=True, slots=True)
class Estimate:
    """Device-hours of one run, or of several."""

    hours: float
    low: float
    high: float
    basis: str
    """What it is estimated from, as text for the user."""
    steps: int | None = None
    """Training steps of the run that it is for; None: of several runs."""


@dataclass(kw_only=True, slots=True)
class Place:
    """What one run gets, on all its nodes together."""

    processes: int = 1
    gpus: float = 0
    """A fraction of one if runs are packed."""
    kinds: tuple[str, ...] = ()
    """Names of the GPUs that it may get, or what a scheduler calls them; empty: not known."""
    partition: str | None = None
    """SLURM's, empty for the default one; None: no job."""


ONE_PROCESS = Place()


def tokens(config: RunConfig) -> int:
    """Training tokens from first to last step."""
    return config.train.steps * config.train.batch_size * config.data.seq_len


def training_flops(config: RunConfig) -> float:
    """From first to last step."""
    return float(costs.flops_per_token(config).train * tokens(config))


# what is to come --------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class _Group:
    """Rates of one kind of device and one shape, by which a run is priced."""

    rates: list[Rate]
    basis: str
    factor: float = 1.0
    """Margin, as a factor up and down."""
    pause_s: float = 0.0
    """Process-seconds of a pause, over the forward FLOPs of a token, where a rate has none."""


def estimate(
    config: RunConfig, *, rates: Sequence[Rate], place: Place = ONE_PROCESS, done: int = 0
) -> Estimate | None:
    """Device-hours of a run from step `done` on: GPU-hours if it has GPUs, else process-hours.

    Where it may get one of several kinds of GPU, the interval covers each. None without a measured
    run on such a device: a time limit bounds a job, and a run goes on in the next.
    """
    groups, note = _similar_rates(config, rates=rates, place=place)
    if not groups:
        return None
    parts = [_interval(_predict_seconds(config, g, done=done), g.factor) for g in groups]
    lows, middles, highs = zip(*parts, strict=True)
    hours = (place.gpus or place.processes) / place.processes / 3600
    return Estimate(
        hours=statistics.median(middles) * hours,
        low=min(lows) * hours,
        high=max(highs) * hours,
        basis=" and ".join(dict.fromkeys(group.basis for group in groups)) + note,
        steps=max(config.train.steps - done, 0),
    )


def _interval(seconds: Sequence[float], factor: float) -> tuple[float, float, float]:
    """(low, middle, high) of predictions by one group."""
    middle = statistics.median(seconds)
    margin = SPREAD / math.sqrt(len(seconds))
    tenths = statistics.quantiles([*seconds, *seconds], n=10, method="inclusive")
    low = min(tenths[0], middle * (1 - margin)) / factor
    return low, middle, max(tenths[-1], middle * (1 + margin)) * factor


def _similar_rates(
    config: RunConfig, *, rates: Sequence[Rate], place: Place
) -> tuple[list[_Group], str]:
    """A group for each kind of device that it may get, and what to say of all.

    Rates of that kind come first, even those of another shape.
    """
    candidates = [rate for rate in rates if (rate.device != CPU) == (place.gpus > 0)]
    if not candidates:
        return [], ""
    if not place.gpus:
        return [_nearest(config, candidates, place=place)], ""
    if place.kinds:
        return [_of_kind(config, candidates, kind, place=place) for kind in place.kinds], ""
    seen = [rate for rate in candidates if place.partition and rate.partition == place.partition]
    by_device = itertools.groupby(
        sorted(seen or candidates, key=lambda rate: rate.device), key=lambda rate: rate.device
    )
    groups = [_nearest(config, list(group), place=place) for _, group in by_device]
    where = (
        "GPUs here may be others" if place.partition is None else "the partition may have others"
    )
    return groups, f"; {where}"


def is_measured(config: RunConfig, *, rates: Sequence[Rate], place: Place) -> bool:
    """Whether there is a rate of its shape on every kind of device that it may get, as far as is
    known which that is."""
    own = shape(config, processes=place.processes)
    same = [r for r in rates if r.shape == own and (r.device != CPU) == (place.gpus > 0)]
    if place.kinds and place.gpus:
        return all(any(is_kind(kind, rate.device) for rate in same) for kind in place.kinds)
    if place.gpus:
        same = [rate for rate in same if rate.partition == place.partition]
    return bool(same)


def _nearest(config: RunConfig, candidates: Sequence[Rate], *, place: Place) -> _Group:
    """Those of the most similar runs; of equally similar ones finished runs, not timed steps."""
    own = shape(config, processes=place.processes)
    flops = costs.flops_per_token(config).forward
    nearest = min(candidates, key=lambda rate: abs(math.log(rate.forward_flops / flops)))
    same = any(rate.shape == own for rate in candidates)
    group = [r for r in candidates if r.shape == (own if same else nearest.shape)]
    group = [rate for rate in group if rate.timed_steps is None] or group
    how = "" if same else ", scaled by FLOPs"
    factor = 1.0 if same else SCALED
    pause_s = _typical_pause(group)
    if pause_s is None and group[0].timed_steps is not None:
        pause_s = _typical_pause(candidates)
        how += ", start and evals not counted" if pause_s is None else ""
    basis = _describe(group) + how
    return _Group(rates=group, basis=basis, factor=factor, pause_s=pause_s or 0.0)


def _typical_pause(rates: Sequence[Rate]) -> float | None:
    """Seconds of a pause over the forward FLOPs of a token; None where no run has measured one."""
    measured = [r.overhead_s / r.forward_flops for r in rates if r.overhead_s is not None]
    return statistics.median(measured) if measured else None


def _of_kind(config: RunConfig, candidates: Sequence[Rate], kind: str, *, place: Place) -> _Group:
    """Those of this kind of GPU; where nothing was measured on it, of another kind, scaled."""
    if own := [rate for rate in candidates if is_kind(kind, rate.device)]:
        return _nearest(config, own, place=place)
    precision = config.train.precision
    ratios = {
        rate.device: peak_ratio(kind, rate.device, precision=precision) for rate in candidates
    }
    with_peak = [rate for rate in candidates if ratios[rate.device]]
    group = _nearest(config, with_peak or candidates, place=place)
    scaled = [
        dataclasses.replace(rate, flops_per_s=rate.flops_per_s * (ratios[rate.device] or 1.0))
        for rate in group.rates
    ]
    how = "scaled by peaks" if with_peak else "as if it were as fast, since a peak is not known"
    return _Group(
        rates=scaled,
        basis=f"{group.basis}, none on {kind}: {how}",
        factor=group.factor * (OTHER_KIND if with_peak else NO_PEAK),
        pause_s=group.pause_s,
    )


def _describe(rates: Sequence[Rate]) -> str:
    """`3 finished runs of tiny on cpu`, `10 timed steps of tiny on NVIDIA A100`."""
    runs = f"{len(rates)} finished run{'s' if len(rates) > 1 else ''}"
    if rates[0].timed_steps is not None:
        steps = sum(rate.timed_steps or 0 for rate in rates)
        runs = f"{steps} timed step{'s' if steps > 1 else ''}"
    devices = " and ".join(sorted({rate.device for rate in rates}))
    return f"{runs} of {rates[0].label} on {devices}"


def _predict_seconds(config: RunConfig, group: _Group, *, done: int) -> list[float]:
    """Process-seconds of the run from step `done` on, by each of the group's rates."""
    flops = costs.flops_per_token(config)
    steps = max(config.train.steps - done, 0)
    work = flops.train * steps * config.train.batch_size * config.data.seq_len
    pauses = flops.forward * count_pauses(config, done=done)
    return [
        work / rate.flops_per_s
        + pauses
        * (group.pause_s if rate.overhead_s is None else rate.overhead_s / rate.forward_flops)
        for rate in group.rates
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
    )


# a plan -----------------------------------------------------------------------------------------
def unit_of(places: Iterable[Place]) -> str:
    """Of which hours in such places are: GPU, or CPU for processes without; device if of both."""
    kinds = {"GPU" if place.gpus else "CPU" for place in places}
    return kinds.pop() if len(kinds) == 1 else "device"


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
    estimates: Collection[Estimate | None], *, max_gpu_hours: float | None, unit: str = "GPU"
) -> None:
    """ConfigError if the runs to queue are expected to take more than the budget.

    The middle of the estimate decides. A run without an estimate is refused, as it may exceed any
    budget.
    """
    if max_gpu_hours is None or not estimates:
        return
    runs, key = len(estimates), "sweep.max_gpu_hours"
    unknown = sum(one is None for one in estimates)
    if unknown:
        raise ConfigError(
            f"{key} must be null while nothing is known of the cost of {unknown} of {runs} runs, "
            f"got {max_gpu_hours:g}; finish one run on a {unit} first (fewer train.steps will do), "
            "or time some steps with --plan --measure"
        )
    asked = total(estimates)
    # Rounding may take a sum that equals the budget above it.
    if asked is None or asked.hours <= max_gpu_hours * (1 + 1e-9):
        return
    fits = _count_fitting([one.hours for one in estimates if one], limit=max_gpu_hours)
    raise ConfigError(
        f"{key} must be >= {_round_up(asked.hours)} for {runs} runs ({interval(asked)} {unit}-hours"
        f" by {asked.basis}), got {max_gpu_hours:g}; {fits} of them fit"
    )


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
    """`1.2 (0.9-1.6)`; the middle has two digits."""
    if one.high < 0.001:
        return "< 0.001"
    places = min(max(1 - math.floor(math.log10(one.hours)), 0), 4)
    return f"{one.hours:.{places}f} ({one.low:.{places}f}-{one.high:.{places}f})"
