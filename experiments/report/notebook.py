"""A report's notebook: it loads the report's tidy data and draws each of its figures again.

Not for: drawing (`redraw.py`, whose text it holds).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pprint import pformat
from typing import Any

from experiments.report import responses
from experiments.report.data import AXES, Sweep
from experiments.report.tables import charts
from relora_core.evals.blimp import ACCURACY

DYNAMICS = {
    "weights_rank": (("weight", "base"), "per"),
    "weights_condition": (("weight", "base"), "condition_number"),
    "updates_rank": (("gradient", "update"), "per"),
    "updates_condition": (("gradient", "update"), "condition_number"),
}
"""Figure -> how its sorts of matrix begin, and its measure."""


def make(sweep: Sweep, figures: Mapping[str, str], *, x: str) -> str:
    """The notebook (nbformat 4) as JSON; `figures` are name -> title of those that were drawn."""
    cells = [
        _text(
            f"# Sweep {sweep.name}\n\nFrom `data.parquet` and `tables/` in this folder. "
            "It needs pyarrow, matplotlib and scipy."
        ),
        _code(Path(__file__).with_name("redraw.py").read_text(encoding="utf-8")),
        _code(_settings(sweep, x=AXES[x])),
    ]
    for name, title in figures.items():
        if call := _call(sweep, name):
            cells += [_text(f"## {title}"), _code(call)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _text(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def _code(source: str) -> dict[str, Any]:
    empty: dict[str, Any] = {"execution_count": None, "outputs": []}
    return {"cell_type": "code", "metadata": {}, "source": source} | empty


def _settings(sweep: Sweep, *, x: str) -> str:
    """What the tidy data do not hold: order and looks of arms, and metrics."""
    arms = [{"name": a.name, "colour": a.colour, "style": a.style} for a in sweep.arms]
    metrics = {
        metric.key: {"label": metric.label, "scale": metric.scale, "better": metric.better}
        for metric in charts(sweep)
    }
    return (
        f"X = {x!r}\nARMS = {pformat(arms)}\n"
        f"METRICS = {pformat(metrics, sort_dicts=False)}\n"
        "CURVES, FINALS, MEANS = read_curves(x=X), read_finals(), read_means()"
    )


def _call(sweep: Sweep, name: str) -> str:
    """The code that draws a figure; empty for one that the data do not tell."""
    fixed = {
        "arms": "draw_finals(MEANS, FINALS, ARMS, METRICS);",
        "differences": 'draw_differences(sorted(Path("tables").glob("compare_*.csv")), METRICS);',
        "marginal": 'draw_marginal("tables/marginal.csv", METRICS);',
        "fronts": 'draw_fronts("tables/tradeoffs.csv", METRICS);',
        "learning_curves": "draw_curves(CURVES, ARMS, METRICS, x=X);",
    }
    if name in fixed:
        return fixed[name]
    if name == "response_map":
        return _map(sweep)
    if name.startswith("response_"):
        return _response(sweep, name)
    metrics = _metrics_of(sweep, name)
    if not metrics:
        return ""
    looks = {key: {"label": key, "scale": scale, "better": ""} for key, scale in metrics.items()}
    call = f"METRICS_OF = {pformat(looks, sort_dicts=False)}\n"
    if name == "blimp_phenomena":
        return f"{call}draw_finals(MEANS, FINALS, ARMS, METRICS_OF);"
    return f"{call}draw_curves(CURVES, ARMS, METRICS_OF, x=X);"


def _metrics_of(sweep: Sweep, name: str) -> dict[str, str]:
    """Metric -> scale of a figure of curves, or of phenomena."""
    recorded = list(dict.fromkeys(m for run in sweep.runs for m in run.curves))
    if name == "schedules":
        return {key: "linear" for key in recorded if key == "train/lr"}
    if name == "restarts":
        return {
            key: "linear"
            for key in recorded
            if key.startswith("restart/loss_") or key == "restart/merged_norm"
        }
    if name == "blimp_phenomena":
        prefix = ACCURACY.key.removesuffix("accuracy")
        return {key: "linear" for key in sweep.metrics() if key.startswith(prefix)}
    if name in DYNAMICS:
        sorts, measure = DYNAMICS[name]
        starts = tuple(f"dynamics/{sort}" for sort in sorts)
        scale = "log" if measure == "condition_number" else "linear"
        chosen = [key for key in recorded if key.startswith(starts)]
        return {key: scale for key in chosen if key.endswith(f"/{measure}")}
    return {}


def _response(sweep: Sweep, name: str) -> str:
    axis = next(
        axis
        for axis in responses.numeric_axes(sweep)
        if name == f"response_{axis.key.replace('.', '_')}"
    )
    drawn = {
        ", ".join(filter(None, (facet.title, line.label))): line
        for facet in responses.response(sweep, axis).facets
        for line in facet.lines
    }
    lines: dict[str, dict[str, list[tuple[float, float, float | None, float | None]]]] = {}
    for metric in charts(sweep):
        own = lines[metric.key] = {}
        for label, line in drawn.items():
            if made := responses.estimates(line.cells, metric=metric):
                own[label] = [(at, o.mean, o.low, o.high) for at, o in sorted(made.items())]
    return (
        f"LINES = {pformat(lines, sort_dicts=False)}\n"
        f"draw_response(LINES, METRICS, axis={axis.key!r}, log={axis.log});"
    )


def _map(sweep: Sweep) -> str:
    down, across = (axis.key for axis in responses.numeric_axes(sweep))
    cells = [
        (responses.place_of(arm, down), responses.place_of(arm, across), arm.name)
        for arm in sweep.arms
    ]
    cells = [cell for cell in cells if None not in cell]
    return f"CELLS = {pformat(cells)}\ndraw_map(MEANS, CELLS, METRICS, axes={(down, across)!r});"
