"""Workers that need not import torch: forks of a parent process that has, each with its own log.

`python -P -m sweeps.local.warm sweeps.worker` is a parent: it computes nothing. Requests are lines
of JSON on stdin (run_dir, log, env), answers lines on stdout (ready, pid, code, error). It ends
with its stdin; its children go on.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from relora_core import shared

PARENT = (sys.executable, "-P", "-m", "sweeps.local.warm")
"""The command of a parent, to which the module of its workers is appended."""
COMMAND = (*PARENT, "sweeps.worker")
QUIET = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Environment in which imports start no threads but OpenBLAS's; see `_end_threads`."""
UNKNOWN = 255
"""Exit code of a worker that outlived its parent: nobody could read the real one."""
GPU_FILES = ("/dev/nvidia", "/dev/kfd", "/dev/dri")
FORK_S = 30.0
"""Longest wait for a fork."""
REAP_S = 0.05


class CannotFork(Exception):
    """The parent cannot fork; one line says why."""


def available() -> bool:
    """Whether forking a process that has loaded torch is safe: on Linux alone."""
    return sys.platform == "linux"


# the launcher's side ----------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Forked:
    """A worker that the parent has forked, with the methods of Popen that launchers use."""

    parent: Warm
    process: psutil.Process | None
    """None if it ended before it could be looked up."""
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            silent = not self.parent.listen()
            self.returncode = self.parent.codes.pop(self.pid, None)
            if self.returncode is None and silent and not self._alive():
                self.returncode = UNKNOWN
        return self.returncode

    def _alive(self) -> bool:
        """A zombie counts as dead."""
        with contextlib.suppress(psutil.NoSuchProcess):
            one = self.process
            return one is not None and one.is_running() and one.status() != psutil.STATUS_ZOMBIE
        return False

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            time.sleep(REAP_S)
        return code

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.poll() is None and self.process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.process.send_signal(number)


@dataclass(kw_only=True, slots=True)
class Warm:
    """The parent, as its launcher sees it."""

    process: subprocess.Popen[bytes]
    environment: Mapping[str, str]
    codes: dict[int, int] = field(default_factory=dict)
    """pid -> exit code of children that have ended."""
    _answers: list[dict[str, Any]] = field(default_factory=list)
    _ready: bool = False
    _unfinished: bytes = b""
    _open: bool = True

    @property
    def importing(self) -> bool:
        """Whether it is still importing."""
        return self.listen() and not self._ready

    def fork(self, run_dir: Path, *, log: Path, environment: Mapping[str, str]) -> Forked:
        """Fork a worker on `run_dir`, its output appended to `log`; CannotFork if that fails."""
        changes = {k: v for k, v in environment.items() if self.environment.get(k) != v}
        request = {"run_dir": str(run_dir.absolute()), "log": str(log.absolute()), "env": changes}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise self._end() from None
        deadline = time.monotonic() + FORK_S
        while not self._answers:
            if not self.listen(timeout_s=REAP_S) or time.monotonic() > deadline:
                raise self._end()
        answer = self._answers.pop(0)
        if "error" in answer:
            raise CannotFork(answer["error"])
        with contextlib.suppress(psutil.NoSuchProcess):
            return Forked(parent=self, pid=answer["pid"], process=psutil.Process(answer["pid"]))
        return Forked(parent=self, pid=answer["pid"], process=None)

    def listen(self, *, timeout_s: float = 0.0) -> bool:
        """Read the parent's answers; whether it can send more."""
        assert self.process.stdout is not None
        out = self.process.stdout.fileno()
        while self._open and select.select([out], [], [], timeout_s)[0]:
            chunk = os.read(out, 65536)
            self._open = bool(chunk)
            *lines, self._unfinished = (self._unfinished + chunk).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
            timeout_s = 0.0
        return self._open

    def _take(self, answer: dict[str, Any]) -> None:
        if "code" in answer:
            self.codes[answer["pid"]] = answer["code"]
        elif "ready" in answer:
            self._ready = True
        else:
            self._answers.append(answer)

    def _end(self) -> CannotFork:
        """Kill the parent: a worker forked from now on would hold its run's lock unknown to us."""
        self.process.kill()
        code = self.process.wait()
        return CannotFork(f"it ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}")

    def close(self) -> None:
        """End the parent; its children go on."""
        assert self.process.stdin is not None
        if self.importing:  # it has no children, and reads its stdin only after its imports
            self.process.kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def open_parent(command: Sequence[str], *, environment: Mapping[str, str]) -> Iterator[Warm]:
    """Start a parent, which begins to import; closed at the end."""
    environment = {**environment, **QUIET}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # an import that fails is in the log of the first run
        env=environment,
        start_new_session=True,
    )
    warm = Warm(process=process, environment=environment)
    try:
        yield warm
    finally:
        warm.close()


@dataclass(kw_only=True, slots=True)
class Starter:
    """Starts workers: forks of the warm parent if it can fork, else processes of `command`."""

    command: Sequence[str]
    """The path that the worker is for is appended."""
    warm: Warm | None = None
    say: Callable[[str], None]
    """Prints a line."""

    @property
    def importing(self) -> bool:
        """Whether the next worker should wait for the parent's imports."""
        return self.warm is not None and self.warm.importing

    def start(
        self, path: Path, *, log: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes] | Forked:
        """Start a worker on `path`; its output is appended to `log`."""
        with shared.open_file(log, "ab") as file:
            if self.warm is not None:
                try:
                    return self.warm.fork(path, log=log, environment=environment)
                except CannotFork as error:
                    self.warm = None
                    self.say(f"workers start one by one from here: no warm one ({error})")
            return subprocess.Popen(
                [*self.command, str(path.absolute())],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # the launcher passes the terminal's Ctrl-C on
            )


# the parent's side ------------------------------------------------------------------------------
def serve(requests: int, answers: int) -> dict[str, Any] | None:
    """Fork a child per request: returns the request in the child, None when no more can come."""
    children: set[int] = set()
    unfinished = b""
    _answer(answers, ready=True)
    while True:
        waiting = select.select([requests], [], [], REAP_S if children else None)[0]
        _reap(children, answers)
        if not waiting:
            continue
        chunk = os.read(requests, 65536)
        if not chunk:
            return None
        *lines, unfinished = (unfinished + chunk).split(b"\n")
        for line in lines:
            if reason := _unsafe():
                _answer(answers, error=reason)
                continue
            try:
                pid = os.fork()
            except OSError as error:
                _answer(answers, error=f"fork: {error.strerror}")
                continue
            if pid == 0:
                os.close(requests)
                os.close(answers)
                return json.loads(line)
            children.add(pid)
            _answer(answers, pid=pid)


def _answer(answers: int, **answer: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the launcher is dead, so requests end, too
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _reap(children: set[int], answers: int) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            children.remove(pid)
            _answer(answers, pid=pid, code=os.waitstatus_to_exitcode(status))


def _end_threads() -> None:
    """End the threads that OpenBLAS started when it was loaded, by a fork.

    OpenBLAS ends them before any fork, and starts them again at a process's first matrix product.
    """
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _unsafe() -> str | None:
    """What makes forking unsafe (other threads, an open GPU); None if nothing does."""
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        return f"it has {threads} threads after its imports"
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if (file := os.readlink(f"/proc/self/fd/{number}")).startswith(GPU_FILES):
                return f"its imports have opened {file}"
    return None


def _become(request: dict[str, Any]) -> None:
    """Make this fork a worker like one that the launcher has started."""
    os.setsid()
    with open(request["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.pop("JE_ARROW_MALLOC_CONF", None)
    os.environ.update(request["env"])


def main(argv: list[str]) -> int:
    """`MODULE`: import it and its PRELOAD, then run its `main([RUN_DIR])` in each fork."""
    requests, answers = os.dup(0), os.dup(1)  # what is printed must not end up among the answers
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    module = importlib.import_module(argv[0])
    for name in getattr(module, "PRELOAD", ()):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else a child's garbage collection would copy the shared pages
    _end_threads()
    request = serve(requests, answers)
    if request is None:
        return 0
    _become(request)
    return module.main([request["run_dir"]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
