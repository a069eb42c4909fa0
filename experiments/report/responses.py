"""How metrics respond to the axes of a sweep: lines over a numeric axis, means over the others.

An axis is a key that the names of runs have, so a setting that two named arms differ in is none.
Not for: pictures (`figures/response.py`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from experiments.report.comparisons import alike, unlike, unlike_text
from experiments.report.data import Arm, Sweep
from experiments.report.document import Block, Table, joined
from experiments.report.tables import certainty, mean_cell, name, shown, value_text
from experiments.stats import Interval, finite, interval
from relora_core.config import get
from relora_core.events import Metric

Cell = TypeVar("Cell", bound=Hashable)
"""What tells means apart: a value of an axis, or one of each of two."""
MOST_FACETS = 4
"""Combinations of further axes with panels of their own; of more, lines are means."""
MOST_LEVELS = 6
"""Arms without a place on an axis that are drawn beside the others."""
MOST_SENTENCES = 12
"""On axes."""
MOST_LISTED = 6
"""Values of an axis that a sentence lists; of more it says the range."""
MOST_VALUES = 12
"""Of an axis whose marginal means are shown, and of a side of a map."""


@dataclass(kw_only=True, slots=True)
class Axis:
    """A numeric axis."""

    key: str
    values: list[float]
    """Ascending."""

    @property
    def log(self) -> bool:
        """Whether its values are spread more evenly by ratio than by difference."""
        return log_spaced(self.values)


def log_spaced(values: Sequence[float]) -> bool:
    """Whether ascending values are spread more evenly by ratio; of two, if one is 10 times more."""
    if values[0] <= 0:
        return False
    if len(values) < 3:
        return values[-1] >= 10 * values[0]
    ratios = [b / a for a, b in itertools.pairwise(values)]
    steps = [b - a for a, b in itertools.pairwise(values)]
    return max(ratios) / min(ratios) < max(steps) / min(steps)


# axes -------------------------------------------------------------------------------------------
def keys(sweep: Sweep) -> list[str]:
    """Every axis, in the order of the names; the seed is none."""
    return list(dict.fromkeys(key for arm in sweep.arms for key in arm.axes))


def numeric_axes(sweep: Sweep) -> list[Axis]:
    """Those with two numbers or more."""
    axes = []
    for key in keys(sweep):
        values = {place for arm in sweep.arms if (place := place_of(arm, key)) is not None}
        if len(values) > 1:
            axes.append(Axis(key=key, values=sorted(values)))
    return axes


def place_of(arm: Arm, key: str) -> float | None:
    """The arm's number on an axis; None where the axis does not apply or the value is no number."""
    if key not in arm.axes or not arm.runs:
        return None
    try:
        value = get(arm.runs[0].config, key)
    except AttributeError:  # a label, such as `arm`
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def value_label(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


# lines ------------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Line:
    """What is drawn over an axis at one value of the next."""

    label: str
    """`relora.r=8`; empty where there is no other axis."""
    cells: dict[float, list[Arm]] = field(default_factory=dict)
    """Place on the axis -> arms; several only where the line is a mean over further axes."""


@dataclass(kw_only=True, slots=True)
class Facet:
    """The lines of one combination of further axes."""

    title: str = ""
    lines: list[Line] = field(default_factory=list)
    levels: list[Arm] = field(default_factory=list)
    """Arms to which the axis does not apply, such as full rank on one of ranks."""


@dataclass(kw_only=True, slots=True)
class Response:
    """What is drawn over one axis."""

    axis: Axis
    facets: list[Facet]
    averaged: list[str]
    """Axes that lines are means over."""
    dots: int = 0
    """Settings with a single value of the axis, which are no lines."""


def response(sweep: Sweep, axis: Axis) -> Response:
    """Lines over the axis, one for each value of the next.

    Further axes are facets if there are few combinations; else lines are means over those with
    numbers, and one for each value of the others. Without a full grid nothing is averaged.
    """
    names = keys(sweep)
    at = names.index(axis.key)
    others = [*names[at + 1 :], *names[:at]]
    on = [arm for arm in sweep.arms if place_of(arm, axis.key) is not None]
    lined, apart, averaged = others[:1], others[1:], []
    if len({_words(arm, apart) for arm in on}) > MOST_FACETS:
        numeric = [axis.key for axis in numeric_axes(sweep)]
        averaged = [key for key in apart if key in numeric]
        lined = [key for key in names if key in lined or (key in apart and key not in numeric)]
        apart = []
    facets = _facets(on, axis, apart=apart, lined=lined)
    if averaged and not _is_grid([line.cells for f in facets.values() for line in f.lines]):
        lined, averaged = [key for key in names if key != axis.key], []
        facets = _facets(on, axis, apart=apart, lined=lined)
    for arm in sweep.arms:
        if place_of(arm, axis.key) is not None:
            continue
        if (title := _facet_of(arm, apart, facets)) is not None:
            facets[title].levels.append(arm)
    dots = 0
    for facet in facets.values():
        lines = [line for line in facet.lines if len(line.cells) > 1]
        dots += len(facet.lines) - len(lines)
        facet.lines = lines
        if len(facet.levels) > MOST_LEVELS:
            facet.levels = []
    made = [facet for facet in facets.values() if facet.lines]
    return Response(axis=axis, facets=made, averaged=averaged, dots=dots)


def _facets(
    arms: Sequence[Arm], axis: Axis, *, apart: Sequence[str], lined: Sequence[str]
) -> dict[str, Facet]:
    facets: dict[str, Facet] = {}
    for arm in arms:
        title, label = _words(arm, apart), _words(arm, lined)
        facet = facets.setdefault(title, Facet(title=title))
        line = next((line for line in facet.lines if line.label == label), None)
        if line is None:
            facet.lines.append(line := Line(label=label))
        place = place_of(arm, axis.key)
        assert place is not None  # of the arms on the axis
        line.cells.setdefault(place, []).append(arm)
    return facets


def _is_grid(groups: Sequence[Mapping[Any, Sequence[Arm]]]) -> bool:
    """Whether all cells have as many arms, as those of a search have not."""
    return len({len(arms) for cells in groups for arms in cells.values()}) <= 1


def _facet_of(arm: Arm, further: Sequence[str], facets: Mapping[str, Facet]) -> str | None:
    """The facet that an arm without a place belongs to; None if it belongs to several or none."""
    title = _words(arm, further)
    return title if title in facets else next(iter(facets)) if len(facets) == 1 else None


def _words(arm: Arm, names: Sequence[str]) -> str:
    return ", ".join(f"{key}={arm.axes[key]}" for key in names if key in arm.axes)


# estimates --------------------------------------------------------------------------------------
def estimates(cells: Mapping[Cell, Sequence[Arm]], *, metric: Metric) -> dict[Cell, Interval]:
    """The interval over seeds of each cell that has values, if these may be compared with the
    first's.

    Where cells have several arms it is of the mean over arms, for those combinations of the other
    axes, and seeds, that every cell has a finite value of: else unlike would be compared.
    """
    cells = _like_first(cells, metric)
    if all(len(arms) == 1 for arms in cells.values()):
        made = {cell: arms[0].estimate(metric) for cell, arms in cells.items()}
        return {cell: one for cell, one in made.items() if one and one.n}
    differing = _shared_axes(cells)
    tables = {cell: _by_combination(arms, differing, metric) for cell, arms in cells.items()}
    if not tables:
        return {}
    combinations = sorted(set.intersection(*(set(table) for table in tables.values())))
    seeds = [set(table[c]) for table in tables.values() for c in combinations]
    common = sorted(set.intersection(*seeds)) if seeds else []
    if not common:
        return {}
    there, back = (math.log, math.exp) if metric.scale == "log" else (float, float)
    return {
        cell: interval(
            [
                back(statistics.fmean(there(table[c][seed]) for c in combinations))
                for seed in common
            ],
            scale=metric.scale,
        )
        for cell, table in tables.items()
    }


def _like_first(cells: Mapping[Cell, Sequence[Arm]], metric: Metric) -> dict[Cell, Sequence[Arm]]:
    """The cells none of whose arms is `unlike` that of the first with values at the same other
    axes."""
    names = _shared_axes(cells)
    with_values = (a for a in cells.values() if any(arm.values(metric.key) for arm in a))
    first = {_combination(arm, names): arm for arm in next(with_values, ())}
    kept: dict[Cell, Sequence[Arm]] = {}
    for cell, arms in cells.items():
        pairs = [(arm, first.get(_combination(arm, names), arm)) for arm in arms]
        if not any(arm is not other and unlike(arm, other, metric) for arm, other in pairs):
            kept[cell] = arms
    return kept


def _combination(arm: Arm, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(arm.axes.get(key, "") for key in names)


def _shared_axes(cells: Mapping[Any, Sequence[Arm]]) -> list[str]:
    """The axes that tell the arms of one cell apart."""
    names = dict.fromkeys(key for arms in cells.values() for arm in arms for key in arm.axes)
    return [
        key
        for key in names
        if any(len({arm.axes.get(key) for arm in arms}) > 1 for arms in cells.values())
    ]


def _by_combination(
    arms: Sequence[Arm], names: Sequence[str], metric: Metric
) -> dict[tuple[str, ...], dict[int, float]]:
    """Values of `names` -> seed -> finite value."""
    table: dict[tuple[str, ...], dict[int, float]] = {}
    for arm in arms:
        values = {s: v for s, v in arm.values(metric.key).items() if _usable(v, metric)}
        if values:
            table[_combination(arm, names)] = values
    return table


def _usable(value: float, metric: Metric) -> bool:
    return finite(value) and (metric.scale == "linear" or value > 0)


# marginal means ---------------------------------------------------------------------------------
def marginal_axes(sweep: Sweep) -> dict[str, dict[float | str, list[Arm]]]:
    """Axis -> value -> arms, of those with few values; empty below three, without numbers, or where
    most of the grid was not planned, as in a search."""
    names = keys(sweep)
    full = [arm for arm in sweep.arms if all(key in arm.axes for key in names)]
    made: dict[str, dict[float | str, list[Arm]]] = {}
    for key in names:
        cells: dict[float | str, list[Arm]] = {}
        for arm in full:
            place = place_of(arm, key)
            cells.setdefault(arm.axes[key] if place is None else place, []).append(arm)
        if 1 < len(cells) <= MOST_VALUES:
            made[key] = dict(sorted(cells.items(), key=_numbers_first))
    points = math.prod(map(len, made.values()))
    if len(made) < 3 or not numeric_axes(sweep) or 2 * len(full) < points:
        return {}
    return made


def _numbers_first(item: tuple[float | str, Any]) -> tuple[bool, float]:
    value = item[0]
    return (True, 0.0) if isinstance(value, str) else (False, value)


def marginals(sweep: Sweep) -> list[Block]:
    """A table of the means at each value of each axis, over all other axes."""
    axes, metrics = marginal_axes(sweep), shown(sweep)
    rows, data = [], []
    for key, cells in axes.items():
        made = {metric.key: estimates(cells, metric=metric) for metric in metrics}
        for value in cells:
            row = [made[metric.key].get(value) for metric in metrics]
            if not any(row):
                continue
            texts = [
                mean_cell(one, partial(value_text, metric), expected=one.n if one else 0)
                for one, metric in zip(row, metrics, strict=True)
            ]
            rows.append([key, value_label(value), *texts])
            for one, metric in zip(row, metrics, strict=True):
                ends = {"low": one.low, "high": one.high, "n": one.n} if one else {"n": 0}
                mean = one.mean if one else None
                data.append(
                    {"axis": key, "value": value, "metric": metric.key, "mean": mean} | ends
                )
    if not rows:
        return []
    return [
        Table(
            name="marginal",
            title="Means over all other axes",
            columns=["axis", "value", *(metric.title for metric in metrics)],
            rows=rows,
            data=data,
            note="Mean over the combinations of the other axes that have finished at every value "
            "of this one [95 % interval over seeds]. It hides that one axis may change what "
            "another does: see the figures."
            + unlike_text(sweep.arms, metrics, so="Shown are those like the first value's."),
        )
    ]


# sentences --------------------------------------------------------------------------------------
def effects(sweep: Sweep, metric: Metric) -> list[str]:
    """For each numeric axis where the metric is best and worst: a sentence for each combination of
    the axes of text, as a mean over other numbers. Of arms that are not `alike` sentences apart."""
    groups = alike(sweep.arms, metric)
    parts = [replace(sweep, arms=arms) for arms in groups] if len(groups) > 1 else [sweep]
    lines = [line for part in parts for line in _effects(part, metric)]
    left = len(lines) - MOST_SENTENCES
    more = [f"{left} further lines: see the figures"] if left > 0 else []
    return lines[:MOST_SENTENCES] + more


def _effects(sweep: Sweep, metric: Metric) -> Iterator[str]:
    numeric = [axis.key for axis in numeric_axes(sweep)]
    text = [key for key in keys(sweep) if key not in numeric]
    for axis in numeric_axes(sweep):
        groups = _along(sweep, axis, text)
        if not _is_grid(list(groups.values())):
            groups = _along(sweep, axis, [key for key in keys(sweep) if key != axis.key])
        for where, cells in groups.items():
            made = estimates(cells, metric=metric)
            if len(made) > 1:
                yield _effect(axis, made, metric, over=_shared_axes(cells), where=where)


def _along(sweep: Sweep, axis: Axis, names: Sequence[str]) -> dict[str, dict[float, list[Arm]]]:
    """Values of `names` -> place on the axis -> arms."""
    groups: dict[str, dict[float, list[Arm]]] = {}
    for arm in sweep.arms:
        if (place := place_of(arm, axis.key)) is not None:
            groups.setdefault(_words(arm, names), {}).setdefault(place, []).append(arm)
    return groups


def _effect(
    axis: Axis, made: Mapping[Any, Interval], metric: Metric, *, over: Sequence[str], where: str
) -> str:
    up = sorted(made, key=lambda place: made[place].mean, reverse=metric.better == "higher")
    first, last = up[0], up[-1]
    best, worst = made[first], made[last]
    what = "lowest" if metric.better == "lower" else "highest"
    opposite = "highest" if metric.better == "lower" else "lowest"
    ends = {min(made): "the smallest tried", max(made): "the largest tried"}
    end = f", {ends[first]}," if first in ends and len(made) > 2 else ""
    mean = f", as a mean over {joined(over)}" if over else ""
    span = f" ({certainty(metric, best, seeds=False)})"
    places = [value_label(place) for place in sorted(made)]
    tried = f"over {axis.key}={joined(places)}"
    if len(places) > MOST_LISTED:
        tried = f"over {axis.key} from {places[0]} to {places[-1]} ({len(places)} values)"
    return (
        f"{tried}"
        f"{f' at {where}' if where else ''}{mean}, "
        f"{name(metric)} is {what} at {value_label(first)}{end} with "
        f"{value_text(metric, best.mean)}{span}, and {opposite} at {value_label(last)} with "
        f"{value_text(metric, worst.mean)}"
    )
