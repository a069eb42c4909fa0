"""The results of a study: its trials, the best of them, and files in its folder.

    best.json             best trial, or Pareto front, with the commands that run it again
    best.yaml             the same as an experiment file (several objectives: best-<trial>.yaml)
    optimization_results.yaml  the same as Hydra's own sweeper for Optuna writes it
    trials.csv            every trial
    plots/                Optuna's own (plots.py)

Numbers come from the study and from the run directories of its trials. Not for: the table that
people see (`sweeps/commands/search.py`), nor for changing the study (`study.py`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from experiments.disk.output_dir import place_of_study, run_at
from experiments.disk.plans import read_sweeps
from experiments.disk.run_dir import RunDir
from experiments.metrics import scale_of
from experiments.stats import interval
from relora_core import atomic
from relora_core.config import RunConfig
from sweeps.planning.provenance import different_code
from sweeps.search import plots, recipe
from sweeps.search.config import Objective, SearchConfig
from sweeps.search.study import Study

STOCK_HEAD = (
    "# In the form of Hydra's own sweeper for Optuna. best.json has intervals and commands,\n"
    "# trials.csv every trial.\n"
)


@dataclass(kw_only=True, slots=True)
class SeedRow:
    """One run of a trial."""

    run_id: str
    seed: int | None
    state: str
    step: int
    """Optimizer steps that were taken."""
    steps: int
    values: list[float] = field(default_factory=list)
    """Of each objective, of this run alone."""


@dataclass(kw_only=True, slots=True)
class TrialRow:
    """One trial."""

    number: int
    state: str
    """`complete`, `pruned`, `fail`, `running`, `refused` (drawn, but not worth running), or
    `learnt` (from an earlier sweep)."""
    counted: bool
    """Whether it is one of n_trials."""
    values: list[float] | None
    params: dict[str, Any]
    feasible: bool
    reason: str | None
    """Why it failed or was refused."""
    learnt_from: str | None
    """The earlier sweep that ran it."""
    runs: list[SeedRow]
    step: int
    """Optimizer steps taken by its runs together."""
    steps: int
    """Optimizer steps if all its seeds had run to the end."""
    seconds: float | None

    @property
    def good(self) -> bool:
        """Whether it may be the best: complete, within the constraints, all numbers finite."""
        finite = all(math.isfinite(value) for value in self.values or [math.nan])
        return self.state in ("complete", "learnt") and self.feasible and finite


@dataclass(kw_only=True, slots=True)
class Best:
    """A trial that no other beats, and how to run it again."""

    number: int
    values: dict[str, float]
    """Metric -> mean over the seeds."""
    intervals: dict[str, tuple[float, float]]
    """Metric -> 95 % t-interval over the seeds, where two or more are finite; of perplexities that
    of the geometric mean, though the value that is searched is the arithmetic one."""
    params: dict[str, Any]
    seeds: list[int]
    command: str | None
    """None if its run directories were removed."""
    learnt_from: str | None = None
    """The earlier sweep that ran it, if the search has not."""


@dataclass(kw_only=True, slots=True)
class Results:
    """All results of a study."""

    name: str
    goals: list[Objective]
    n_trials: int
    """Trials in all, as asked for."""
    counts: dict[str, int]
    """State -> number of trials, of those that count."""
    trials: list[TrialRow]
    """All that were drawn or learnt."""
    best: list[Best]
    """One, or the Pareto front, best in the first objective first; none if no trial is good."""
    importances: dict[str, dict[str, float]]
    """Metric -> parameter -> share."""
    pruned_steps: int
    """Optimizer steps that pruned trials took ..."""
    saved_steps: int
    """... and those that they were spared."""
    notes: list[str]
    """Of its plan, one line each, and on trials of different code."""
    codes: list[str] = field(default_factory=list)
    """code_hash of the runs of all trials that have a value, each once."""

    @property
    def all_failed(self) -> bool:
        return bool(self.counts) and set(self.counts) <= {"fail", "refused"}

    def trial(self, number: int) -> TrialRow:
        return next(row for row in self.trials if row.number == number)

    @property
    def counted(self) -> list[TrialRow]:
        return [row for row in self.trials if row.counted]

    @property
    def learnt(self) -> list[TrialRow]:
        return [row for row in self.trials if row.state == "learnt"]


# reading ----------------------------------------------------------------------------------------
def read(study: Study) -> Results:
    """The results of a search without arms, or of one arm."""
    config, output_dir = study.config, study.output_dir
    goals: list[Objective] = config.objectives
    trials = study.optuna.get_trials(deepcopy=False)
    drawn = [trial for trial in trials if trial.state != TrialState.WAITING]
    rows = [_row(trial, config, output_dir=output_dir) for trial in drawn]
    chosen = best_rows(rows, directions=[goal.direction for goal in goals])
    pruned = [row for row in rows if row.state == "pruned"]
    codes = _codes(rows, output_dir=output_dir)
    return Results(
        name=study.name,
        goals=goals,
        n_trials=config.n_trials,
        counts=dict(Counter(row.state for row in rows if row.counted)),
        trials=rows,
        best=[_best(row, goals=goals, output_dir=output_dir) for row in chosen],
        importances=importances(study.optuna, goals=goals),
        pruned_steps=sum(row.step for row in pruned),
        saved_steps=sum(row.steps - row.step for row in pruned),
        notes=[*_notes(study.name, output_dir=output_dir), *different_code(codes, what="trials")],
        codes=codes,
    )


def _codes(rows: Sequence[TrialRow], *, output_dir: Path | str) -> list[str]:
    runs = [run_at(output_dir, run.run_id) for row in rows if row.values for run in row.runs]
    codes = [record.get("code_hash") for run in runs for record in run.attempt_records()]
    return list(dict.fromkeys(code for code in codes if code))


def _notes(name: str, *, output_dir: Path | str) -> list[str]:
    """Of the plan; the first trial writes it."""
    plans = read_sweeps(output_dir, [name])
    return plans[name].notes if plans else []


def _row(trial: FrozenTrial, config: SearchConfig, *, output_dir: Path | str) -> TrialRow:
    attrs = trial.user_attrs
    learnt, values = attrs.get("learnt"), attrs.get("by_seed", {})
    runs = [_seed_row(run_at(output_dir, id_), values) for id_ in attrs.get("run_ids", [])]
    longest = max((run.steps for run in runs), default=0)
    begun = trial.state.is_finished() or "worker" in attrs
    return TrialRow(
        number=trial.number,
        state="learnt" if learnt else "refused" if "refused" in attrs else trial.state.name.lower(),
        counted=begun and attrs.get("counted", True),
        # Of a pruned trial Optuna has the newest report, which may be of another metric.
        values=None if trial.state.name == "PRUNED" else trial.values,
        params=attrs.get("params", trial.params),
        feasible=all(excess <= 0 for excess in trial.constraints.values()),
        reason=attrs.get("reason"),
        learnt_from=learnt,
        runs=runs,
        step=0 if learnt else sum(run.step for run in runs),
        steps=0 if learnt else longest * len(config.seeds),
        seconds=trial.duration.total_seconds() if trial.duration and not learnt else None,
    )


def _seed_row(run: RunDir, values: Mapping[str, list[float]]) -> SeedRow:
    config, status = _config(run), run.status()
    return SeedRow(
        run_id=run.run_id,
        seed=config.seed if config else None,
        state=run.ended() or status.state,
        step=status.step,
        steps=config.train.steps if config else status.steps,
        values=values.get(str(config.seed), []) if config else [],
    )


def _config(run: RunDir) -> RunConfig | None:
    """None for a run that was removed, or that another version wrote."""
    try:
        return run.config()
    except (OSError, ValueError, TypeError):
        return None


# the best ---------------------------------------------------------------------------------------
def best_rows(rows: Sequence[TrialRow], *, directions: Sequence[str]) -> list[TrialRow]:
    """The good trials that no other good one dominates, best in the first objective first.

    With one objective the first of those that tie. Infeasible trials neither win nor dominate.
    """
    signs = [1.0 if direction == "minimize" else -1.0 for direction in directions]
    costs = {
        row.number: [sign * value for sign, value in zip(signs, row.values or [], strict=True)]
        for row in rows
        if row.good
    }
    front = [
        row
        for row in rows
        if row.good and not any(_dominates(c, costs[row.number]) for c in costs.values())
    ]
    front.sort(key=lambda row: (costs[row.number], row.number))
    return front[:1] if len(directions) == 1 else front


def _dominates(one: Sequence[float], two: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, two, strict=True)) and list(one) != list(two)


def _best(row: TrialRow, *, goals: Sequence[Objective], output_dir: Path | str) -> Best:
    intervals = {}
    for i, goal in enumerate(goals):
        values = [run.values[i] for run in row.runs if run.values]
        if len(values) > 1:
            one = interval(values, scale=scale_of(goal.metric))
            if one.low is not None and one.high is not None:
                intervals[goal.metric] = (one.low, one.high)
    config = config_of(row, output_dir=output_dir)
    return Best(
        number=row.number,
        values={g.metric: v for g, v in zip(goals, row.values or [], strict=True)},
        intervals=intervals,
        params=row.params,
        seeds=[run.seed for run in row.runs if run.seed is not None],
        command=recipe.command(config) if config else None,
        learnt_from=row.learnt_from,
    )


def config_of(row: TrialRow, *, output_dir: Path | str) -> RunConfig | None:
    """The config of the trial's first run that is still there."""
    runs = [run_at(output_dir, run.run_id) for run in row.runs]
    return next((config for config in map(_config, runs) if config), None)


# importances ------------------------------------------------------------------------------------
def importances(study: optuna.Study, *, goals: Sequence[Objective]) -> dict[str, dict[str, float]]:
    """Metric -> parameter -> its share in what sets the best tenth of the trials apart.

    By PED-ANOVA, Optuna's default: it knows parameters that only some trials have.
    """
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    finite = [t for t in finished if all(math.isfinite(value) for value in t.values)]
    if len(finite) < plots.FEWEST:
        return {}
    by_metric = {}
    for i, goal in enumerate(goals):
        with warnings.catch_warnings():  # that it takes the target to be minimised: it is
            warnings.simplefilter("ignore")
            by_metric[goal.metric] = optuna.importance.get_param_importances(
                study, target=plots.to_minimise(goal, index=i)
            )
    return by_metric


# files ------------------------------------------------------------------------------------------
def write_results(folder: Path | str) -> list[Path]:
    """Write all files of the study in `folder`; those that were written."""
    study = Study.open(folder)
    return write(read(study), study=study.optuna, folder=Path(folder))[0]


def write(results: Results, *, study: optuna.Study, folder: Path) -> tuple[list[Path], list[str]]:
    """Write all files; those that were written, and a line for each plot that is left out."""
    written = write_data(results, folder=folder)
    drawn, left_out = plots.draw(study, goals=results.goals, folder=folder / "plots")
    return written + drawn, left_out


def write_data(results: Results, *, folder: Path) -> list[Path]:
    """Write all files but the plots; those that were written."""
    written = [folder / "best.json", folder / "trials.csv", folder / "optimization_results.yaml"]
    atomic.write_json(written[0], best_json(results))
    atomic.write_text(written[1], trials_csv(results))
    stock = yaml.safe_dump(stock_results(results), sort_keys=False)
    atomic.write_text(written[2], f"{STOCK_HEAD}{stock}")
    for best in results.best:
        text = experiment_text(
            results, number=best.number, name=None, output_dir=place_of_study(folder).output_dir
        )
        if text is not None:
            several = len(results.goals) > 1
            path = folder / (f"best-{best.number}.yaml" if several else "best.yaml")
            atomic.write_text(path, text)
            written.append(path)
    for old in set(folder.glob("best*.yaml")) - set(written):  # no longer among the best
        old.unlink()
    return written


def best_json(results: Results) -> dict[str, Any]:
    """The results without the list of all trials."""
    values = dataclasses.asdict(results)
    del values["trials"]
    return values


def stock_results(results: Results) -> dict[str, Any]:
    """The best as Hydra's own sweeper for Optuna writes it; no best: only the name."""
    rows = {row.number: row for row in results.trials}
    best = [rows[one.number] for one in results.best]
    if len(results.goals) > 1:
        solutions = [{"params": dict(row.params), "values": list(row.values or [])} for row in best]
        return {"name": "optuna", "solutions": solutions}
    values: dict[str, Any] = {"name": "optuna"}
    for row in best:
        values |= {"best_params": dict(row.params), "best_value": (row.values or [None])[0]}
    return values


def trials_csv(results: Results) -> str:
    """A row for each trial; parameters that it does not have are empty."""
    metrics = [goal.metric for goal in results.goals]
    params = list(dict.fromkeys(key for row in results.trials for key in row.params))
    heads = ["number", "state", *metrics, *params]
    heads += ["counted", "feasible", "step", "steps", "seconds", "run_ids", "reason"]
    table = [
        dataclasses.asdict(row)
        | dict(zip(metrics, row.values or [], strict=False))
        | row.params
        | {"run_ids": " ".join(run.run_id for run in row.runs)}
        for row in results.trials
    ]
    return to_csv(table, heads)


def to_csv(table: Sequence[Mapping[str, Any]], heads: Sequence[str] = ()) -> str:
    """A row for each mapping, with what it lacks empty; without `heads` a column for each key."""
    text, heads = io.StringIO(), heads or list(dict.fromkeys(key for row in table for key in row))
    writer = csv.DictWriter(text, heads, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def experiment_text(
    results: Results, *, number: int, name: str | None, output_dir: Path | str
) -> str | None:
    """A trial as an experiment file; None if its run directories were removed."""
    row = results.trial(number)
    config = config_of(row, output_dir=output_dir)
    if config is None:
        return None
    keys, metrics = ", ".join(row.params), " and ".join(g.metric for g in results.goals)
    achieved = [
        f"{goal.metric} {value:.6g}"
        for goal, value in zip(results.goals, row.values or [], strict=False)
    ]
    count = f"{len(row.runs)} seed" + ("s" if len(row.runs) != 1 else "")
    return recipe.experiment_yaml(
        config,
        name=name or file_name(results.name),
        question=f"which {keys} give the best {metrics}?",
        source=[
            f"trial {number} of search {results.name} ({results.n_trials} trials, {count} each)"
            + (f", learnt from {row.learnt_from}" if row.learnt_from else ""),
            *([f"found {', '.join(achieved)}"] if achieved else []),
        ],
    )


def file_name(name: str) -> str:
    """A study's name with the characters that a config group's options may have."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)
