"""`run.py -m hydra/sweeper=search`: a search is planned, checked, written (`outlook.py`), begun.

Not for: parsing and composing (`hydra_plugins`), nor for what a process does (`process.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.disk.output_dir import refuse_unwritable, study_folder
from experiments.notices import across
from relora_core.config import ConfigError, RunConfig, validate
from sweeps import display, tracking
from sweeps.launchers import Launcher
from sweeps.outlook import Outlook, check_tracking, complete_configs, find_output_dir
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
    configs, notes = complete_configs([config for _, config in bases], launcher)
    name = check_name(configs[0].sweep.name or name)
    configs = [
        dataclasses.replace(config, sweep=dataclasses.replace(config.sweep, name=name))
        for config in configs
    ]
    folder = study_folder(configs[0].output_dir, name=name)
    configs = reads.as_planned(configs, folder)
    groups = list(bases[0][0])
    spaces.check_space(space, groups=groups, when=search.when, config=configs[0])
    points = [(choices, config) for (choices, _), config in zip(bases, configs, strict=True)]
    spec = Spec(
        config=search,
        space=dict(space),
        groups=groups,
        bases={spaces.base_key(choices): config for choices, config in points},
        command=command,
        notes=list(notes),
    )
    plan = make_plan(points)
    output_dir = find_output_dir(plan)
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
    plan.notes = notes
    costs = estimates(plan, launcher=launcher, output_dir=output_dir, runs=left * len(search.seeds))
    outlook = SearchOutlook(
        plan=plan, output_dir=output_dir, launcher=launcher, costs=costs, spec=spec, left=left
    )
    return outlook.carry_out(console or display.make_console(), plan_only=plan_only)


@dataclass(kw_only=True)
class SearchOutlook(Outlook):
    """Of a search only the runs' costs are known. The plan holds the configs it starts from."""

    spec: Spec
    left: int
    """Trials that have not ended."""

    study: Study | None = None
    """Once it is written."""

    def show(self, console: Console, *, stored: bool) -> None:
        """The space as a table, how many trials are left, and what they may cost."""
        search, title = self.spec.config, f"search {self.plan.name}"
        table = Table("key", "values", "where", title=title, title_justify="left", box=None)
        for key, dimension in self.spec.space.items():
            table.add_row(key, dimension.text(), search.when.get(key, ""))
        console.print(table)
        goals = "; ".join(one.text() for one in search.objectives)
        rules = f", {' and '.join(search.constraints)}" if search.constraints else ""
        cost = budget.total(self.costs.values())
        unit = self.launcher.unit
        price = f", {budget.interval(cost)} {unit}-hours by {cost.basis}" if cost else ""
        display.say(console, f"objective: {goals}{rules}")
        display.say(
            console,
            f"{search.sampler['name']} sampler, pruner {search.pruner['name']}, "
            f"seeds {' '.join(map(str, search.seeds))}",
        )
        ended = search.n_trials - self.left
        display.say(
            console, f"{ended} of {search.n_trials} trials have ended, {self.left} left{price}"
        )

    def check(self) -> None:
        super().check()
        self.launcher.check_search(self.plan)

    def store(self) -> None:
        folder = study_folder(self.output_dir, name=self.plan.name)
        self.study = study = Study.open(folder, create=self.spec)
        # the grid sampler's may be fewer
        self.left = study.left() + study.counts().get("RUNNING", 0)

    def start(self, console: Console) -> int:
        assert self.study is not None
        if not self.left:
            done = f"{self.plan.name} has its {self.spec.config.n_trials} trials"
            console.print(f"nothing to do: {done}", highlight=False)
            return close(self.study, console)
        with refuse_unwritable(self.output_dir):
            code = start_processes(
                self.launcher, self.study.folder,
                left=self.left, config=self.plan.cells[0].config, console=console,
            )  # fmt: skip
        return close(self.study, console) or code if self.launcher.kind == "local" else code


def begun_notes(spec: Spec, before: Spec) -> list[str]:
    """Lines on what it has learnt, and on keys at which the space of an existing study grows."""
    notes = []
    if spec.learnt:
        sweeps = ", ".join(dict.fromkeys(one["sweep"] for one in spec.learnt))
        notes.append(f"{len(spec.learnt)} trials were learnt from {sweeps} when it began")
    if lines := spec.grown_from(before):
        anew = "; cmaes begins anew in it" if spec.config.sampler["name"] == "cmaes" else ""
        notes.append(f"the space grows, and the trials so far stay: {'; '.join(lines)}{anew}")
    return notes


def to_do(study: Study, n_trials: int) -> int:
    """How many of the `n_trials` trials have not ended."""
    ended = sum(n for state, n in study.counts().items() if state != "RUNNING")
    return max(0, n_trials - ended)


def close(study: Study, console: Console) -> int:
    """Write and print the search's results; 1 if no trial has a value."""
    from sweeps.search.results import write_results

    name, output_dir = study.name, study.folder.resolve().parents[2]
    counts = {state.lower(): n for state, n in study.counts().items() if n}
    ends = ", ".join(f"{n} {state}" for state, n in counts.items())
    console.print(f"{name}: {ends or 'no trial yet'}", highlight=False)
    if counts.get("fail") and not counts.keys() - {"fail"}:
        reasons = study.failures()
        console.print(
            f"error: all {counts['fail']} trials failed; the newest: {reasons[0]}",
            style="bold red", highlight=False, soft_wrap=True,
        )  # fmt: skip
        return 1
    write_results(study.folder)
    if any(base.tracking.enabled for base in study.spec.bases.values()):
        # plots go to the parent run
        for line in tracking.new_problems(tracking.show(output_dir, name)):
            console.print(line, style="yellow", highlight=False, soft_wrap=True)
    display.say(console, f"results: {command('search', name, output_dir=output_dir)}")
    return 0


# checks -----------------------------------------------------------------------------------------
def check_corners(spec: Spec) -> list[RunConfig]:
    """The runs at the ends of the space; ConfigError if one is not valid."""
    configs = []
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
            configs.append(config)
    return configs


def applying(spec: Spec, *, choices: Mapping[str, str], base: RunConfig) -> list[str]:
    """Keys that are drawn beside these choices of groups, whatever the other keys' values."""
    when = spec.config.when
    params: dict[str, Any] = dict(choices)
    keys = []
    for key in spaces.ordered(spec.space, groups=spec.groups, when=when):
        if key in spec.groups:
            continue
        needed = spaces.condition(key, when[key])[0] if key in when else None
        if needed in spec.space and needed not in params:
            continue  # it depends on a value, not on a group
        if spaces.is_active(
            key, params=params, space=spec.space, when=when, config=base, group=False
        ):
            keys.append(key)
    return keys


def corners(space: Mapping[str, Dimension]) -> Iterator[dict[str, Any]]:
    """Points with every dimension at one of its ends; all values of a choice are ends."""
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
    rates = budget.read_rates(output_dir)
    per_cell = budget.estimates(
        plan.cells, states={}, output_dir=output_dir, rates=rates, place=launcher.place
    )
    each = itertools.islice(itertools.cycle(per_cell.values()), runs)
    return {f"trial {index}": one for index, one in enumerate(each)}
