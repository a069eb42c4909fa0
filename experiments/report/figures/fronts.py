"""The figure of what arms reach for what they take, with the Pareto front of each pair.

Not for: which arms are on it (`experiments/report/tradeoffs.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.report import tradeoffs
from experiments.report.comparisons import unlike_text
from experiments.report.data import Sweep
from experiments.report.figures import canvas
from experiments.report.figures.canvas import Drawing, NoData
from experiments.report.tables import charts
from experiments.report.tradeoffs import Point
from relora_core.events import Metric

NARROW = 4
"""Ratio of the ends of a logarithmic axis below which its ticks are those of a linear one."""
LONGEST = 18
"""Letters of a name beside its point."""
LARGEST = 1e280
"""End of an axis: what is further out fits no axis of floats."""


def fronts(sweep: Sweep) -> Drawing:
    """A row for each metric, a column for each cost in which arms differ."""
    metrics = charts(sweep)
    costs = [cost for cost in tradeoffs.COSTS if tradeoffs.differ(sweep, cost)]
    if not metrics or not costs:
        raise NoData("no finished runs differ in what they take")
    figure = Canvas(figsize=(min(3.1 * len(costs) + 0.8, 10.5), 2.5 * len(metrics) + 0.4))
    for row, metric in enumerate(metrics):
        for column, cost in enumerate(costs):
            ax = figure.add_subplot(len(metrics), len(costs), row * len(costs) + column + 1)
            made = tradeoffs.points(sweep, cost=cost, metric=metric)
            _panel(ax, made, metric=metric)
            if cost.key == "gpu_hours":
                ax.xaxis.set_major_formatter(FuncFormatter(lambda hours, _: f"{hours:.2g}"))
            if row + 1 == len(metrics):
                ax.set_xlabel(cost.title)
            else:
                ax.tick_params(axis="x", labelbottom=False)
            if column == 0:
                ax.set_ylabel(metric.label)
            else:
                ax.tick_params(axis="y", labelleft=False, which="both")
    drawn, others = canvas.few([arm for arm in sweep.arms if arm.finished])
    line = Line2D([], [], color=canvas.DARK, linewidth=1.0, label="Pareto front (by means)")
    canvas.legend(figure, drawn, extra=[line], dots=True)
    same = [cost.title for cost in tradeoffs.COSTS if cost not in costs]
    caption = (
        "Means over finished seeds with 95 % t intervals, cut where they would set the scale. "
        "Ringed arms are on the front: no other is as cheap and as good, and better in either. "
        "Fronts are of means: where intervals overlap, another seed may give another front."
        + (f" All arms take the same: {', '.join(same)}." if same else "")
        + unlike_text(sweep.arms, metrics, so="Fronts are of arms that may be compared.")
    )
    return Drawing(canvas=figure, caption=caption + others)


def _panel(ax: Axes, made: Sequence[Point], *, metric: Metric) -> None:
    ax.set_xscale("log")
    if metric.scale == "log":
        ax.set_yscale("log")
    best = [front for front in tradeoffs.fronts(made, metric=metric) if front]
    for front in best:
        _front_line(ax, front)
    on = {one.arm.arm_id for front in best for one in front}
    for one in made:
        colour, shape = one.arm.colour, canvas.MARKERS[one.arm.style]
        x, y = one.cost.mean, one.value.mean
        if one.value.low is not None and one.value.high is not None:
            ax.plot([x, x], [one.value.low, one.value.high], "-", color=colour, linewidth=1.2)
        if one.cost.low is not None and one.cost.high is not None and one.cost.low > 0:
            ax.plot([one.cost.low, one.cost.high], [y, y], "-", color=colour, linewidth=1.2)
        if one.arm.arm_id in on:
            ax.plot([x], [y], "o", color="none", markeredgecolor=canvas.DARK, markersize=11)
            _name(ax, x, y, one.arm.name)
        ax.plot([x], [y], shape, color=colour, markersize=5.5)
    _limits(ax, made, metric=metric)


def _name(ax: Axes, x: float, y: float, name: str) -> None:
    short = name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
    ax.annotate(short, (x, y), (7, 5), textcoords="offset points", fontsize=7, color=canvas.DARK)


def _front_line(ax: Axes, best: Sequence[Point]) -> None:
    """Steps through the front: what the cheapest arm of at most so much reaches."""
    xs, ys = [one.cost.mean for one in best], [one.value.mean for one in best]
    ax.step(xs, ys, where="post", color=canvas.DARK, linewidth=1.0, zorder=1.5)


def _limits(ax: Axes, made: Sequence[Point], *, metric: Metric) -> None:
    """Axes that hold all means, with few and short labels."""
    xs, ys = [one.cost.mean for one in made], [one.value.mean for one in made]
    if xs:
        ax.set_xlim(min(xs) / 1.5, max(xs) * 1.5)
        log = metric.scale == "log"
        low, high = (math.log(min(ys)), math.log(max(ys))) if log else (min(ys), max(ys))
        margin = 0.15 * (high - low) or 0.05 * abs(high) or 1.0
        most = math.log(LARGEST) if log else LARGEST
        ends = max(-most, low - margin), min(high + margin, most)
        ax.set_ylim(*(map(math.exp, ends) if log else ends))
        if log and max(ys) < NARROW * min(ys):
            ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
            ax.yaxis.set_major_formatter(EngFormatter(sep=""))
        ax.yaxis.set_minor_formatter(NullFormatter())
    if xs and max(xs) < NARROW * min(xs):
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    elif xs and max(xs) < 50 * min(xs):
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
