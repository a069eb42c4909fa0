"""The whole of `run.py -m hydra/sweeper=search`: check, price, prepare, write, start processes.

As in `sweeps/launch.py`, all that can be refused is refused before anything is written. Not for:
parsing and composing (`hydra_plugins`), nor for what a process does (`process.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.disk.output_dir import (
    check_output_dir,
    plan_folder,
    refuse_unwritable,
    study_folder,
)
from experiments.notices import across
from experiments.run.complete import complete_all
from relora_core import shell
from relora_core.config import ConfigError, RunConfig, validate
from sweeps import display, snapshot, tracking
from sweeps.launch import check_tracking, one_output_dir, prepare_data
from sweeps.launchers import Launcher, store_launcher
from sweeps.planning import budget
from sweeps.planning.budget import Estimate
from sweeps.planning.grid import check_name
from sweeps.planning.plan import Plan, command, make_plan
from sweeps.search import reads
from sweeps.search import space as spaces
from sweeps.search.config import SearchConfig
from sweeps.search.growth import combinations
from sweeps.search.learn import learn
from sweeps.search.processes import start_processes
from sweeps.search.space import Choice, Dimension
from sweeps.search.study import Spec, Study

CORNERS = 256
"""Corners of a larger space are checked where one dimension at a time leaves its first value."""


def run_search(
    search: SearchConfig,
    *,
    space: Mapping[str, Dimension],
    bases: Sequence[tuple[dict[str, str], RunConfig]],
    name: str,
    launcher: Launcher,
    command: str = "",
    plan_only: bool = False,
    console: Console | None = None,
) -> int:
    """Begin the study, or go on with it, until it has `search.n_trials` trials; the exit code.

    `bases` holds each combination of searched groups with what it composes to. Raises ConfigError
    before anything is written where the user made a mistake.
    """
    console = console or display.make_console()
    notes: list[str] = []
    completed = complete_all([config for _, config in bases], notes=notes)
    for config in completed:
        shell.check_asked(config, gpu=launcher.place(config).gpus > 0)
    name = check_name(completed[0].sweep.name or name)
    completed = [
        dataclasses.replace(config, sweep=dataclasses.replace(config.sweep, name=name))
        for config in completed
    ]
    folder = study_folder(completed[0].output_dir, name=name)
    completed = reads.as_planned(completed, folder)
    groups = list(bases[0][0])
    spaces.check_space(space, groups=groups, when=search.when, config=completed[0])
    spec = Spec(
        config=search,
        space=dict(space),
        groups=groups,
        bases={
            spaces.base_key(choices): config
            for (choices, _), config in zip(bases, completed, strict=True)
        },
        command=command,
        notes=list(notes),
    )
    plan = make_plan([(dict(c), config) for (c, _), config in zip(bases, completed, strict=True)])
    output_dir = one_output_dir(plan)
    left = search.n_trials
    begun = Study.open(folder) if (folder / "study.json").exists() else None
    if begun:
        reads.check(begun.spec, folder)
        left = to_do(begun, search.n_trials)
        spec, before = begun.spec.continued(spec), begun.spec
        notes += begun_notes(spec, before)
    notes += across(check_corners(spec), seeds=len(search.seeds))
    spec.check()
    check_tracking(plan)
    if begun is None:
        spec.learnt, lines = learn(spec, output_dir=output_dir)
        notes += lines
    costs = estimates(plan, launcher=launcher, output_dir=output_dir, runs=left * len(search.seeds))
    limit = completed[0].sweep.max_gpu_hours
    if plan_only:
        show(spec, name=name, left=left, costs=costs, unit=launcher.unit, console=console)
        display.show_notes(notes, console=console)
    launcher.check(plan, estimates=dict.fromkeys(costs))
    launcher.check_search(plan)
    budget.check_budget(costs, max_gpu_hours=limit, unit=launcher.unit)
    if plan_only:
        return 0
    check_output_dir(output_dir)
    prepare_data(plan, output_dir, console=console)
    with refuse_unwritable(output_dir):
        study = Study.open(folder, create=spec)
        snapshot.record(plan_folder(output_dir, name=name), output_dir=output_dir)
        store_launcher(launcher, plan_folder(output_dir, name=name))
    left = study.left() + study.counts().get("RUNNING", 0)  # the grid sampler's may be fewer
    show(spec, name=name, left=left, costs=costs, unit=launcher.unit, console=console)
    display.show_notes(notes, console=console)
    if not left:
        console.print(f"nothing to do: {name} has its {search.n_trials} trials", highlight=False)
        return close(study, console)
    with refuse_unwritable(output_dir):
        code = start_processes(launcher, folder, left=left, config=completed[0], console=console)
    return close(study, console) or code if launcher.kind == "local" else code


def begun_notes(spec: Spec, before: Spec) -> list[str]:
    """What it had learnt, and where the space of a study that has begun grows."""
    notes = []
    if spec.learnt:
        sweeps = ", ".join(dict.fromkeys(one["sweep"] for one in spec.learnt))
        notes.append(f"{len(spec.learnt)} trials were learnt from {sweeps} when it began")
    if lines := spec.grown_from(before):
        anew = "; cmaes begins anew in it" if spec.config.sampler["name"] == "cmaes" else ""
        notes.append(f"the space grows, and the trials so far stay: {'; '.join(lines)}{anew}")
    return notes


def to_do(study: Study, n_trials: int) -> int:
    """Trials that have not ended of the `n_trials` that there are to be."""
    ended = sum(n for state, n in study.counts().items() if state != "RUNNING")
    return max(0, n_trials - ended)


def close(study: Study, console: Console) -> int:
    """What the search came to, on disk and on screen; 1 where no trial has a value."""
    from sweeps.search.results import write_results

    counts = {state.lower(): n for state, n in study.counts().items() if n}
    told = ", ".join(f"{n} {state}" for state, n in counts.items())
    console.print(f"{study.folder.parent.name}: {told or 'no trial yet'}", highlight=False)
    if counts.get("fail") and not counts.keys() - {"fail"}:
        reasons = study.failures()
        console.print(
            f"error: all {counts['fail']} trials failed; the newest: {reasons[0]}",
            style="bold red", highlight=False, soft_wrap=True,
        )  # fmt: skip
        return 1
    write_results(study.folder)
    if any(base.tracking.enabled for base in study.spec.bases.values()):
        name, output_dir = study.folder.parent.name, study.folder.resolve().parents[2]
        for line in tracking.complaints(
            tracking.shown(output_dir, name)
        ):  # plots go to the parent run
            console.print(line, style="yellow", highlight=False, soft_wrap=True)
    name, output_dir = study.folder.parent.name, study.folder.resolve().parents[2]
    results = command("search", name, output_dir=output_dir)
    console.print(f"results: {results}", markup=False, highlight=False, soft_wrap=True)
    return 0


# checks -----------------------------------------------------------------------------------------
def check_corners(spec: Spec) -> list[RunConfig]:
    """The runs at the ends of the space; ConfigError where one is not valid."""
    found = []
    for choices in combinations(spec):
        base = spec.bases[spaces.base_key(choices)]
        active = applying(spec, choices=choices, base=base)
        for values in corners({key: spec.space[key] for key in active}):
            config = spaces.with_values(base, values)
            try:
                validate(config)
            except ConfigError as error:
                where = ", ".join(f"{k}={v}" for k, v in {**choices, **values}.items())
                raise ConfigError(
                    f"search.space must hold valid runs only, got {where}: {error}"
                ) from None
            found.append(config)
    return found


def applying(spec: Spec, *, choices: Mapping[str, str], base: RunConfig) -> list[str]:
    """Keys that are drawn beside these choices of groups, whatever the other keys' values."""
    when = spec.config.when
    params: dict[str, Any] = dict(choices)
    found = []
    for key in spaces.ordered(spec.space, groups=spec.groups, when=when):
        if key in spec.groups:
            continue
        needed = spaces.condition(key, when[key])[0] if key in when else None
        if needed in spec.space and needed not in params:
            continue  # it depends on a value, not on a group
        if spaces.is_active(
            key, params=params, space=spec.space, when=when, config=base, group=False
        ):
            found.append(key)
    return found


def corners(space: Mapping[str, Dimension]) -> Iterator[dict[str, Any]]:
    """Points where every dimension is at one of its ends; a choice has as many as it has values."""
    ends = {key: _ends(dimension) for key, dimension in space.items()}
    count = 1
    for values in ends.values():
        count *= len(values)
    if count <= CORNERS:
        yield from (
            dict(zip(ends, point, strict=True)) for point in itertools.product(*ends.values())
        )
        return
    first = {key: values[0] for key, values in ends.items()}
    for key, values in ends.items():
        yield from ({**first, key: value} for value in values)


def _ends(dimension: Dimension) -> list[Any]:
    if isinstance(dimension, Choice):
        return dimension.values
    finite = dimension.finite() if dimension.step else None
    return [dimension.low, finite[-1] if finite else dimension.high]


# cost and plan ----------------------------------------------------------------------------------
def estimates(
    plan: Plan, *, launcher: Launcher, output_dir: Path, runs: int
) -> dict[str, Estimate | None]:
    """What each run still to come may cost: the combinations of groups in turn."""
    rates = budget.measured(output_dir)
    found = budget.estimates(
        plan.cells, states={}, output_dir=output_dir, rates=rates, place=launcher.place
    )
    each = itertools.islice(itertools.cycle(found.values()), runs)
    return {f"trial {index}": one for index, one in enumerate(each)}


def show(
    spec: Spec,
    *,
    name: str,
    left: int,
    costs: Mapping[str, Estimate | None],
    unit: str,
    console: Console,
) -> None:
    """The space as a table, how many trials are left, and what they may cost."""
    search = spec.config
    table = Table("key", "values", "where", title=f"search {name}", title_justify="left", box=None)
    for key, dimension in spec.space.items():
        table.add_row(key, dimension.text(), search.when.get(key, ""))
    console.print(table)
    goals = "; ".join(one.text() for one in search.objectives)
    rules = f", {' and '.join(search.constraints)}" if search.constraints else ""
    whole = budget.total(costs.values())
    price = f", {budget.interval(whole)} {unit}-hours by {whole.basis}" if whole else ""
    for line in (
        f"objective: {goals}{rules}",
        f"{search.sampler['name']} sampler, pruner {search.pruner['name']}, "
        f"seeds {' '.join(map(str, search.seeds))}",
        f"{search.n_trials - left} of {search.n_trials} trials have ended, {left} left{price}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
