"""`run.py -m hydra/sweeper=search`: plans a search and starts its processes.

Not for: in which order (`outlook.py`), parsing and composing (`hydra_plugins`), nor what a process
does (`process.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.disk.output_dir import place_of_study, refuse_unwritable, study_folder
from experiments.identity import left_out
from experiments.notices import across, replaced
from relora_core.config import EVALS, ConfigError, RunConfig, nearest, validate
from sweeps import display, tracking
from sweeps import measure as measuring
from sweeps.launchers import Launcher
from sweeps.outlook import Outlook, check_tracking, complete_configs
from sweeps.planning import budget
from sweeps.planning.budget import Estimate
from sweeps.planning.grid import Point, check_name
from sweeps.planning.plan import Cell, Plan, command, make_plan
from sweeps.planning.rates import read_rates
from sweeps.search import arms, draws, growth, reads, samplers
from sweeps.search import space as spaces
from sweeps.search.config import SearchConfig, constraints_of
from sweeps.search.learn import learn
from sweeps.search.processes import start_processes
from sweeps.search.space import Choice, Dimension
from sweeps.search.study import Spec, Study

CORNERS = 256
"""Of a space with more corners only those that are one step from the first are checked."""


_READ_ONCE = re.compile(
    r"data\.(kind|path|tokenizer|split|text_field|eos_id|vocab_size)|eval\.\w+\.(path|split|enabled)"
)
"""Keys by which planning fills in fingerprints and vocabularies."""


@dataclass(kw_only=True, slots=True)
class Draft:
    """One study as a command asks for it."""

    search: SearchConfig
    space: Mapping[str, Dimension]
    bases: Sequence[tuple[Point, RunConfig]]
    """Each combination of searched groups with what it composes to."""
    follows: Sequence[Mapping[str, Any]]
    """For each of them what refers to a key that is searched: dotted key -> what stands there."""
    arm: str | None = None
    """Its name in a search with arms."""
    given: Mapping[str, str] = field(default_factory=dict)
    """Key -> value of what was set, as it was given; a key that is searched has no value."""


@dataclass(kw_only=True, slots=True)
class Part:
    """One study of a search (all of it, or an arm) as this command will leave it."""

    arm: str | None
    folder: Path
    spec: Spec
    points: Sequence[tuple[Point, RunConfig]]
    """The draft's bases, completed."""
    cells: Sequence[Cell]
    """A run of each point."""
    n_trials: int
    """In all; of a grid not more than it has points."""
    left: int
    """Trials that have not ended."""
    notes: list[str]


def run_search(
    drafts: Sequence[Draft],
    *,
    name: str,
    launcher: Launcher,
    command: str = "",
    plan_only: bool = False,
    measure: bool = False,
    console: Console | None = None,
) -> int:
    """Begin each study, or go on with it, until it has `search.n_trials` trials; the exit code.

    `measure` first times some steps of each shape that it starts from, if its speed is not known.
    A search has a draft for each of its arms, else a single one. Raises ConfigError for a user's
    mistake, before anything is written.
    """
    configs, notes = complete_configs([c for draft in drafts for _, c in draft.bases], launcher)
    name = check_name(configs[0].sweep.name or name)
    output_dir = Path(configs[0].output_dir)
    arms.check_begun(study_folder(output_dir, name=name), arms=drafts[0].arm is not None)
    named = (dataclasses.replace(c, sweep=dataclasses.replace(c.sweep, name=name)) for c in configs)
    parts: list[Part] = []
    for draft in drafts:
        folder = study_folder(output_dir, name=name, arm=draft.arm)
        planned = reads.as_planned(itertools.islice(named, len(draft.bases)), folder)
        points = [(choices, c) for (choices, _), c in zip(draft.bases, planned, strict=True)]
        with _naming(draft.arm):
            part = _plan_part(draft, points, folder=folder, command=command, notes=notes)
        parts.append(part)
    plan = make_plan([point for part in parts for point in part.points])
    check_tracking(plan)
    console = console or display.make_console()
    if measure:
        measuring.measure(
            plan, states={}, launcher=launcher, output_dir=output_dir, console=console
        )
    rates = read_rates(output_dir)
    # All from step 0: what has been run of these configs says nothing of the trials.
    costs = {
        cell.run_id: budget.estimate(cell.config, rates=rates, place=launcher.place(cell.config))
        for part in parts
        if part.left
        for cell in part.cells
    }
    more = [note for part in parts for note in part.notes]
    plan.notes = list(dict.fromkeys([*notes, *more, *uneven(parts)]))
    outlook = SearchOutlook(
        plan=plan, output_dir=output_dir, launcher=launcher, costs=costs, parts=parts
    )
    return outlook.carry_out(console, plan_only=plan_only)


def _plan_part(
    draft: Draft,
    points: Sequence[tuple[Point, RunConfig]],
    *,
    folder: Path,
    command: str,
    notes: Sequence[str],
) -> Part:
    """ConfigError if the draft cannot be searched, or not in the study that is in `folder`."""
    more: list[str] = []
    for choices, config in points:
        more += replaced({**draft.given, **choices}, config)
    known = list(dict.fromkeys([*notes, *more]))  # the first trial writes them into plan.json
    spec = _spec(draft, points, command=command, notes=known)
    begun = Study.open(folder) if (folder / "study.json").exists() else None
    if begun:
        reads.check(begun.spec, folder)
        spec, before = begun.spec.continue_with(spec), begun.spec
        arm = f"{draft.arm}: " if draft.arm else ""
        more += [f"{arm}{line}" for line in begun_notes(spec, before)]
    more += across(corner_configs(spec), seeds=len(draft.search.seeds))
    spec.check()
    check_measured(spec)
    left = n_trials = samplers.n_trials(spec.config, space=spec.space)
    if begun:
        counts = begun.counts()
        if growth.mark(spec) == growth.mark(begun.spec) and draws.grid_is_done(begun):
            n_trials = sum(counts.values())  # fewer than its points, where some do not apply
        left = max(0, n_trials - sum(counts.values()) + counts.get("RUNNING", 0))
    else:
        spec.learnt, lines = learn(spec, output_dir=Path(points[0][1].output_dir))
        more += lines
    return Part(
        arm=draft.arm,
        folder=folder,
        spec=spec,
        points=points,
        cells=make_plan(points).cells,
        n_trials=n_trials,
        left=left,
        notes=more,
    )


def _spec(
    draft: Draft,
    points: Sequence[tuple[Point, RunConfig]],
    *,
    command: str,
    notes: Sequence[str],
) -> Spec:
    """Of the draft alone; ConfigError if its space is none."""
    for key in dict.fromkeys([*draft.space, *itertools.chain.from_iterable(draft.follows)]):
        if _READ_ONCE.fullmatch(key):
            raise ConfigError(
                f"{key} must be the same in all trials of a search, which reads its data once; "
                "options of a group, as data=a,b, may be searched"
            )
    groups = list(points[0][0])
    spaces.check_space(draft.space, groups=groups, when=draft.search.when, config=points[0][1])
    return Spec(
        config=draft.search,
        space=dict(draft.space),
        groups=groups,
        bases={spaces.base_key(choices): config for choices, config in points},
        follows={
            spaces.base_key(choices): dict(those)
            for (choices, _), those in zip(points, draft.follows, strict=True)
        },
        command=command,
        notes=list(notes),
    )


def check_measured(spec: Spec) -> None:
    """ConfigError for the metric of an eval that the runs leave out: every trial would fail."""
    search = spec.config
    metrics = [("objectives", one.metric) for one in search.objectives]
    metrics += [("prune_metric", str(search.prune_metric))]
    metrics += [("constraints", one.metric) for one in constraints_of(search)]
    for (key, metric), config in itertools.product(metrics, spec.bases.values()):
        if not metric.startswith("eval/"):
            continue
        name = metric.split("/")[1]
        if name not in EVALS:
            raise ConfigError(
                f"search.{key} must be of one of the evals {', '.join(EVALS)}, got {metric!r}."
                f"{nearest(name, EVALS)}"
            )
        if off := left_out(name, config):
            raise ConfigError(
                f"search.{key} must be what all runs measure, got {metric!r} with {off}"
            )


@contextlib.contextmanager
def _naming(arm: str | None) -> Iterator[None]:
    """A context in which a ConfigError begins with the arm."""
    try:
        yield
    except ConfigError as error:
        raise (ConfigError(f"arm {arm}: {error}") if arm else error) from None


def begun_notes(spec: Spec, before: Spec) -> list[str]:
    """What an existing study had learnt, and the keys at which its space grows."""
    notes = []
    if spec.learnt:
        sweeps = ", ".join(dict.fromkeys(one["sweep"] for one in spec.learnt))
        notes.append(f"{len(spec.learnt)} trials were learnt from {sweeps} when it began")
    if lines := spec.growth_since(before):
        anew = "; cmaes begins anew in it" if spec.config.sampler["name"] == "cmaes" else ""
        notes.append(f"the space grows, and the trials so far stay: {'; '.join(lines)}{anew}")
    return notes


def uneven(parts: Sequence[Part]) -> list[str]:
    """A note if the arms of a grid have different numbers of points, and so of trials."""
    sizes = {str(part.arm): part.n_trials for part in parts}
    if len(set(sizes.values())) == 1:
        return []
    some = ", ".join(f"{arm} {size}" for arm, size in sizes.items())
    return [
        f"arms have different numbers of trials ({some}): sweep.from_search takes settings only "
        "from arms that were tuned alike"
    ]


@dataclass(kw_only=True)
class SearchOutlook(Outlook):
    """A search. Its plan has the configs that it starts from; its trials are drawn later."""

    parts: list[Part]

    @property
    def bill(self) -> list[Estimate | None]:
        """What each run still to come may cost, as if the combinations of groups took turns."""
        bill: list[Estimate | None] = []
        for part in self.parts:
            each = itertools.cycle(self.costs.get(cell.run_id) for cell in part.cells)
            bill += itertools.islice(each, part.left * len(part.spec.config.seeds))
        return bill

    @property
    def asked(self) -> Plan:
        """A run of each base: bases that differ in resources alone are one run in `plan`."""
        points = [point for part in self.parts for point in part.points]
        cells = [cell for point in points for cell in make_plan([point]).cells]
        return dataclasses.replace(self.plan, cells=cells)

    @property
    def folder(self) -> Path:
        """Of the search with all its arms."""
        return study_folder(self.output_dir, name=self.plan.name)

    @property
    def left(self) -> int:
        """Trials that have not ended."""
        return sum(part.left for part in self.parts)

    def show(self, console: Console, *, stored: bool) -> None:
        """The space as a table, how many trials are left, and what they may cost."""
        search = self.parts[0].spec.config
        console.print(self._arms() if self.parts[0].arm else self._space())
        goals = "; ".join(one.text() for one in search.objectives)
        rules = f", {' and '.join(search.constraints)}" if search.constraints else ""
        cost = budget.total(self.bill)
        price = f", {budget.interval(cost)} {self.unit}-hours by {cost.basis}" if cost else ""
        display.say(console, f"objective: {goals}{rules}")
        display.say(
            console,
            f"{search.sampler['name']} sampler, pruner {search.pruner['name']}, "
            f"seeds {' '.join(map(str, search.seeds))}",
        )
        n_trials = sum(part.n_trials for part in self.parts)
        display.say(
            console,
            f"{n_trials - self.left} of {n_trials} trials have ended, {self.left} left{price}",
        )

    def _space(self) -> Table:
        spec = self.parts[0].spec
        title = f"search {self.plan.name}"
        table = Table("key", "values", "where", title=title, title_justify="left", box=None)
        for key, dimension in spec.space.items():
            table.add_row(key, dimension.text(), spec.config.when.get(key, ""))
        return table

    def _arms(self) -> Table:
        title = f"search {self.plan.name}: {len(self.parts)} arms"
        table = Table("arm", "method", "searched", title=title, title_justify="left", box=None)
        table.add_column("ended", justify="right")
        for part in self.parts:
            space, n_trials = part.spec.space, part.n_trials
            table.add_row(
                part.arm,
                " ".join(dict.fromkeys(base.method for base in part.spec.bases.values())),
                "  ".join(f"{key}={one.text()}" for key, one in space.items()),
                f"{n_trials - part.left}/{n_trials}",
            )
        return table

    def check(self) -> None:
        super().check()
        self.launcher.check_search(self.asked)

    def store(self) -> None:
        for part in self.parts:
            study = Study.open(part.folder, create=part.spec)
            counts = study.counts()
            part.left = counts.get("RUNNING", 0)
            if left := study.left():
                # Of a grid its points, where n_trials is more; fewer, if some do not apply.
                most = samplers.n_trials(part.spec.config, space=part.spec.space)
                part.left += max(1, min(left, most - sum(counts.values())))
        if self.parts[0].arm:
            arms.write_arms(self.folder, [str(part.arm) for part in self.parts])

    def start(self, console: Console) -> int:
        if not self.left:
            each = f" for each of {len(self.parts)} arms" if self.parts[0].arm else ""
            n_trials = self.parts[0].spec.config.n_trials
            console.print(
                f"nothing to do: {self.plan.name} has its {n_trials} trials{each}", highlight=False
            )
            return close(self.folder, console)
        with refuse_unwritable(self.output_dir):
            code = start_processes(
                self.launcher,
                self.folder,
                left=self.left,
                config=self.plan.cells[0].config,
                console=console,
            )
        return close(self.folder, console) or code if self.launcher.kind == "local" else code


def close(folder: Path, console: Console) -> int:
    """Write and print the search's results; 1 if no trial of any arm has a value."""
    from sweeps.search import response, response_files, results  # SciPy, Matplotlib: not to plan

    output_dir, name, _ = place_of_study(folder.resolve())
    studies = arms.open_studies(folder)
    failed = [study for study in studies if _close(study, console)]
    if len(failed) == len(studies):
        return 1
    if len(studies) == 1 and studies[0].arm is None:
        results.write_results(folder)
    else:
        for line in response_files.write(response.read(folder), folder)[1]:
            display.say(console, line)
    if any(base.tracking.enabled for study in studies for base in study.spec.bases.values()):
        for line in tracking.new_problems(tracking.show(output_dir, name)):  # with the plots
            console.print(line, style="yellow", highlight=False, soft_wrap=True)
    display.say(console, f"results: {command('search', name, output_dir=output_dir)}")
    return 0


def _close(study: Study, console: Console) -> bool:
    """Print how the trials of a study have ended; whether all have failed."""
    name = f"{study.name} {study.arm}" if study.arm else study.name
    counts = {state.lower(): n for state, n in study.counts().items() if n}
    ends = ", ".join(f"{n} {state}" for state, n in counts.items())
    console.print(f"{name}: {ends or 'no trial yet'}", highlight=False)
    if counts.get("fail") and not counts.keys() - {"fail"}:
        reasons = study.failures()
        console.print(
            f"error: all {counts['fail']} trials failed; the newest: {reasons[0]}",
            style="bold red",
            highlight=False,
            soft_wrap=True,
        )
        return True
    return False


# checks -----------------------------------------------------------------------------------------
def corner_configs(spec: Spec) -> list[RunConfig]:
    """What runs at the ends of the space; ConfigError if one of them is not valid."""
    configs = []
    for choices in growth.combinations(spec):
        base = spec.bases[spaces.base_key(choices)]
        active = active_keys(spec, choices=choices, base=base)
        for values in corners({key: spec.space[key] for key in active}):
            try:
                config = spec.at(choices, values)
                validate(config)
            except ConfigError as error:
                where = ", ".join(f"{k}={v}" for k, v in {**choices, **values}.items())
                raise ConfigError(
                    f"search.space must hold valid runs only, got {where}: {error}"
                ) from None
            configs.append(config)
    return configs


def active_keys(spec: Spec, *, choices: Mapping[str, str], base: RunConfig) -> list[str]:
    """Keys that are drawn with these choices of groups, whatever the other keys' values."""
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
    if math.prod(map(len, ends.values())) <= CORNERS:
        for point in itertools.product(*ends.values()):
            yield dict(zip(ends, point, strict=True))
        return
    first = {key: values[0] for key, values in ends.items()}
    for key, values in ends.items():
        yield from ({**first, key: value} for value in values)


def _ends(dimension: Dimension) -> list[Any]:
    if isinstance(dimension, Choice):
        return dimension.values
    finite = dimension.finite() if dimension.step else None
    return [dimension.low, finite[-1] if finite else dimension.high]
