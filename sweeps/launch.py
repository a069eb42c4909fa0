"""The whole of `run.py -m`: plan, check, prepare, write, then hand the runs to a launcher.

The order matters: everything that can be refused is refused before anything is written, and
everything is on disk before anything is queued.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console

from experiments.disk.output_dir import (
    plan_folder,
    refuse_unwritable,
    run_at,
    runs_folder,
    same_runs,
)
from experiments.disk.run_dir import DONE, RunDir
from experiments.disk.state import state_of
from experiments.tracking import links
from relora_core import shell
from relora_core.config import ConfigError, RunConfig
from sweeps import display, snapshot, tracking
from sweeps.launchers import Launcher, load_launcher, store_launcher
from sweeps.planning import budget
from sweeps.planning.grid import Point
from sweeps.planning.plan import Cell, Plan, command, make_plan, other_settings, side_by_side, store
from sweeps.slurm.survey import survey


def run_sweep(
    points: Sequence[tuple[Point, RunConfig]],
    *,
    launcher: Launcher,
    command: str = "",
    plan_only: bool = False,
    console: Console | None = None,
) -> int:
    """Plan the points and hand them to the launcher; with `plan_only` show what would be done.

    Raises ConfigError, or DataError, before anything is queued where the user made a mistake.
    """
    from experiments.disk.output_dir import check_output_dir
    from experiments.run.complete import complete_all, prepared_notes

    console = console or display.make_console()
    notes: list[str] = []
    configs = complete_all([config for _, config in points], notes=notes)
    for config in configs:
        shell.check_asked(config, gpu=launcher.place(config).gpus > 0)
    points = [(point, config) for (point, _), config in zip(points, configs, strict=True)]
    folder = runs_folder(configs[0].output_dir)
    plan = make_plan(  # complete_all has seen to it that they are valid
        points, command=command, valid=True, begun=lambda run_id: (folder / run_id).exists()
    )
    output_dir = one_output_dir(plan)
    plan.notes = [*notes, *side_by_side([cell.config for cell in plan.cells])]
    if any(c.runtime.device == "cpu" and launcher.place(c).gpus for c in configs):
        plan.notes.append(
            "jobs hold GPUs that runtime.device=cpu leaves idle: hydra.launcher.gpus_per_node=0"
        )
    if not configs[0].sweep.name:
        plan.notes += other_settings(plan, [point for point, _ in points], output_dir=output_dir)
    plan.collapsed += same_elsewhere(plan, output_dir)
    check_tracking(plan)
    states = survey([run_at(output_dir, cell.run_id) for cell in plan.cells])
    costs = budget.estimates(
        plan.cells,
        states=states,
        output_dir=output_dir,
        rates=budget.measured(output_dir),
        place=launcher.place,
    )
    limit = plan.cells[0].config.sweep.max_gpu_hours

    def show() -> None:
        display.show_plan(
            plan,
            states=states,
            console=console,
            estimates=costs,
            unit=launcher.unit,
            max_hours=limit,
            output_dir=output_dir,
            stored=not plan_only,
        )
        display.show_notes(plan.notes, console=console)

    if plan_only:
        show()
    launcher.check(plan, estimates=costs)
    budget.check_budget(costs, max_gpu_hours=limit, unit=launcher.unit)
    if plan_only:
        return 0
    check_output_dir(output_dir)
    todo = [cell for cell in plan.cells if states[cell.run_id].state not in DONE]
    prepare_data(dataclasses.replace(plan, cells=todo), output_dir, console=console)
    later = [note for cell in todo for note in prepared_notes(cell.config)]
    plan.notes = list(dict.fromkeys(plan.notes + later))
    with refuse_unwritable(output_dir):
        plan = store(plan, output_dir=output_dir)
        snapshot.record(plan_folder(output_dir, name=plan.name), output_dir=output_dir)
        store_launcher(launcher, plan_folder(output_dir, name=plan.name))
    show()
    with refuse_unwritable(output_dir):
        code = launcher.launch(plan, output_dir=output_dir, console=console)
    # SLURM's jobs are still to come; who pressed Ctrl-C, or ran nothing, need not wait for a page.
    if launcher.kind == "local" and len(plan.cells) > 1 and todo and code != 130:
        _report(plan, output_dir=output_dir, console=console)
    _show_ui(plan, output_dir=output_dir, console=console)
    return code


def relaunch(plan: Plan, run_ids: Collection[str], *, output_dir: Path | str) -> int:
    """Launch some runs of a stored plan again, as they were launched last; the exit code."""
    shell.alone("a sweep")
    output_dir, console = Path(output_dir), display.make_console()
    launcher = load_launcher(plan_folder(output_dir, name=plan.name))
    cells = [_frozen(output_dir, cell) for cell in plan.cells if cell.run_id in run_ids]
    part = dataclasses.replace(plan, cells=cells, collapsed=[])
    launcher.check(part, estimates={})
    prepare_data(part, output_dir, console=console)
    with refuse_unwritable(output_dir):
        return launcher.launch(part, output_dir=output_dir, console=console)


# before the runs --------------------------------------------------------------------------------
def _run_dir(output_dir: Path, cell: Cell) -> RunDir:
    return RunDir(runs_folder(output_dir) / cell.run_id)


def _frozen(output_dir: Path, cell: Cell) -> Cell:
    """The cell with its run's own config, which knows where the data lie now."""
    run_dir = run_at(output_dir, cell.run_id)
    there = run_dir.config_path.exists()
    return dataclasses.replace(cell, config=run_dir.config()) if there else cell


def same_elsewhere(plan: Plan, output_dir: Path) -> list[str]:
    """A line for each new run that computes what one of another id, begun before, computes."""
    new = [cell for cell in plan.cells if not run_at(output_dir, cell.run_id).path.exists()]
    others = same_runs([cell.config for cell in new], output_dir=output_dir)
    pairs = zip(new, others, strict=True)
    return [f"{cell.name} computes what run {run.run_id} does" for cell, run in pairs if run]


def one_output_dir(plan: Plan) -> Path:
    folders = {cell.config.output_dir for cell in plan.cells}
    if len(folders) > 1:
        raise ConfigError(
            f"output_dir must be one folder per command, got {', '.join(sorted(folders))}"
        )
    output_dir = Path(folders.pop())
    nearest = next(p for p in (output_dir, *output_dir.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output_dir must be a folder, got {output_dir} and {nearest} is a file")
    return output_dir


def check_tracking(plan: Plan) -> None:
    """ConfigError where a run is to be tracked in a way that MLflow does not take."""
    from experiments.tracking import store as mlflow_store

    for config in tracked(plan).values():
        mlflow_store.check(config)


def tracked(plan: Plan) -> dict[tuple[str, str], RunConfig]:
    """Store and MLflow experiment -> one of the runs that go there."""
    from experiments.addresses import experiment_name, store_uri

    configs = [cell.config for cell in plan.cells if cell.config.tracking.enabled]
    return {(store_uri(config), experiment_name(config)): config for config in configs}


def prepare_data(plan: Plan, output_dir: Path, *, console: Console) -> None:
    """Check, and tokenise once, each data set that a run still needs, before any worker."""
    from experiments.disk import inputs
    from experiments.disk.output_dir import cache_dir
    from relora_core import data

    seen = set()
    for cell in plan.cells:
        run_dir = run_at(output_dir, cell.run_id)
        if state_of(run_dir).state in DONE:
            continue
        config = inputs.as_accepted(run_dir, cell.config)
        if (key := repr((config.data, config.eval))) in seen:
            continue
        seen.add(key)
        config = inputs.opened(run_dir, cell.config)
        data.prepare(config.data, cache_dir=cache_dir(output_dir), progress=console.out)


def _report(plan: Plan, *, output_dir: Path, console: Console) -> None:
    """The sweep's page, and all of it on its MLflow parent. What fails here costs no run."""
    from experiments.errors import one_line
    from experiments.report import page

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        line(f"report: {page.write(output_dir, plan.name)}")
    except Exception as error:  # whatever it is: the runs have their results
        again = command("report", plan.name, output_dir=output_dir)
        line(f"no report: {one_line(error)}; `{again}` tries again")
    if any(cell.config.tracking.enabled for cell in plan.cells):
        for text in tracking.complaints(tracking.shown(output_dir, plan.name)):
            line(text)


def _show_ui(plan: Plan, *, output_dir: Path, console: Console) -> None:
    if any(cell.config.tracking.enabled for cell in plan.cells):
        line = f"compare: {links.ui_command(output_dir, sweep=plan.name)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
