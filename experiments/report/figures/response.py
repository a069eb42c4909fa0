"""Metrics over numeric axes: lines, maps of two axes, means over the others.

Not for: which arms belong to a line (`experiments/report/responses.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from experiments.colours import OKABE_ITO, STYLES
from experiments.disk.states import State
from experiments.report import responses
from experiments.report.comparisons import unlike, unlike_text
from experiments.report.data import Arm, Sweep
from experiments.report.document import joined
from experiments.report.figures import canvas
from experiments.report.figures.canvas import Drawing, NoData
from experiments.report.figures.curves import STEPS, plain_ticks
from experiments.report.responses import Axis, Facet, Line, value_label
from experiments.report.tables import charts, name, value_text
from experiments.stats import ROUNDING, Interval, Scale
from relora_core.events import Metric

MOST_TICKS = 8
"""Labels of an axis with a tick at each value."""
LETTER = 0.08
"""Inches that a letter of a tick's label takes."""
SEQUENTIAL = "viridis"
"""Of lines whose label is a number; perceptually uniform, and safe for colour-blind readers."""
MAP = "cividis"
"""Of maps; made for colour-blind readers."""
REACH = 10.0
"""How many times its distance from the best the median may be exceeded before a dot is cut off."""


# dots with intervals, shared with searches ------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Dot:
    """A value at a place on an axis, with its interval."""

    x: float
    y: float
    """nan or infinite where it diverged."""
    low: float | None = None
    high: float | None = None


def draw_dots(
    ax: Axes,
    dots: Sequence[Dot],
    *,
    colour: str,
    ends: tuple[float, float],
    lost: float,
    line: str | None = "-",
    marker: str = "o",
    label: str = "",
) -> None:
    """Dots with intervals, open without one, joined by a line unless that is None.

    What is beyond `ends` is a triangle at the edge; what is infinite, or nan and so at `lost`, an
    x there.
    """
    low, high = ends
    if line:
        usable = [dot for dot in dots if math.isfinite(dot.y)]
        xs, ys = [dot.x for dot in usable], [dot.y for dot in usable]
        ax.plot(xs, ys, linestyle=line, color=colour, linewidth=1.3)
    ax.plot([], [], linestyle=line or "", marker=marker, color=colour, markersize=4, label=label)
    for dot in dots:
        if not low <= dot.y <= high:
            end = lost if math.isnan(dot.y) else low if dot.y < low else high
            shape = "x" if not math.isfinite(dot.y) else "^" if end == high else "v"
            ax.plot([dot.x], [end], shape, color=colour, markersize=5, clip_on=False)
            continue
        single = dot.low is None or dot.high is None
        face = "white" if single else colour
        ax.plot(
            [dot.x], [dot.y], marker, color=colour, markersize=4, markerfacecolor=face, zorder=3
        )
        if dot.low is not None and dot.high is not None:
            cut = [max(dot.low, low), min(dot.high, high)]
            ax.plot([dot.x, dot.x], cut, "-", color=colour, linewidth=1.0, alpha=0.6)


def limits(
    values: Sequence[float],
    *,
    better: Literal["lower", "higher"],
    reach: float = REACH,
    scale: Scale = "linear",
) -> tuple[float, float]:
    """Ends of an axis: from the best to well beyond the median, not to what diverged."""
    there, back = (math.log, math.exp) if scale == "log" else (float, float)
    sign = 1.0 if better == "lower" else -1.0
    usable = [
        value for value in values if math.isfinite(value) and (scale == "linear" or value > 0)
    ]
    costs = sorted(sign * there(value) for value in usable) or [0.0]
    best, median = costs[0], float(np.median(costs))
    worst = min(costs[-1], best + reach * (median - best)) if median > best else costs[-1]
    margin = 0.08 * (worst - best) or 0.05 * abs(best) or 1.0
    ends = sorted((sign * (best - margin), sign * (worst + margin)))
    return back(ends[0]), back(ends[1])


# lines over an axis -----------------------------------------------------------------------------
def over(sweep: Sweep, axis: Axis) -> Drawing:
    """The metrics over one axis: a line for each value of the next, panels for further ones."""
    metrics = charts(sweep)
    made = responses.response(sweep, axis)
    labels = list(dict.fromkeys(line.label for facet in made.facets for line in facet.lines))
    for facet in made.facets:
        facet.lines = [line for line in facet.lines if line.label in labels[: canvas.MOST_CURVES]]
    if not metrics or not made.facets:
        raise NoData("no line has two values with a finished run")
    rows, columns = len(made.facets), len(metrics)
    if rows == 1:
        columns = min(2, columns)
        rows = math.ceil(len(metrics) / columns)
    wide = 4.4 if columns < 3 else 3.1
    figure = Canvas(figsize=(wide * columns + 0.5, (2.9 if columns < 3 else 2.5) * rows))
    looks = _looks(made.facets)
    for index, (facet, metric) in enumerate((f, m) for f in made.facets for m in metrics):
        ax = figure.add_subplot(rows, columns, index + 1)
        _panel(ax, facet, metric, axis=axis, looks=looks, inches=wide - 0.8)
        ax.set_ylabel(metric.label)
        ax.set_xlabel(axis.key)
        if facet.title and metric is metrics[0]:
            ax.set_title(facet.title)
    _legend(figure, made.facets, looks)
    text = f"Over {axis.key}{' (log axis)' if axis.log else ''}. {_intervals(sweep)}"
    if made.averaged:
        text += (
            f" Lines are means over {joined(made.averaged)}, for the combinations and seeds that "
            "have finished at every dot."
        )
    if made.dots:
        text += f" {made.dots} settings that were tried at one value only are in the tables."
    if (left := len(labels) - canvas.MOST_CURVES) > 0:
        text += f" The first {canvas.MOST_CURVES} lines are drawn, {left} others are in the tables."
    if any(facet.levels for facet in made.facets):
        text += f" Level lines, with bands: arms to which {axis.key} does not apply."
    text += unlike_text(sweep.arms, metrics, so="No line joins them.")
    return Drawing(canvas=figure, caption=text)


def _intervals(sweep: Sweep) -> str:
    several = any(len(arm.finished) > 1 for arm in sweep.arms)
    return (
        "Dots are means over finished seeds (perplexity: geometric) with 95 % t intervals"
        if several
        else "One seed: no intervals"
    ) + "; an open dot is a single seed, x at the edge: every seed diverged."


def _panel(
    ax: Axes,
    facet: Facet,
    metric: Metric,
    *,
    axis: Axis,
    looks: dict[str, dict[str, Any]],
    inches: float,
) -> None:
    dots = {line.label: _dots(line, metric, facet) for line in facet.lines}
    firsts = [next(iter(line.cells.values()))[0] for line in facet.lines]
    levels = [
        (arm, responses.estimates({0: [arm]}, metric=metric).get(0))
        for arm in facet.levels
        if not all(unlike(arm, first, metric) for first in firsts)
    ]
    means = [dot.y for own in dots.values() for dot in own]
    means += [one.mean for _, one in levels if one]
    if metric.scale == "log":
        ax.set_yscale("log")
    ends = limits(means, better=metric.better, scale=metric.scale)
    ends = _with_intervals(ends, [d for own in dots.values() for d in own], scale=metric.scale)
    for arm, one in levels:
        if one is None:
            continue
        ax.axhline(one.mean, color=arm.colour, linestyle=(0, (4, 2)), linewidth=1.2, zorder=1.6)
        if one.low is not None and one.high is not None:
            ax.axhspan(one.low, one.high, color=arm.colour, alpha=0.1, linewidth=0, zorder=1)
    lost = ends[1] if metric.better == "lower" else ends[0]
    shifts = _shifts(axis, len(facet.lines))
    for line, shift in zip(facet.lines, shifts, strict=True):
        for dot in dots[line.label]:
            dot.x = dot.x * shift if axis.log else dot.x + shift
        draw_dots(ax, dots[line.label], ends=ends, lost=lost, **looks[line.label])
    if metric.chance is not None and ends[0] < metric.chance < ends[1]:
        ax.axhline(metric.chance, color=canvas.GREY, linestyle=(0, (1, 2)), linewidth=1.2)
        ax.annotate(
            "chance",
            (1, metric.chance),
            xycoords=ax.get_yaxis_transform(),
            ha="right",
            va="bottom",
            fontsize=8,
            color=canvas.DARK,
        )
    ax.set_ylim(*ends)
    if metric.scale == "log":
        plain_ticks(ax.yaxis, *ends)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=STEPS))
    value_axis(ax, axis, inches=inches)


def _dots(line: Line, metric: Metric, facet: Facet) -> list[Dot]:
    """Of the line's cells with a value, and of those that lost it to divergence."""
    made = responses.estimates(line.cells, metric=metric)
    dots = []
    for place, arms in sorted(line.cells.items()):
        one = made.get(place)
        if one is not None:
            dots.append(Dot(x=place, y=one.mean, low=one.low, high=one.high))
        elif _diverged(arms):
            dots.append(Dot(x=place, y=math.nan))
    return dots


def _diverged(arms: Sequence[Arm]) -> bool:
    """Whether all that has ended has diverged."""
    states = {run.state for arm in arms for run in arm.runs}
    return State.DIVERGED in states and State.FINISHED not in states


def _with_intervals(
    ends: tuple[float, float], dots: Sequence[Dot], *, scale: Scale
) -> tuple[float, float]:
    """Ends that hold the intervals, which widen them by the span of the means at most."""
    there, back = (math.log, math.exp) if scale == "log" else (float, float)
    low, high = there(ends[0]), there(ends[1])
    span = high - low
    lows = [there(d.low) for d in dots if d.low is not None and (scale == "linear" or d.low > 0)]
    highs = [there(d.high) for d in dots if d.high is not None and math.isfinite(d.high)]
    margin = 0.04 * span
    low = max(low - span, min([low, *(value - margin for value in lows)]))
    high = min(high + span, max([high, *(value + margin for value in highs)]))
    return back(low), back(high)


def _shifts(axis: Axis, lines: int) -> list[float]:
    """How far each line's dots are moved aside, so that intervals do not cover each other."""
    if len(axis.values) > MOST_TICKS:
        return [1.0 if axis.log else 0.0] * lines
    places = np.log(axis.values) if axis.log else np.array(axis.values)
    span = float(places[-1] - places[0])
    step = min(0.012 * span, 0.08 * span / lines, 0.5 / lines * float(np.diff(places).min()))
    moved = [(line - (lines - 1) / 2) * step for line in range(lines)]
    return [math.exp(shift) for shift in moved] if axis.log else moved


def value_axis(ax: Axes, axis: Axis, *, inches: float) -> None:
    """An x axis with a tick at each value that was tried, unless there are many; `inches` wide."""
    values = axis.values
    if axis.log:
        ax.set_xscale("log")
    if len(values) <= MOST_TICKS:
        ax.xaxis.set_major_locator(FixedLocator(_apart(axis, inches=inches)))
    else:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)) if axis.log else MaxNLocator(nbins=5))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: value_label(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    if axis.log:
        wide = (values[-1] / values[0]) ** 0.06
        ax.set_xlim(values[0] / wide, values[-1] * wide)
    else:
        wide = 0.06 * (values[-1] - values[0])
        ax.set_xlim(values[0] - wide, values[-1] + wide)


def _apart(axis: Axis, *, inches: float) -> list[float]:
    """The values whose labels leave room for each other."""
    there = math.log if axis.log else float
    span = there(axis.values[-1]) - there(axis.values[0])
    kept, end = list[float](), -math.inf
    for value in axis.values:
        at = inches * 0.85 * (there(value) - there(axis.values[0])) / span
        half = 0.5 * LETTER * len(value_label(value))
        if at - half > end:
            kept.append(value)
            end = at + half + LETTER
    return kept


def _looks(facets: Sequence[Facet]) -> dict[str, dict[str, Any]]:
    """Label of a line -> its look: shades of one scale for numbers, else hues."""
    labels: dict[str, Arm] = {}
    for facet in facets:
        for line in facet.lines:
            labels.setdefault(line.label, next(iter(line.cells.values()))[0])
    names, looks = sorted(labels, key=_number_of), {}
    numbers = all(math.isfinite(_number_of(label)) for label in names) and len(names) > 1
    for index, label in enumerate(names):
        if numbers:
            shade = colormaps[SEQUENTIAL](0.88 * index / (len(names) - 1))
            colour = "#" + "".join(f"{round(255 * part):02x}" for part in shade[:3])
        elif len(names) < len(OKABE_ITO):
            colour = OKABE_ITO[index]
        else:
            colour = labels[label].colour
        style = STYLES[index % len(STYLES)]
        looks[label] = {"colour": colour, "line": style, "marker": canvas.MARKERS[style]}
    return looks


def _number_of(label: str) -> float:
    """The number after `=`; infinite for text, which keeps its order at the end."""
    try:
        return float(label.rpartition("=")[2])
    except ValueError:
        return math.inf


def _legend(figure: Canvas, facets: Sequence[Facet], looks: dict[str, dict[str, Any]]) -> None:
    handles = []
    for label, look in looks.items():
        drawn = {"color": look["colour"], "linestyle": look["line"], "marker": look["marker"]}
        handles += [Line2D([], [], **drawn, markersize=4, label=label)] if label else []
    levels = {arm.arm_id: arm for facet in facets for arm in facet.levels}
    handles += [
        Line2D([], [], color=arm.colour, linestyle=(0, (4, 2)), label=arm.name)
        for arm in levels.values()
    ]
    if handles:
        canvas.legend(figure, (), extra=handles)


# a map of two axes ------------------------------------------------------------------------------
def has_map(sweep: Sweep) -> bool:
    """Whether it is a grid of two numeric axes, at least half of it planned."""
    axes = responses.numeric_axes(sweep)
    if len(axes) != 2 or any(len(axis.values) > responses.MOST_VALUES for axis in axes):
        return False
    cells = {
        (responses.place_of(arm, axes[0].key), responses.place_of(arm, axes[1].key))
        for arm in sweep.arms
    }
    planned = [cell for cell in cells if None not in cell]
    return len(planned) >= len(axes[0].values) * len(axes[1].values) / 2


def heat_map(sweep: Sweep) -> Drawing:
    """A cell for each pair of values: mean and standard deviation over seeds."""
    metrics = charts(sweep)
    down, across = responses.numeric_axes(sweep)
    if len(down.values) > len(across.values):
        down, across = across, down
    groups: dict[str, dict[tuple[float, float], Arm]] = {}
    text = [key for key in responses.keys(sweep) if key not in (down.key, across.key)]
    for arm in sweep.arms:
        row, column = responses.place_of(arm, down.key), responses.place_of(arm, across.key)
        if row is not None and column is not None:
            title = ", ".join(f"{key}={arm.axes[key]}" for key in text if key in arm.axes)
            groups.setdefault(title, {})[row, column] = arm
    if not metrics or not groups:
        raise NoData("no run has finished")
    shown_groups = dict(list(groups.items())[: responses.MOST_FACETS])
    columns = min(2, len(metrics)) if len(shown_groups) == 1 else len(metrics)
    rows = -(-len(metrics) // columns) * len(shown_groups)
    wide = max(3.2, 0.62 * len(across.values) + 1.1)
    figure = Canvas(figsize=(min(wide, 8.0) * columns, (0.42 * len(down.values) + 1.15) * rows))
    index = 0
    for title, arms in shown_groups.items():
        for metric in metrics:
            index += 1
            ax = figure.add_subplot(rows, columns, index)
            _cells(ax, arms, metric, down=down, across=across)
            heading = name(metric) + (", %" if metric.percent else "")
            ax.set_title(f"{heading}\n{title}" if title else heading)
    left = len(groups) - len(shown_groups)
    caption = (
        "Means over finished seeds (perplexity: geometric), below them the standard deviation over "
        "seeds; the best cell is framed, a cell without a finished run is empty. Light is better."
        + (f" {left} more maps are not drawn." if left else "")
        + unlike_text(sweep.arms, metrics, so="A map has those like its first cell's.")
    )
    return Drawing(canvas=figure, caption=caption)


def _cells(
    ax: Axes, arms: dict[tuple[float, float], Arm], metric: Metric, *, down: Axis, across: Axis
) -> None:
    estimates = responses.estimates({cell: [arm] for cell, arm in arms.items()}, metric=metric)
    grid = np.full((len(down.values), len(across.values)), math.nan)
    for cell, one in estimates.items():
        row, column = cell  # type: ignore[misc]
        grid[down.values.index(row), across.values.index(column)] = one.mean
    usable = grid[np.isfinite(grid)]
    log = metric.scale == "log" and usable.size and usable.min() > 0
    ends = (usable.min(), usable.max()) if usable.size else (0.0, 1.0)
    norm = LogNorm(*ends) if log and ends[0] < ends[1] else Normalize(*ends)
    colours = colormaps[MAP if metric.better == "higher" else f"{MAP}_r"].with_extremes(bad="white")
    ax.imshow(grid, cmap=colours, norm=norm, aspect="auto", origin="lower")
    ax.grid(visible=False)
    for axis, side in ((across, ax.xaxis), (down, ax.yaxis)):
        side.set_ticks(range(len(axis.values)), [value_label(value) for value in axis.values])
        side.set_tick_params(length=0)
    ax.set_xlabel(across.key)
    ax.set_ylabel(down.key)
    small = 8.0 if len(across.values) <= 6 else 7.0
    for (row, column), arm in arms.items():
        at = across.values.index(column), down.values.index(row)
        one = estimates.get((row, column))
        if one is None:
            refused = (own := arm.estimate(metric)) is not None and own.n > 0
            words = "not\ncompared" if refused else "diverged" if _diverged([arm]) else ""
            ax.text(*at, words, ha="center", va="center", fontsize=small, color=canvas.DARK)
            continue
        red, green, blue, _ = (float(part) for part in colours(float(norm(one.mean))))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        ax.text(
            *at,
            _cell_text(one, metric),
            ha="center",
            va="center",
            fontsize=small,
            color="white" if dark else "black",
        )
    if usable.size:
        pick = np.nanargmin if metric.better == "lower" else np.nanargmax
        row, column = np.unravel_index(pick(grid), grid.shape)
        corner, look = (column - 0.48, row - 0.48), {"edgecolor": OKABE_ITO[1], "linewidth": 1.8}
        ax.add_patch(Rectangle(corner, 0.96, 0.96, fill=False, clip_on=False, **look))


def _cell_text(one: Interval, metric: Metric) -> str:
    """`133.8` above `± 0.5`; nothing below for a single seed."""
    mean = value_text(metric, one.mean)
    if one.sd is None:
        return mean
    spread = one.mean * one.sd if metric.scale == "log" else one.sd
    if spread <= ROUNDING * abs(one.mean):
        return f"{mean}\n± 0"
    spread *= 100 if metric.percent else 1
    text = f"{spread:#.2g}".rstrip(".") if spread < 100 else f"{spread:,.0f}"
    return f"{mean}\n± {text}"


# means over all other axes ----------------------------------------------------------------------
def marginal(sweep: Sweep) -> Drawing:
    """A column for each axis, a row for each metric: means over all other axes."""
    axes, metrics = responses.marginal_axes(sweep), charts(sweep)
    made = {
        (metric.key, key): responses.estimates(cells, metric=metric)
        for metric in metrics
        for key, cells in axes.items()
    }
    if not any(made.values()):
        raise NoData("no combination of the other axes has finished at every value of one")
    numbers = {axis.key: axis for axis in responses.numeric_axes(sweep)}
    figure = Canvas(figsize=(min(2.5 * len(axes) + 0.8, 12), 2.1 * len(metrics) + 0.4))
    for row, metric in enumerate(metrics):
        _marginal_row(figure, metric, row, len(metrics), axes=axes, made=made, numbers=numbers)
    caption = (
        "Mean over the combinations of the other axes that have finished at every value of this "
        "one, with 95 % t intervals over seeds. It hides that one axis may change what another "
        "does." + unlike_text(sweep.arms, metrics, so="Shown are those like the first value's.")
    )
    return Drawing(canvas=figure, caption=caption)


def _marginal_row(
    figure: Canvas,
    metric: Metric,
    row: int,
    rows: int,
    *,
    axes: dict[str, Any],
    made: dict[tuple[str, str], Any],
    numbers: dict[str, Axis],
) -> None:
    own = [one for key in axes for one in made[metric.key, key].values()]
    ends = limits([one.mean for one in own], better=metric.better, scale=metric.scale)
    every = [Dot(x=0, y=one.mean, low=one.low, high=one.high) for one in own]
    ends = _with_intervals(ends, every, scale=metric.scale)
    for column, (key, cells) in enumerate(axes.items()):
        ax = figure.add_subplot(rows, len(axes), row * len(axes) + column + 1)
        values = list(cells)
        axis = numbers.get(key)
        if axis and not all(isinstance(value, float) for value in values):
            axis = None  # some of its values are no numbers
        dots = [
            Dot(x=value if axis else place, y=one.mean, low=one.low, high=one.high)
            for place, value in enumerate(values)
            if (one := made[metric.key, key].get(value))
        ]
        if metric.scale == "log":
            ax.set_yscale("log")
        line = "-" if axis else None
        draw_dots(ax, dots, colour=OKABE_ITO[0], ends=ends, lost=ends[1], line=line)
        ax.set_ylim(*ends)
        if metric.scale == "log":
            plain_ticks(ax.yaxis, *ends)
        if axis:
            value_axis(ax, axis, inches=2.2)
        else:
            ax.set_xticks(range(len(values)), [value_label(value) for value in values])
            ax.set_xlim(-0.5, len(values) - 0.5)
            if max(len(value_label(value)) for value in values) * len(values) > 24:
                ax.tick_params(axis="x", labelrotation=30)
        if column == 0:
            ax.set_ylabel(metric.label)
        else:
            ax.tick_params(axis="y", labelleft=False, which="both")
        if row + 1 == rows:
            ax.set_xlabel(key)
        else:
            ax.tick_params(axis="x", labelbottom=False)


def drawings(sweep: Sweep) -> dict[str, tuple[str, Any]]:
    """Name -> (title, function that draws it), of the sweep's numeric axes."""
    axes = responses.numeric_axes(sweep)
    made: dict[str, tuple[str, Any]] = {
        f"response_{axis.key.replace('.', '_')}": (
            f"Response to {axis.key}",
            partial(over, sweep, axis),
        )
        for axis in axes
    }
    if has_map(sweep):
        title = f"Map of {axes[0].key} and {axes[1].key}"
        made["response_map"] = (title, partial(heat_map, sweep))
    if responses.marginal_axes(sweep):
        made["marginal"] = ("Means over all other axes", partial(marginal, sweep))
    return made
