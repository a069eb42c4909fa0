"""Submits a plan as SLURM job arrays, one per resource shape; no process waits for them.

What a job is to do is stored before sbatch is called: a crash at any time leaves no job, or one
that can be found by its name. Not for: what happens on the node (`job.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from experiments.disk.output_dir import run_at
from experiments.disk.run_dir import RunDir
from experiments.disk.states import State
from experiments.environment import python_path
from experiments.errors import RunLocked
from relora_core import shared, shell
from relora_core.config import ConfigError, RunConfig
from sweeps import snapshot
from sweeps.planning.budget import Estimate, Place, to_run
from sweeps.planning.plan import Cell, Plan, command
from sweeps.slurm import cluster, refusal
from sweeps.slurm.batches import Batch, batches
from sweeps.slurm.cluster import SlurmError
from sweeps.slurm.options import (
    Shape,
    SlurmOptions,
    check_cell,
    check_options,
    gpu_kinds,
    partition_of,
    settled,
    shape_of,
)
from sweeps.slurm.queue import Queue, in_parts
from sweeps.slurm.sbatch import Sbatch, Unsure, options_of_environment, print_environment
from sweeps.slurm.submission import Submission, adopt, only_submitter
from sweeps.slurm.survey import dead_holders, survey
from sweeps.slurm.timings import time_on_slurm
from sweeps.timing import Timings

T = TypeVar("T")
WRITERS = 16
"""Threads that write runs' files."""


@dataclass(kw_only=True, slots=True)
class SlurmLauncher:
    """`hydra/launcher=slurm`."""

    options: SlurmOptions
    kind: str = "slurm"

    def __post_init__(self) -> None:
        self.options = settled(self.options)

    def place(self, config: RunConfig) -> Place:
        shape = shape_of(config, self.options)
        options = dataclasses.replace(self.options, **options_of_environment(self.options))
        return Place(
            processes=shape.processes,
            gpus=shape.nodes * shape.gpus_per_node / self.options.runs_per_job,
            kinds=gpu_kinds(options),
            partition=partition_of(options),
        )

    def check(self, plan: Plan, *, estimates: Mapping[str, Estimate | None]) -> None:
        """ConfigError if SLURM would refuse a job, or a job could not do what it is for."""
        check_options(self.options)
        print_environment(self.options)
        for cell in plan.cells[:1]:
            limit_mb = self.options.snapshot_limit_mb
            snapshot.check(output_dir=cell.config.output_dir, limit_mb=limit_mb)
        for cell in plan.cells:
            check_cell(cell.config, self.options)
            self._check_pace(cell.config, estimates.get(cell.run_id))
            if "%" in (place := os.path.abspath(cell.config.output_dir)):
                raise ConfigError(
                    f"output_dir must hold no % (SLURM's own sign in file names), got {place!r}; "
                    f"nearest valid: {place.replace('%', '_')!r}"
                )
        if not cluster.available():
            raise ConfigError(
                "hydra/launcher must be local here: slurm needs sbatch and squeue on PATH"
            )
        try:
            for shape in {shape_of(cell.config, self.options) for cell in plan.cells}:
                self._test(shape)
        except SlurmError as error:
            raise ConfigError(f"hydra/launcher=slurm needs SLURM's answer: {error}") from None

    def _check_pace(self, config: RunConfig, cost: Estimate | None) -> None:
        """ConfigError if a job is too short for a checkpoint: every kill would lose all of it."""
        if cost is None or cost.steps is None:
            return
        if config.checkpoint.every_minutes is not None:
            return
        shape, every = shape_of(config, self.options), config.checkpoint.every_steps
        place = self.place(config)
        wall_min = 60 * cost.hours / (place.gpus or place.processes)
        interval = wall_min * min(1.0, every / max(cost.steps, 1))
        if interval > shape.minutes:
            good = max(1, int(every * shape.minutes / interval / 2))
            raise ConfigError(
                f"hydra.launcher.time must be longer than a checkpoint interval (checkpoint."
                f"every_steps={every} take about {interval:.0f} min), got {shape.minutes} min; "
                f"nearest valid: {int(interval) + 1}, or checkpoint.every_steps={good}"
            )

    def _test(self, shape: Shape) -> None:
        """`sbatch --test-only`; then the limit of the partition, which that does not check."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "submission.json"
            check = Sbatch(name="check", tasks=1, options=self.options, shape=shape, file=file)
            path = Path(folder) / "check.sh"
            path.write_text(check.script(), encoding="utf-8")
            refusal.test(path)
        self._check_limit(shape)

    def _check_limit(self, shape: Shape) -> None:
        """A job longer than its partition allows may be accepted and never start."""
        options = dataclasses.replace(self.options, **options_of_environment(self.options))
        if options.qos:  # a QOS may allow more
            return
        partition = partition_of(options)
        limit = cluster.time_limit(partition)
        if limit is not None and shape.minutes > limit[0]:
            raise ConfigError(
                f"hydra.launcher.time must be <= {limit[1]} (the limit of "
                f"{f'partition {partition}' if partition else 'the default partition'}), got "
                f"{shape.minutes} min: such a job never starts; "
                f"nearest valid: {limit[0]}"
            )

    def launch(self, plan: Plan, *, output_dir: Path, console: Console) -> int:
        """Submit what is not done and not in flight; the exit code."""
        output_dir = output_dir.absolute()
        _for_each(lambda cell: run_at(output_dir, cell.run_id).create(cell.config), plan.cells)
        with only_submitter(output_dir, console):
            try:
                todo = self._todo(plan, output_dir)
                self._print_skipped(plan, todo, console)
                if not todo:
                    return 0
                queue = Queue.open(
                    output_dir, plan.name, kind="train", options=self.options, console=console
                )
                code = self._submit_all(plan, todo, queue, console=console)
                _show_in_mlflow(plan, output_dir, console=console)
                watch = command("watch", plan.name, output_dir=output_dir)
                console.print(f"watch: {watch}", markup=False, highlight=False, soft_wrap=True)
                return code
            except SlurmError as error:
                raise ConfigError(
                    f"SLURM does not answer, nothing was submitted: {error}"
                ) from None

    def time(self, work: Timings, *, name: str, output_dir: Path, console: Console) -> None:
        time_on_slurm(self.options, work, name=name, output_dir=output_dir, console=console)

    def check_search(self, plan: Plan) -> None:
        """ConfigError unless a job is for one trial in one process, and all need the same."""
        if self.options.runs_per_job > 1:
            raise ConfigError(
                "hydra.launcher.runs_per_job must be 1 with hydra/sweeper=search, got "
                f"{self.options.runs_per_job}"
            )
        shapes = {shape_of(cell.config, self.options) for cell in plan.cells}
        if len(shapes) > 1:
            raise ConfigError(
                "resources must be the same in all of a search (nobody knows which trial a job "
                f"will get), got {len(shapes)} different ones"
            )
        if (processes := shapes.pop().processes) > 1:
            raise ConfigError(
                f"hydra.launcher.tasks_per_node must be 1 with hydra/sweeper=search, got "
                f"{processes} processes; nearest valid: tasks_per_node=1 on one node"
            )

    def _todo(self, plan: Plan, output_dir: Path) -> list[Cell]:
        """Runs that are not done and have no job."""
        adopt(output_dir, plan.name)
        runs = {cell.run_id: run_at(output_dir, cell.run_id) for cell in plan.cells}
        states = survey(list(runs.values()))
        return [c for c in plan.cells if to_run(states[c.run_id])]

    def _print_skipped(self, plan: Plan, todo: list[Cell], console: Console) -> None:
        if skipped := len(plan.cells) - len(todo):
            rest = "nothing to submit" if not todo else f"{len(todo)} to submit"
            console.print(f"{skipped} runs are done or in flight: {rest}", highlight=False)

    def _submit_all(self, plan: Plan, todo: list[Cell], queue: Queue, *, console: Console) -> int:
        options = dataclasses.replace(self.options, max_parallel=queue.cap)
        made = batches(todo, options=options, max_array_size=cluster.max_array_size())
        sent = 0
        for number, batch in enumerate(made, 1):
            try:
                for part, submission in in_parts(batch, partial(_submit, queue)):
                    sent += len(part.cells)
                    console.print(
                        _describe(submission, part, options=self.options),
                        highlight=False,
                        soft_wrap=True,
                    )
            except SlurmError as error:
                console.print(
                    f"error: sbatch {'may have taken' if isinstance(error, Unsure) else 'refused'} "
                    f"job array {number} of {len(made)}: {error}; "
                    f"{sent} runs are submitted and stay so, {len(todo) - sent} are not: the same "
                    "command submits them",
                    style="red",
                    highlight=False,
                    soft_wrap=True,
                )
                return 1
            except KeyboardInterrupt:
                states = survey([run_at(queue.output_dir, cell.run_id) for cell in todo])
                done = sum(one.state.in_flight for one in states.values())
                cancel = command("cancel", plan.name, output_dir=queue.output_dir)
                rest = f", {len(todo) - done} are not: the same command submits them"
                console.print(
                    f"Ctrl-C: {done} runs are submitted and go on{rest if done < len(todo) else ''}"
                    f"; to end what is submitted: {cancel}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
                raise
        return 0


def _submit(queue: Queue, batch: Batch[Cell]) -> Submission:
    """Submit one array, and record the jobs in its runs."""
    runs = {cell.run_id: run_at(queue.output_dir, cell.run_id) for cell in batch.cells}
    _for_each(partial(_reset, dead=dead_holders(runs.values())), runs.values())
    try:
        one = queue.submit(batch, [[cell.run_id for cell in task] for task in batch.tasks])
        _for_each(lambda of: _record_job(runs[of[0]], of[1]), one.job_ids().items())
    except KeyboardInterrupt:
        with contextlib.suppress(SlurmError):
            adopt(queue.output_dir, queue.sweep)  # SLURM may have accepted it
        raise
    return one


def _for_each(do: Callable[[T], object], things: Iterable[T]) -> None:
    """Do it for each, many at once: writing a run's files waits for the disk some 10 ms each."""
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(do, things))


def _reset(run: RunDir, *, dead: Collection[dict[str, Any]]) -> None:
    """Reset the run to planned, without a request to cancel it, unless that is for a process which
    may be at work, and without a dead holder's lock: a node cannot look at this host's processes,
    and a job in a container cannot ask SLURM."""
    now, held = run.status(), (run.path / "lock").exists()
    if held:
        with contextlib.suppress(RunLocked), run.lock(is_dead=lambda holder: holder in dead):
            held = False  # the context's end removes the lock
    if not held:
        run.cancel_path.unlink(missing_ok=True)
    if (now.state, now.phase, now.job_id, now.error) != (State.PLANNED, "", None, None):
        run.update_status(state=State.PLANNED, phase="", job_id=None, error=None)


def _show_in_mlflow(plan: Plan, output_dir: Path, *, console: Console) -> None:
    """Show the sweep in MLflow from another process: hundreds of runs take a minute.

    If it fails, the records can be synced at any time.
    """
    if plan.is_tracked:
        log = sync_in_background(output_dir, plan.name)
        line = f"MLflow shows them in a minute (log: {log}); `python -m sweeps sync` does it again"
        console.print(line, highlight=False, soft_wrap=True)


def _record_job(run: RunDir, job_id: str) -> None:
    """Record the run's job, unless the job has begun: then it records itself."""
    if run.lock_holder() is None and run.status().state is State.PLANNED:
        run.update_status(state=State.QUEUED, job_id=job_id)


def _describe(one: Submission, batch: Batch[Cell], *, options: SlurmOptions) -> str:
    """A line on what was submitted: `submitted job 7 (array of 3): 3 runs; 1 node, 1 GPU, ...`."""
    (_, shape), jobs = batch.request(options), len(batch.tasks)
    runs, most = len(batch.cells), max(len(task) for task in batch.tasks)
    resources = [
        _count(shape.nodes, "node"),
        *([_count(shape.gpus_per_node * shape.nodes, "GPU")] if shape.gpus_per_node else []),
        *([_count(shape.processes, "process", "processes")] if shape.processes > 1 else []),
        _count(shape.cpus_per_task * shape.processes * most, "core"),
        f"{shape.minutes} min",
    ]
    array = f" (array of {jobs})" if jobs > 1 else ""
    packed = f", up to {most} in a job" if most > 1 else ""
    return (
        f"submitted job {one.job_id}{array}: {_count(runs, 'run')}{packed}; {', '.join(resources)}"
    )


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


_BACKGROUND: list[subprocess.Popen[bytes]] = []
"""Processes that outlive this one; Python warns of an unfinished one that is garbage-collected."""


def sync_in_background(output_dir: Path | str, sweep: str) -> Path:
    """Update the sweep in MLflow from a process that may outlive this one; its log."""
    output_dir = Path(output_dir).absolute()
    log = output_dir / "logs" / "mlflow-sync.log"
    with contextlib.suppress(OSError):
        shared.make_folder(log.parent)
        with shared.open_file(log, "ab") as log_file:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sweeps", "sync", sweep, "--output-dir", output_dir],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                env={**shell.strip_group(os.environ), "PYTHONPATH": python_path()},
                start_new_session=True,  # Ctrl-C, and the terminal's end, must not reach it
            )
        _BACKGROUND.append(process)
    return log
