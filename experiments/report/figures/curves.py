"""Curves of arms: the mean of finished runs with a 95 % t band over seeds.

A single finished run, and each unfinished run, is a thin line without a band. Not for: what a
figure shows (`catalogue.py`, `paper.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis as MplAxis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from experiments.disk.states import State
from experiments.report.data import AXES, Arm, Point, RunData, Sweep
from experiments.report.figures.canvas import DARK, GREY, finite
from experiments.stats import CONFIDENCE, Scale
from relora_core.config import ConfigError, nearest


# the axis of progress ---------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Progress:
    """What curves are drawn against."""

    key: str
    """Field of a Point."""
    label: str
    factor: float
    """From the field's unit to the label's."""

    def of(self, point: Point) -> float:
        return getattr(point, self.key) * self.factor


STEPS = [1, 2, 2.5, 5, 10]
"""Between ticks, times a power of ten."""
UNITS = {
    "steps": [(0.0, 1.0, "optimizer steps")],
    "tokens": [
        (2e9, 1e-9, "tokens (billions)"),
        (2e6, 1e-6, "tokens (millions)"),
        (2e3, 1e-3, "tokens (thousands)"),
        (0.0, 1.0, "tokens"),
    ],
    "gpu_hours": [
        (2.0, 1.0, "training time (device-hours)"),
        (2 / 60, 60.0, "training time (device-minutes)"),
        (0.0, 3600.0, "training time (device-seconds)"),
    ],
}
"""Axis -> (least maximum for this unit, factor, label)."""


def progress(sweep: Sweep, x: str) -> Progress:
    """The axis in a unit that suits the longest run; ConfigError for an unknown axis."""
    if x not in AXES:
        raise ConfigError(f"x must be one of {', '.join(AXES)}, got {x!r}.{nearest(x, list(AXES))}")
    ends = [points[-1] for run in sweep.runs for points in run.curves.values() if points]
    longest = max((getattr(point, AXES[x]) for point in ends), default=0.0)
    factor, label = next((f, name) for least, f, name in UNITS[x] if longest >= least)
    return Progress(key=AXES[x], label=label, factor=factor)


# curves -----------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Curve:
    """Mean over runs at the steps that all of them have, with its 95 % t interval."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """As `low`, nan for a single run."""
    n: int


def curve(runs: Sequence[RunData], metric: str, *, axis: Progress, scale: Scale) -> Curve | None:
    """The runs' mean and interval, geometric on the log scale; None if no run has the metric.

    Steps at which a run's value is not finite are left out, so that n is the same at every step.
    """
    by_run = [{p.step: p for p in run.curves.get(metric, ())} for run in runs]
    by_run = [points for points in by_run if points]
    if not by_run:
        return None
    steps = sorted(set.intersection(*(set(points) for points in by_run)))
    values = np.array([[points[s].value for s in steps] for points in by_run], dtype=float)
    x = np.array([[axis.of(points[s]) for s in steps] for points in by_run], dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(values) if scale == "log" else values
    usable = np.isfinite(values).all(axis=0)
    values, at, n = values[:, usable], x[:, usable].mean(axis=0), len(by_run)
    mean = values.mean(axis=0)
    half = np.full_like(mean, math.nan)
    if n > 1:
        from scipy.special import stdtrit

        half = stdtrit(n - 1, 0.5 + CONFIDENCE / 2) * values.std(axis=0, ddof=1) / math.sqrt(n)
    back = np.exp if scale == "log" else np.asarray
    return Curve(x=at, mean=back(mean), low=back(mean - half), high=back(mean + half), n=n)


@dataclass(kw_only=True, slots=True)
class Panel:
    """Axes, and the values drawn in them, which set the scale."""

    ax: Axes
    axis: Progress
    scale: Scale = "linear"
    start: float = 0.0
    """Where the x axis begins."""
    lines: list[float] = field(default_factory=list)
    bands: list[float] = field(default_factory=list)
    end: float = 0.0

    def arm(self, arm: Arm, metric: str) -> None:
        """Draw the mean and band of an arm's finished runs, and its other runs."""
        finished, others = arm.finished, [run for run in arm.runs if not run.finished]
        mean = curve(finished, metric, axis=self.axis, scale=self.scale)
        look: dict[str, Any] = {"color": arm.colour, "linestyle": arm.style}
        self._draw(mean, **look, linewidth=1.7 if mean and mean.n > 1 else 1.0)
        for run in others:
            alone = curve([run], metric, axis=self.axis, scale=self.scale)
            self._draw(alone, **look, linewidth=0.8, alpha=0.6)
            if alone and len(alone.x) and run.state == State.DIVERGED:
                self.ax.plot(alone.x[-1:], alone.mean[-1:], "x", color=arm.colour, markersize=6)

    def _draw(self, line: Curve | None, **look: Any) -> None:
        if line is None:
            return
        inside = line.x >= self.start
        x, mean, low, high = (v[inside] for v in (line.x, line.mean, line.low, line.high))
        if not len(x):
            return
        marker = "." if len(x) == 1 else ""
        self.ax.plot(x, mean, marker=marker, **look)
        if line.n > 1:
            self.ax.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0)
        self.lines += [mean.min(), mean.max()]
        self.bands += [*finite(low), *finite(high)]
        self.end = max(self.end, x.max())

    def level(self, value: float, *, text: str, inside: bool = True) -> None:
        """Draw a horizontal line with a label; with `inside` it is always in view."""
        self.ax.axhline(value, color=GREY, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1.5)
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
        self.ax.text(
            *(0.99, value, text),
            transform=self.ax.get_yaxis_transform(),
            ha="right",
            va="bottom",
            fontsize=9,
            color=DARK,
            clip_on=True,
            zorder=1.6,  # curves go over the label
            bbox=box,
        )
        if inside:
            self.lines.append(value)

    def bound(self, line: Sequence[tuple[float, float]]) -> None:
        """Draw a dotted step line through (x, upper bound up to x); bounds of 1 are left out."""
        x, y = (np.array(values) for values in zip(*line, strict=True))
        y = np.where(y < 1, y, math.nan)
        look: dict[str, Any] = {"color": GREY, "linewidth": 1.0, "linestyle": (0, (1, 2))}
        self.ax.plot(x, y, drawstyle="steps-pre", zorder=1.5, **look)
        self.lines += finite(y)

    def finish(self, *, ylabel: str, title: str = "", xlabel: bool = True) -> None:
        """Set scales, limits and labels. Bands widen the limits by the span of lines at most."""
        ax = self.ax
        if self.scale == "log":
            ax.set_yscale("log")
            plain_ticks(ax.yaxis, *(self._limits() if self.lines else (1.0, 10.0)))
        if self.lines:
            ax.set_ylim(*self._limits())
        width = self.end - self.start
        if width > 0:
            ax.set_xlim(self.start - 0.01 * width, self.end + 0.02 * width)
        ax.set_ylabel(ylabel)
        if title:
            ax.set_title(title)
        if xlabel:
            ax.set_xlabel(self.axis.label)

    def _limits(self) -> tuple[float, float]:
        there, back = (math.log, math.exp) if self.scale == "log" else (float, float)
        usable = [v for v in self.bands if self.scale == "linear" or v > 0]
        low, high = there(min(self.lines)), there(max(self.lines))
        span = (high - low) or abs(low) * 0.05 or 1.0
        low = max(low - span, min([low, *map(there, usable)]))
        high = min(high + span, max([high, *map(there, usable)]))
        margin = 0.06 * (high - low or span)
        return back(low - margin), back(high + margin)


def plain_ticks(axis: MplAxis, low: float, high: float) -> None:
    """Label ticks between the powers of ten where a log axis spans at most three decades."""
    decades = math.log10(high / low)
    subs = (1, 2, 5) if decades > 0.9 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    if decades > 3:
        return
    few = high < 3 * low  # multiples of powers of ten would leave a tick or two
    axis.set_major_locator(MaxNLocator(nbins=6, steps=STEPS) if few else LogLocator(subs=subs))
    if few:
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def restart_ticks(ax: Axes, arms: Sequence[Arm], *, axis: Progress) -> bool:
    """Mark restarts above the x axis, in one row for arms with equal restarts.

    Returns whether any arm has restarts.
    """
    rows: dict[tuple[float, ...], list[Arm]] = {}
    for arm in arms:
        run = max(arm.runs, key=lambda run: len(run.restarts), default=None)
        points = run.curves.get("restart/count", []) if run else []
        if points:
            rows.setdefault(tuple(p.step for p in points), []).append(arm)
    for index, (steps, members) in enumerate(list(rows.items())[:6]):
        longest = max(members[0].runs, key=lambda run: len(run.restarts))
        at = [axis.of(p) for p in longest.curves["restart/count"] if p.step in steps]
        colour = members[0].colour if len(members) == 1 else DARK
        low = 0.04 * index
        ax.vlines(
            *(at, low, low + 0.033),
            transform=ax.get_xaxis_transform(),
            color=colour,
            linewidth=1.3,
            zorder=3,
        )
    return bool(rows)
