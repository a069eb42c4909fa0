"""The paper's figures, from our runs: learning dynamics (3 to 6), schedules (8); and restarts.

Not for: measuring (`relora_core/dynamics.py`), nor the paper's own curves (`published.py`).
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from experiments.report.data import Arm, RunData, Sweep
from experiments.report.figures import canvas
from experiments.report.figures import published as paper_curves
from experiments.report.figures.canvas import Drawing, NoData
from experiments.report.figures.curves import Panel, Progress, restart_ticks
from experiments.report.figures.published import Published, Series
from experiments.stats import Scale
from relora_core.config import ADAPTERS, RunConfig, adapted_shapes, linear_shapes
from relora_core.redraws import Draws
from relora_core.schedule import lr_factor, redraws

GROUPS = {
    "weights": {"weight": "W + sBA", "base": "W without adapter\n(as published)"},
    "updates": {
        "gradient": "gradient of W + sBA",
        "update_proxy": "product BA\n(as published)",
        "update_restart": "true update\nsince the last restart",
        "update_total": "true update\nsince the start",
    },
}
"""Figure -> sort of matrix, as in the record -> title of its column."""
KINDS = {
    "w_2": "w_2",
    "ov": "OV, heads\nside by side",
    "vo": "V·O\n(as published)",
    "v_proj": "v_proj",
    "o_proj": "o_proj",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "w_0": "w_0",
    "w_1": "w_1",
}
MEASURES: dict[str, tuple[str, Scale]] = {
    "per": ("PER", "linear"),
    "condition_number": ("condition number", "log"),
}
SMALLEST_CHANGE = 0.005
"""Least height of a panel, in nats, so that rounding looks flat."""
MOST_SCHEDULES = 8
FINEST = 4000
"""Most points of a drawn schedule."""


# learning dynamics ------------------------------------------------------------------------------
def dynamics(
    sweep: Sweep,
    *,
    axis: Progress,
    group: str,
    measure: str,
    paper: Published | None = None,
) -> Drawing:
    """A row for each kind of layer, a column for each sort of matrix; means over layers."""
    label, scale = MEASURES[measure]
    cells = {
        (what, kind): f"dynamics/{what}/{kind}/{measure}"
        for what in GROUPS[group]
        for kind in KINDS
    }
    cells = {c: name for c, name in cells.items() if any(canvas.has(a, name) for a in sweep.arms)}
    if not cells:
        raise NoData(f"no run has recorded the dynamics of {group}")
    whats = [what for what in GROUPS[group] if any(w == what for w, _ in cells)]
    kinds = [kind for kind in KINDS if any(k == kind for _, k in cells)]
    measured = [a for a in sweep.arms if any(canvas.has(a, name) for name in cells.values())]
    drawn, others = canvas.few(measured)
    width = max(2.3 * len(whats) + 0.9, 5.6)
    figure = Canvas(figsize=(min(width, 10.1), 1.6 * len(kinds) + 0.8))
    laid: list[list[Series]] = []
    capped = False
    for row, kind in enumerate(kinds):
        panels = []
        for column, what in enumerate(whats):
            ax = figure.add_subplot(len(kinds), len(whats), row * len(whats) + column + 1)
            lowest = not any((what, below) in cells for below in kinds[row + 1 :])
            ax.tick_params(labelbottom=lowest)
            ax.set_xlabel(axis.label if lowest else "")
            if row == 0:
                ax.set_title(GROUPS[group][what])
            if (what, kind) not in cells:
                _empty(ax)
                continue
            panel = Panel(ax=ax, axis=axis, scale=scale)
            for arm in drawn:
                panel.arm(arm, cells[what, kind])
            if paper:
                laid.append(
                    paper.lay_dynamics(panel, group=group, what=what, kind=kind, measure=measure)
                )
            if measure == "per":
                capped |= _caps(panel, drawn, what=what, kind=kind)
            panels.append(panel)
        _same_scale(panels)
        for panel in panels:
            first = panel is panels[0]
            panel.finish(ylabel=f"{KINDS[kind]}\n{label}" if first else "", xlabel=False)
            restart_ticks(panel.ax, drawn, axis=axis)
    restarts = [canvas.RESTART] if any(run.restarts for a in drawn for run in a.runs) else []
    canvas.legend(figure, drawn, extra=[*restarts, *(paper.legend(laid) if paper else [])])
    text = _measure_text(group, measure, capped=capped)
    notes = paper_curves.note(laid, group=group, measure=measure) if paper else ""
    return Drawing(canvas=figure, caption=f"{text} {canvas.bands(drawn)}{others}{notes}")


def _empty(ax: Any) -> None:
    ax.set_axis_off()
    ax.text(
        *(0.5, 0.5, "not measured"),
        transform=ax.transAxes,
        ha="center",
        va="center",
        color=canvas.GREY,
    )


def _same_scale(panels: Sequence[Panel]) -> None:
    """Give the panels of a row one y axis, so that columns can be compared."""
    lines = [value for panel in panels for value in panel.lines]
    bands = [value for panel in panels for value in panel.bands]
    end = max((panel.end for panel in panels), default=0.0)
    for panel in panels:
        panel.lines, panel.bands, panel.end = lines, bands, end


def _caps(panel: Panel, arms: Sequence[Arm], *, what: str, kind: str) -> bool:
    """Draw the largest PER that the adapters' ranks allow; whether any was drawn."""
    levels, lines = set[float](), set[tuple[tuple[float, float], ...]]()
    for arm in arms:
        run = max(arm.runs, key=lambda run: run.step)
        points = run.curves.get(f"dynamics/{what}/{kind}/per", [])
        steps = [point.step for point in points]
        caps = largest_per(run.config, what=what, kind=kind, steps=steps)
        bounded = {cap for cap in caps if 0 < cap < 1}
        if len(bounded) == 1 and len(set(caps)) == 1:
            levels |= bounded
        elif bounded:
            at = (panel.axis.of(point) for point in points)
            lines.add(tuple(zip(at, caps, strict=True)))
    for cap in sorted(levels):
        panel.level(cap, text="r / min(shape)", inside=True)
    for line in sorted(lines):
        panel.bound(line)
    return bool(levels or lines)


def largest_per(config: RunConfig, *, what: str, kind: str, steps: Sequence[int]) -> list[float]:
    """For each step the largest mean over layers of rank / min(shape) of an update.

    Over the layers that were measured: for a product BA those with an adapter. 1 if any rank is
    possible; empty if the matrix is not a low-rank update, or there is no such layer.
    """
    if config.method not in ADAPTERS or what not in ("update_proxy", "update_restart"):
        return []
    names = [n for n in linear_shapes(config.model) if n.endswith(f".{kind}")]
    places = {name: index for index, name in enumerate(adapted_shapes(config))}
    if what == "update_proxy":
        names = [name for name in names if name in places]
    if not names:
        return []
    draws, size = Draws(config), min(linear_shapes(config.model)[names[0]])

    def rank(name: str, step: int) -> int:
        if what == "update_proxy":
            return draws.rank(step, places[name])
        return draws.update_rank(step, name)

    return [sum(rank(name, step) for name in names) / len(names) / size for step in steps]


def _measure_text(group: str, measure: str, *, capped: bool) -> str:
    if measure == "per":
        text = "Proportional effective rank, exp(entropy of the singular values) / min(shape)"
        cap = "; dotted: the most that the adapters' ranks allow" if capped else ""
        return f"{text}, mean over layers{cap}."
    text = (
        "Largest over smallest singular value, mean over layers, log axis; singular values that may"
        " be rounding are left out."
    )
    if group == "updates":
        text += " So BA is conditioned by its r directions only, unlike the paper's Figure 6."
    return text


# schedules --------------------------------------------------------------------------------------
def schedules(sweep: Sweep) -> Drawing:
    """Each arm's learning rate by its settings, and the rates that a run recorded."""
    groups: dict[Any, list[Arm]] = {}
    for arm in sweep.arms:
        if arm.runs and arm.runs[0].trained:
            groups.setdefault(_schedule_key(arm.runs[0].config), []).append(arm)
    if not groups:
        raise NoData("the sweep has no runs")
    shown = list(groups.values())[:MOST_SCHEDULES]
    columns = 1 if len(shown) == 1 else 2
    rows = -(-len(shown) // columns)
    titles = [_names(arms) for arms in shown]
    tall = max(title.count("\n") for title in titles)
    figure = Canvas(figsize=(4.6 * columns, rows * (2.0 + 0.17 * tall) + 0.3))
    for index, (arms, title) in enumerate(zip(shown, titles, strict=True)):
        ax = figure.add_subplot(rows, columns, index + 1)
        steps, rates = _rates(arms[0].runs[0].config)
        ax.plot(steps, rates, color=arms[0].colour, linewidth=1.4)
        logged = _logged(arms)
        if logged:
            x, y = zip(*logged, strict=True)
            ax.plot(x, y, "o", color=canvas.DARK, markersize=2.4, alpha=0.7, zorder=3)
        ax.set_title(title, fontsize=9)
        ax.set_ylim(0, None)
        ax.set_xlim(0, steps[-1] + 1)
        ax.set_ylabel("learning rate")
        ax.set_xlabel("optimizer step")
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    caption = (
        "Lines: the rate of every update as the settings have it; dots: rates that a run recorded."
    )
    left = len(groups) - len(shown)
    caption += f" {left} more schedules are not drawn." if left else ""
    return Drawing(canvas=figure, caption=caption)


def _schedule_key(config: RunConfig) -> Any:
    """A value that is equal for arms with the same rate at every update."""
    jagged = redraws(config) and config.relora.restart_warmup_steps
    relora = config.relora
    restarts = (*redraws(config), relora.reset_frequency, relora.restart_warmup_steps)
    schedule = repr(config.schedule), config.train.steps, config.train.lr
    return (*schedule, restarts if jagged else ())


def _rates(config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """(steps, rates) of at most FINEST updates, and of all turning points at restarts."""
    n, relora = config.train.steps, config.relora
    steps = set(range(0, n, max(1, n // FINEST))) | {n - 1}
    for restart in redraws(config):
        start = restart - relora.restart_offset
        rise = relora.restart_warmup_steps
        steps |= {start - 1, *(start + rise * i // 8 for i in range(9))}
    drawn = sorted(step for step in steps if 0 <= step < n)
    rates = [config.train.lr * lr_factor(step, config=config) for step in drawn]
    return np.array(drawn), np.array(rates)


def _logged(arms: Sequence[Arm], *, most: int = 60) -> list[tuple[int, float]]:
    """(step, rate) of the run that recorded most; that of update k is logged at step k + 1."""
    points = max((r.curves.get("train/lr", []) for a in arms for r in a.runs), key=len)
    every = max(1, -(-len(points) // most))
    return [(p.step - 1, p.value) for p in points[::every]]


def _names(arms: Sequence[Arm]) -> str:
    """Names of arms that share a panel, on three lines at most."""
    text = arms[0].name
    more = [arm.name for arm in arms[1:3]]
    left = len(arms) - 1 - len(more)
    text = ", ".join([text, *more]) + (f" and {left} more" if left else "")
    lines = textwrap.wrap(text, 56, break_on_hyphens=False)
    return "\n".join(lines[:3]) + (" ..." if len(lines) > 3 else "")


# restarts ---------------------------------------------------------------------------------------
def restarts(sweep: Sweep) -> Drawing:
    """Each restart's effect on the loss of a fixed batch, and the norm of what it merged."""
    arms = [arm for arm in sweep.arms if any(run.restarts for run in arm.runs)]
    if not arms:
        raise NoData("no run has restarted")
    drawn, others = canvas.few(arms)
    wanted = {
        "loss after - before": "loss after the restart\nminus before (nats per token)",
        "loss next - before": "loss after the next update\nminus before (nats per token)",
        "restart/merged_norm": "norm of what was merged",
    }
    figure = Canvas(figsize=(10.0, 3.2))
    axis = Progress(key="step", label="optimizer step", factor=1.0)
    changed = [_with_changes(arm) for arm in drawn]
    shown = [m for m in wanted if any(canvas.has(arm, m) for arm in changed)]
    if not shown:
        raise NoData("no restart has recorded what it changed")
    for index, metric in enumerate(shown):
        ax = figure.add_subplot(1, len(shown), index + 1)
        panel = Panel(ax=ax, axis=axis)
        for arm in changed:
            panel.arm(arm, metric)
        for line in ax.lines:
            line.set(marker="o", markersize=3.5)
        if metric != "restart/merged_norm":
            ax.axhline(0, color=canvas.DARK, linewidth=0.9, zorder=1.5)
            panel.lines += [-SMALLEST_CHANGE, SMALLEST_CHANGE]
        panel.finish(ylabel="", title=wanted[metric])
        ax.set_xlim(0, panel.end * 1.06)
    canvas.legend(figure, drawn)
    caption = (
        "On one fixed batch: its loss just before a restart, just after it, and after the next"
        " update; a merge that leaves the function alone changes it by rounding only. Norm: of the"
        " adapters' products that were added to the base, over all layers."
    )
    return Drawing(canvas=figure, caption=f"{caption} {canvas.bands(drawn)}{others}")


def _with_changes(arm: Arm) -> Arm:
    """The arm with curves of what each restart changed."""
    runs = []
    for run in arm.runs:
        curves = {k: v for k, v in run.curves.items() if k == "restart/merged_norm"}
        curves |= dict(_changes(run))
        runs.append(dataclasses.replace(run, curves=curves))
    return Arm(arm_id=arm.arm_id, name=arm.name, colour=arm.colour, style=arm.style, runs=runs)


def _changes(run: RunData) -> Iterator[tuple[str, list[Any]]]:
    before = {p.step: p for p in run.curves.get("restart/loss_before", [])}
    following = run.curves.get("restart/loss_next", [])
    later = {
        "loss after - before": {p.step: p for p in run.curves.get("restart/loss_after", [])},
        # The next update's event comes a step later.
        "loss next - before": {p.step - 1: p for p in following},
    }
    for name, after in later.items():
        points = [
            at._replace(value=after[step].value - at.value)
            for step, at in before.items()
            if step in after
        ]
        if points:
            yield name, points
