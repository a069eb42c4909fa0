"""The tables of a report: means, comparisons, restarts, cost, runs.

Not for: estimates and tests themselves (`stats.py`), nor tables of BLiMP (`blimp.py`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from experiments.metrics import MFU, MFU_6N, headline, percent
from experiments.notices import fixed_order
from experiments.report.data import Arm, RunData, Sweep, fixed_side, floor
from experiments.report.document import Block, Bullets, Notice, Table, joined, number, plural
from experiments.stats import BOOTSTRAP, Comparison, Interval, compare, holm, interval
from relora_core.config import ConfigError, nearest
from relora_core.evals.paloma import BITS_PER_BYTE
from relora_core.events import LOSS_STEPS, Metric

Pair = tuple[Arm, Arm]
"""An arm and its reference."""
HOURS = "device-hours"
SIGNIFICANT = 0.05
"""A difference is stated as one where its adjusted p is below."""
SAME_TASK = ("model.", "data.", "train.", "eval.")
"""Prefixes of settings that should be the same in an arm and its reference."""


def shown(sweep: Sweep) -> list[Metric]:
    """The metrics that a finished run has; beside models from elsewhere also bits per byte, which
    compares across tokenizers."""
    every = list(headline())
    if not all(run.trained for run in sweep.runs):
        every.append(BITS_PER_BYTE)
    return [m for m in every if any(arm.values(m.key) for arm in sweep.arms)]


def find_arm(sweep: Sweep, word: str | None, *, option: str = "--reference") -> Arm | None:
    """The arm with `word` as name or id, or as part of them; ConfigError if there are several.

    For an arm that has no runs of its own, the one that computes the same.
    """
    if word is None:
        return None
    word = sweep.same_arms.get(word, word)
    exact = [arm for arm in sweep.arms if word in (arm.name, arm.arm_id)]
    hits = exact or [arm for arm in sweep.arms if word in arm.name or word in arm.arm_id]
    if len(hits) == 1:
        return hits[0]
    names = [arm.name for arm in hits or sweep.arms]
    many = f" that {len(hits)} match" if hits else ""
    raise ConfigError(
        f"{option} must name one arm of {joined(names, most=8)}, got {word!r}{many}."
        f"{nearest(word, names)}"
    )


def against(sweep: Sweep, *, reference: Arm | None) -> list[Pair]:
    """Each arm with its reference, by default a full-rank arm, of AdamW if there is one.

    Of several it is the one with the most settings of SAME_TASK in common. If there is none, or if
    all arms are full-rank, it is the sweep's first arm.
    """
    full = [arm for arm in sweep.arms if arm.runs[0].config.method == "full_rank"]
    full = [a for a in full if a.runs[0].config.train.optimizer == "adamw"] or full
    if reference is None and 0 < len(full) < len(sweep.arms):
        ids = {arm.arm_id for arm in full}
        others = [arm for arm in sweep.arms if arm.arm_id not in ids]
        return [(arm, max(full, key=partial(_shared, arm))) for arm in others]
    first = reference or sweep.arms[0]
    return [(arm, first) for arm in sweep.arms if arm is not first]


def _shared(arm: Arm, other: Arm) -> int:
    keys = [key for key in arm.settings if key.startswith(SAME_TASK)]
    return sum(arm.settings[key] == other.settings.get(key) for key in keys)


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


# comparisons ------------------------------------------------------------------------------------
def comparisons(sweep: Sweep, pairs: Sequence[Pair]) -> list[Block]:
    """For each metric a table of arms against their references on common seeds."""
    blocks: list[Block] = []
    for metric in shown(sweep):
        outcomes = compared(pairs, metric)
        if any(c.difference is not None for c in outcomes):
            blocks.append(difference_table(metric, pairs, outcomes))
    if not blocks:
        return ["There is nothing to compare: fewer than two arms have finished runs."]
    return ["Arm minus reference on the seeds that both have; of perplexities the ratio.", *blocks]


def methods(sweep: Sweep, pairs: Sequence[Pair]) -> list[Block]:
    """How the numbers of Results and Comparisons come about, and what their tests assume."""
    metrics = shown(sweep)
    if not metrics:
        return []
    lines = []
    if any(len(arm.finished) > 1 for arm in sweep.arms):
        lines += [
            "Means have a 95 % interval over seeds (Student's t); those of perplexities are "
            "geometric, with the interval of the logarithms.",
        ]
    outcomes = [c for metric in metrics for c in compared(pairs, metric)]
    if any(c.difference is not None for c in outcomes):
        lines += [
            "Comparisons: arm minus reference on the seeds that both have; of perplexities the "
            "ratio of the two.",
            "p (Holm) is adjusted for all comparisons of its table. The answer states a difference "
            f"as one where that p is below {SIGNIFICANT}.",
            "Seeds needed: with so many of each arm a test at 5 % would find the gap seen here "
            "four times in five, if gap and spread are the true ones.",
        ]
    assumed = list(dict.fromkeys(c.assumes for c in outcomes if c.p is not None))
    assumed += [BOOTSTRAP] if any(c.bootstrap for c in outcomes) else []
    assumptions = ["What the tests assume:", Bullets(assumed)] if assumed else []
    return [Bullets(lines), *assumptions] if lines else []


def compared(pairs: Sequence[Pair], metric: Metric) -> list[Comparison]:
    """A comparison of each pair; Holm's adjustment is over all of them."""
    return adjusted([compare_arms(arm, other, metric) for arm, other in pairs])


def compare_arms(arm: Arm, reference: Arm, metric: Metric) -> Comparison:
    """Not adjusted; a model from elsewhere is compared with all seeds of the other."""
    own, others = arm.values(metric.key), reference.values(metric.key)
    return compare(own, others, scale=metric.scale, fixed=fixed_side(arm, reference))


def adjusted(outcomes: list[Comparison]) -> list[Comparison]:
    """The same, with Holm's adjustment over all of them."""
    for comparison, p in zip(outcomes, holm([c.p for c in outcomes]), strict=True):
        comparison.p_holm = p
    return outcomes


def certainty(metric: Metric, estimate: Interval, *, seeds: bool = True) -> str:
    """`95 % interval 132.6 to 134.9, 3 seeds`, and of how many seeds values were lost."""
    n, lost = estimate.n, estimate.left_out
    of = f"{n} of {n + lost} seeds, {lost} without a finite value" if lost else plural(n, "seed")
    if estimate.low is None or estimate.high is None:
        return f"{of}: no interval" if lost else "one seed: no interval"
    ends = f"{value_text(metric, estimate.low)} to {value_text(metric, estimate.high)}"
    return f"95 % interval {ends}" + (f", {of}" if seeds or lost else "")


def title_end(pairs: Sequence[Pair]) -> tuple[str, bool]:
    """(` to REFERENCE`, True) if all pairs have one reference, else ("", False)."""
    names = {reference.name for _, reference in pairs}
    return (f" to {names.pop()}", True) if len(names) == 1 else ("", False)


def difference_table(
    metric: Metric, pairs: Sequence[Pair], tests: Sequence[Comparison], *, to: str | None = None
) -> Table:
    """A row for each pair; `to` stands for the names of the references."""
    against_what, one = (f" to {to}", True) if to else title_end(pairs)
    rows, data = [], []
    for (arm, reference), c in zip(pairs, tests, strict=True):
        rows.append(
            [
                *([arm.name] if one else [arm.name, reference.name]),
                seeds_cell(c),
                between(metric, c.difference, c.low, c.high),
                p_value(c.p),
                p_value(c.p_holm),
                "-" if c.bootstrap is None else ends(metric, *c.bootstrap),
                "-" if c.effect is None else f"{c.effect:+.2f}",
                c.needed.text if c.p is not None else "-",
                c.note,
            ]
        )
        data.append({"arm": arm.name, "reference": reference.name, **comparison_row(metric, c)})
    what = "ratio" if metric.scale == "log" else "difference"
    return Table(
        name=f"compare_{slug(metric)}",
        title=f"{metric.title}: {what}{against_what}",
        columns=[
            *(["arm"] if one else ["arm", "reference"]),
            *("seeds", f"{what} [95 %]", "p", "p (Holm)", "bootstrap 95 %", "Hedges' g"),
            *("seeds needed", "note"),
        ],
        rows=rows,
        data=data,
    )


def seeds_cell(c: Comparison) -> str:
    """Pairs, or values of arm and reference."""
    return str(c.n) if c.n else f"{c.n_arm} and {c.n_reference}"


def comparison_row(metric: Metric, c: Comparison) -> dict[str, Any]:
    """The CSV row of a comparison, without the names of arm and reference."""
    row = asdict(c) | {"needed": c.needed.text, "metric": metric.key}
    row["unmatched"], row["not_finite"] = _seeds(c.unmatched), _seeds(c.not_finite)
    low, high = c.bootstrap or (None, None)
    del row["bootstrap"]
    return row | {"bootstrap_low": low, "bootstrap_high": high}


def _seeds(seeds: Sequence[int]) -> str:
    return " ".join(map(str, seeds))


def slug(metric: Metric) -> str:
    return metric.key.removeprefix("eval/").replace("/", "_")


def difference_text(metric: Metric, value: float | None) -> str:
    """A signed difference, with one more decimal than values have, or a ratio (log scale)."""
    if value is None or math.isnan(value):
        return "-"
    if metric.scale == "log":
        return f"{value:.4f}"
    return f"{100 * value:+,.2f}" if metric.percent else f"{value:+,.4f}"


def between(metric: Metric, value: float | None, low: float | None, high: float | None) -> str:
    """`-0.021 [-0.030, -0.012]`."""
    text = difference_text(metric, value)
    return text if low is None or high is None else f"{text} {ends(metric, low, high)}"


def ends(metric: Metric, low: float, high: float) -> str:
    return f"[{difference_text(metric, low)}, {difference_text(metric, high)}]"


def p_value(p: float | None) -> str:
    if p is None:
        return "-"
    return f"{p:.3f}" if p >= 1e-3 else f"{p:.1e}"


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
