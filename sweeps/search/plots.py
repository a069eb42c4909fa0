"""Optuna's own plots of a study as files: PNG and SVG, and HTML if plotly is installed.

Not for: numbers (`results.py`).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState

from relora_core import shared
from sweeps.search.config import Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST = 5
"""Least number of finished trials for importances."""
LONGEST_LEGEND = 12
PANEL_INCHES = 3.8


@dataclass(kw_only=True, slots=True)
class Plot:
    """One plot, drawn by the function of this name in either of Optuna's plotting modules."""

    name: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None
    """Why this study has no such plot."""


def draw(
    study: optuna.Study, *, goals: Sequence[Objective], folder: Path
) -> tuple[list[Path], list[str]]:
    """Draw all plots of the study; the files, and a line for each plot that is left out."""
    shared.make_folder(folder)
    shown = _finite(study)
    written: list[Path] = []
    left_out: list[str] = []
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        for plot in _plots(shown, goals=goals):
            source = study if plot.name == "timeline" else shown
            missing = plot.missing or _try(plot, source, folder=folder, written=written)
            if missing:
                left_out.append(f"no {plot.name}: {missing}")
    finally:
        optuna.logging.set_verbosity(verbosity)
    return written, left_out


def _finite(study: optuna.Study) -> optuna.Study:
    """A copy in which trials with an infinite value, which no axis has, are failed ones."""
    copy = optuna.create_study(directions=study.directions, study_name=study.study_name)
    for trial in study.get_trials():
        if trial.state == TrialState.COMPLETE and not all(map(math.isfinite, trial.values)):
            trial.state, trial.values = TrialState.FAIL, None
        copy.add_trial(trial)
    return copy


# which ------------------------------------------------------------------------------------------
def _plots(study: optuna.Study, *, goals: Sequence[Objective]) -> Iterator[Plot]:
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for index, goal in enumerate(goals):
        for plot in _of_objective(goal, index=index, done=done, several=len(goals) > 1):
            if len(goals) > 1:
                plot.name += f"-{goal.metric.replace('/', '-')}"
            yield plot
    yield _front(goals, done=done) if len(goals) > 1 else _curves(study)
    began = None if study.trials else "no trial began"
    yield Plot(name="timeline", function="plot_timeline", missing=began)


def _of_objective(
    goal: Objective, *, index: int, done: Sequence[FrozenTrial], several: bool
) -> Iterator[Plot]:
    n = f"{len(done)} finished trials"
    common = [key for key in _params(done) if all(key in trial.params for trial in done)]
    one = None if len(common) > 1 else "fewer than two parameters that every trial has"
    few = None if len(done) > 1 else n
    options: dict[str, Any] = {"target_name": goal.metric}
    minimised = {**options, "target": to_minimise(goal, index=index)}
    if several:
        options["target"] = functools.partial(_value, index=index)
    yield Plot(
        name="optimization-history",
        function="plot_optimization_history",
        options=options,
        missing=None if done else n,
    )
    yield Plot(
        name="param-importances",
        function="plot_param_importances",
        options=minimised,
        missing=None if len(done) >= FEWEST else f"{n} of {FEWEST}",
    )
    yield Plot(name="slice", function="plot_slice", options=options, missing=few)
    yield Plot(
        name="parallel-coordinate",
        function="plot_parallel_coordinate",
        options={"params": common, **options},
        missing=few or one,
    )


def _front(goals: Sequence[Objective], *, done: Sequence[FrozenTrial]) -> Plot:
    many = None if len(goals) <= 3 else f"{len(goals)} objectives"
    return Plot(
        name="pareto-front",
        function="plot_pareto_front",
        options={"target_names": [goal.metric for goal in goals]},
        missing=many or (None if done else "0 finished trials"),
    )


def _curves(study: optuna.Study) -> Plot:
    reported = any(trial.intermediate_values for trial in study.get_trials(deepcopy=False))
    return Plot(
        name="intermediate-values",
        function="plot_intermediate_values",
        missing=None if reported else "no trial reported while it trained",
    )


def _params(trials: Sequence[FrozenTrial]) -> list[str]:
    return list(dict.fromkeys(key for trial in trials for key in trial.params))


def to_minimise(goal: Objective, *, index: int) -> Callable[[FrozenTrial], float]:
    """The objective, with its sign such that less is better, as Optuna's importances need it."""
    return functools.partial(_value, index=index, sign=1 if goal.direction == "minimize" else -1)


def _value(trial: FrozenTrial, *, index: int, sign: int = 1) -> float:
    return sign * trial.values[index]


# drawing ----------------------------------------------------------------------------------------
def _try(plot: Plot, study: optuna.Study, *, folder: Path, written: list[Path]) -> str | None:
    """Draw one plot; if Optuna cannot, why."""
    try:
        with warnings.catch_warnings():  # experimental functions, axes of one value
            warnings.simplefilter("ignore")
            written += _still(plot, study, folder=folder)
            if visualization.is_available():
                written.append(_live(plot, study, folder=folder))
    except Exception as error:  # a plot that fails must not cost the results
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _still(plot: Plot, study: optuna.Study, *, folder: Path) -> list[Path]:
    import matplotlib
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as drawing

    paths = [folder / f"{plot.name}.{kind}" for kind in ("png", "svg")]
    with pyplot.style.context("default"), matplotlib.rc_context({"svg.hashsalt": "optuna"}):
        pyplot.switch_backend("agg")
        function: Callable[..., Any] = getattr(drawing, plot.function)
        try:
            function(study, **plot.options)
            _tidy(pyplot.gcf())
            for path in paths:
                pyplot.gcf().savefig(path, bbox_inches="tight", dpi=120)
                shared.share(path)
        finally:
            pyplot.close("all")
    return paths


def _tidy(figure: Figure) -> None:
    """Avoid collisions of long labels and legends: Optuna's sizes suit few trials, short names."""
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    if len(panels) > 1:
        figure.set_size_inches(PANEL_INCHES * len(panels), 4.8)
    for axes in panels:
        legend = axes.get_legend()
        if legend and len(legend.get_texts()) > LONGEST_LEGEND:
            legend.remove()
        elif legend and axes.patches:  # bars of importances, under the legend
            legend.set_loc("lower left")
            legend.set_bbox_to_anchor((1.02, 0.0))


def _live(plot: Plot, study: optuna.Study, *, folder: Path) -> Path:
    path = folder / f"{plot.name}.html"
    figure = getattr(visualization, plot.function)(study, **plot.options)
    figure.write_html(path, include_plotlyjs="directory")
    shared.share(path)
    return path
