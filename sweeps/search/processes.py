"""Starts the processes of a search, each of which takes trials from the study.

Not for: the jobs of SLURM (`sweeps/slurm/searches.py`), nor what a process does (`process.py`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from optuna.trial import FrozenTrial
from rich.console import Console

from experiments.run.stopping import stop_requested
from relora_core import shared
from relora_core.config import RunConfig
from sweeps import snapshot, tracking
from sweeps.launchers import Launcher
from sweeps.local import warm
from sweeps.local.processes import POLL_S, Processes, Workers, open_processes
from sweeps.local.slots import Slots
from sweeps.local.warm import UNKNOWN
from sweeps.search.arms import open_studies
from sweeps.search.study import Study
from sweeps.search.trial import spell
from sweeps.slurm.launcher import SlurmLauncher
from sweeps.slurm.searches import submit_search

WORKERS = Workers(
    command=(sys.executable, "-P", "-m", "sweeps.search.process"),
    parent=(*warm.PARENT, "sweeps.search.process"),
)
PRINT_EVERY_S = 2.0
TRACK_EVERY_S = 20.0


def start_processes(
    launcher: Launcher, study: Path, *, left: int, config: RunConfig, console: Console
) -> int:
    """Start them here or as SLURM jobs, until no trial is left; the exit code."""
    if isinstance(launcher, SlurmLauncher):
        return submit_search(launcher, study, left=left, config=config, console=console)
    output_dir, most = study.parents[2], launcher.options["max_parallel"]
    code = snapshot.freeze(study.parent / "code", output_dir=output_dir)
    bases = [base for one in open_studies(study) for base in one.spec.bases.values()]
    devices = [base.runtime.device for base in bases]
    slots = Slots.of(most, runs=left, devices=devices, code=code)
    return search_local(study, slots=slots, console=console)


def search_local(folder: Path, *, slots: Slots, console: Console) -> int:
    """Run the study to its end with `slots.parallel` processes; the exit code."""

    def say(line: str) -> None:
        console.print(line, style="yellow", highlight=False, soft_wrap=True)

    with (
        stop_requested() as stop,
        open_processes(WORKERS, slots=slots, runs=slots.parallel, say=say) as processes,
        follow(folder),
    ):
        team = Team(folder=folder, processes=processes, console=console)
        team.run(stop)
    return 130 if stop.is_set() else max(team.codes, default=0)


@dataclass(kw_only=True, slots=True)
class Team:
    """The processes at work on one search. One that is killed is replaced: its trial goes on."""

    folder: Path
    processes: Processes[int]
    console: Console
    codes: list[int] = field(default_factory=list)
    killed: int = 0
    printed: set[tuple[str | None, int]] = field(default_factory=set)
    """Arm and number of the trials that have a line, or had ended before."""

    def run(self, stop: threading.Event) -> None:
        studies = open_studies(self.folder)
        for study in studies:
            for trial in study.optuna.get_trials(deepcopy=False):
                if trial.state.is_finished():
                    self.printed.add((study.arm, trial.number))
        while not self.processes.ready and not stop.is_set():
            stop.wait(POLL_S)
        last = time.monotonic()
        try:
            for number in range(0 if stop.is_set() else self.processes.slots.parallel):
                self._start(number)
            while self.processes.work and not stop.is_set():
                self._reap(most=studies[0].config.max_failures)
                if time.monotonic() - last >= PRINT_EVERY_S:
                    self._print_ended(studies)
                    last = time.monotonic()
                stop.wait(POLL_S)
        finally:
            self.processes.stop()  # the same command goes on
            self._print_ended(studies)

    def _log(self, number: int) -> Path:
        return self.folder / "logs" / f"process-{number}.log"

    def _start(self, number: int) -> None:
        shared.make_folder(self._log(number).parent)
        self.processes.start(number, self.folder, log=self._log(number))

    def _reap(self, *, most: int) -> None:
        for number, code in self.processes.reap():
            if code == UNKNOWN:  # the next process sees whether any trial is left
                self._start(number)
                continue
            if code >= 0:
                self.codes.append(code)
                if code:
                    self.console.print(
                        f"a process of the search ended with exit code {code} "
                        f"({self._log(number)})",
                        style="red",
                        highlight=False,
                        soft_wrap=True,
                    )
                continue
            self.killed += 1
            self.console.print(f"a process was killed by signal {-code}", style="yellow")
            if self.killed <= most:
                self._start(number)
            else:
                self.codes.append(1)

    def _print_ended(self, studies: Sequence[Study]) -> None:
        """A line for each trial that has ended."""
        for study in studies:
            for trial in study.optuna.get_trials(deepcopy=False):
                if trial.state.is_finished() and (study.arm, trial.number) not in self.printed:
                    self.printed.add((study.arm, trial.number))
                    self.console.print(_line(study, trial), highlight=False, soft_wrap=True)


def _line(study: Study, trial: FrozenTrial) -> str:
    values = " ".join(f"{value:.5g}" for value in trial.values or [])
    arm, state = f"{study.arm} " if study.arm else "", trial.state.name.lower()
    return f"{arm}trial {trial.number:>3} {state:<8} {values}  {spell(trial.params)}"


def follow(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keep MLflow up to date while the body runs, if tracking is on."""
    config = next(iter(open_studies(folder)[0].spec.bases.values()))
    if not config.tracking.enabled:
        return contextlib.nullcontext()
    return tracking.keep_up_to_date(
        folder.resolve().parents[2],
        [folder.parent.name],
        every_s=TRACK_EVERY_S,
        report=tracking.print_problems,
    )
