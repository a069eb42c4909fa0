"""Runs a plan in worker processes of this machine.

A worker (`worker.py`) gets a RUN_DIR and environment variables, nothing else. Two launchers may run
one plan: a run's lock decides which of them gets it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from experiments import environment
from experiments.disk import presence
from experiments.disk.output_dir import plan_folder, refuse_unwritable, run_at
from experiments.disk.state import RunState, state_of
from experiments.disk.states import State
from experiments.run.stopping import stop_requested
from relora_core.config import ConfigError, RunConfig
from sweeps import display, snapshot
from sweeps.local import warm
from sweeps.local.pool import Pool
from sweeps.local.processes import Workers, open_processes
from sweeps.local.progress import Progress
from sweeps.local.slots import Slots, gpu_names, visible_gpus
from sweeps.planning import budget
from sweeps.planning.budget import Estimate, Place
from sweeps.planning.plan import Plan, command
from sweeps.slurm import cluster
from sweeps.slurm.survey import survey
from sweeps.timing import Timings, time_each
from sweeps.tracking import follow

# -P: the current folder must not shadow our packages; an output folder holds a `sweeps`, too.
WORKERS = Workers(command=(sys.executable, "-P", "-m", "sweeps.worker"), parent=warm.COMMAND)


@dataclass(kw_only=True, slots=True)
class Summary:
    """The states of a plan's runs when the launcher returns."""

    states: dict[str, RunState]
    """run_id -> state."""
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """130 when stopped, 1 when a run failed, diverged or was cancelled, else 0."""
        if self.interrupted:
            return 130
        return int(any(state.state.bad for state in self.states.values()))


@dataclass(kw_only=True, slots=True)
class LocalLauncher:
    """`hydra/launcher=local`: the same worker as on a cluster, in processes of this machine."""

    max_parallel: int | None = None
    kind: str = "local"

    @property
    def options(self) -> dict[str, int | None]:
        return {"max_parallel": self.max_parallel}

    def place(self, config: RunConfig) -> Place:
        if config.runtime.device == "cpu" or not visible_gpus():
            return Place()
        return Place(gpus=1, kinds=gpu_names())

    def check(self, plan: Plan, *, estimates: Mapping[str, Estimate | None]) -> None:
        check_parallel(self.max_parallel)
        for cell in plan.cells[:1]:
            snapshot.check(output_dir=cell.config.output_dir)
        for cell in plan.cells:
            asked = environment.gpu_asked(cell.config)
            if asked is None or visible_gpus():
                continue
            if not run_at(Path(cell.config.output_dir), cell.run_id).ended():
                raise environment.no_gpu(cell.config, asked)

    def launch(self, plan: Plan, *, output_dir: Path, console: Console) -> int:
        """Run what is not done, print how it ended; the exit code."""
        folder = plan_folder(output_dir, name=plan.name) / "code"
        code = snapshot.freeze(folder, output_dir=output_dir)
        summary = launch_local(
            plan,
            output_dir=output_dir,
            max_parallel=self.max_parallel,
            workers=dataclasses.replace(WORKERS, code=code),
            console=console,
        )
        display.show_closing(plan, states=summary.states, output_dir=output_dir, console=console)
        return summary.exit_code

    def time(self, work: Timings, *, name: str, output_dir: Path, console: Console) -> None:
        """One at a time, with the share of the machine that each of the sweep's runs would get."""
        devices = [config.runtime.device for config in work.configs]
        slots = Slots.of(self.max_parallel, runs=work.runs, devices=devices)
        display.say(console, f"timing some steps here of {', '.join(work.names)}")
        with stop_requested() as stop:
            time_each(
                work.files,
                environments=lambda index: slots.environment(0),
                stop=stop.is_set,
                tick=work.collect,
            )
        if stop.is_set():
            raise KeyboardInterrupt

    def check_search(self, plan: Plan) -> None:
        pass


def check_parallel(max_parallel: int | None) -> None:
    if max_parallel is not None and max_parallel < 1:
        raise ConfigError(
            f"hydra.launcher.max_parallel must be >= 1, got {max_parallel}; nearest valid: 1"
        )


def launch_local(
    plan: Plan,
    *,
    output_dir: Path | str,
    max_parallel: int | None = None,
    workers: Workers = WORKERS,
    console: Console | None = None,
) -> Summary:
    """Run what is neither done nor running elsewhere, at most `max_parallel` runs at a time.

    A run that fails does not end the others. The data must be prepared.
    """
    check_parallel(max_parallel)
    output_dir, console = Path(output_dir), console or display.make_console()
    with refuse_unwritable(output_dir):
        for cell in plan.cells:
            run_at(output_dir, cell.run_id).create(cell.config)
    states = survey([run_at(output_dir, cell.run_id) for cell in plan.cells])
    todo = [cell for cell in plan.cells if not states[cell.run_id].state.done]
    done = len(plan.cells) - len(todo)
    if queued := sum(_is_queued_job(states[cell.run_id]) for cell in todo):
        cancel = command("cancel", plan.name, output_dir=output_dir)
        wait = "run waits" if queued == 1 else "runs wait"
        line = f"{queued} {wait} for SLURM: left alone; to cancel: {cancel}"
        display.say(console, line)
        todo = [cell for cell in todo if not _is_queued_job(states[cell.run_id])]
    if not todo:
        if not queued:
            display.say(console, f"nothing to run: all {len(plan.cells)} runs are done")
        return Summary(states=states)
    # The longest first, so that no long run is alone at the end.
    todo.sort(key=lambda cell: budget.training_flops(cell.config), reverse=True)
    for cell in todo:
        run = run_at(output_dir, cell.run_id)
        if run.lock_holder() is None:  # else the request is for the process at work
            run.cancel_path.unlink(missing_ok=True)
    devices = [cell.config.runtime.device for cell in todo]
    slots = Slots.of(max_parallel, runs=len(todo), devices=devices, code=workers.code)
    say = partial(display.say, console)
    with (
        presence.shown(output_dir) as file,
        open_processes(workers, slots=slots, runs=len(todo), say=say) as processes,
        follow(plan, output_dir),
        Progress(plan.cells, output_dir=output_dir, console=console) as progress,
        stop_requested() as stop,
    ):
        pool = Pool(output_dir=output_dir, processes=processes, progress=progress)
        pool.run(todo, done=done, stop=stop)
        file.unlink(missing_ok=True)  # none of its runs is queued any more
    states = {cell.run_id: state_of(run_at(output_dir, cell.run_id)) for cell in plan.cells}
    return Summary(states=states, interrupted=stop.is_set())


def _is_queued_job(state: RunState) -> bool:
    """Whether a job of SLURM, as far as this machine can ask, will run it."""
    return state.state is State.QUEUED and state.job_id is not None and cluster.available()
