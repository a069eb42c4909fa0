"""What a report's notebook draws with: its text is the notebook's first cell of code.

It needs pyarrow, matplotlib and scipy, and nothing of the project.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyarrow.parquet as pq
from scipy.stats import t as student

inf = math.inf  # as numbers in the cells below are written
Curves = dict[tuple[str, str], dict[int, dict[int, tuple[float, float]]]]
"""(arm, metric) -> seed -> step -> (place on the x axis, value), of finished runs."""


# data -------------------------------------------------------------------------------------------
def read_curves(path: str | Path = "data.parquet", *, x: str = "tokens") -> Curves:
    """Every point of every finished run; `x` is `step`, `tokens` or `gpu_hours`."""
    columns = ["arm", "seed", "state", "metric", "step", x, "value"]
    table = pq.read_table(path, columns=list(dict.fromkeys(columns))).to_pydict()
    rows = zip(*(table[column] for column in columns), strict=True)
    curves: Curves = {}
    for arm, seed, state, metric, step, at, value in rows:
        if state == "finished" and math.isfinite(value):
            curves.setdefault((arm, metric), {}).setdefault(seed, {})[step] = (at, value)
    return curves


def read_finals(path: str | Path = "tables/runs.csv") -> dict[str, dict[str, dict[int, float]]]:
    """arm -> metric -> seed -> final value, of finished runs."""
    finals: dict[str, dict[str, dict[int, float]]] = {}
    for row in read_table(path):
        if row["state"] != "finished":
            continue
        for key, text in row.items():
            if "/" in key and not key.startswith("setting/") and text:
                values = finals.setdefault(row["arm"], {}).setdefault(key, {})
                values[int(row["seed"])] = float(text)
    return finals


def read_means(folder: str | Path = "tables") -> dict[tuple[str, str], tuple[float, ...]]:
    """(arm, metric) -> mean and both ends of its 95 % interval, nan where there is none."""
    paths = [Path(folder) / "arms.csv", *sorted(Path(folder).glob("blimp_*_phenomena.csv"))]
    rows = [row for path in paths for row in read_table(path) if int(row["n"])]
    ends = ("mean", "low", "high")
    return {
        (row["arm"], row["metric"]): tuple(float(row[end] or "nan") for end in ends) for row in rows
    }


def read_table(path: str | Path) -> list[dict[str, str]]:
    """The rows of a table of the report."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def interval(values: Iterable[float], *, log: bool = False) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % Student t interval, nan for one value; geometric on `log`."""
    there, back = (math.log, math.exp) if log else (float, float)
    numbers = [there(value) for value in values]
    mean = statistics.fmean(numbers)
    if len(numbers) < 2:
        return back(mean), math.nan, math.nan
    spread = statistics.stdev(numbers) / math.sqrt(len(numbers))
    half = float(student.ppf(0.975, len(numbers) - 1)) * spread
    return back(mean), back(mean - half), back(mean + half)


# figures ----------------------------------------------------------------------------------------
def panels(count: int, *, columns: int = 2, wide: float = 4.4, tall: float = 3.0) -> Any:
    """A figure, and that many axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = plt.figure(figsize=(wide * columns, tall * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def draw_curves(
    curves: Curves, arms: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], *, x: str
) -> Any:
    """Means and bands over seeds, at the steps that all seeds have; a panel for each metric."""
    figure, axes = panels(len(metrics))
    for ax, (metric, look) in zip(axes, metrics.items(), strict=True):
        log = look.get("scale") == "log"
        for arm in arms:
            seeds = list(curves.get((arm["name"], metric), {}).values())
            steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
            if log:
                steps = [step for step in steps if all(seed[step][1] > 0 for seed in seeds)]
            ends = [interval([seed[step][1] for seed in seeds], log=log) for step in steps]
            places = [statistics.fmean(seed[step][0] for seed in seeds) for step in steps]
            if ends:
                mean, low, high = zip(*ends, strict=True)
                drawn = {"color": arm["colour"], "linestyle": arm["style"], "label": arm["name"]}
                ax.plot(places, mean, marker="." if len(places) == 1 else "", **drawn)
                ax.fill_between(places, low, high, color=arm["colour"], alpha=0.16, linewidth=0)
        ax.set_yscale("log" if log else "linear")
        ax.set_ylabel(look.get("label", metric))
        ax.set_xlabel(x)
    _legend(figure, axes)
    return figure


def draw_finals(
    means: Mapping[tuple[str, str], Sequence[float]],
    finals: Mapping[str, Any],
    arms: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
) -> Any:
    """A row for each arm: mean with interval, and the seeds."""
    figure, axes = panels(len(metrics), columns=4, wide=3.0, tall=1.0 + 0.3 * len(arms))
    for index, (ax, (metric, look)) in enumerate(zip(axes, metrics.items(), strict=True)):
        for row, arm in enumerate(arms):
            if (arm["name"], metric) in means:
                middle, low, high = means[arm["name"], metric]
                values = list(finals.get(arm["name"], {}).get(metric, {}).values())
                ax.plot([low, high], [row, row], "-", color=arm["colour"])
                ax.plot([middle], [row], "o", color=arm["colour"])
                ax.plot(values, [row + 0.22] * len(values), "|", color=arm["colour"])
        _rows(ax, [arm["name"] for arm in arms], first=index == 0)
        ax.set_xlabel(f"{look['label']}\n({look['better']} is better)")
    return figure


def draw_differences(paths: Iterable[str | Path], metrics: Mapping[str, Any]) -> Any:
    """Arm minus reference from tables of comparisons, of perplexities the change in per cent."""
    rows = [row for path in paths for row in read_table(path) if row["difference"]]
    pairs = list(dict.fromkeys((row["arm"], row["reference"]) for row in rows))
    same = len({reference for _, reference in pairs}) == 1
    figure, axes = panels(len(metrics), columns=4, wide=3.0, tall=1.0 + 0.3 * len(pairs))
    for index, (ax, (metric, look)) in enumerate(zip(axes, metrics.items(), strict=True)):
        log = look["scale"] == "log"
        ax.axvline(0, color="#3b4046", linewidth=1)
        for row in (row for row in rows if row["metric"] == metric):
            ends = [float(row[key] or "nan") for key in ("difference", "low", "high")]
            ends = [100 * (end - 1) if log else end for end in ends]
            at = pairs.index((row["arm"], row["reference"]))
            ax.plot(ends[1:], [at, at], "-", color="#0072b2")
            ax.plot(ends[:1], [at], "o", color="#0072b2")
        names = [arm if same else f"{arm} minus {reference}" for arm, reference in pairs]
        _rows(ax, names, first=index == 0)
        unit = "change in %" if log else "difference"
        ax.set_xlabel(f"{look['label']}\n{unit}{f' to {pairs[0][1]}' if same else ''}")
    return figure


def draw_response(
    lines: Mapping[str, Mapping[str, Sequence[tuple[float, float, float | None, float | None]]]],
    metrics: Mapping[str, Any],
    *,
    axis: str,
    log: bool,
) -> Any:
    """Metrics over an axis: metric -> line -> (place, mean, ends of its interval), as reported."""
    figure, axes = panels(len(metrics))
    for ax, (metric, look) in zip(axes, metrics.items(), strict=True):
        for label, dots in lines[metric].items():
            places, means, lows, highs = zip(*dots, strict=True)
            bars = [
                [0 if low is None else mean - low for mean, low in zip(means, lows, strict=True)],
                [0 if high is None else high - m for m, high in zip(means, highs, strict=True)],
            ]
            ax.errorbar(places, means, yerr=bars, marker="o", markersize=4, label=label)
        ax.set_xscale("log" if log else "linear")
        ax.set_yscale(look["scale"])
        ax.set_xlabel(axis)
        ax.set_ylabel(look["label"])
    _legend(figure, axes)
    return figure


def draw_map(
    means: Mapping[tuple[str, str], Sequence[float]],
    cells: Sequence[tuple[float, float, str]],
    metrics: Mapping[str, Any],
    *,
    axes: tuple[str, str],
) -> Any:
    """Means in a cell for each (row, column, arm); cells without a finished run are empty."""
    downs, acrosses = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    figure, places = panels(len(metrics), tall=0.5 * len(downs) + 1.4)
    for ax, (metric, look) in zip(places, metrics.items(), strict=True):
        grid = [[math.nan] * len(acrosses) for _ in downs]
        for down, across, arm in cells:
            if (arm, metric) in means:
                mean = means[arm, metric][0]
                row, column = downs.index(down), acrosses.index(across)
                grid[row][column] = mean
                box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
                ax.text(column, row, f"{mean:.4g}", ha="center", va="center", fontsize=8, bbox=box)
        colours = "cividis" if look["better"] == "higher" else "cividis_r"
        ax.imshow(grid, cmap=colours, aspect="auto", origin="lower")
        ax.set_xticks(range(len(acrosses)), [f"{value:g}" for value in acrosses])
        ax.set_yticks(range(len(downs)), [f"{value:g}" for value in downs])
        ax.set_ylabel(axes[0])
        ax.set_xlabel(axes[1])
        ax.set_title(look["label"].replace("\n", " "))
    return figure


def draw_marginal(path: str | Path, metrics: Mapping[str, Any]) -> Any:
    """Means over all other axes, from their table."""
    rows = [row for row in read_table(path) if row["metric"] in metrics and row["mean"]]
    keys = list(dict.fromkeys(row["axis"] for row in rows))
    figure, axes = panels(len(keys) * len(metrics), columns=len(keys), wide=2.6, tall=2.2)
    for index, ax in enumerate(axes):
        key, metric = keys[index % len(keys)], list(metrics)[index // len(keys)]
        own = [row for row in rows if row["axis"] == key and row["metric"] == metric]
        for place, row in enumerate(own):
            if row["low"]:
                ax.plot([place] * 2, [float(row["low"]), float(row["high"])], "-", color="#0072b2")
            ax.plot([place], [float(row["mean"])], "o", color="#0072b2")
        ax.set_xticks(range(len(own)), [row["value"] for row in own])
        ax.set_yscale(metrics[metric]["scale"])
        ax.set_xlabel(key)
        ax.set_ylabel(metrics[metric]["label"])
    return figure


def draw_fronts(path: str | Path, metrics: Mapping[str, Any]) -> Any:
    """What arms reach for what they take, from the table of trade-offs."""
    rows = [row for row in read_table(path) if row["metric"] in metrics and row["mean"]]
    costs = [
        cost
        for cost in ("trainable", "moment_bytes", "tokens", "gpu_hours")
        if len({row[cost] for row in rows if row[cost]}) > 1
    ]
    figure, axes = panels(len(costs) * len(metrics), columns=max(1, len(costs)), wide=3.2)
    for index, ax in enumerate(axes):
        cost, metric = costs[index % len(costs)], list(metrics)[index // len(costs)]
        for row in rows:
            if row["metric"] == metric and row[cost]:
                at = float(row[cost]), float(row["mean"])
                ax.plot(*([value] for value in at), "o", color="#0072b2")
                ax.annotate(row["arm"], at, (4, 4), textcoords="offset points", fontsize=7)
        ax.set_xscale("log")
        ax.set_yscale(metrics[metric]["scale"])
        ax.set_xlabel(cost)
        ax.set_ylabel(metrics[metric]["label"])
    return figure


def _rows(ax: Any, names: Sequence[str], *, first: bool) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", labelleft=first)


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            if label:
                entries.setdefault(label, handle)
    if entries:
        handles, labels = list(entries.values()), list(entries)
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
