"""The files of a search with arms.

    study/arms.csv        a row for each arm: its best settings, their objective, edges
         /response.csv    a row for each trial: settings, objective with interval
         /plots/response  the objective over the rate, a panel for each arm, on common axes

Not for: their numbers (`response.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments import stats
from experiments.colours import OKABE_ITO
from experiments.errors import one_line
from experiments.metrics import scale_of
from experiments.report.figures import canvas, response
from experiments.report.figures.canvas import Drawing
from experiments.report.figures.curves import plain_ticks
from experiments.report.figures.response import Dot, draw_dots
from relora_core import atomic
from sweeps.search import results
from sweeps.search.arms import arm_folders
from sweeps.search.response import RATE, Arm, best_row, rates, rows, seed_values
from sweeps.search.results import TrialRow

COLUMNS = 4
LONGEST_NAME = 30
REACH = 3.0
"""Trials this many times as far from the best as the median are cut off: searches try bad ones."""
MOST_LINES = 4
"""Most settings of the other keys that have a line each; more have dots only."""


def write(arms: Sequence[Arm], folder: Path | str) -> tuple[list[Path], list[str]]:
    """Write them, and each arm's best and trials; the files, and a line if the plot has failed."""
    folder, written = Path(folder), []
    for arm, place in zip(arms, arm_folders(folder).values(), strict=True):
        if arm.results.trials:
            written += results.write_data(arm.results, folder=place)
    tables = {"arms.csv": [best_row(arm) for arm in arms], "response.csv": rows(arms)}
    for name, table in tables.items():
        if table:
            atomic.write_text(folder / name, results.to_csv(table))
            written.append(folder / name)
    try:
        return written + draw(arms, folder=folder / "plots"), []
    except Exception as error:  # a plot that fails must not cost the results
        return written, [f"no response: {one_line(error)}"]


def draw(arms: Sequence[Arm], *, folder: Path) -> list[Path]:
    """Draw the objective over the rate as PNG and SVG, unless no arm has tried two rates."""
    if not any(len(rates(arm)) > 1 for arm in arms):
        return []
    made = canvas.produce("response", title="", draw=lambda: figure(arms), folder=folder)
    return [path for path in (made.png, made.svg) if path]


# the plot ---------------------------------------------------------------------------------------
def figure(arms: Sequence[Arm]) -> Drawing:
    """Each arm's objective over the rate, with intervals over seeds; its best is marked."""
    drawn = [arm for arm in arms if rates(arm)]
    columns = min(COLUMNS, len(drawn))
    lines = math.ceil(len(drawn) / columns)
    made = Canvas(figsize=(2.6 * columns + 0.6, 2.3 * lines + 0.5))
    goal = drawn[0].results.goals[0]
    ends, scale = limits(drawn), scale_of(goal.metric)
    first: Axes | None = None
    for index, arm in enumerate(drawn):
        ax = made.add_subplot(lines, columns, index + 1, sharex=first, sharey=first)
        first = first or ax
        _panel(ax, arm, ends=ends, scale=scale)
        ax.label_outer()
        if index + columns >= len(drawn):
            ax.tick_params(axis="x", labelbottom=True, which="both")
            ax.set_xlabel("learning rate")
    assert first is not None
    first.set_xscale("log")
    first.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    first.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))
    first.xaxis.set_minor_formatter(NullFormatter())
    every = [rate for arm in drawn for rate in rates(arm)]
    first.set_xlim(min(every) / 1.4, max(every) * 1.4)
    first.set_yscale(scale)
    first.set_ylim(*ends)
    if scale == "log":
        plain_ticks(first.yaxis, *ends)
    made.supylabel(goal.metric, fontsize=10)
    return Drawing(canvas=made, caption="")


def limits(arms: Sequence[Arm]) -> tuple[float, float]:
    """Ends of the common axis: from the best to well beyond the median, not to what diverged."""
    values = [trial.values[0] for arm in arms for trial in arm.results.trials if trial.values]
    goal = arms[0].results.goals[0]
    better = "lower" if goal.direction == "minimize" else "higher"
    return response.limits(values, better=better, reach=REACH, scale=scale_of(goal.metric))


def _panel(ax: Axes, arm: Arm, *, ends: tuple[float, float], scale: stats.Scale) -> None:
    groups: dict[str, list[TrialRow]] = {}
    for trial in sorted(arm.results.trials, key=_others):
        if trial.values and RATE in trial.params:
            groups.setdefault(_label(trial), []).append(trial)
    lined = len(groups) <= MOST_LINES
    if len(groups) > 1:
        ax.plot(*_envelope(arm), "-", color=canvas.GREY, linewidth=1.0, alpha=0.7, zorder=1.5)
    for index, (label, trials) in enumerate(groups.items()):
        colour = OKABE_ITO[index] if lined else canvas.GREY
        trials.sort(key=lambda trial: trial.params[RATE])
        line = lined and (len(trials) > 2 or len(groups) == 1)
        _trials(ax, trials, colour=colour, line=line, ends=ends, label=label, scale=scale)
    if (best := arm.best) and RATE in best.params:
        rate, value = best.params[RATE], best.values[arm.results.goals[0].metric]
        ax.plot([rate], [value], "*", color=canvas.DARK, markersize=11, zorder=5, clip_on=False)
    title = arm.name if len(arm.name) <= LONGEST_NAME else f"{arm.name[: LONGEST_NAME - 3]}..."
    edge = any(line.startswith(f"{RATE}=") for line in arm.edges)
    ax.set_title(f"{title} (best at the edge)" if edge else title, color="#b3261e" if edge else "k")
    if lined and any(groups):  # a group without a label has no other keys
        ax.legend(loc="best", fontsize=7.5, handlelength=1.2, borderaxespad=0.2)


def _envelope(arm: Arm) -> tuple[list[float], list[float]]:
    """The rates that were tried, and the best value at each, whatever the other keys were."""
    pick = min if arm.results.goals[0].direction == "minimize" else max
    best: dict[float, float] = {}
    for trial in arm.results.trials:
        if trial.values and RATE in trial.params and math.isfinite(trial.values[0]):
            rate = trial.params[RATE]
            best[rate] = pick(best.get(rate, trial.values[0]), trial.values[0])
    return sorted(best), [best[rate] for rate in sorted(best)]


def _trials(
    ax: Axes,
    trials: Sequence[TrialRow],
    *,
    colour: str,
    line: bool,
    ends: tuple[float, float],
    label: str,
    scale: stats.Scale,
) -> None:
    """One setting of the other keys: a line, dots with intervals, marks at what is off the axis."""
    dots = []
    for trial in trials:
        if not trial.values:
            continue
        values = seed_values(trial)
        one = stats.interval(values, scale=scale) if values else None
        low, high = (one.low, one.high) if one else (None, None)
        dots.append(Dot(x=trial.params[RATE], y=trial.values[0], low=low, high=high))
    style = "-" if line else None
    draw_dots(ax, dots, colour=colour, ends=ends, lost=ends[1], line=style, label=label)


def _others(trial: TrialRow) -> list[tuple[bool, Any]]:
    """The values of all keys but the rate, for sorting: numbers before text."""
    values = [value for key, value in trial.params.items() if key != RATE]
    return [(False, v) if isinstance(v, (int, float)) else (True, str(v)) for v in values]


def _label(trial: TrialRow) -> str:
    """`scale 2`: the last part of each key but the rate, with its value."""
    others = {key: value for key, value in trial.params.items() if key != RATE}
    return ", ".join(f"{key.rpartition('.')[2]} {_text(value)}" for key, value in others.items())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_text, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
