"""What a command is about to do, in one order: look ahead, check, write, show, start.

The order matters: everything that can be refused is refused before anything is written, and
everything is on disk before anything is queued. Not for: how a sweep (`launch.py`) or a search
(`search/launch.py`) is planned.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from experiments.addresses import experiment_name, store_uri
from experiments.disk import inputs
from experiments.disk.output_dir import (
    cache_dir,
    check_output_dir,
    plan_folder,
    refuse_unwritable,
    run_at,
)
from experiments.disk.state import state_of
from experiments.run.complete import complete_all
from relora_core import data, shell
from relora_core.config import ConfigError, RunConfig
from sweeps import display, snapshot
from sweeps.launchers import Launcher, store_launcher
from sweeps.planning import budget
from sweeps.planning.budget import Estimate
from sweeps.planning.plan import Cell, Plan


@dataclass(kw_only=True)
class Outlook(ABC):
    """What is to be run, where, and what that may cost."""

    plan: Plan
    output_dir: Path
    launcher: Launcher
    costs: Mapping[str, Estimate | None]

    @property
    def limit(self) -> float | None:
        """The budget in device-hours."""
        return self.plan.cells[0].config.sweep.max_gpu_hours

    @property
    def todo(self) -> list[Cell]:
        """What needs its data."""
        return self.plan.cells

    @abstractmethod
    def show(self, console: Console, *, stored: bool) -> None:
        """Print what is to be run and what it may cost."""

    def check(self) -> None:
        """ConfigError if the sweep cannot run or would cost too much."""
        self.launcher.check(self.plan, estimates=self.costs)
        budget.check_budget(self.costs, max_gpu_hours=self.limit, unit=self.launcher.unit)

    @abstractmethod
    def store(self) -> None:
        """Write the plan."""

    @abstractmethod
    def start(self, console: Console) -> int:
        """Run it, or queue it; the exit code."""

    def carry_out(self, console: Console, *, plan_only: bool) -> int:
        """All of it; with `plan_only` show what would be done, and whether it can be."""
        if plan_only:
            self.show(console, stored=False)
            display.show_notes(self.plan.notes, console=console)
        self.check()
        if plan_only:
            return 0
        check_output_dir(self.output_dir)
        part = dataclasses.replace(self.plan, cells=self.todo)
        prepare_data(part, self.output_dir, console=console)
        folder = plan_folder(self.output_dir, name=self.plan.name)
        with refuse_unwritable(self.output_dir):
            self.store()
            snapshot.record(folder, output_dir=self.output_dir)
            store_launcher(self.launcher, folder)
        self.show(console, stored=True)
        display.show_notes(self.plan.notes, console=console)
        return self.start(console)


# before the runs --------------------------------------------------------------------------------
def completed(
    configs: Sequence[RunConfig], launcher: Launcher
) -> tuple[list[RunConfig], list[str]]:
    """The configs with what their data and evals say of themselves, and notes on those."""
    notes: list[str] = []
    configs = complete_all(configs, notes=notes)
    for config in configs:
        shell.check_asked(config, gpu=launcher.place(config).gpus > 0)
    return configs, notes


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
    """ConfigError if a run is to be tracked in a way that MLflow does not take."""
    from experiments.tracking import store as mlflow_store

    for config in tracked(plan).values():
        mlflow_store.check(config)


def tracked(plan: Plan) -> dict[tuple[str, str], RunConfig]:
    """Store and MLflow experiment -> one of the runs that go there."""
    configs = [cell.config for cell in plan.cells if cell.config.tracking.enabled]
    return {(store_uri(config), experiment_name(config)): config for config in configs}


def prepare_data(plan: Plan, output_dir: Path, *, console: Console) -> None:
    """Check, and tokenise once, each data set that a run still needs, before any worker."""
    seen = set()
    for cell in plan.cells:
        run_dir = run_at(output_dir, cell.run_id)
        if state_of(run_dir).state.done:
            continue
        config = inputs.as_accepted(run_dir, cell.config)
        if (key := repr((config.data, config.eval))) in seen:
            continue
        seen.add(key)
        config = inputs.opened(run_dir, cell.config)
        data.prepare(config.data, cache_dir=cache_dir(output_dir), progress=console.out)
