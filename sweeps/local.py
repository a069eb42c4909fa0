"""Runs a plan in worker processes on this machine; survives failures and Ctrl-C. Not for: SLURM.

A worker is a process over a RUN_DIR (`worker.py`) and gets nothing from this one but environment
variables. Where forking is safe, workers are forks of a process that has imported torch
(`warm.py`); else, and where that fails, each imports it again. Two launchers may run one plan: a
run's lock decides which of them gets it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType

from rich.console import Console

from experiments import environment
from experiments.run_dir import DONE, RunDir, Status, runs_folder
from experiments.scheduler import JOB
from experiments.state import RunState, state_of
from relora_core import costs, shared, shell
from relora_core.config import ConfigError, RunConfig
from sweeps import display, snapshot, track, warm
from sweeps.budget import Estimate, Place
from sweeps.job import settle
from sweeps.plan import Cell, Plan, plan_folder
from sweeps.warm import Forked, Starter, Warm
from sweeps.worker import LOCKED

ROOT = Path(__file__).resolve().parents[1]
# -P: the current folder must not shadow our packages (an output folder holds a `sweeps`, too).
WORKER = (sys.executable, "-P", "-m", "sweeps.worker")
POLL_S = 0.2
GRACE_S = 60.0
"""When the sweep is stopped: from terminate, on which a worker saves, to kill."""
STORE_S = 120.0
"""Longest wait for MLflow's store when all runs have ended."""


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
        bad = ("failed", "diverged", "cancelled")
        return int(any(state.state in bad for state in self.states.values()))


@dataclass(kw_only=True, slots=True)
class LocalLauncher:
    """`hydra/launcher=local`: the same worker as on a cluster, in processes of this machine."""

    max_parallel: int | None = None
    kind: str = "local"

    @property
    def options(self) -> dict[str, int | None]:
        return {"max_parallel": self.max_parallel}

    @property
    def unit(self) -> str:
        return "GPU" if visible_gpus() else "CPU"

    def place(self, config: RunConfig) -> Place:
        return Place(gpus=int(config.runtime.device != "cpu" and bool(visible_gpus())))

    def check(self, plan: Plan, *, estimates: Mapping[str, Estimate | None]) -> None:
        check_parallel(self.max_parallel)
        for cell in plan.cells:
            asked = environment.gpu_asked(cell.config)
            if asked is None or sys.platform == "darwin" or visible_gpus():
                continue
            if not _run_dir(Path(cell.config.output_dir), cell).ended():
                raise environment.no_gpu(cell.config, asked)

    def launch(self, plan: Plan, *, output_dir: Path, console: Console) -> int:
        """Run everything that is not done, show how it ended; the exit code."""
        folder = plan_folder(output_dir, name=plan.name) / "code"
        summary = launch_local(
            plan,
            output_dir=output_dir,
            max_parallel=self.max_parallel,
            console=console,
            code=snapshot.freeze(folder, output_dir=output_dir),
        )
        display.show_closing(plan, states=summary.states, output_dir=output_dir, console=console)
        return summary.exit_code

    def check_search(self, plan: Plan) -> None:
        pass

    def search(self, study: Path, *, left: int, config: RunConfig, console: Console) -> int:
        """Processes that take trials until none is left; the exit code."""
        from sweeps.search.local import search_local

        output_dir, device = study.parents[2], config.runtime.device
        code = snapshot.freeze(study.parent / "code", output_dir=output_dir)
        slots = Slots.of(self.max_parallel, runs=left, device=device, code=code)
        return search_local(study, slots=slots, console=console)


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
    console: Console | None = None,
    worker: Sequence[str] = WORKER,
    parent: Sequence[str] | None = None,
    code: Path = ROOT,
) -> Summary:
    """Run what is neither done nor running elsewhere, at most `max_parallel` runs at a time.

    Workers import the project from `code`, a frozen copy that later edits do not reach. `worker` is
    the command that RUN_DIR is appended to, `parent` that of a warm parent of such workers
    (default: ours, where the workers are ours). The data must be prepared.
    """
    check_parallel(max_parallel)
    output_dir, console = Path(output_dir), console or display.make_console()
    with refuse_unwritable(output_dir):
        for cell in plan.cells:
            _run_dir(output_dir, cell).create(cell.config)
    states = {cell.run_id: state_of(_run_dir(output_dir, cell)) for cell in plan.cells}
    todo = [cell for cell in plan.cells if states[cell.run_id].state not in DONE]
    if not todo:
        console.print(f"nothing to run: all {len(plan.cells)} runs are done", highlight=False)
        return Summary(states=states)
    # The longest first, so that no long run is alone at the end.
    todo.sort(key=lambda cell: cost(cell.config), reverse=True)
    for cell in todo:
        _run_dir(output_dir, cell).cancel_path.unlink(missing_ok=True)
    device = plan.cells[0].config.runtime.device
    slots = Slots.of(max_parallel, runs=len(todo), device=device, code=code)
    if parent is None and tuple(worker) == WORKER:
        parent = warm.COMMAND
    with (
        warmed(parent, slots=slots, runs=len(todo)) as forks,
        follow(plan, output_dir),
        display.Progress(plan.cells, output_dir=output_dir, console=console) as progress,
        stop_requested() as stop,
    ):
        starter = Starter(command=worker, warm=forks, say=progress.say)
        pool = Pool(output_dir=output_dir, starter=starter, slots=slots, progress=progress)
        pool.run(todo, done=len(plan.cells) - len(todo), stop=stop)
    states = {cell.run_id: state_of(_run_dir(output_dir, cell)) for cell in plan.cells}
    return Summary(states=states, interrupted=stop.is_set())


@contextlib.contextmanager
def warmed(parent: Sequence[str] | None, *, slots: Slots, runs: int) -> Iterator[Warm | None]:
    """A warm parent that has begun to import; None where it saves nothing or is not safe."""
    if parent is None or runs < 2 or not warm.available():
        yield None
        return
    with warm.open_parent(parent, environment=slots.shared()) as forks:
        yield forks


def cost(config: RunConfig) -> float:
    """Training FLOPs of the whole run."""
    return float(costs.flops_per_token(config).train) * display.tokens(config)


@contextlib.contextmanager
def refuse_unwritable(output_dir: Path) -> Iterator[None]:
    """ConfigError where `output_dir` cannot be written to."""
    try:
        shared.make_folder(output_dir)
        yield
    except OSError as error:
        why = shared.explained(error)
        raise ConfigError(
            f"output_dir must be a folder with free space to write to, got {output_dir}: "
            f"{why or f'{error.strerror or error} ({error.filename or output_dir})'}"
        ) from None


def _run_dir(output_dir: Path, cell: Cell) -> RunDir:
    return RunDir(runs_folder(output_dir) / cell.run_id)


@contextlib.contextmanager
def follow(plan: Plan, output_dir: Path) -> Iterator[None]:
    """Keep the sweep's runs in MLflow up to date; its means when all have ended.

    In a thread: a store may take a second for each run, or not answer at all.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(plan, output_dir, ended), daemon=True)
    if not any(cell.config.tracking.enabled for cell in plan.cells):
        yield
        return
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(STORE_S)
        if thread.is_alive():
            line = f"tracking: not ready {STORE_S:.0f} s after the runs; `python -m sweeps sync` is"
            print(f"{line} what is left to do", file=sys.stderr)


def _follow(plan: Plan, output_dir: Path, ended: threading.Event) -> None:
    """Show all runs, follow them by a child process until `ended`, show all again."""
    from experiments import mlflow_follow, mlflow_store

    tracked = [cell for cell in plan.cells if cell.config.tracking.enabled]
    config = tracked[0].config
    place = (mlflow_store.store_uri(config), mlflow_store.experiment_name(config))
    shown = track.shown(output_dir, plan.name)
    here = next((one for one in shown if (one.uri, one.experiment) == place), None)
    if not ended.is_set():
        with mlflow_follow.follow(
            [_run_dir(output_dir, cell) for cell in tracked],
            config=config,
            names=here.names if here else {cell.run_id: cell.name for cell in tracked},
            parent=here.parent if here else None,
            warn=lambda _: None,  # a pass over all of it follows
        ):
            ended.wait()
    for line in track.complaints(track.shown(output_dir, plan.name)):
        print(line, file=sys.stderr)


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; the handlers do nothing else."""
    stop = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")
"""In /dev where there is a GPU: NVIDIA's, AMD's, Windows' under WSL."""


# places to run ----------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Slots:
    """How many workers run at once, and what each may use."""

    parallel: int
    threads: int
    """CPU threads of each worker."""
    gpus: list[str]
    """Device ids, given to slots in turn; empty: the CPU."""
    code: Path = ROOT
    """What workers import the project from."""

    @classmethod
    def of(cls, max_parallel: int | None, *, runs: int, device: str, code: Path = ROOT) -> Slots:
        """As many as there are GPUs, else cores; never more than there are runs."""
        gpus = [] if device == "cpu" else visible_gpus()
        cores = len(os.sched_getaffinity(0))
        parallel = min(max_parallel or len(gpus) or cores, runs)
        threads = max(1, cores // parallel)
        return cls(parallel=parallel, threads=threads, gpus=gpus, code=code)

    def environment(self, slot: int) -> dict[str, str]:
        """Environment of the worker in this slot: ours without its process group's variables, and
        the worker's share of the machine."""
        if not self.gpus:
            return self.shared()
        return self.shared() | {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]}

    def shared(self) -> dict[str, str]:
        """What the workers of all slots have in common."""
        path = os.pathsep.join(
            filter(None, (str(self.code.absolute()), os.environ.get("PYTHONPATH")))
        )
        share = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "GOMP_SPINCOUNT": "5000"}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RELORA_THREADS"):
            share[name] = str(min(self.threads, _parse_count(os.environ.get(name), self.threads)))
        inherited = {name: value for name, value in os.environ.items() if name != JOB}
        return {**shell.outside(inherited), **share}


def _parse_count(text: str | None, default: int) -> int:
    return int(text) if text and text.isdigit() and int(text) else default


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use, without loading torch.

    As CUDA reads CUDA_VISIBLE_DEVICES: the list ends before the first invalid id (SLURM's
    `NoDevFiles`, -1, an index beyond the last), and an id given twice hides all.
    """
    installed = _installed_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [name for name in installed or [] if name.isdigit()]
    ids = [part.strip() for part in chosen.split(",")]
    ids = list(itertools.takewhile(lambda name: _is_gpu(name, installed), ids))
    return ids if len(set(ids)) == len(ids) else []


def _is_gpu(name: str, installed: Sequence[str] | None) -> bool:
    """Whether it is an index, or the UUID, perhaps cut short, of a GPU or a slice of one."""
    if name.isdigit():
        return installed is None or name in installed
    if not name.startswith(("GPU-", "MIG-")):
        return False
    if installed is None:
        return True
    gpu = name.removeprefix("MIG-").partition("/")[0]  # MIG-GPU-.../1/0, as older drivers name it
    return any(one.startswith((name, gpu)) for one in installed)


@cache  # asked for every run of a plan
def _installed_gpus() -> list[str] | None:
    """Indices, and UUIDs of GPUs and their slices; None where there are GPUs but no nvidia-smi."""
    asked = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "-L"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    if asked is not None:
        return re.findall(r"(?<=^GPU )\d+(?=:)|(?<=UUID: )[^)]+", asked.stdout, re.MULTILINE)
    return None if any(Path("/dev").glob(pattern) for pattern in GPU_FILES) else []


# workers ----------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Job:
    """A live worker of this launcher."""

    cell: Cell
    process: subprocess.Popen[bytes] | Forked
    slot: int


@dataclass(kw_only=True, slots=True)
class Pool:
    """Starts workers while there are runs and free slots, and settles the runs of dead ones."""

    output_dir: Path
    starter: Starter
    slots: Slots
    progress: display.Progress
    pending: list[Cell] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    elsewhere: list[Cell] = field(default_factory=list)
    """Runs of another process on this host: awaited, not touched."""
    before: dict[str, Status] = field(default_factory=dict)
    """run_id -> status before it was queued."""
    ends: list[str] = field(default_factory=list)

    def run(self, cells: Sequence[Cell], *, done: int, stop: threading.Event) -> None:
        """Run `cells` in this order until all have ended or `stop` is set."""
        self.ends = ["done"] * done
        self.pending = list(cells)
        for cell in cells:
            self._queue(cell)
        try:
            while (self.pending or self.jobs or self.elsewhere) and not stop.is_set():
                self._start_some()
                self._reap()
                self._look_elsewhere()
                active = [job.cell for job in self.jobs] + self.elsewhere
                self.progress.tick(active, counts=self._counts())
                stop.wait(POLL_S)
        finally:
            self._stop_all()

    def _counts(self) -> dict[str, int]:
        counts = {state: self.ends.count(state) for state in dict.fromkeys(self.ends)}
        running = len(self.jobs) + len(self.elsewhere)
        return counts | {"running": running, "queued": len(self.pending)}

    def _dir(self, cell: Cell) -> RunDir:
        return _run_dir(self.output_dir, cell)

    def _queue(self, cell: Cell) -> None:
        run_dir = self._dir(cell)
        self.before[cell.run_id] = run_dir.status()
        if run_dir.lock_holder() is None:
            here = {"host": socket.gethostname(), "pid": os.getpid(), "job_id": None}
            run_dir.update_status(state="queued", error=None, **here)

    def _start_some(self) -> None:
        if self.starter.importing:
            return
        while self.pending and len(self.jobs) < self.slots.parallel:
            cell = self.pending.pop(0)
            run_dir = self._dir(cell)
            now = state_of(run_dir)
            if run_dir.lock_holder() is not None:
                self.elsewhere.append(cell)
            elif now.state in DONE or self._failed_meanwhile(cell, now):
                self._ended(cell, now)
            elif run_dir.cancel_path.exists():
                run_dir.update_status(state="cancelled", error=None)
                self._ended(cell, state_of(run_dir))
            else:
                self._start(cell)

    def _failed_meanwhile(self, cell: Cell, now: RunState) -> bool:
        """Whether another launcher has tried it since it was queued: then it has failed."""
        return now.state == "failed" and now.attempts > self.before[cell.run_id].attempts

    def _start(self, cell: Cell) -> None:
        run_dir = self._dir(cell)
        attempt = run_dir.next_attempt()
        slot = min(set(range(self.slots.parallel)) - {job.slot for job in self.jobs})
        log, environment = run_dir.log_path(attempt), self.slots.environment(slot)
        process = self.starter.start(run_dir.path, log=log, environment=environment)
        self.jobs.append(Job(cell=cell, process=process, slot=slot))
        self.progress.started(cell, attempt=attempt)

    def _reap(self) -> None:
        for job in list(self.jobs):
            code = job.process.poll()
            if code is None:
                continue
            self.jobs.remove(job)
            if code == LOCKED:
                self.elsewhere.append(job.cell)
            else:
                settle(self._dir(job.cell), code=code)
                self._ended(job.cell, state_of(self._dir(job.cell)))

    def _look_elsewhere(self) -> None:
        """Await runs of this host; leave those of other hosts alone."""
        for cell in list(self.elsewhere):
            run_dir = self._dir(cell)
            holder = run_dir.lock_holder()
            if holder is not None and holder["host"] in ("?", socket.gethostname()):
                continue
            self.elsewhere.remove(cell)
            now = state_of(run_dir)
            if holder is not None or now.state in (*DONE, "failed", "cancelled"):
                self._ended(cell, now)
            else:
                self.pending.append(cell)

    def _ended(self, cell: Cell, now: RunState) -> None:
        self.ends.append(now.state)
        reason = now.reason
        if now.state == "failed":
            reason = display.error_line(self._dir(cell), attempts=now.attempts, reason=reason)
        self.progress.ended(cell, state=now.state, reason=reason)

    def _stop_all(self) -> None:
        """Terminate, then kill, our own workers; the same command resumes their runs."""
        for job in self.jobs:
            job.process.terminate()
        deadline = time.monotonic() + GRACE_S
        for job in self.jobs:
            try:
                job.process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()
            code = job.process.wait()
            settle(self._dir(job.cell), code=code, reason="stopped; the same command resumes it")
        for cell in self.pending:
            self._unqueue(cell)
        self.jobs, self.pending = [], []

    def _unqueue(self, cell: Cell) -> None:
        now, before = self._dir(cell).status(), self.before[cell.run_id]
        if now.state == "queued" and now.pid == os.getpid():
            again = "planned" if before.state in ("queued", "running") else before.state
            self._dir(cell).update_status(state=again, error=before.error)
