"""Figures with a row or dot for each arm: final numbers, differences, BLiMP by phenomenon.

Not for: curves (`curves.py`), estimates (`stats.py`).
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments import stats
from experiments.metrics import charted
from experiments.report.comparisons import compare_arms, unlike
from experiments.report.data import Arm, Sweep, fixed_side
from experiments.report.figures import canvas
from experiments.report.figures.canvas import Drawing, NoData
from experiments.stats import Scale
from relora_core.evals.blimp import ACCURACY

MOST_ROWS = 60
"""Arms in a figure with a row for each."""
MOST_DOTS = 12
"""Arms in the figure of BLiMP's phenomena."""


# rows of arms -----------------------------------------------------------------------------------
def arms_summary(sweep: Sweep) -> Drawing:
    """A row for each arm: mean with interval, and the value of each seed."""
    metrics = [
        metric
        for metric in charted()
        if any((one := arm.estimate(metric)) and one.n for arm in sweep.arms)
    ]
    if not metrics:
        raise NoData("no run has finished")
    arms, others = canvas.few(sweep.arms, most=MOST_ROWS)
    labels = [f"{_short(arm.name)}\n{_count(arm)}" for arm in arms]
    figure, panels = _rows(labels, len(metrics))
    for ax, metric in zip(panels, metrics, strict=True):
        for row, arm in enumerate(arms):
            estimate = arm.estimate(metric)
            if not estimate or not estimate.n:
                _no_value(ax, row)
                continue
            if estimate.n > 1:
                seeds = [value for value in arm.values(metric.key).values() if stats.finite(value)]
                ax.plot(seeds, [row + 0.22] * len(seeds), "|", color=arm.colour, markersize=5)
            shape = canvas.MARKERS[arm.style]
            ends = estimate.low, estimate.high
            _dot(ax, row, estimate.mean, *ends, colour=arm.colour, shape=shape)
        ax.set_xlabel(f"{metric.label}\n({metric.better} is better)")
    caption = (
        "Filled dots are means over finished seeds with 95 % t intervals (perplexity: geometric);"
        " small ticks are single seeds; an open dot is a single seed, which has no interval."
    )
    return Drawing(canvas=figure, caption=caption + others)


def differences(pairs: Sequence[tuple[Arm, Arm]]) -> Drawing:
    """A forest plot: each arm minus its reference."""
    if not pairs:
        raise NoData("there is one arm only, so nothing to compare")
    tests = {metric: [compare_arms(arm, to, metric) for arm, to in pairs] for metric in charted()}
    both = [m for m, own in tests.items() if any(one.n_arm and one.n_reference for one in own)]
    refused = dict.fromkeys(unlike(arm, to, metric) for metric in both for arm, to in pairs)
    refused.pop("", None)
    metrics = [m for m in both if any(one.difference is not None for one in tests[m])]
    if not metrics:
        raise NoData("no two arms have finished runs with the same metric that may be compared")
    shown = list(pairs[:MOST_ROWS])
    same = len({to.arm_id for _, to in pairs}) == 1
    labels = [_short(a.name) + ("" if same else f"\nminus {_short(to.name)}") for a, to in shown]
    figure, panels = _rows(labels, len(metrics))
    for ax, metric in zip(panels, metrics, strict=True):
        ax.axvline(0, color=canvas.DARK, linewidth=1.0, zorder=1.5)
        for row, ((arm, to), comparison) in enumerate(zip(shown, tests[metric], strict=False)):
            change = partial(_change, scale=metric.scale)
            if comparison.difference is None:
                _no_value(ax, row, "not compared" if unlike(arm, to, metric) else "no value")
                continue
            low, high = change(comparison.low), change(comparison.high)
            shape = "s" if comparison.kind == "welch" else canvas.MARKERS[arm.style]
            middle = change(comparison.difference)
            assert middle is not None
            _dot(ax, row, middle, low, high, colour=arm.colour, shape=shape)
        unit = "change in %" if metric.scale == "log" else "difference"
        ax.set_xlabel(f"{metric.label}\n{unit}, {metric.better} is better")
    against = f"Arm minus {pairs[0][1].name}" if same else "Arm minus reference"
    caption = (
        f"{against}, mean over common seeds with 95 % paired t interval; perplexity as the ratio of"
        " geometric means. Squares: fewer than two common seeds, so unpaired (Welch). Open: no"
        " interval, for want of a second seed or of any spread. Intervals are not adjusted for the"
        " number of comparisons."
    )
    if any(fixed_side(arm, to) for arm, to in shown):
        caption += " A model from elsewhere is one value: all seeds of the other are compared with"
        caption += " it (one-sample t)."
    if refused:
        caption += f" Not compared are arms that {'; arms that '.join(refused)}."
    left = len(pairs) - len(shown)
    return Drawing(canvas=figure, caption=caption + (f" {left} more in the tables." * bool(left)))


def _change(value: float | None, *, scale: Scale) -> float | None:
    """A ratio as change in per cent; a difference as it is."""
    return 100 * (value - 1) if value is not None and scale == "log" else value


def _rows(labels: Sequence[str], panels: int) -> tuple[Canvas, list[Axes]]:
    """A figure with panels side by side and labelled rows, the first at the top."""
    lines = len(labels) * max(0.14 + 0.16 * (label.count("\n") + 1) for label in labels)
    width = max((len(line) for label in labels for line in label.split("\n")), default=0)
    figure = Canvas(figsize=(min(2.3 * panels + 0.8 + 0.075 * width, 11), 1.1 + lines))
    axes = [figure.add_subplot(1, panels, 1)]
    axes += [figure.add_subplot(1, panels, i, sharey=axes[0]) for i in range(2, panels + 1)]
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    for index, ax in enumerate(axes):
        ax.tick_params(axis="y", length=0, labelleft=index == 0)
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=3))
    return figure, axes


def _dot(
    ax: Axes,
    row: float,
    middle: float,
    low: float | None,
    high: float | None,
    *,
    colour: str,
    shape: str = "o",
    size: float = 6.5,
) -> None:
    """Draw a mean with its interval, or an open dot if it has none."""
    measured = low is not None and high is not None
    if measured:
        ax.plot([low, high], [row, row], "-", color=colour, linewidth=1.6)  # type: ignore[list-item]
    face = colour if measured and shape != "s" else "white"
    ax.plot([middle], [row], shape, color=colour, markerfacecolor=face, markersize=size)


def _no_value(ax: Axes, row: int, text: str = "no value") -> None:
    across = ax.get_yaxis_transform()
    ax.text(0.02, row, text, transform=across, va="center", color=canvas.GREY)


def _short(name: str) -> str:
    return textwrap.fill(name, 34, break_long_words=False, break_on_hyphens=False)


def _count(arm: Arm) -> str:
    """`n = 5`, or `n = 3 of 5: 1 diverged, 1 running`."""
    n, m = len(arm.finished), len(arm.runs)
    rest = Counter(run.state for run in arm.runs if not run.finished)
    others = ", ".join(f"{count} {state}" for state, count in rest.items())
    return f"n = {n}" + (f" of {m}: {others}" if n < m else "")


# BLiMP ------------------------------------------------------------------------------------------
def blimp_phenomena(sweep: Sweep) -> Drawing:
    """A dot for each phenomenon and arm, and chance."""
    prefix = ACCURACY.key.removesuffix("accuracy")
    finished = [arm for arm in sweep.arms if arm.values(prefix + "accuracy")]
    names = [m.removeprefix(prefix) for m in sweep.metrics() if m.startswith(prefix)]
    groups = ["accuracy", *sorted(set(names) - {"accuracy"})]
    if not finished or len(groups) < 2:
        raise NoData("no finished run has BLiMP's phenomena")
    if len(finished) > MOST_DOTS:
        raise NoData(f"{len(finished)} arms are too many for one picture: see the table")
    columns = 1 if len(finished) <= 2 else 2
    half = -(-len(groups) // columns)
    figure = Canvas(figsize=(9.2, 1.0 + half * (0.13 * len(finished) + 0.16)))
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    ends: list[float] = [0.5]
    for ax, chosen in zip(axes, (groups[:half], groups[half:]), strict=False):
        ends += _phenomena(ax, chosen, finished, prefix=prefix, rows=half)
    low, high = min(ends), max(ends)
    for ax in axes:
        ax.set_xlim(max(0.0, low - 0.03) - 0.005, min(1.0, high + 0.03) + 0.005)
        ax.set_xlabel("accuracy")
    chance = Line2D([], [], color=canvas.GREY, linestyle=(0, (1, 2)), label="chance")
    canvas.legend(figure, finished, extra=[chance], dots=True)
    caption = (
        "Scored as no_bos. Means over finished seeds with 95 % t intervals over seeds, cut at 0"
        " and 1; an open dot is a single seed. `all` is the mean over paradigms."
    )
    return Drawing(canvas=figure, caption=caption)


def _phenomena(
    ax: Axes, groups: Sequence[str], arms: Sequence[Arm], *, prefix: str, rows: int
) -> list[float]:
    """Draw some phenomena in one column; the values drawn, with ends of intervals."""
    ends: list[float] = []
    ax.axvline(0.5, color=canvas.GREY, linestyle=(0, (1, 2)), linewidth=1.2, zorder=1.5)
    step = 0.8 / len(arms)
    for row, group in enumerate(groups):
        if row % 2:
            ax.axhspan(row - 0.5, row + 0.5, color="#f5f6f8", zorder=0)
        for index, arm in enumerate(arms):
            values = canvas.finite(arm.values(prefix + group).values())
            if not values:
                continue
            estimate = stats.mean_interval(values)
            low = None if estimate.low is None else max(0.0, estimate.low)
            high = None if estimate.high is None else min(1.0, estimate.high)
            at = row + (index - (len(arms) - 1) / 2) * step
            shape = canvas.MARKERS[arm.style]
            _dot(ax, at, estimate.mean, low, high, colour=arm.colour, shape=shape, size=4.5)
            ends += [v for v in (estimate.mean, low, high) if v is not None]
    labels = ["all" if g == "accuracy" else g.replace("_", " ") for g in groups]
    ax.set_yticks(range(len(groups)), labels)
    ax.set_ylim(rows - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    return ends
