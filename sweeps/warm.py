"""Workers that need not import torch: a parent that has, and a fork of it for each run.

    python -P -m sweeps.warm sweeps.worker

The parent imports what a run needs and computes nothing. Each run is a process and a session of
its own as if it were started anew: what it has from the parent are the modules. A line of JSON per
request on stdin (run_dir, log, env), a line per answer on stdout (ready, pid, code, error). At the
end of its stdin the parent goes and leaves its children be. Not for: what a worker does
(`worker.py`, `search/run.py`), nor which run is next (`local.py`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from relora_core import shared

PARENT = (sys.executable, "-P", "-m", "sweeps.warm")
"""The command that the module of its workers is appended to."""
COMMAND = (*PARENT, "sweeps.worker")
QUIET = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Environment in which importing starts no thread that outlives `_rested`."""
UNKNOWN = 255
"""Exit code of a worker whose parent died before it: nobody can know."""
GPU_FILES = ("/dev/nvidia", "/dev/kfd", "/dev/dri")
FORK_S = 30.0
"""Longest wait for a fork."""
REAP_S = 0.05


class WarmGone(Exception):
    """The parent cannot fork; one line why."""


def available() -> bool:
    """Elsewhere forking a process that has loaded torch is not safe."""
    return sys.platform == "linux"


# the launcher's side ----------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Forked:
    """A worker that the parent has forked, with what the launcher uses of a Popen."""

    parent: Warm
    process: psutil.Process | None
    """None where it was gone before one could look."""
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            gone = not self.parent.listen()
            self.returncode = self.parent.codes.pop(self.pid, None)
            if self.returncode is None and gone and not self._alive():
                self.returncode = UNKNOWN
        return self.returncode

    def _alive(self) -> bool:
        """Zombies, which nobody may be there to reap, are not."""
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
        if self.poll() is None and self.process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.process.terminate()

    def kill(self) -> None:
        if self.poll() is None and self.process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.process.kill()


@dataclass(kw_only=True, slots=True)
class Warm:
    """The parent, as its launcher sees it."""

    process: subprocess.Popen[bytes]
    environment: Mapping[str, str]
    codes: dict[int, int] = field(default_factory=dict)
    """pid -> exit code of children that have ended."""
    _told: list[dict[str, Any]] = field(default_factory=list)
    _ready: bool = False
    _torn: bytes = b""
    _open: bool = True

    @property
    def importing(self) -> bool:
        """Not ready yet, and alive."""
        return self.listen() and not self._ready

    def fork(self, run_dir: Path, *, log: Path, environment: Mapping[str, str]) -> Forked:
        """A worker at `run_dir`, its output going to `log`; WarmGone where the parent cannot."""
        changes = {k: v for k, v in environment.items() if self.environment.get(k) != v}
        request = {"run_dir": str(run_dir.absolute()), "log": str(log.absolute()), "env": changes}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise self._gone() from None
        deadline = time.monotonic() + FORK_S
        while not self._told:
            if not self.listen(timeout_s=REAP_S) or time.monotonic() > deadline:
                raise self._gone()
        answer = self._told.pop(0)
        if "error" in answer:
            raise WarmGone(answer["error"])
        with contextlib.suppress(psutil.NoSuchProcess):
            return Forked(parent=self, pid=answer["pid"], process=psutil.Process(answer["pid"]))
        return Forked(parent=self, pid=answer["pid"], process=None)

    def listen(self, *, timeout_s: float = 0.0) -> bool:
        """Take in what the parent says; whether it can say more."""
        assert self.process.stdout is not None
        out = self.process.stdout.fileno()
        while self._open and select.select([out], [], [], timeout_s)[0]:
            chunk = os.read(out, 65536)
            self._open = bool(chunk)
            *lines, self._torn = (self._torn + chunk).split(b"\n")
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
            self._told.append(answer)

    def _gone(self) -> WarmGone:
        """After which it forks no worker: one that nobody knows of would take the run."""
        self.process.kill()
        code = self.process.wait()
        return WarmGone(f"it ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}")

    def close(self) -> None:
        """Its children go on."""
        assert self.process.stdin is not None
        if self.importing:  # it has none, and would not hear before it is done
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
def opened(command: Sequence[str], *, environment: Mapping[str, str]) -> Iterator[Warm]:
    """A parent that begins to import; closed at the end."""
    environment = {**environment, **QUIET}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what does not import tells so in the log of a run
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
    """Starts workers: forks of the warm parent while it can, else processes of `command`."""

    command: Sequence[str]
    """PATH is appended."""
    warm: Warm | None = None
    say: Callable[[str], None]
    """Is told, in a line, that there is no warm parent any more."""

    @property
    def importing(self) -> bool:
        """Whether a moment's wait saves the next worker its imports."""
        return self.warm is not None and self.warm.importing

    def start(
        self, path: Path, *, log: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes] | Forked:
        """A worker over `path` whose output goes to the end of `log`."""
        with shared.opened(log, "ab") as file:
            if self.warm is not None:
                try:
                    return self.warm.fork(path, log=log, environment=environment)
                except WarmGone as error:
                    self.warm = None
                    self.say(f"workers start one by one from here: no warm one ({error})")
            return subprocess.Popen(
                [*self.command, str(path.absolute())],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # the terminal's Ctrl-C is the launcher's to pass on
            )


# the parent's side ------------------------------------------------------------------------------
def serve(requests: int, answers: int) -> dict[str, Any] | None:
    """Fork a child per request: returns the request in the child, None when no more can come."""
    children: set[int] = set()
    torn = b""
    _tell(answers, ready=True)
    while True:
        heard = select.select([requests], [], [], REAP_S if children else None)[0]
        _reap(children, answers)
        if not heard:
            continue
        chunk = os.read(requests, 65536)
        if not chunk:
            return None
        *lines, torn = (torn + chunk).split(b"\n")
        for line in lines:
            if odd := _unsafe():
                _tell(answers, error=odd)
                continue
            try:
                pid = os.fork()
            except OSError as error:
                _tell(answers, error=f"fork: {error.strerror}")
                continue
            if pid == 0:
                os.close(requests)
                os.close(answers)
                return json.loads(line)
            children.add(pid)
            _tell(answers, pid=pid)


def _tell(answers: int, **answer: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the end of the requests says the same
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _reap(children: set[int], answers: int) -> None:
    for pid in list(children):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            children.remove(pid)
            _tell(answers, pid=pid, code=os.waitstatus_to_exitcode(status))


def _rested() -> None:
    """OpenBLAS has had threads since it was loaded: its own handler of forks ends them, and each
    process starts them again with its first product."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _unsafe() -> str | None:
    """A fork copies the calling thread alone, and no GPU's driver: what it would leave behind."""
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        return f"it has {threads} threads after its imports"
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if (file := os.readlink(f"/proc/self/fd/{number}")).startswith(GPU_FILES):
                return f"its imports have opened {file}"
    return None


def _become(request: dict[str, Any]) -> None:
    """A worker as the launcher would have started it."""
    os.setsid()
    with open(request["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.pop("JE_ARROW_MALLOC_CONF", None)
    os.environ.update(request["env"])


def main(argv: list[str]) -> int:
    """`MODULE`, whose PRELOAD is imported and whose `main([RUN_DIR])` is each run."""
    requests, answers = os.dup(0), os.dup(1)  # what is printed must not end up among the answers
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    module = importlib.import_module(argv[0])
    for name in getattr(module, "PRELOAD", ()):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no collection of a child touches, and so copies, what is shared
    _rested()
    request = serve(requests, answers)
    if request is None:
        return 0
    _become(request)
    return module.main([request["run_dir"]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
