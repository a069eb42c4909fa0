"""Draws points of the space until one is worth a run. The caller has the study's lock.

A point is refused if it is no valid run, breaks a constraint on a cost that follows from the
config, or was tried before. The study gets it all the same (`refused` in its user attributes).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState

from relora_core.config import ConfigError, RunConfig, validate
from sweeps.search import samplers
from sweeps.search.config import CONFIG_COSTS, constraints_of
from sweeps.search.objective import config_cost
from sweeps.search.trial import Trial, Worker, fill, is_begun

if TYPE_CHECKING:
    from sweeps.search.study import Study

DRAWS = 20
"""Most points that are drawn for one trial; if the last is refused, too, it counts as a trial."""


def draw(study: Study, worker: Worker) -> Trial | None:
    """A new trial for the worker; None if the last point that was drawn is refused, too."""
    grid = _is_grid(study)
    draws = samplers.grid_size(study.config, space=study.spec.space) if grid else DRAWS
    for index in range(draws):
        if grid_is_done(study):
            return None
        trial = _ask(study)
        if _refused(trial, counted=index == draws - 1 and not grid):
            continue
        handle = study.handle(study.frozen(trial.number))
        handle.set_user_attr("params", trial.params)
        handle.set_user_attr("run_ids", trial.run_ids)
        handle.set_user_attr("worker", dataclasses.asdict(worker))  # last: this begins it
        return trial
    return None


def grid_is_done(study: Study) -> bool:
    """Whether the sampler is a grid that has no point left."""
    if not _is_grid(study):
        return False
    trials = study.optuna.get_trials(deepcopy=False)
    visited = samplers.points_visited(trials, study.config, space=study.spec.space)
    if any(t.state == TrialState.RUNNING and not is_begun(t) for t in trials):
        return False  # a process was killed while it drew one
    return len(visited) >= samplers.grid_size(study.config, space=study.spec.space)


def _is_grid(study: Study) -> bool:
    return study.config.sampler["name"] == "grid"


def _ask(study: Study) -> Trial:
    """Draw a point of the space, or the rest of one that another process began to draw."""
    reader, spec = study.optuna, study.spec
    begun = [t for t in reader.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
    half = [t for t in begun if t.state == TrialState.RUNNING and not is_begun(t)]
    draw = len(begun) - len(half)  # a half-drawn point keeps its number, and so its seed
    reader.sampler = samplers.make_sampler(study.config, space=spec.space, draw=draw)
    try:
        asked = optuna.trial.Trial(reader, half[0]._trial_id) if half else reader.ask()
        params = fill(spec, lambda key, _: samplers.suggest(asked, key, spec.space[key]))
    finally:  # a grid sampler fails on results that come from outside Optuna's own loop
        reader.sampler = optuna.samplers.RandomSampler()
    return Trial(study=study, number=asked.number, params=params)


def _refused(trial: Trial, *, counted: bool) -> bool:
    """Whether the point was refused: its config shows that it should not run."""
    try:
        config = trial.config(trial.seeds[0])
        validate(config)
    except ConfigError as error:
        _refuse(trial, TrialState.FAIL, reason=str(error), counted=counted)
        return True
    excess, broken = _excess(trial, config)
    if broken:  # pruned, not failed: samplers learn from pruned trials
        _refuse(trial, TrialState.PRUNED, reason=broken, counted=counted, excess=excess)
        return True
    twin = _twin(trial)
    if twin is None or counted:  # if all draws have a twin, the last one reuses its runs
        return False
    _refuse(trial, TrialState.FAIL, reason=f"as trial {twin}", counted=False)
    return True


def _excess(trial: Trial, config: RunConfig) -> tuple[dict[str, float], str | None]:
    """The excess over each constraint on a cost of the config; why the first broken one is."""
    excess, broken = {}, None
    for constraint in constraints_of(trial.study.config):
        if constraint.metric in CONFIG_COSTS:
            cost = config_cost(constraint.metric, config)
            excess[constraint.text()] = constraint.excess(cost)
            if constraint.excess(cost) > 0:
                broken = broken or f"{constraint.metric} is {cost:g}, not {constraint.text()}"
    return excess, broken


def _refuse(
    trial: Trial,
    state: TrialState,
    *,
    reason: str,
    counted: bool,
    excess: dict[str, float] | None = None,
) -> None:
    study = trial.study
    study.handle(study.frozen(trial.number)).set_user_attr("refused", True)
    study.tell(trial.number, state=state, reason=reason, counted=counted, constraints=excess or {})


def _twin(trial: Trial) -> int | None:
    """The number of another trial with the same parameters, if there is one."""
    for frozen in [*trial.study.learnt(), *trial.study.trials()]:
        if frozen.number != trial.number and frozen.user_attrs.get("params") == trial.params:
            return frozen.number
    return None
