"""Worker processes of this machine: started in slots, watched, stopped.

Not for: what they work on (`pool.py`, and `processes.py` of the search).
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from experiments.environment import ROOT
from sweeps.local import warm
from sweeps.local.slots import Slots
from sweeps.local.warm import Forked, Starter

T = TypeVar("T")
POLL_S = 0.2
GRACE_S = 60.0
"""When the sweep is stopped: from SIGTERM, on which a worker saves, to SIGKILL."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Workers:
    """How worker processes are started."""

    command: Sequence[str]
    """A path is appended."""
    parent: Sequence[str] | None = None
    """The command of a warm parent of such workers."""
    code: Path = ROOT
    """What they import the project from: a frozen copy, so that later edits do not reach them."""


@dataclass(kw_only=True, slots=True)
class Processes(Generic[T]):
    """Worker processes, each working on one thing in a slot of its own."""

    starter: Starter
    slots: Slots
    running: dict[int, tuple[T, subprocess.Popen[bytes] | Forked]] = field(default_factory=dict)
    """By slot."""

    @property
    def work(self) -> list[T]:
        """The things that are worked on."""
        return [thing for thing, _ in self.running.values()]

    @property
    def ready(self) -> bool:
        """Whether the next one can start: a slot is free, and the warm parent has imported."""
        return len(self.running) < self.slots.parallel and not self.starter.importing

    def start(self, thing: T, path: Path, *, log: Path) -> None:
        """Start a process on `path` in the first free slot; its output is appended to `log`."""
        slot = min(set(range(self.slots.parallel)) - self.running.keys())
        environment = self.slots.environment(slot)
        process = self.starter.start(path, log=log, environment=environment)
        self.running[slot] = (thing, process)

    def reap(self) -> list[tuple[T, int]]:
        """The things whose processes have ended, and the exit codes."""
        ended = []
        for slot, (thing, process) in list(self.running.items()):
            if (code := process.poll()) is not None:
                del self.running[slot]
                ended.append((thing, code))
        return ended

    def stop(self) -> list[tuple[T, int]]:
        """Ask all to save and end, kill those that do not; their things, and the exit codes."""
        for _, process in self.running.values():
            process.terminate()
        deadline = time.monotonic() + GRACE_S
        for _, process in self.running.values():
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        ended = [(thing, process.wait()) for thing, process in self.running.values()]
        self.running.clear()
        return ended


@contextlib.contextmanager
def open_processes(
    workers: Workers, *, slots: Slots, runs: int, say: Callable[[str], None]
) -> Iterator[Processes[Any]]:
    """Processes, none started yet; a warm parent begins to import if that is safe and worth it."""
    with contextlib.ExitStack() as stack:
        forks = None
        if workers.parent is not None and runs > 1 and warm.available():
            forks = stack.enter_context(
                warm.open_parent(workers.parent, environment=slots.shared())
            )
        yield Processes(starter=Starter(command=workers.command, warm=forks, say=say), slots=slots)
