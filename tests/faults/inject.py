"""Runs in which a chosen file operation kills the process or fails, forked from a warm process.

Every change below one folder (open for writing, write, flush, fsync, close, rename, unlink, mkdir,
rmdir, link) is an operation; a kill or an error in a write leaves half of it behind. Not for: what
is then true of the run.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import io
import os
import re
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import IO, Any

from relora_core.config import DynamicsConfig, EvalConfig, RunConfig
from tests import forks, warm
from tests.conftest import nano_config

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 24, 4
SERVER = "import sys; from tests.faults.inject import serve; serve(sys.argv[1])"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(kw_only=True, slots=True)
class Plan:
    """What goes wrong in one attempt."""

    at: int = 0
    """At which operation, from 1 on; 0: at none."""
    on: str = ""
    """Only operations whose label this pattern is found in count."""
    errno: int = 0
    """0: the process is killed."""
    lasting: bool = False
    """Every such operation from there on fails, too."""
    kill_after_s: float = 0.0
    """Killed from outside after so long; 0: not."""
    clock_s: float = 0.0
    """Added to what time.time says."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of one attempt."""

    code: int
    """Exit code; below 0 the signal that killed it."""
    output: str
    """stdout and stderr."""
    trace: list[str] = field(default_factory=list)
    """Label of every operation; of one that kills, too."""
    cpu_s: float = 0.0


def small_run(output_dir: Path | str, **changes: Any) -> RunConfig:
    """Restarts, dropout, evals, dynamics and checkpoints within a fraction of a second."""
    evals = EvalConfig()
    for one in (evals.paloma, evals.blimp):
        one.enabled, one.every_steps = True, 12
    evals.paloma.max_documents = evals.blimp.max_pairs = 1
    settings: dict[str, Any] = {
        "model": {"d_model": 16, "d_ff": 24, "n_layers": 1, "vocab_size": None},
        "relora": {"dropout": 0.1, "reset_frequency": 6, "r": 2},
        "train": {"steps": STEPS, "batch_size": 2},
        "data": {"seq_len": 8},
        "checkpoint": {"every_steps": EVERY},
        "runtime": {"log_every_steps": 2},
        "tracking": {"enabled": False, "system_metrics": False},
        "eval": evals,
        "dynamics": DynamicsConfig(every_steps=12),
        "output_dir": str(output_dir),
    }
    return nano_config(**settings | changes)


# the operations -----------------------------------------------------------------------------------
class Faults:
    """Counts the operations below `root` of this process and does what the plan says."""

    def __init__(self, root: Path, plan: Plan, *, trace: int) -> None:
        self.root, self.plan, self.trace, self.count = os.path.realpath(root), plan, trace, 0
        self._lock = threading.RLock()

    def hit(self, verb: str, path: str, *, torn: Callable[[], object] = lambda: None) -> None:
        with self._lock:
            label = f"{verb} {self._kind(path)}"
            os.write(self.trace, f"{label}\n".encode())
            if not self.plan.at or not re.search(self.plan.on, label):
                return
            self.count += 1
            if self.count != self.plan.at and not (self.plan.lasting and self.count > self.plan.at):
                return
            torn()
            if not self.plan.errno:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.plan.errno, os.strerror(self.plan.errno), path)

    def _kind(self, path: str) -> str:
        """The path without what differs from run to run."""
        kind = os.path.relpath(path, self.root)
        kind = re.sub(r"(?<=\.)[\w]{8}(?=\.tmp)|\btmp\w{8}$", "T", kind)
        kind = re.sub(r"runs/[^/]+", "run", kind)
        return re.sub(r"\d+", "N", re.sub(r"(-old|-damaged)?-\d+$|(step)-\d{8}-\d+", r"\1\2", kind))

    def where(self, path: Any, *, dir_fd: int | None = None) -> str | None:
        """The path of a file below `root`; None for any other."""
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return None
        folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        whole = os.path.join(folder, os.fsdecode(path))
        return whole if whole == self.root or whole.startswith(f"{self.root}/") else None

    def install(self) -> None:
        """In this process, for good."""
        real_open, real_os_open = io.open, os.open

        def opening(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            path = self.where(file) if set(mode) & set("wxa+") else None
            if path is None:
                return real_open(file, mode, *rest, **named)
            if not isinstance(file, int):
                self.hit("open", path)
            return File(real_open(file, mode, *rest, **named), path, self)

        def os_opening(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & WRITING and (here := self.where(path, dir_fd=named.get("dir_fd"))):
                self.hit("open", here)
            return real_os_open(path, flags, *rest, **named)

        def hooked(verb: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Any, *rest: Any, **named: Any) -> Any:
                if here := self.where(path, dir_fd=named.get("dir_fd")):
                    self.hit(verb, here)
                return real(path, *rest, **named)

            return call

        builtins.open = io.open = opening  # type: ignore[assignment]
        os.open = os_opening  # type: ignore[assignment]
        for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "fsync"):
            setattr(os, name, hooked(name, getattr(os, name)))


class File:
    """A file that is open for writing."""

    def __init__(self, file: Any, path: str, faults: Faults) -> None:
        self._file, self._path, self._faults = file, path, faults

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._faults.hit("write", self._path, torn=half)
        return self._file.write(data)

    def flush(self) -> None:
        self._faults.hit("flush", self._path)
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            self._faults.hit("close", self._path, torn=self._file.close)
            self._file.close()

    def __enter__(self) -> File:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


# the warm process ---------------------------------------------------------------------------------
class Runner:
    """`python run.py` of a config, in forks of a process that has imported all and trained once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def attempt(self, config: RunConfig, **faults: Any) -> Outcome:
        """One process from its start to its end; `faults` are fields of its Plan."""
        (outcome,) = self.together(config, copies=1, **faults)
        return outcome

    def together(self, config: RunConfig, *, copies: int, **faults: Any) -> list[Outcome]:
        """The same command in several processes at once."""
        return self._ask(config, output_dir=config.output_dir, copies=copies, plan=Plan(**faults))

    def command(
        self, words: Sequence[str], *, output_dir: Path, copies: int = 1, **faults: Any
    ) -> list[Outcome]:
        """`python run.py WORDS`. Faults are the launcher's, not its workers'."""
        return self._ask(words, output_dir=str(output_dir), copies=copies, plan=Plan(**faults))

    def _ask(self, what: Any, **rest: Any) -> list[Outcome]:
        self._connection.send((what, rest))
        return self._connection.recv()


@contextlib.contextmanager
def runner() -> Iterator[Runner]:
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        with Listener(address) as listener:
            started = warm.start(["-c", SERVER, address], cwd=ROOT, figures=False)
            with listener.accept() as connection:
                yield Runner(connection)
        started.wait()


def serve(address: str) -> None:
    """Attempts, one after the other, until nobody asks for more."""
    from experiments.run.single import run_here

    # What is imported and set up at the first step would cost each fork half a second.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run_here(small_run(folder))
    gc.collect()
    gc.freeze()  # else a fork's garbage collection would copy the shared pages
    forks.nurse(f"{address}.nurse")
    with Client(address) as connection, contextlib.suppress(EOFError):
        while True:
            what, rest = connection.recv()
            if isinstance(what, RunConfig):
                body = partial(run_here, what)
            else:
                body = partial(_command, what, nurse=f"{address}.nurse")
            connection.send(_forked(body, **rest))


def _forked(body: Callable[[], int], *, output_dir: str, plan: Plan, copies: int) -> list[Outcome]:
    begun = []
    with contextlib.ExitStack() as files:
        for _ in range(copies):
            output, trace = (files.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            pid = os.fork()
            if pid == 0:
                faults = Faults(Path(output_dir), plan, trace=trace.fileno())
                _child(body, faults, output=output.fileno())
            begun.append((pid, output, trace))
        if plan.kill_after_s:
            time.sleep(plan.kill_after_s)
            for pid, _, _ in begun:
                os.kill(pid, signal.SIGKILL)
        return [_ended(pid, output=output, trace=trace) for pid, output, trace in begun]


def _ended(pid: int, *, output: IO[bytes], trace: IO[bytes]) -> Outcome:
    _, status, usage = os.wait4(pid, 0)
    texts = []
    for file in (output, trace):
        file.seek(0)
        texts.append(file.read().decode())
    return Outcome(
        code=os.waitstatus_to_exitcode(status),
        output=texts[0],
        trace=texts[1].splitlines(),
        cpu_s=usage.ru_utime + usage.ru_stime,
    )


def _child(body: Callable[[], int], faults: Faults, *, output: int) -> None:
    """As `run.py` does, from where Hydra has composed the config."""
    from experiments.errors import reporting

    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        if clock_s := faults.plan.clock_s:
            real = time.time
            time.time = lambda: real() + clock_s
        faults.install()
        with reporting():
            code = body()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# launchers ----------------------------------------------------------------------------------------
def _command(words: Sequence[str], *, nurse: str) -> int:
    """`run.py` with these words; its workers' parent is a fork of ours: imports take seconds."""
    forks.use_nurse(nurse)
    os.chdir(ROOT)
    sys.argv = ["run.py", *words]
    runpy.run_path("run.py", run_name="__main__")
    return 0
