"""`run.py -m`: plans a grid and hands it to a launcher. Not for: in which order (`outlook.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from experiments import addresses, notices
from experiments.disk.output_dir import (
    plan_folder,
    refuse_unwritable,
    run_at,
    runs_folder,
    same_runs,
)
from experiments.disk.state import RunState
from experiments.errors import one_line
from experiments.run.complete import prepared_notes
from relora_core import shell
from relora_core.config import RunConfig
from sweeps import display, tracking
from sweeps import measure as measuring
from sweeps.launchers import Launcher, load_launcher
from sweeps.outlook import Outlook, check_tracking, complete_configs, prepare_data
from sweeps.planning import budget, provenance
from sweeps.planning.grid import Point, axes
from sweeps.planning.plan import (
    Cell,
    Plan,
    command,
    comparison_notes,
    make_plan,
    other_settings,
    store,
)
from sweeps.planning.provenance import Tuned
from sweeps.planning.rates import read_rates
from sweeps.slurm.survey import survey


def run_sweep(
    points: Sequence[tuple[Point, RunConfig]],
    *,
    launcher: Launcher,
    command: str = "",
    plan_only: bool = False,
    measure: bool = False,
    console: Console | None = None,
    tuned: Mapping[str, Tuned] | None = None,
) -> int:
    """Plan the points and hand them to the launcher; with `plan_only` show what would be done.

    `measure` first times some steps of each shape whose speed is not known.
    `tuned` is what points already have from a search, by arm. Raises ConfigError or DataError for
    a user's mistake, before anything is queued.
    """
    configs, notes = complete_configs([config for _, config in points], launcher)
    points = [(point, config) for (point, _), config in zip(points, configs, strict=True)]
    folder = runs_folder(configs[0].output_dir)
    plan = make_plan(  # valid: complete_all has checked them
        points, command=command, valid=True, begun=lambda run_id: (folder / run_id).exists()
    )
    output_dir = Path(configs[0].output_dir)
    plan.notes = [*notes, *comparison_notes([cell.config for cell in plan.cells])]
    fixed = {key for point, _ in points for key in point} - {*axes([point for point, _ in points])}
    plan.notes += notices.without_effect(fixed, configs)
    plan.notes += dict.fromkeys(note for one in points for note in notices.replaced(*one))
    if any(c.runtime.device == "cpu" and launcher.place(c).gpus for c in configs):
        plan.notes.append(
            "jobs hold GPUs that runtime.device=cpu leaves idle: hydra.launcher.gpus_per_node=0"
        )
    plan.tuned = {arm: one.record() for arm, one in (tuned or {}).items()}
    plan.notes += provenance.notes(tuned or {}, configs)
    if not configs[0].sweep.name:
        plan.notes += other_settings(plan, [point for point, _ in points], output_dir=output_dir)
    plan.collapsed += same_elsewhere(plan, output_dir)
    check_tracking(plan)
    states = survey([run_at(output_dir, cell.run_id) for cell in plan.cells])
    console = console or display.make_console()
    if measure:
        measuring.measure(
            plan, states=states, launcher=launcher, output_dir=output_dir, console=console
        )
    costs = budget.estimates(
        plan.cells,
        states=states,
        output_dir=output_dir,
        rates=read_rates(output_dir),
        place=launcher.place,
    )
    outlook = SweepOutlook(
        plan=plan, output_dir=output_dir, launcher=launcher, costs=costs, states=states
    )
    return outlook.carry_out(console, plan_only=plan_only)


@dataclass(kw_only=True)
class SweepOutlook(Outlook):
    """A grid of runs."""

    states: Mapping[str, RunState]
    """Before the command, by run_id."""

    @property
    def todo(self) -> list[Cell]:
        return [cell for cell in self.plan.cells if not self.states[cell.run_id].state.done]

    def show(self, console: Console, *, stored: bool) -> None:
        display.show_plan(
            self.plan,
            states=self.states,
            console=console,
            estimates=self.costs,
            unit=self.unit,
            max_hours=self.limit,
            output_dir=self.output_dir,
            stored=stored,
        )
        for line in provenance.lines(self.plan.tuned):
            display.say(console, line)

    def store(self) -> None:
        later = [note for cell in self.todo for note in prepared_notes(cell.config)]
        self.plan.notes = list(dict.fromkeys(self.plan.notes + later))
        self.plan = store(self.plan, output_dir=self.output_dir)

    def start(self, console: Console) -> int:
        plan, output_dir = self.plan, self.output_dir
        with refuse_unwritable(output_dir):
            code = self.launcher.launch(plan, output_dir=output_dir, console=console)
        # With SLURM there are no results yet; after Ctrl-C, or if nothing was run, no new ones.
        if self.launcher.kind == "local" and len(plan.cells) > 1 and self.todo and code != 130:
            _report(plan, output_dir=output_dir, console=console)
        if plan.is_tracked:
            display.say(console, f"compare: {addresses.ui_command(output_dir, sweep=plan.name)}")
        return code


def relaunch(plan: Plan, run_ids: Collection[str], *, output_dir: Path | str) -> int:
    """Launch runs of a stored plan again, with the launcher of the last time; the exit code."""
    shell.require_one_process("a sweep")
    output_dir, console = Path(output_dir), display.make_console()
    launcher = load_launcher(plan_folder(output_dir, name=plan.name))
    cells = [_as_stored(output_dir, cell) for cell in plan.cells if cell.run_id in run_ids]
    part = dataclasses.replace(plan, cells=cells, collapsed=[])
    launcher.check(part, estimates={})
    prepare_data(part, output_dir, console=console)
    with refuse_unwritable(output_dir):
        return launcher.launch(part, output_dir=output_dir, console=console)


def _as_stored(output_dir: Path, cell: Cell) -> Cell:
    """The cell with the config of its run, if there is one: that has the data's current paths."""
    run_dir = run_at(output_dir, cell.run_id)
    stored = run_dir.config_path.exists()
    return dataclasses.replace(cell, config=run_dir.config()) if stored else cell


def same_elsewhere(plan: Plan, output_dir: Path) -> list[str]:
    """A line for each new run that computes the same as an older run with another id."""
    new = [cell for cell in plan.cells if not run_at(output_dir, cell.run_id).path.exists()]
    others = same_runs([cell.config for cell in new], output_dir=output_dir)
    pairs = zip(new, others, strict=True)
    return [f"{cell.name} computes what run {run.run_id} does" for cell, run in pairs if run]


def _report(plan: Plan, *, output_dir: Path, console: Console) -> None:
    """Write the sweep's page and show it in MLflow. A failure here is printed and ends nothing."""
    from experiments.report import page  # NumPy: 0.15 s that --plan and SLURM would pay for nothing

    try:
        display.say(console, f"report: {page.write(output_dir, plan.name)}")
    except Exception as error:  # of any kind: the runs have their results
        again = command("report", plan.name, output_dir=output_dir)
        display.say(console, f"no report: {one_line(error)}; `{again}` tries again")
    if plan.is_tracked:
        for text in tracking.new_problems(tracking.show(output_dir, plan.name)):
            display.say(console, text)
