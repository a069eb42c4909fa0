"""The tables of a report: means, restarts, cost, runs.

Not for: estimates themselves (`stats.py`), comparisons (`comparisons.py`), nor BLiMP (`blimp.py`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

from experiments.identity import essential
from experiments.metrics import LOSS, MFU, MFU_6N, headline, percent
from experiments.notices import fixed_order
from experiments.report.data import Arm, RunData, Sweep, floor
from experiments.report.document import Block, Notice, Table, joined, number, plural
from experiments.stats import Interval, interval
from relora_core.evals.paloma import BITS_PER_BYTE
from relora_core.events import LOSS_STEPS, Metric

HOURS = "device-hours"


def shown(sweep: Sweep) -> list[Metric]:
    """The metrics that a finished run has; beside models from elsewhere also bits per byte, which
    compares across tokenizers."""
    every = list(headline())
    if not all(run.trained for run in sweep.runs):
        every.append(BITS_PER_BYTE)
    return [m for m in every if any(arm.values(m.key) for arm in sweep.arms)]


def charts(sweep: Sweep) -> list[Metric]:
    """The metrics of `shown` that figures draw."""
    return [metric for metric in shown(sweep) if metric.charted]


def name(metric: Metric) -> str:
    """Its name in a sentence."""
    return " ".join(metric.label.split())


# means ------------------------------------------------------------------------------------------
def results(sweep: Sweep) -> list[Block]:
    """A table of the arms: the interval of each metric."""
    metrics = shown(sweep)
    if not metrics:
        return []
    rows, data = [], []
    for arm in sweep.arms:
        done, cells = len(arm.finished), []
        for metric in metrics:
            estimate = arm.estimate(metric)
            cells.append(mean_cell(estimate, partial(value_text, metric), expected=done))
            data.append(mean_row(arm, metric, estimate))
        cells += [tokens_per_run(arm), hours_cell(arm)]
        rows.append([arm.name, f"{done} of {len(arm.runs)}", *cells])
    several = any(len(arm.finished) > 1 for arm in sweep.arms)
    note = (
        "Mean [95 % interval of the mean over seeds, Student's t]; of perplexities the geometric "
        "mean with the interval of the logarithms. "
        if several
        else "One value per arm: no interval. "
    )
    if several:
        note += "".join(
            f"{line[:1].upper()}{line[1:]}. " for line in fixed_order(r.config for r in sweep.runs)
        )
    note += f"Loss: training loss of the last {LOSS_STEPS} updates, nats per token. "
    note += "Tokens and device-hours are those of training. A mean of fewer values than runs that "
    note += "finished says so (n)."
    blocks: list[Block] = [
        Table(
            name="arms",
            title="Arms",
            columns=["arm", "finished", *(m.title for m in metrics), "tokens", HOURS],
            rows=rows,
            data=data,
            note=note,
        ),
        *other_losses(sweep.runs),
        *noisy_losses([sweep.arms]),
    ]
    if bound := floor(sweep):
        blocks.append(
            f"The grammar's entropy is {bound.entropy:.3f} nats per token: no model's expected "
            f"loss is below it. One that knows frequencies only has {bound.unigram:.3f}."
        )
    return blocks


def other_losses(runs: Iterable[RunData]) -> list[Block]:
    """Notices on runs with a loss that is not a mean over LOSS_STEPS updates.

    Earlier versions averaged the updates since the last log.
    """
    odd: dict[int, list[str]] = {}
    for run in runs:
        if run.finished and run.loss_steps not in (0, min(LOSS_STEPS, run.step)):
            odd.setdefault(run.loss_steps, []).append(run.run_id)
    return [
        Notice(
            f"The loss of {joined(ids)} is a mean over the last {plural(steps, 'update')}, as an "
            f"earlier version logged it, that of other runs over {LOSS_STEPS}."
        )
        for steps, ids in sorted(odd.items())
    ]


def noisy_losses(groups: Iterable[Sequence[Arm]]) -> list[Block]:
    """A notice if arms of a group differ in what training draws: their losses are then of other
    models than those that evals see."""
    drawn: list[tuple[str, Drawn]] = []
    for group in groups:
        own = [(arm.name, _drawn(arm)) for arm in group if arm.trained and arm.values(LOSS.key)]
        drawn += own if len({one for _, one in own}) > 1 else []
    dropout = dict.fromkeys(name for name, one in drawn if one.dropout)
    nested = dict.fromkeys(name for name, one in drawn if one.nested)
    ways = [f"with dropout (relora.dropout) in {joined(dropout)}"] if dropout else []
    if nested:
        ways.append(f"with adapters cut to a random rank (relora.nested_rank) in {joined(nested)}")
    if not ways:
        return []
    return [
        Notice(
            f"Training loss is measured as arms train, {' and '.join(ways)}: a difference to other "
            "arms may come from that alone. Compare evaluations."
        )
    ]


class Drawn(NamedTuple):
    """Randomness of training steps that evaluations do not have."""

    dropout: float
    nested: bool
    method: str
    """Empty without either. It counts since restarts merge adapters, which dropout then spares."""


def _drawn(arm: Arm) -> Drawn:
    config = arm.runs[0].config
    chosen = essential(config)  # what has an effect
    dropout, nested = (chosen.get(f"relora.{key}") for key in ("dropout", "nested_rank"))
    return Drawn(dropout or 0.0, bool(nested), config.method if dropout or nested else "")


def mean_cell(
    estimate: Interval | None, text: Callable[[float | None], str], *, expected: int
) -> str:
    """`2.61 [2.58, 2.64]`, with n if values are missing."""
    if estimate is None or not estimate.n:
        return "-"
    cell = text(estimate.mean)
    if estimate.low is not None:
        cell += f" [{text(estimate.low)}, {text(estimate.high)}]"
    return cell if estimate.n == expected else f"{cell} (n = {estimate.n})"


def value_text(metric: Metric, value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    if metric.scale == "log":
        return number(value)
    return f"{100 * value:,.1f}" if metric.percent else f"{value:,.3f}"


def mean_row(arm: Arm, metric: Metric, estimate: Interval | None) -> dict[str, Any]:
    """The CSV row of an arm's mean."""
    row = {
        "arm": arm.name,
        "arm_id": arm.arm_id,
        "metric": metric.key,
        "finished": len(arm.finished),
        "planned": len(arm.runs),
    }
    return row | (asdict(estimate) if estimate else {"n": 0})


def certainty(metric: Metric, estimate: Interval, *, seeds: bool = True) -> str:
    """`95 % interval 132.6 to 134.9, 3 seeds`, and of how many seeds values were lost."""
    n, lost = estimate.n, estimate.left_out
    of = f"{n} of {n + lost} seeds, {lost} without a finite value" if lost else plural(n, "seed")
    if estimate.low is None or estimate.high is None:
        return f"{of}: no interval" if lost else "one seed: no interval"
    ends = f"{value_text(metric, estimate.low)} to {value_text(metric, estimate.high)}"
    return f"95 % interval {ends}" + (f", {of}" if seeds or lost else "")


# restarts ---------------------------------------------------------------------------------------
RESTART = {
    "restart/loss_before": "loss before",
    "restart/loss_after": "loss after",
    "restart/loss_next": "one step later",
    "restart/logit_change_max": "largest change of a logit",
    "restart/merged_norm": "norm merged",
    "restart/state_zeroed": "state zeroed",
}


def restarts(sweep: Sweep) -> list[Block]:
    """A table of what restarts did, as means over all restarts of an arm."""
    rows, data = [], []
    for arm in sweep.arms:
        count = sum(len(run.restarts) for run in arm.runs)
        if not count:
            continue
        values = {metric: _all_values(arm.runs, metric) for metric in RESTART}
        means = {m: statistics.fmean(v) if v else None for m, v in values.items()}
        rows.append([arm.name, str(count), *(number(means[m]) for m in RESTART)])
        data.append({"arm": arm.name, "restarts": count, **means})
    if not rows:
        return []
    return [
        Table(
            name="restarts",
            title="What the restarts did",
            columns=["arm", "restarts", *RESTART.values()],
            rows=rows,
            data=data,
            note="Means over all restarts of all runs of the arm, whatever became of the runs. "
            "Losses are those of one fixed batch: a merge that leaves the model's function alone "
            "leaves the loss alone, too.",
        )
    ]


def _all_values(runs: Sequence[RunData], metric: str) -> list[float]:
    values = [point.value for run in runs for point in run.curves.get(metric, [])]
    return [value for value in values if math.isfinite(value)]


# cost -------------------------------------------------------------------------------------------
def cost(sweep: Sweep) -> list[Block]:
    """A table of what each arm has cost."""
    rows, data = [], []
    for arm in sweep.arms:
        hours = hours_per_run(arm)
        training = sum(run.cost.gpu_hours for run in arm.runs)
        everything = sum(run.cost.all_hours for run in arm.runs)
        attempts = sum(run.cost.attempts for run in arm.runs)
        rate, mfu, mfu_6n = (
            statistics.median(values) if (values := _all_values(arm.finished, key)) else None
            for key in ("perf/tokens_per_s", MFU, MFU_6N)
        )
        rows.append(
            [
                arm.name,
                tokens_per_run(arm),
                hours_cell(arm),
                "-" if rate is None else f"{rate:,.0f}",
                "-" if mfu is None else f"{percent(mfu)} ({percent(mfu_6n)})",
                *(number(training, digits=3), number(everything, digits=3), str(attempts)),
            ]
        )
        data.append(
            {
                "arm": arm.name,
                "tokens_per_run": tokens_per_run(arm).replace(",", ""),
                "gpu_hours_per_run": hours.mean if hours else None,
                "tokens_per_s": rate,
                "mfu": mfu,
                "mfu_6n": mfu_6n,
                "gpu_hours": training,
                "all_hours": everything,
                "attempts": attempts,
            }
        )
    names = ["training device-hours", "with evals and lost work", "attempts"]
    return [
        Table(
            name="cost",
            title="Cost",
            columns=["arm", "tokens per run", "device-hours per run", "tokens/s", "MFU", *names],
            rows=rows,
            data=data,
            note="A device-hour is an hour of one process, on a GPU or a CPU. Per run: training of "
            "the finished runs, without evals; in all: of every run and attempt, from its first to "
            "its last event. Speeds of runs that shared a machine cannot be compared. MFU: model "
            "FLOPs utilisation, as a share of the peak of the run's GPUs: by the FLOPs that the "
            "method takes, and in brackets by 6N + 12 L d T per token, as most others publish it. "
            "Both are medians; on a CPU, or where the peak is not known, there is none.",
        )
    ]


def hours_per_run(arm: Arm) -> Interval | None:
    """Device-hours of training, over the finished runs."""
    hours = [run.cost.gpu_hours for run in arm.finished]
    return interval(hours, scale="linear") if hours else None


def hours_cell(arm: Arm) -> str:
    text = partial(number, digits=3)
    return mean_cell(hours_per_run(arm), text, expected=len(arm.finished))


def tokens_per_run(arm: Arm) -> str:
    """The finished runs' tokens: one number, or a range."""
    tokens = sorted({run.cost.tokens for run in arm.finished})
    return " to ".join(f"{count:,}" for count in sorted({*tokens[:1], *tokens[-1:]})) or "-"


# runs -------------------------------------------------------------------------------------------
def every_run(sweep: Sweep) -> Table:
    """A table of the runs; its CSV has their settings and all final numbers, too."""
    metrics = shown(sweep)
    rows, data = [], []
    for arm in sweep.arms:
        for run in arm.runs:
            values = {m.key: run.metrics.get(m.key) for m in metrics}
            rows.append(
                [
                    *(arm.name, str(run.seed), run.state, f"{run.step:,}"),
                    *(value_text(m, values[m.key]) for m in metrics),
                    *(number(run.cost.gpu_hours, digits=3), str(run.cost.attempts), run.run_id),
                ]
            )
            data.append(_run_row(arm, run))
    return Table(
        name="runs",
        title=f"Every run ({plural(len(rows), 'run')})",
        columns=[
            *("arm", "seed", "state", "step"),
            *(m.title for m in metrics),
            *("device-hours", "attempts", "run_id"),
        ],
        rows=rows,
        data=data,
        folded=True,
    )


def _run_row(arm: Arm, run: RunData) -> Mapping[str, Any]:
    return {
        "run_id": run.run_id,
        "arm": arm.name,
        "arm_id": arm.arm_id,
        "seed": run.seed,
        "state": run.state,
        "reason": run.reason,
        "step": run.step,
        **{f"setting/{key}": value for key, value in arm.settings.items()},
        **{k: v for k, v in run.metrics.items() if not k.startswith("dynamics/")},
        **asdict(run.cost),
        "restarts": len(run.restarts),
        "code": " ".join(run.code),
    }
