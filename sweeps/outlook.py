"""What a command is about to run: checked, written, shown, started, in this order.

Whatever can be refused is refused before anything is written, and all is on disk before anything
is queued. Not for: planning a sweep (`launch.py`) or a search (`search/launch.py`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
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
from experiments.tracking import store as mlflow_store
from relora_core import data, shell
from relora_core.config import RunConfig
from sweeps import display, snapshot
from sweeps.launchers import Launcher, store_launcher
from sweeps.planning import budget
from sweeps.planning.budget import Estimate
from sweeps.planning.plan import Cell, Plan


@dataclass(kw_only=True)
class Outlook(ABC):
    """What is to be run, where, and at what cost."""

    plan: Plan
    output_dir: Path
    launcher: Launcher
    costs: Mapping[str, Estimate | None]
    """Of the plan's runs that are to be run, by run_id; None: unknown."""

    @property
    def bill(self) -> Collection[Estimate | None]:
        """What each run to come costs."""
        return self.costs.values()

    @property
    def limit(self) -> float | None:
        """The budget in device-hours."""
        return self.plan.cells[0].config.sweep.max_gpu_hours

    @property
    def unit(self) -> str:
        """Of which the costs are hours."""
        return budget.unit_of(self.launcher.place(cell.config) for cell in self.plan.cells)

    @property
    def asked(self) -> Plan:
        """What the launcher must be able to run."""
        return self.plan

    @property
    def todo(self) -> list[Cell]:
        """The runs that are not done."""
        return self.plan.cells

    @abstractmethod
    def show(self, console: Console, *, stored: bool) -> None:
        """Print what is to be run and its cost; `stored`: whether the plan is on disk."""

    def check(self) -> None:
        """ConfigError if the sweep cannot run or would cost too much."""
        self.launcher.check(self.asked, estimates=self.costs)
        budget.check_budget(self.bill, max_gpu_hours=self.limit, unit=self.unit)

    @abstractmethod
    def store(self) -> None:
        """Write the plan."""

    @abstractmethod
    def start(self, console: Console) -> int:
        """Run or queue it; the exit code."""

    def carry_out(self, console: Console, *, plan_only: bool) -> int:
        """Do all of it; with `plan_only` only show it, and check it. The exit code."""
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
def complete_configs(
    configs: Sequence[RunConfig], launcher: Launcher
) -> tuple[list[RunConfig], list[str]]:
    """The configs with what is read from their data and eval texts, and notes on those."""
    notes: list[str] = []
    configs = complete_all(configs, notes=notes)
    for config in configs:
        shell.check_options(config, gpu=launcher.place(config).gpus > 0)
    return configs, notes


def check_tracking(plan: Plan) -> None:
    """ConfigError if MLflow does not take a run's settings of tracking."""
    configs = [cell.config for cell in plan.cells if cell.config.tracking.enabled]
    by_place = {(store_uri(config), experiment_name(config)): config for config in configs}
    for config in by_place.values():
        mlflow_store.check(config)


def prepare_data(plan: Plan, output_dir: Path, *, console: Console) -> None:
    """Check, and tokenise once, each data set that a run still needs."""
    seen = set()
    for cell in plan.cells:
        run_dir = run_at(output_dir, cell.run_id)
        if state_of(run_dir).state.done:
            continue
        config = inputs.with_accepted(run_dir, cell.config)
        if (key := repr((config.data, config.eval))) in seen:
            continue
        seen.add(key)
        config = inputs.open_for_training(run_dir, cell.config)
        data.prepare(config.data, cache_dir=cache_dir(output_dir), progress=console.out)
